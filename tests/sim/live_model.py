"""What a live disk must hold: now, and after a power cut."""

from dataclasses import dataclass, field
from typing import Final

SECTOR: Final = 512


@dataclass(slots=True)
class Change:
    """A request that changes a run, as one sector of it sees it; `ended` counts in the model's own ticks."""

    content: bytes
    ended: int | None = None


@dataclass(slots=True)
class Allowed:
    """What each sector may hold after a power cut: the last flushed content, or anything issued later."""

    floor: bytes
    later: dict[int, list[bytes]]

    def demand(self, shown: bytes) -> None:
        """Fail if a flushed write is lost, or if a sector holds what nobody wrote there."""
        assert len(shown) == len(self.floor)
        for number in range(len(shown) // SECTOR):
            run = slice(number * SECTOR, (number + 1) * SECTOR)
            if shown[run] != self.floor[run]:
                assert shown[run] in self.later.get(number, ()), f"sector {number} holds neither flushed nor new bytes"


@dataclass(frozen=True, slots=True)
class Moment:
    """The disk at an instant when no request was under way.

    Attributes:
        top: the node that guests wrote to then.
        loose: what sectors may hold instead whose last request has ended in a way that its guest had not found out yet:
            it failed, or was a discard.
    """

    content: bytes
    top: object
    loose: dict[int, list[bytes]]

    def wrong_sector(self, shown: bytes, at: int = 0) -> int | None:
        """The first sector in which `shown`, a run from `at` on, is something else; any odd run will do."""
        if shown == self.content[at : at + len(shown)]:
            return None
        end = at + len(shown)
        for number in range(at // SECTOR, -(-end // SECTOR)):
            start, stop = max(at, number * SECTOR), min(end, (number + 1) * SECTOR)
            there = shown[start - at : stop - at]
            cut = slice(start - number * SECTOR, stop - number * SECTOR)
            if there != self.content[start:stop] and there not in [each[cut] for each in self.loose.get(number, ())]:
                return number
        return None


@dataclass(slots=True)
class Model:
    """The content of a live disk and the promises about it. Requests of one sector never overlap.

    Attributes:
        content: what a reader must find while no request is under way.
    """

    content: bytearray
    _floor: bytearray = field(init=False)
    _later: dict[int, list[Change]] = field(default_factory=dict)
    _tick: int = 0

    def __post_init__(self) -> None:
        self._floor = bytearray(self.content)

    def begin(self, at: int, *contents: bytes) -> list[Change]:
        """A request is issued that makes a run hold one of `contents`."""
        changes = []
        for content in contents:
            for start in range(0, len(content), SECTOR):
                changes.append(Change(content[start : start + SECTOR]))
                self._later.setdefault((at + start) // SECTOR, []).append(changes[-1])
        return changes

    def end(self, changes: list[Change], at: int, shown: bytes) -> None:
        """The request has ended, well or not, and the run holds `shown` now."""
        self._tick += 1
        self.content[at : at + len(shown)] = shown
        for change in changes:
            change.ended = self._tick
        for start in range(0, len(shown), SECTOR):
            self._later[(at + start) // SECTOR].append(Change(shown[start : start + SECTOR], self._tick))

    def flush_begin(self) -> int:
        """What has ended by now is to be durable; returns what `flush_end` must be given."""
        return self._tick

    def flush_end(self, mark: int) -> None:
        """It is."""
        for number, changes in list(self._later.items()):
            done = [index for index, change in enumerate(changes) if change.ended is not None and change.ended <= mark]
            if done:
                self._floor[number * SECTOR : (number + 1) * SECTOR] = changes[done[-1]].content
                del changes[: done[-1] + 1]
            if not changes:
                del self._later[number]

    def moment(self, top: object = None) -> Moment:
        """The disk as it is now, while guests are at rest."""
        loose = {
            number: [change.content for change in changes if change.ended is None]
            for number, changes in self._later.items()
        }
        return Moment(bytes(self.content), top, {number: contents for number, contents in loose.items() if contents})

    def allowed(self) -> Allowed:
        """What a power cut at this instant may leave."""
        later = {number: [change.content for change in changes] for number, changes in self._later.items()}
        return Allowed(bytes(self._floor), later)


def first_difference(one: bytes, other: bytes) -> int | None:
    """The first sector in which they differ."""
    if one == other:
        return None
    for at in range(0, max(len(one), len(other)), SECTOR):
        if one[at : at + SECTOR] != other[at : at + SECTOR]:
            return at // SECTOR
    return None
