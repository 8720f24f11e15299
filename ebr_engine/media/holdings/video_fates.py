"""What becomes of a clip's holdings, by output format."""

from ebr_engine.media.holdings.types import FateTable

VIDEO_FATES: FateTable = {}
