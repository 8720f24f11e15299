"""Sound files: what is not changed is written as it was, and all that they hold beside their samples is kept or told."""

import struct

import numpy as np
import pytest
import soundfile

from ebr_engine.media.decoding import MediaError
from ebr_engine.media.holdings import Fate, inventory
from ebr_engine.media.holdings.sound import sound_outcomes
from ebr_engine.media.kinds import is_sound, reason_to_leave, written_name
from ebr_engine.media.sound.files import SoundReader, SoundWriter

RATE = 8000


def samples(length=1001, channels=2):
    return np.random.default_rng(0).uniform(-1, 1, (length, channels))


def write(path, subtype="PCM_16", length=1001, channels=2, rate=RATE):
    soundfile.write(path, samples(length, channels), rate, subtype=subtype)
    return path


def copied(source, target):
    reader = SoundReader(source)
    with SoundWriter(target, reader) as writer:
        for block in reader.blocks():
            writer.write(block)
    return writer


def add_chunk(path, name, body):
    content = path.read_bytes() + struct.pack("<4sI", name, len(body)) + body + b"\0" * (len(body) % 2)
    path.write_bytes(content[:4] + struct.pack("<I", len(content) - 8) + content[8:])


def chunk(path, name):
    """The content of a chunk of a WAV file, found by walking over it as any reader does."""
    content, place = path.read_bytes(), 12
    assert struct.unpack_from("<I", content, 4)[0] == len(content) - 8
    while place < len(content):
        found, length = struct.unpack_from("<4sI", content, place)
        if found == name:
            return content[place + 8 : place + 8 + length]
        place += 8 + length + length % 2
    return None


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wav_is_written_as_it_was(tmp_path, subtype):
    source, target = write(tmp_path / "a.wav", subtype), tmp_path / "b.wav"
    assert not copied(source, target).note
    before, after = soundfile.info(source), soundfile.info(target)
    assert (after.samplerate, after.channels, after.frames, after.subtype) == (RATE, 2, 1001, subtype)
    kind = "float64" if subtype in ("FLOAT", "DOUBLE") else "int32"
    assert np.array_equal(soundfile.read(source, dtype=kind)[0], soundfile.read(target, dtype=kind)[0])
    assert before.format == after.format


@pytest.mark.parametrize(
    ("subtype", "after"), [("PCM_16", "PCM_16"), ("PCM_24", "PCM_24"), ("FLOAT", "PCM_24"), ("PCM_32", "PCM_24")]
)
def test_flac_has_the_depth_or_says_so(tmp_path, subtype, after):
    source = write(tmp_path / "a.wav", subtype, channels=1)
    writer = copied(source, tmp_path / "b.flac")
    assert soundfile.info(tmp_path / "b.flac").subtype == after
    assert bool(writer.note) == (subtype != after)
    error = np.abs(soundfile.read(source)[0] - soundfile.read(tmp_path / "b.flac")[0]).max()
    assert error <= (0 if subtype == after else 2**-24)


def test_what_leaves_the_range_is_cut_off_in_integers_and_kept_in_floats(tmp_path):
    for subtype, most in (("PCM_16", 32767 / 32768), ("FLOAT", 1.5)):
        reader = SoundReader(write(tmp_path / f"{subtype}.wav", subtype, channels=1))
        with SoundWriter(tmp_path / "out.wav", reader) as writer:
            writer.write(np.array([[1.5], [-0.5]]))
        assert soundfile.read(tmp_path / "out.wav")[0].tolist() == [most, -0.5]


def test_texts_and_chunks_of_wav_are_kept_in_wav(tmp_path):
    source, target = write(tmp_path / "a.wav"), tmp_path / "b.wav"
    body = b"INFO" + struct.pack("<4sI", b"INAM", 6) + b"Title\0" + struct.pack("<4sI", b"IXYZ", 3) + b"odd\0"
    add_chunk(source, b"LIST", body)
    add_chunk(source, b"bext", b"B" * 602)
    add_chunk(source, b"abcd", b"123")
    writer = copied(source, target)
    assert chunk(target, b"LIST") == body
    assert chunk(target, b"bext") == b"B" * 602
    assert chunk(target, b"abcd") == b"123"
    assert {one.fate for one in writer.outcomes} == {Fate.KEPT}
    assert [each.kind for each in inventory(target)] == ["text", "other WAV text", "broadcast information", "chunk of WAV"]
    assert np.array_equal(soundfile.read(source, dtype="int16")[0], soundfile.read(target, dtype="int16")[0])


