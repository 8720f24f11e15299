"""Engines as files: our own format, and other runtimes'."""
