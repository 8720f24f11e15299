"""What a video is, apart from its pixels; and a frame."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.picture import Picture
from ebr_engine.media.video.light import Light


@dataclass(frozen=True)
class Colour:
    """How the stored numbers mean colours: code points of ITU-T H.273, and the range."""

    primaries: int = 1
    transfer: int = 1
    matrix: int = 1  # never "unspecified": 0 for RGB, otherwise what it is read with
    full_range: bool = False


@dataclass(frozen=True)
class VideoInfo:
    """A video as its frames leave the reader: upright, from `start`, not more than `frames`."""

    width: int
    height: int
    fps: Fraction  # the mean where the rate varies
    time_base: Fraction  # seconds a tick of the frames' timestamps
    frames: int | None = None  # as the container counts them; None where it does not
    duration: float | None = None  # seconds
    bits: int = 8  # a channel
    pix_fmt: str = "gbrp"  # FFmpeg's name of the stored format
    codec: str = ""
    colour: Colour = Colour()
    pixel_aspect: Fraction = Fraction(1)  # a pixel's width by its height
    rotation: int = 0  # degrees clockwise that the pixels were turned by
    interlaced: bool = False
    variable_rate: bool = False  # judged by the header: the mean rate is not the smallest one that fits
    has_audio: bool = False
    has_subtitles: bool = False
    chapters: int = 0
    light: Light = field(default_factory=Light)
    profile: str = ""  # of the codec, in FFmpeg's words
    pictures: bool = True  # a folder of pictures or an animation, not a video; or nothing is known of it

    @property
    def alpha(self) -> bool:
        """Whether the stored format has transparency."""
        return self.pix_fmt.startswith(("yuva", "gbrap", "ya", "rgba", "bgra", "argb", "abgr", "ayuv", "vuya"))

    @property
    def expected_frames(self) -> int | None:
        """The number of frames, estimated from the duration where it is not known; for showing progress."""
        if self.frames is not None or self.duration is None:
            return self.frames
        return round(self.duration * self.fps)


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded picture and the time that it is shown at."""

    pixels: np.ndarray  # [H, W, 3] float32 RGB in [0, 1]
    pts: int  # ticks of `time_base` since the first moment that is read
    time_base: Fraction
    duration: int | None = None  # ticks
    name: str | None = None  # of the picture file that it comes from, without suffix
    alpha: np.ndarray | None = None  # [H, W] float32 in [0, 1]
    messages: Mapping[str, bytes] = field(default_factory=dict)  # that came with it in the stream: captions and others
    picture: Picture | None = None  # what else its file held, without its pixels

    @property
    def time(self) -> Fraction:
        """Seconds."""
        return self.pts * self.time_base


def pyav():
    """PyAV, or MediaError with the way to install it."""
    try:
        import av
    except ImportError as error:
        raise MediaError(f"PyAV could not be loaded ({error}); pip install av") from error
    return av
