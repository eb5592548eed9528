"""Which parts of a node are dirty: one bit per granule, found and counted in C, never bit by bit in Python."""

from collections.abc import Iterable, Iterator

from bitarray import bitarray

from blockjobs.base.span import Span


class DirtyBitmap:
    """Bits over the bytes of a node; bit n stands for the granule at `n * granularity`.

    Spans that come in are widened to granules; spans that go out end at `length`, although the last granule may be
    longer. The bits are kept in qcow2's own order (least significant first), so that storing them is a copy.
    """

    def __init__(self, length: int, granularity: int) -> None:
        """Make a clean map.

        Args:
            length: bytes of the node; 0 is allowed.
            granularity: bytes per bit, a power of two.
        """
        assert length >= 0 and granularity > 0 and granularity & (granularity - 1) == 0, (length, granularity)
        self.length = length
        self.granularity = granularity
        self._bits = bitarray(-(-length // granularity), endian="little")
        self._bits.setall(0)

    def resize(self, length: int) -> None:
        """Cover `length` bytes from now on; what is new is clean."""
        granules = -(-length // self.granularity)
        self.length = length
        before = len(self._bits)
        if granules < before:
            del self._bits[granules:]
        else:
            self._bits.extend(bitarray(granules - before))
            self._bits[before:] = 0

    def set(self, span: Span) -> None:
        """Mark every granule that `span` touches."""
        first, stop = self._range(span)
        self._bits[first:stop] = 1

    def clear(self, span: Span) -> None:
        """Unmark every granule that `span` touches."""
        first, stop = self._range(span)
        self._bits[first:stop] = 0

    def set_all(self) -> None:
        """Mark everything."""
        self._bits.setall(1)

    def any(self, span: Span | None = None) -> bool:
        """Whether a granule of `span`, or of all, is marked."""
        if span is None:
            return bool(self._bits.any())
        first, stop = self._range(span)
        return self._bits.find(1, first, stop) >= 0

    def count_bytes(self) -> int:
        """Bytes in marked granules, the last one counted whole, as `BlockDirtyInfo.count` does."""
        return self._bits.count(1) * self.granularity

    def dirty_bytes(self, span: Span | None = None) -> int:
        """Bytes of the node that are marked, in all granules or those of `span`: the last one is cut at `length`."""
        first, stop = (0, len(self._bits)) if span is None else self._range(span)
        marked = self._bits.count(1, first, stop) * self.granularity
        excess = stop * self.granularity - self.length
        return marked - (excess if excess > 0 and self._bits[stop - 1] else 0)

    def next_run(self, at: int = 0, length_max: int | None = None, end: int | None = None) -> Span | None:
        """The first marked run at or after byte `at`.

        Args:
            at: where to look from; inside a marked granule the run starts at that granule's start.
            length_max: the run is cut to so many bytes, but never below one granule.
            end: look no further than this byte.
        """
        stop_at = self.length if end is None else min(end, self.length)
        if at >= stop_at:
            return None
        stop = -(-stop_at // self.granularity)
        first = self._bits.find(1, at // self.granularity, stop)
        if first < 0:
            return None
        if length_max is not None:
            stop = min(stop, first + max(1, length_max // self.granularity))
        clean = self._bits.find(0, first, stop)
        return self._span(first, stop if clean < 0 else clean)

    def set_all_of(self, spans: Iterable[Span]) -> None:
        """As `set` for each of `spans`, which must be inside the node and not empty."""
        self._set_all_of(spans, 1)

    def clear_all_of(self, spans: Iterable[Span]) -> None:
        """As `clear` for each of `spans`, which must be inside the node and not empty."""
        self._set_all_of(spans, 0)

    def _set_all_of(self, spans: Iterable[Span], bit: int) -> None:
        bits, size = self._bits, self.granularity
        for at, length in spans:
            bits[at // size : -(-(at + length) // size)] = bit

    def runs(self, span: Span | None = None) -> Iterator[Span]:
        """All marked runs, in order, within the granules of `span`, as they are now."""
        first, stop = (0, len(self._bits)) if span is None else self._range(span)
        size, bits = self.granularity, self._bits[first:stop]
        bits.append(0)
        edges = (bits ^ (bits >> 1)).search(1)  # in turn where a run begins and where it has ended
        for start, end in zip(edges, edges, strict=True):
            at = (first + start) * size
            yield Span(at, min((first + end) * size, self.length) - at)

    def merge(self, other: "DirtyBitmap") -> None:
        """Mark what `other`, a map of the same length, has marked; the granularities may differ."""
        assert self.length == other.length, (self.length, other.length)
        self.merge_inside(other)

    def merge_inside(self, other: "DirtyBitmap") -> None:
        """The same with a map of another length, as far as this one goes: a file below an image grows."""
        if self.granularity == other.granularity:
            both = min(len(self._bits), len(other._bits))
            self._bits[:both] |= other._bits[:both]
            return
        for run in other.runs():
            self.set(run)

    def packed(self, *, align: int = 1) -> bytes:
        """The bits as bytes, least significant first, as in qcow2; whole units of `align` bytes, at least one."""
        content = self._bits.tobytes()
        return content.ljust(max(1, -(-len(content) // align)) * align, b"\0")

    @classmethod
    def unpacked(cls, length: int, granularity: int, content: bytes) -> "DirtyBitmap":
        """The map that `packed` made `content` of; bits past the end mean nothing."""
        made = cls(length, granularity)
        granules = len(made._bits)
        made._bits = bitarray(endian="little")
        made._bits.frombytes(content)
        del made._bits[granules:]
        assert len(made._bits) == granules, (length, granularity, len(content))
        return made

    def copy(self) -> "DirtyBitmap":
        """An independent map of the same content."""
        twin = DirtyBitmap(self.length, self.granularity)
        twin._bits = self._bits.copy()
        return twin

    def _range(self, span: Span) -> tuple[int, int]:
        """First granule and the one after the last that `span` touches inside the node."""
        end = min(span.end, self.length)
        if not span or span.at >= end:
            return 0, 0
        return span.at // self.granularity, -(-end // self.granularity)

    def _span(self, first: int, stop: int) -> Span:
        return Span.between(first * self.granularity, min(stop * self.granularity, self.length))
