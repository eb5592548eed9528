"""Every state that a power cut may leave of small disks, as what differs from the last durable one: cheap to compare.

Sectors have numbers over all disks (`Place`), so that a state is one dict, and a set of places says what somebody has
looked at.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Generic, TypeVar

from blockjobs.testing.crash import WriteLog
from blockjobs.testing.disk import SECTOR, Act, Change, Pages

ZERO_SECTOR = bytes(SECTOR)
SUBSETS_MAX = 5
"""Of up to so many writes every subset is tried."""
TEARS_MAX = 8
"""Longer writes are payload: they are torn in a few places only."""
DISK_PLACES = 1 << 32

Outcome = TypeVar("Outcome")
Sectors = list[bytes]
Disks = dict[str, Sectors]
Place = int
"""Number of a sector: of the first disk from 0, of the next one from `DISK_PLACES`, and so on."""


def sectors_of(pages: Pages) -> Sectors:
    content = pages.read(0, -(-pages.size // SECTOR) * SECTOR)
    return [content[at : at + SECTOR] for at in range(0, len(content), SECTOR)]


def pages_of(sectors: Sectors) -> Pages:
    return Pages(b"".join(sectors))


class Pending:
    """One change that may be lost.

    Attributes:
        pieces: what it does to each sector: (place, first byte, end byte, content).
        length: for a change of the length, the new one in sectors; else -1.
        whole: the sectors that it writes if it writes nothing but whole sectors.
    """

    def __init__(self, change: Change, disk: int) -> None:
        self.disk, self.length = disk, -1
        self.grows = change.act in (Act.WRITE, Act.ZERO)
        self.pieces: list[tuple[Place, int, int, bytes]] = []
        if change.act is Act.TRUNCATE:
            self.length = -(-change.length // SECTOR)
        at, end = change.at, change.at + (change.length if self.length < 0 else 0)
        while at < end:
            low = at % SECTOR
            high = min(SECTOR, low + end - at)
            offset = at - change.at
            content = change.content[offset : offset + high - low] if change.act is Act.WRITE else bytes(high - low)
            self.pieces.append((disk * DISK_PLACES + at // SECTOR, low, high, content))
            at += high - low
        self.whole: dict[Place, bytes] = {}
        if self.grows and all(high - low == SECTOR for _, low, high, _ in self.pieces):
            self.whole = {place: content for place, _, _, content in self.pieces}

    def tears(self) -> list[tuple[int, int]]:
        """The runs of pieces that may survive alone: every beginning and every end."""
        count = len(self.pieces)
        cuts = range(1, count) if count <= TEARS_MAX else (1, count // 2, count - 1)
        return [(0, cut) for cut in cuts] + [(cut, count) for cut in cuts]


class Base(dict[Place, bytes]):
    """Disks that others are compared with, not to be changed, by place: zeroes past their ends.

    Attributes:
        disks: their sectors.
    """

    def __init__(self, disks: list[Sectors]) -> None:
        super().__init__()
        self.disks = disks

    def __missing__(self, place: Place) -> bytes:
        disk, sector = divmod(place, DISK_PLACES)
        self[place] = found = self.disks[disk][sector] if sector < len(self.disks[disk]) else ZERO_SECTOR
        return found


class State:
    """Disks as they may be found.

    Attributes:
        base: what is durable.
        changed: the sectors that may differ from it.
        lengths: of each disk, in sectors.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.changed: dict[Place, bytes] = {}
        self.lengths = [len(sectors) for sectors in base.disks]

    def apply(self, change: Pending, first: int = 0, end: int | None = None) -> None:
        """Do it, or only the pieces from `first` to `end`."""
        if change.length >= 0:
            self._truncate(change.disk, change.length)
            return
        if change.whole and end is None:
            self.changed.update(change.whole)
            self.lengths[change.disk] = max(self.lengths[change.disk], change.pieces[-1][0] % DISK_PLACES + 1)
            return
        for place, low, high, content in change.pieces[first:end]:
            if place % DISK_PLACES >= self.lengths[change.disk]:
                if not change.grows:
                    continue
                self.lengths[change.disk] = place % DISK_PLACES + 1
            old = self.changed[place] if place in self.changed else self.base[place]
            self.changed[place] = old[:low] + content + old[high:]

    def _truncate(self, disk: int, length: int) -> None:
        first = disk * DISK_PLACES
        durable = range(first + length, first + len(self.base.disks[disk]))
        changed = [place for place in self.changed if first + length <= place < first + DISK_PLACES]
        self.changed.update(dict.fromkeys([*durable, *changed], ZERO_SECTOR))
        self.lengths[disk] = length

    def disks(self) -> list[Sectors]:
        """All sectors; lists are shared with the base where nothing differs."""
        found = list(self.base.disks)
        touched = {place // DISK_PLACES for place in self.changed}
        for disk, (sectors, length) in enumerate(zip(self.base.disks, self.lengths, strict=True)):
            if disk not in touched and length == len(sectors):
                continue
            found[disk] = sectors[:length] + [ZERO_SECTOR] * (length - len(sectors))
            for place, content in self.changed.items():
                if 0 <= (sector := place - disk * DISK_PLACES) < length:
                    found[disk][sector] = content
        return found

    def settle(self) -> None:
        """Forget changes that change nothing."""
        base = self.base
        self.changed = {place: content for place, content in self.changed.items() if content != base[place]}

    def key(self, base_key: int) -> int:
        """A number for what the disks hold, the same from whatever base it was reached; that of the base is known."""
        base = self.base
        before = [(place, base[place]) for place in self.changed]
        return base_key + sum(map(hash, self.changed.items())) - sum(map(hash, before))


class Stretch:
    """What happened between two syncs.

    Attributes:
        begin, end: places in the log.
        base: the disks without any of it, `names` theirs.
        key: a number for them.
    """

    def __init__(self, begin: int, end: int, names: list[str], base: Base, key: int,
                 pending: list[Pending]) -> None:  # fmt: skip
        self.begin, self.end, self.names, self.base, self.key, self.pending = begin, end, names, base, key, pending

    @property
    def durable(self) -> Disks:
        """The disks without any of it."""
        return dict(zip(self.names, self.base.disks, strict=True))

    def disks(self, state: State) -> Disks:
        """All sectors of a state. Not to be changed."""
        return dict(zip(self.names, state.disks(), strict=True))

    def states(self) -> Iterator[tuple[str, State]]:
        """(what survived, the disks): every prefix, every prefix without one of its writes, every write torn.

        Of a few writes, every subset.
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
                yield f"first {item} of {count}, {story}", self._with(range(item + 1), item, first, end)
                if item < count - 1:
                    yield f"all {count}, {story}", self._with(range(count), item, first, end)

    def torn_alone(self) -> Iterator[tuple[str, State]]:
        """A piece of one write, and nothing else: for runs of few writes, where that is cheap."""
        for item, torn in enumerate(self.pending):
            for first, end in torn.tears():
                yield f"only {item}, torn to pieces {first} to {end}", self._with([item], item, first, end)

    def _with(self, chosen: Iterable[int], torn: int = -1, first: int = 0, end: int | None = None) -> State:
        state = State(self.base)
        for item in chosen:
            if item == torn:
                state.apply(self.pending[item], first, end)
            else:
                state.apply(self.pending[item])
        state.settle()
        return state


def stretches(log: WriteLog, start: Mapping[str, Sectors]) -> Iterator[Stretch]:
    """What happened between syncs, in order. The last one ends where the log does."""
    names, base = list(start), Base(list(start.values()))
    whole = State(Base([[] for _ in names]))
    for disk, sectors in enumerate(base.disks):
        whole.changed.update(enumerate(sectors, disk * DISK_PLACES))
    key, begin = whole.key(0), -1
    pending: list[Pending] = []
    for index, change in enumerate(log.changes):
        if change.act is Act.SYNC:
            yield Stretch(begin, index, names, base, key, pending)
            synced, state = names.index(change.disk), State(base)
            for item in pending:
                if item.disk == synced:
                    state.apply(item)
            base, key = Base(state.disks()), state.key(key)
            pending = [item for item in pending if item.disk != synced]
            begin = index
        elif change.act is not Act.MARK:
            pending.append(Pending(change, names.index(change.disk)))
    yield Stretch(begin, len(log.changes), names, base, key, pending)


class Recall(Generic[Outcome]):
    """What was found out about states of one stretch, for others that are the same to whoever found it out.

    Two states that hold the same wherever one has been looked at are the same to a reader who knows nothing else.
    """

    def __init__(self, stretch: Stretch) -> None:
        self._touched = {place for change in stretch.pending for place, *_ in change.pieces}
        if any(change.length >= 0 for change in stretch.pending):
            self._touched |= {disk * DISK_PLACES + sector for disk, sectors in enumerate(stretch.base.disks)
                              for sector in range(len(sectors))}  # fmt: skip
        self._found: dict[frozenset[Place], dict[frozenset[tuple[Place, bytes]], Outcome]] = {}

    def find(self, state: State) -> Outcome | None:
        """What was found out about a state, if anything."""
        for seen, outcomes in self._found.items():
            if (outcome := outcomes.get(self._part(state, seen))) is not None:
                return outcome
        return None

    def keep(self, state: State, read: Iterable[Place], outcome: Outcome) -> None:
        """An outcome that depends on the sectors `read` of a state, and on nothing else."""
        seen = frozenset(self._touched.intersection(read))
        self._found.setdefault(seen, {})[self._part(state, seen)] = outcome

    @staticmethod
    def _part(state: State, seen: frozenset[Place]) -> frozenset[tuple[Place, bytes]]:
        return frozenset((place, state.changed[place]) for place in seen.intersection(state.changed))
