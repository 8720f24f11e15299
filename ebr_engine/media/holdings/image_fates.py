"""What becomes of a picture's holdings, by output format."""

from ebr_engine.media.holdings.types import FateTable

IMAGE_FATES: FateTable = {}
