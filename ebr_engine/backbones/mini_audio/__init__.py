"""`mini-audio`, the small backbone for sound that comes with the package."""
