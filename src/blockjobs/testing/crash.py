"""Crash replay: a log of what reached the disks, and every image that a power cut may have left (design §4.5).

Between two syncs of a disk any subset of its writes may survive, each torn at 512-byte boundaries
(spec/durability.md §1). A test records a run, puts marks into the log for what was promised to whom, and then checks
each state: consistent, everything promised before is there, nothing foreign is.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Final

from blockjobs.base.buffers import Buffer
from blockjobs.block.medium import Allocation, Medium
from blockjobs.testing.disk import Act, Change, Pages, copy_through_memory

_NEVER_LOST: Final = frozenset({Act.SYNC, Act.MARK})
_ALONE_MAX: Final = 24
"""Longer stretches between syncs are bulk data; their subsets of one and all but one teach nothing new."""


class WriteLog:
    """What was done to one or several disks, in order, with the marks of the test between."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def mark(self, label: object) -> int:
        """Note a fact at this place of the log, for instance that a flush was acknowledged; returns its index."""
        self.changes.append(Change(Act.MARK, label=label))
        return len(self.changes) - 1

    def marks(self, until: int) -> Iterator[tuple[int, object]]:
        """(index, label) of the marks before an index."""
        for index, change in enumerate(self.changes[:until]):
            if change.act is Act.MARK:
                yield index, change.label


class RecordingMedium(Medium):
    """Another medium, with all its changes in a log under the name `disk`."""

    def __init__(self, inner: Medium, log: WriteLog, disk: str = "disk") -> None:
        self.inner, self.log, self.disk = inner, log, disk

    def _note(self, act: Act, at: int = 0, length: int = 0, content: bytes = b"") -> None:
        self.log.changes.append(Change(act, at, length, content, self.disk))

    def read_into(self, at: int, buffer: memoryview) -> None:
        """See `Medium`."""
        self.inner.read_into(at, buffer)

    def write(self, at: int, content: Buffer) -> None:
        """See `Medium`; noted even if it fails, since a part may have been written."""
        self._note(Act.WRITE, at, len(content), bytes(content))
        self.inner.write(at, content)

    def writev(self, at: int, contents: list[Buffer]) -> None:
        """See `Medium`."""
        self.write(at, b"".join(bytes(piece) for piece in contents))

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        """See `Medium`."""
        self._note(Act.ZERO, at, length)
        self.inner.zero(at, length, unmap=unmap)

    def discard(self, at: int, length: int) -> None:
        """See `Medium`."""
        self._note(Act.DISCARD, at, length)
        self.inner.discard(at, length)

    def copy_from(self, source: Medium, source_at: int, at: int, length: int) -> None:
        """See `Medium`."""
        copy_through_memory(self, source, source_at, at, length)

    def allocations(self, at: int, length: int) -> list[Allocation]:
        """See `Medium`."""
        return self.inner.allocations(at, length)

    def sync(self) -> None:
        """See `Medium`; noted only when it succeeded."""
        self.inner.sync()
        self._note(Act.SYNC)

    def truncate(self, length: int) -> None:
        """See `Medium`."""
        self._note(Act.TRUNCATE, length=length)
        self.inner.truncate(length)

    def size(self) -> int:
        """See `Medium`."""
        return self.inner.size()

    def unwritten_at(self) -> int:
        """See `Medium`."""
        return self.inner.unwritten_at()

    def allocated_size(self) -> int:
        """See `Medium`."""
        return self.inner.allocated_size()

    def close(self) -> None:
        """See `Medium`."""
        self.inner.close()


_Survivor = tuple[Change, frozenset[int] | None]


@dataclass(frozen=True)
class CrashState:
    """The disks as one power cut may leave them.

    Attributes:
        synced: index in the log of the last sync before the cut (-1: none).
        issued: index in the log of the cut: promises before it hold, and nothing after it can be in the images.
        story: which changes survived, to reproduce a finding.
        durable: the disks as of the last sync of each; not to be changed.
        survivors: what else reached the disks, with the sectors that did if it was torn.
    """

    synced: int
    issued: int
    story: str
    durable: Mapping[str, Pages]
    survivors: Sequence[_Survivor]

    @cached_property
    def images(self) -> dict[str, Pages]:
        """The content by the name of the disk, made at the first use: most runs look at a sample of states only."""
        images = {disk: pages.copy() for disk, pages in self.durable.items()}
        for change, sectors in self.survivors:
            change.apply(images[change.disk], sectors)
        return images


def crash_states(
    log: WriteLog,
    start: Mapping[str, Pages],
    *,
    seed: int,
    exhaustive_up_to: int = 4,
    samples: int = 6,
) -> Iterator[CrashState]:
    """The images that a power cut during the recorded run may have left.

    For each stretch between two syncs: nothing of it (the flush boundary itself), every prefix, and other subsets: all
    of them if the stretch has at most `exhaustive_up_to` changes, else each change alone, all but each, and `samples`
    random ones; the random ones and the last write of each prefix also torn.

    Args:
        log: the recorded run.
        start: the disks before it, durable.
        seed: for the random subsets; the same seed gives the same states.
    """
    chance = random.Random(seed)
    durable = {disk: pages.copy() for disk, pages in start.items()}
    pending: list[Change] = []
    synced = -1
    for index, change in enumerate([*log.changes, Change(Act.MARK, label="end")]):
        is_last = index == len(log.changes)
        if change.act not in _NEVER_LOST:
            pending.append(change)
        elif change.act is Act.SYNC or is_last:
            for survivors, story in _choices(pending, chance, exhaustive_up_to, samples):
                yield CrashState(synced, index, f"cut at {index}: {story}", durable, survivors)
        if change.act is Act.SYNC:
            durable = {disk: pages.copy() for disk, pages in durable.items()}
            done = [item for item in pending if item.disk == change.disk]
            for item in done:
                item.apply(durable[item.disk])
            pending = [item for item in pending if item.disk != change.disk]
            synced = index


def _choices(
    pending: list[Change], chance: random.Random, exhaustive_up_to: int, samples: int
) -> Iterator[tuple[list[_Survivor], str]]:
    count = len(pending)
    for length in range(count + 1):
        prefix: list[_Survivor] = [(change, None) for change in pending[:length]]
        yield prefix, f"first {length} of {count}"
        if length and len(pending[length - 1].sectors()) > 1:
            torn = _tear(pending[length - 1], chance)
            yield [*prefix[:-1], torn], f"first {length} of {count}, the last torn to {sorted(torn[1] or ())}"
    if count <= exhaustive_up_to:
        for length in range(1, count):
            for chosen in combinations(range(count), length):
                if chosen != tuple(range(length)):
                    yield [(pending[item], None) for item in chosen], f"only {chosen} of {count}"
        return
    for item in range(count if count <= _ALONE_MAX else 0):
        yield [(pending[item], None)], f"only {item} of {count}"
        yield [(change, None) for change in pending if change is not pending[item]], f"all but {item} of {count}"
    for _ in range(samples):
        chosen = tuple(item for item in range(count) if chance.random() < 0.5)
        torn_item = chance.choice(chosen) if chosen else None
        survivors = [_tear(pending[item], chance) if item == torn_item else (pending[item], None) for item in chosen]
        yield survivors, f"only {chosen} of {count}, {torn_item} torn"


def _tear(change: Change, chance: random.Random) -> _Survivor:
    sectors = change.sectors()
    if len(sectors) <= 1:
        return change, None
    if chance.random() < 0.5:
        return change, frozenset(sectors[: chance.randrange(1, len(sectors))])
    return change, frozenset(sector for sector in sectors if chance.random() < 0.5)
