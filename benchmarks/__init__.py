"""Measurements: where time goes, and how fast things are."""
