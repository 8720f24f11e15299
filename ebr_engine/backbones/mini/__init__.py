"""`mini`, the small backbone that comes with the package."""
