"""Small clips made on the spot."""

from fractions import Fraction

import numpy as np
import pytest

SRT = "1\n00:00:00,100 --> 00:00:00,400\nfirst line\n\n2\n00:00:00,600 --> 00:00:01,000\nsecond line\n"


def moving_picture(index, height=48, width=64):
    """[H, W, 3] uint8: a coloured ramp with a bright square that moves by two pixels a frame."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([x * 200 / width + 30, y * 200 / height + 30, np.full_like(x, 90)], axis=-1)
    left = 4 + 2 * index % (width - 16)
    picture[height // 3 : height // 3 + 8, left : left + 8] = 230
    return picture.astype(np.uint8)


@pytest.fixture
def make_clip(tmp_path):
    """make(name, ...) writes a clip and gives its path; `pictures` are [H, W, 3] uint8 or ready av.VideoFrames."""
    av = pytest.importorskip("av")

    def make(
        name="clip.mp4",
        frames=12,
        *,
        pictures=None,
        size=(48, 64),
        rate=12,
        codec="libx264",
        pix_fmt="yuv420p",
        options=None,
        ticks=None,
        time_base=None,
        audio=None,
        subtitles=False,
        chapters=(),
        tags=None,
        language=None,
        context=None,
        rotate=None,
        attachment=False,
        container_options=None,
    ):
        path = tmp_path / name
        pictures = [moving_picture(i, *size) for i in range(frames)] if pictures is None else pictures
        first = pictures[0]
        height, width = first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
        with av.open(str(path), "w", container_options=container_options or {}) as output:
            output.metadata.update(tags or {})
            stream = output.add_stream(codec, rate=rate, options=options or {"crf": "10"} if "26" in codec else options)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            base = time_base or Fraction(1, 12288)
            stream.time_base = stream.codec_context.time_base = base
            for key, value in (context or {}).items():
                setattr(stream.codec_context, key, value)
            if language:
                stream.metadata["language"] = language
            if rotate is not None:
                stream.set_display_rotation(*rotate)
            others = []
            if audio:
                sound = output.add_stream(audio, rate=48000, layout="mono")
                sound.metadata["language"] = "deu"
                others.append(_sound(av, sound, Fraction(len(pictures), rate)))
            if subtitles:
                (tmp_path / "lines.srt").write_text(SRT)
                lines = av.open(str(tmp_path / "lines.srt"))
                target = output.add_stream_from_template(lines.streams.subtitles[0])
                others.append(_moved(lines.demux(), target))
            if attachment:
                output.add_attachment("font.ttf", "font/ttf", b"letters")
            output.set_chapters(
                [
                    {"id": i, "start": start, "end": end, "time_base": Fraction(1, 1000), "metadata": {"title": title}}
                    for i, (start, end, title) in enumerate(chapters)
                ]
            )
            for packets in others:
                for packet in packets:
                    output.mux(packet)
            step = round(1 / (Fraction(rate) * base))
            for index, picture in enumerate(pictures):
                frame = picture if not isinstance(picture, np.ndarray) else av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts, frame.time_base = ticks[index] if ticks else index * step, base
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return path

    return make


def _sound(av, stream, seconds):
    samples = int(48000 * seconds)
    tone = (0.2 * np.sin(np.arange(samples) * 0.05)).astype(np.float32)
    for start in range(0, samples, 1024):
        frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _moved(packets, target):
    for packet in packets:
        if packet.dts is not None:
            packet.stream = target
            yield packet
