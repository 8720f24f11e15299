"""What a sound file holds beside its samples, and what becomes of it: chunks of WAV, metadata blocks of FLAC.

From WAV to WAV and from FLAC to FLAC everything is carried over as it is; between the two the usual texts (title, artist, …) are
converted. The containers are read here, as libsndfile knows a few texts only.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ebr_engine.media.holdings.types import Fate, FateTable, Holding, Outcome

SOUND_FORMATS = ("wav", "flac")
_OURS = {b"fmt ", b"data", b"fact", b"PEAK", b"ds64", b"JUNK", b"PAD ", b"FLLR", b"junk"}  # the samples' own, or nothing
TEXTS = {  # of a WAV's list of texts, and of Vorbis comments
    "INAM": "TITLE",
    "IART": "ARTIST",
    "IPRD": "ALBUM",
    "ICRD": "DATE",
    "IGNR": "GENRE",
    "ITRK": "TRACKNUMBER",
    "ICMT": "COMMENT",
    "ICOP": "COPYRIGHT",
    "ISFT": "SOFTWARE",
}
NAMES = {vorbis: riff for riff, vorbis in TEXTS.items()}
_CHUNKS = {b"bext": "broadcast information", b"cue ": "cue points", b"smpl": "loops", b"iXML": "iXML", b"id3 ": "ID3 tags"}
STREAMINFO, PADDING, APPLICATION, SEEKTABLE, COMMENTS, CUESHEET, PICTURE = range(7)
_BLOCKS = {APPLICATION: "application data of FLAC", CUESHEET: "cue sheet", PICTURE: "cover picture"}
LARGEST = 2**32 - 1  # bytes of a RIFF file

_BOTH = {"wav": (Fate.KEPT, ""), "flac": (Fate.KEPT, "")}
_ONLY_WAV = {"wav": (Fate.KEPT, ""), "flac": (Fate.NOT_KEPT, "only WAV holds it")}
_ONLY_FLAC = {"wav": (Fate.NOT_KEPT, "only FLAC holds it"), "flac": (Fate.KEPT, "")}
SOUND_FATES: FateTable = {
    "text": _BOTH,
    "other text": _ONLY_FLAC,
    "other WAV text": _ONLY_WAV,
    **dict.fromkeys((*_CHUNKS.values(), "chunk of WAV"), _ONLY_WAV),
    **dict.fromkeys(_BLOCKS.values(), _ONLY_FLAC),
}


def sound_kind(head: bytes) -> str | None:
    """The format of a sound file by its first 12 bytes, "wav" or "flac"; None for what is none of them."""
    if head.startswith(b"fLaC"):
        return "flac"
    return "wav" if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE" else None


def sound_inventory(path: Path) -> list[Holding] | None:
    """All that a WAV or FLAC file holds beside its samples, from its container alone; None for what is no such file.

    OSError where it cannot be read.
    """
    with path.open("rb") as file:
        if (kind := sound_kind(file.read(12))) is None:
            return None
        return _held(*_parts(file, kind))


def sound_outcomes(source: Path, suffix: str) -> list[Outcome]:
    """What becomes of all that a sound file holds beside its samples, in a file with `suffix` (.wav or .flac)."""
    format = suffix[1:]
    with source.open("rb") as file:
        parts, from_flac = _parts(file, sound_kind(file.read(12)))
    results = [Outcome(one, *SOUND_FATES[one.kind][format]) for one in _held(parts, from_flac)]
    if from_flac == (format == "flac"):
        return results
    made = Fate.CONVERTED, "to the format's own"
    return [Outcome(one.holding, *made) if one.holding.kind == "text" else one for one in results]


def carry_over(source: Path, target: Path, suffix: str) -> None:
    """Add to `target`, a file of `suffix` that has just been written, what `source` holds beside its samples."""
    with source.open("rb") as file:
        parts, from_flac = _parts(file, sound_kind(file.read(12)))
    if suffix == ".flac":
        _add_blocks(target, parts if from_flac else _as_comments(texts_of(parts)))
    else:
        _add_chunks(target, _as_list(comments_of(parts)) if from_flac else parts)


def texts_of(chunks: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """The texts of a WAV's list by name (INAM …)."""
    return {name: value for chunk, body in chunks for name, value in _listed(chunk, body)}


def comments_of(blocks: list[tuple[int, bytes]]) -> list[tuple[str, str]]:
    """The Vorbis comments of a FLAC file, (name in capitals, text), in order."""
    return [each for kind, body in blocks if kind == COMMENTS for each in _vorbis(body)]


def _parts(file: BinaryIO, kind: str | None) -> tuple[list[tuple], bool]:
    """The chunks of a WAV file, or the blocks of a FLAC file and that it is one."""
    return (list(_blocks(file)), True) if kind == "flac" else (list(_chunks(file)), False)


def _held(parts: list[tuple], from_flac: bool) -> list[Holding]:
    return [one for kind, body in parts for one in (_of_block if from_flac else _of_chunk)(kind, body)]


def _of_chunk(name: bytes, body: bytes) -> list[Holding]:
    shown = name.decode("latin-1")
    if texts := list(_listed(name, body)):
        kinds = ("text" if key in TEXTS else "other WAV text" for key, _ in texts)
        return [Holding(kind, f"LIST {key}", value[:60], len(value)) for kind, (key, value) in zip(kinds, texts)]
    return [Holding(_CHUNKS.get(name, "chunk of WAV"), shown.strip(), "" if name in _CHUNKS else shown.strip(), len(body))]


