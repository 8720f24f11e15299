"""AV1's units (OBUs) in a packet, and its sequence header as far as its colours."""

from collections.abc import Iterator
from typing import NamedTuple


class Unit(NamedTuple):
    """A unit in bytes: its type, where it begins, where its content begins, and how long that says it is."""

    kind: int
    start: int
    body: int
    size: int


def units(packet: bytes) -> Iterator[Unit]:
    """The units of a packet, whose lengths are read without trust; one that says none, as the last one may, goes up to the end.

    Source: AV1 Bitstream & Decoding Process Specification, 4.10.5 and 5.3.
    """
    start = 0
    while start < len(packet):
        has_size, body = packet[start] & 2, start + 1 + (packet[start] >> 2 & 1)
        size, shift = 0 if has_size else max(0, len(packet) - body), 0
        while has_size and body < len(packet):
            byte = packet[body]
            size |= (byte & 127) << shift
            body, shift = body + 1, shift + 7
            if byte < 128:
                break
        yield Unit(packet[start] >> 3 & 15, start, body, size)
        start = body + size


def colours_at(data: bytes) -> int | None:
    """Where AV1's sequence header has its primaries, in bits; None where it has none, or is no still picture's."""
    header = next((unit for unit in units(data) if unit.kind == 1), None)
    return None if header is None else _Bits(data, header.body * 8).colours()


def colours(data: bytes) -> tuple[int, int, int] | None:
    """Primaries, transfer and matrix of a coded picture by H.273; None where its header does not say."""
    at = colours_at(data)
    if at is None or at + 24 > 8 * len(data):
        return None
    number = int.from_bytes(data, "big") >> (8 * len(data) - at - 24)
    return number >> 16 & 255, number >> 8 & 255, number & 255


class _Bits:
    """AV1's sequence header, bit by bit (section 5.5 of its specification)."""

    def __init__(self, data: bytes, at: int) -> None:
        self.number, self.length, self.at = int.from_bytes(data, "big"), 8 * len(data), at

    def take(self, count: int) -> int:
        self.at += count
        return self.number >> max(0, self.length - self.at) & ((1 << count) - 1)

    def colours(self) -> int | None:
        profile, _, reduced = self.take(3), self.take(1), self.take(1)
        if reduced:
            self.take(5)
        else:
            if self.take(1):  # timing, which no still picture has
                return None
            self.take(1)
            for _ in range(self.take(5) + 1):
                self.take(12)
                if self.take(5) > 7:
                    self.take(1)
        sizes = self.take(4) + 1, self.take(4) + 1
        for size in sizes:
            self.take(size)
        if not reduced and self.take(1):
            self.take(7)
        self.take(3)
        if not reduced:
            self._tools()
        self.take(3)
        deep = self.take(1)
        if profile == 2 and deep:
            self.take(1)
        if profile != 1:
            self.take(1)
        return self.at if self.take(1) else None

    def _tools(self) -> None:
        self.take(4)
        ordered = self.take(1)
        if ordered:
            self.take(2)
        screen = 2 if self.take(1) else self.take(1)
        if screen > 0 and not self.take(1):
            self.take(1)
        if ordered:
            self.take(3)
