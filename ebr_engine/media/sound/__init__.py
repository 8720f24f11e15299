"""Sound files as samples, and what can be wrong with sound; knows no model."""

SUFFIXES = (".wav", ".flac")  # of the files that are read and written
