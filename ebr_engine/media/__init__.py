"""Files, clips, tiles and degradations as arrays; knows no model."""

PICTURES, SOUND = "pictures", "sound"  # what a backbone restores: pictures and clips of them, or sound
