"""AV1's sequence header, as far as its colours."""


def colours_at(data: bytes) -> int | None:
    """Where AV1's sequence header has its primaries, in bits; None where it has none, or is no still picture's."""
    place = 0
    while place + 2 < len(data):
        kind, has_size = data[place] >> 3 & 15, data[place] & 2
        place += 1 + (data[place] >> 2 & 1)
        size, shift = 0, 0
        while has_size and place < len(data):
            size |= (data[place] & 0x7F) << shift
            shift += 7
            place += 1
            if not data[place - 1] & 0x80:
                break
        if kind == 1:
            return _Bits(data, place * 8).colours()
        place += size
    return None


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