def tagged_flac(path):
    """A FLAC file with comments that libsndfile does not know, and a picture."""
    write(path)
    lines = [b"TITLE=Lied", b"MOOD=glad", "ARTIST=Jürg".encode()]
    comments = (
        struct.pack("<I", 1) + b"x" + struct.pack("<I", len(lines)) + b"".join(struct.pack("<I", len(x)) + x for x in lines)
    )
    picture = struct.pack(">II9sI5I4s", 3, 9, b"image/png", 0, 1, 1, 24, 0, 4, b"data")
    content, place, last = path.read_bytes(), 4, False
    while not last:  # over the blocks that the library has written
        last = bool(content[place] & 0x80)
        place += 4 + int.from_bytes(content[place + 1 : place + 4], "big")
    blocks = bytes([4]) + len(comments).to_bytes(3, "big") + comments + bytes([0x86]) + len(picture).to_bytes(3, "big") + picture
    path.write_bytes(content[:4] + bytes([0]) + content[5:42] + blocks + content[place:])
    return path


def test_comments_and_pictures_of_flac_are_kept_in_flac(tmp_path):
    source = tagged_flac(tmp_path / "a.flac")
    copied(source, tmp_path / "b.flac")
    held = [(one.kind, one.detail) for one in inventory(tmp_path / "b.flac")]
    assert ("text", "TITLE=Lied") in held
    assert ("other text", "MOOD=glad") in held
    assert "cover picture" in dict(held)
    assert np.array_equal(soundfile.read(source)[0], soundfile.read(tmp_path / "b.flac")[0])
    with soundfile.SoundFile(tmp_path / "b.flac") as file:
        assert (file.title, file.artist) == ("Lied", "Jürg")


def test_texts_change_between_the_formats_and_the_rest_is_told(tmp_path):
    source = tagged_flac(tmp_path / "a.flac")
    writer = copied(source, tmp_path / "b.wav")
    with soundfile.SoundFile(tmp_path / "b.wav") as file:
        assert (file.title, file.artist) == ("Lied", "Jürg")
    fates = {one.holding.detail or one.holding.kind: one.fate for one in writer.outcomes}
    assert (fates["TITLE=Lied"], fates["MOOD=glad"], fates["cover picture"]) == (Fate.CONVERTED, Fate.NOT_KEPT, Fate.NOT_KEPT)
    copied(tmp_path / "b.wav", tmp_path / "c.flac")
    with soundfile.SoundFile(tmp_path / "c.flac") as file:
        assert (file.title, file.artist) == ("Lied", "Jürg")


def test_strict_writes_nothing_where_something_would_be_lost(tmp_path):
    source = tagged_flac(tmp_path / "a.flac")
    with pytest.raises(MediaError, match="not everything can be kept"):
        SoundWriter(tmp_path / "b.wav", SoundReader(source), strict=True)
    assert not list(tmp_path.glob("*b.wav*"))


def test_a_failure_leaves_nothing_behind(tmp_path):
    reader = SoundReader(write(tmp_path / "a.wav"))

    def fails():
        with SoundWriter(tmp_path / "b.wav", reader) as writer:
            writer.write(samples(10))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.wav", b"RIFF\0\0\0\0WAVE", "cannot be read as sound"),
        ("b.wav", b"hello, this is a text", "cannot be read as sound"),
        ("c.flac", b"fLaC\0\0\0", "cannot be read as sound"),
    ],
)
def test_what_is_no_sound_is_told_in_a_line(tmp_path, one_line, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=words) as error:
        SoundReader(tmp_path / name)
    one_line(error, [name])


def test_empty_and_not_finite_files_are_told(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 1)), RATE)
    with pytest.raises(MediaError, match="holds no samples"):
        SoundReader(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), RATE, subtype="FLOAT")
    with pytest.raises(MediaError, match="not finite"):
        list(SoundReader(tmp_path / "nan.wav").blocks())


def test_a_file_is_what_its_content_says(tmp_path):
    assert is_sound(write(tmp_path / "a.wav"))
    other = (tmp_path / "a.wav").rename(tmp_path / "recording")
    assert is_sound(other)
    assert written_name(other, other.relative_to(tmp_path)).name == "recording.wav"
    (tmp_path / "c.wav").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    assert not is_sound(tmp_path / "c.wav")
    assert reason_to_leave(tmp_path / "song.mp3", "sound") == "of sound, WAV and FLAC are restored"
    assert reason_to_leave(other, "sound") is None
    assert reason_to_leave(other) == ""


def test_what_becomes_of_a_file_without_more_is_nothing(tmp_path):
    assert sound_outcomes(write(tmp_path / "a.wav"), ".flac") == []
