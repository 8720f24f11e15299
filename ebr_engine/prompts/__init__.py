"""Prompts: their files, how several mix, and which tasks there are."""
