"""The engine inside of other programs; each module imports its program's own when it is used."""