def _of_block(kind: int, body: bytes) -> list[Holding]:
    if kind == COMMENTS:
        return [
            Holding("text" if name in NAMES else "other text", "VORBIS_COMMENT", f"{name}={text[:60]}", len(text))
            for name, text in _vorbis(body)
        ]
    return [Holding(_BLOCKS.get(kind, "application data of FLAC"), f"block {kind}", "", len(body))]


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of every chunk of a WAV file that is not its samples'; damaged ends are left out."""
    size = file.seek(0, 2)
    place, large = 12, None  # bytes of the samples, where RF64 has them elsewhere
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"ds64":
            large = struct.unpack("<QQ", file.read(16))[1] if length >= 16 else None
        elif name == b"data" and length == LARGEST and large is not None:
            length = large
        if name not in _OURS and place + 8 + length <= size:
            yield name, file.read(length)
        place += 8 + length + length % 2


def _listed(name: bytes, body: bytes) -> Iterator[tuple[str, str]]:
    """The texts of a `LIST` chunk of the kind INFO."""
    if name != b"LIST" or body[:4] != b"INFO":
        return
    place = 4
    while place + 8 <= len(body):
        key, length = struct.unpack_from("<4sI", body, place)
        yield key.decode("latin-1"), _text(body[place + 8 : place + 8 + length].split(b"\0")[0])
        place += 8 + length + length % 2


def _text(data: bytes) -> str:
    """The words of a field that does not say its encoding."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _blocks(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Kind and content of a FLAC file's metadata, but for what belongs to its samples and padding."""
    file.seek(4)
    last = False
    while not last and len(head := file.read(4)) == 4:
        last, kind, length = bool(head[0] & 0x80), head[0] & 0x7F, int.from_bytes(head[1:], "big")
        body = file.read(length)
        if kind not in (STREAMINFO, PADDING, SEEKTABLE) and len(body) == length:
            yield kind, body


def _vorbis(body: bytes) -> Iterator[tuple[str, str]]:
    """The comments of a block; a damaged one ends where it stops making sense."""
    place = 4 + int.from_bytes(body[:4], "little")
    count = int.from_bytes(body[place : place + 4], "little")
    place += 4
    for _ in range(count):
        length = int.from_bytes(body[place : place + 4], "little")
        line = body[place + 4 : place + 4 + length]
        if len(line) < length or place + 4 > len(body):
            return
        name, _, text = line.decode("utf-8", "replace").partition("=")
        yield name.upper(), text
        place += 4 + length


def _as_comments(texts: dict[str, str]) -> list[tuple[int, bytes]]:
    lines = [f"{TEXTS[name]}={text}".encode() for name, text in texts.items() if name in TEXTS and text]
    if not lines:
        return []
    packed = b"".join(struct.pack("<I", len(line)) + line for line in lines)
    return [(COMMENTS, struct.pack("<I", 10) + b"ebr-engine" + struct.pack("<I", len(lines)) + packed)]


def _as_list(comments: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    joined: dict[str, str] = {}
    for name, text in comments:
        if name in NAMES:
            joined[name] = f"{joined[name]}; {text}" if name in joined else text
    body = b"INFO"
    for name, text in joined.items():
        data = text.encode() + b"\0"
        body += struct.pack("<4sI", NAMES[name].encode(), len(data)) + data + b"\0" * (len(data) % 2)
    return [(b"LIST", body)] if joined else []


def _add_chunks(path: Path, chunks: list[tuple[bytes, bytes]]) -> None:
    """Put chunks behind the samples of a WAV file, which tells its new length; in RF64 that is a number of its own."""
    if not chunks:
        return
    with path.open("r+b") as file:
        form = file.read(4)
        end = file.seek(0, 2)
        file.write(b"\0" * (end % 2))
        for name, body in chunks:
            file.write(struct.pack("<4sI", name, len(body)) + body + b"\0" * (len(body) % 2))
        length = file.tell() - 8
        if form == b"RF64":  # ds64 is its first chunk
            file.seek(20)
            file.write(struct.pack("<Q", length))
        else:
            file.seek(4)
            file.write(struct.pack("<I", min(length, LARGEST)))


def _add_blocks(path: Path, blocks: list[tuple[int, bytes]]) -> None:
    """Put metadata blocks behind the first one of a FLAC file, in place of the comments that its writer made."""
    if not blocks:
        return
    part = path.with_name(f"{path.name}.tags")
    with path.open("rb") as source, part.open("wb") as target:
        source.seek(4)
        kept, last = [], False
        while not last:
            head = source.read(4)
            last, kind, length = bool(head[0] & 0x80), head[0] & 0x7F, int.from_bytes(head[1:], "big")
            body = source.read(length)
            if kind in (STREAMINFO, SEEKTABLE):
                kept.append((kind, body))
        written = [*kept, *blocks]
        target.write(b"fLaC")
        for i, (kind, body) in enumerate(written):
            target.write(bytes([kind | 0x80 * (i == len(written) - 1)]) + len(body).to_bytes(3, "big") + body)
        while block := source.read(2**20):
            target.write(block)
    part.replace(path)
