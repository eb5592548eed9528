"""Every state that a power cut may leave of small disks, as lists of sectors: cheap to change and to compare."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from blockjobs.testing.crash import WriteLog
from blockjobs.testing.disk import SECTOR, Act, Change, Pages

ZERO_SECTOR = bytes(SECTOR)
SUBSETS_MAX = 5
"""Of up to so many writes every subset is tried."""
TEARS_MAX = 8
"""Longer writes are payload: they are torn in a few places only."""

Sectors = list[bytes]
Disks = dict[str, Sectors]


def sectors_of(pages: Pages) -> Sectors:
    content = pages.read(0, -(-pages.size // SECTOR) * SECTOR)
    return [content[at : at + SECTOR] for at in range(0, len(content), SECTOR)]


def pages_of(sectors: Sectors) -> Pages:
    return Pages(b"".join(sectors))


@dataclass(frozen=True)
class _Piece:
    """What one change does to one sector; `low` and `high` bound the bytes of it."""

    sector: int
    content: bytes
    low: int = 0
    high: int = SECTOR


class Pending:
    """One change that may be lost, in pieces of a sector."""

    def __init__(self, change: Change) -> None:
        self.disk, self.length = change.disk, -1
        self.grows = change.act in (Act.WRITE, Act.ZERO)
        self.pieces: list[_Piece] = []
        if change.act is Act.TRUNCATE:
            self.length = -(-change.length // SECTOR)
            return
        at, end = change.at, change.at + change.length
        while at < end:
            low = at % SECTOR
            high = min(SECTOR, low + end - at)
            offset = at - change.at
            content = change.content[offset : offset + high - low] if change.act is Act.WRITE else bytes(high - low)
            if content == ZERO_SECTOR:
                content = ZERO_SECTOR
            self.pieces.append(_Piece(at // SECTOR, content, low, high))
            at += high - low

    def apply(self, sectors: Sectors, first: int = 0, end: int | None = None) -> None:
        """Do it, or only the pieces from `first` to `end`."""
        if self.length >= 0:
            if self.length < len(sectors):
                del sectors[self.length :]
            sectors.extend([ZERO_SECTOR] * (self.length - len(sectors)))
            return
        for piece in self.pieces[first:end]:
            if piece.sector >= len(sectors):
                if not self.grows:
                    continue
                sectors.extend([ZERO_SECTOR] * (piece.sector + 1 - len(sectors)))
            if piece.high - piece.low == SECTOR:
                sectors[piece.sector] = piece.content
            else:
                old = sectors[piece.sector]
                sectors[piece.sector] = old[: piece.low] + piece.content + old[piece.high :]

    def tears(self) -> list[tuple[int, int]]:
        """The runs of pieces that may survive alone: every beginning and every end."""
        count = len(self.pieces)
        cuts = range(1, count) if count <= TEARS_MAX else (1, count // 2, count - 1)
        return [(0, cut) for cut in cuts] + [(cut, count) for cut in cuts]


@dataclass
class Stretch:
    """What happened between two syncs.

    Attributes:
        begin, end: places in the log.
        durable: the disks without any of it.
    """

    begin: int
    end: int
    durable: Disks
    pending: list[Pending]

    def states(self) -> Iterator[tuple[str, Disks]]:
        """(what survived, the disks): every prefix, every prefix without one of its writes, every write torn.

        Of a few writes, every subset. The disks are not to be changed.
        """
        count = len(self.pending)
        if count <= SUBSETS_MAX:
            for length in range(count + 1):
                for chosen in combinations(range(count), length):
                    yield f"{chosen} of {count}", self._with(chosen)
        else:
            for length in range(count + 1):
                yield f"first {length} of {count}", self._with(range(length))
                for lost in range(length - 1):
                    kept = [item for item in range(length) if item != lost]
                    yield f"first {length} of {count} but {lost}", self._with(kept)
            for item in range(count):
                yield f"only {item} of {count}", self._with([item])
        for item, torn in enumerate(self.pending):
            for first, end in torn.tears():
                story = f"{item} torn to pieces {first} to {end}"
                yield f"first {item} of {count}, {story}", self._with(range(item), item, first, end)
                if item < count - 1:
                    yield f"all {count}, {story}", self._with(range(count), item, first, end)

    def _with(self, chosen: "range | tuple[int, ...] | list[int]", torn: int = -1, first: int = 0,
              end: int | None = None) -> Disks:  # fmt: skip
        disks = dict(self.durable)
        changed = set()
        for item in chosen if torn < 0 or torn in chosen else [*chosen, torn]:
            change = self.pending[item]
            if change.disk not in changed:
                disks[change.disk] = list(disks[change.disk])
                changed.add(change.disk)
            if item == torn:
                change.apply(disks[change.disk], first, end)
            else:
                change.apply(disks[change.disk])
        return disks


def stretches(log: WriteLog, start: Mapping[str, Sectors]) -> Iterator[Stretch]:
    """What happened between syncs, in order. The last one ends where the log does."""
    durable: Disks = dict(start)
    pending: list[Pending] = []
    begin = -1
    for index, change in enumerate(log.changes):
        if change.act is Act.SYNC:
            yield Stretch(begin, index, durable, pending)
            durable = dict(durable)
            durable[change.disk] = list(durable[change.disk])
            for item in pending:
                if item.disk == change.disk:
                    item.apply(durable[change.disk])
            pending = [item for item in pending if item.disk != change.disk]
            begin = index
        elif change.act is not Act.MARK:
            pending.append(Pending(change))
    yield Stretch(begin, len(log.changes), durable, pending)
