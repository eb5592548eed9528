"""The worker's side of a copy: plain steps over media, run in one hop (docs/adr/0005-plan-execute-publish.md).

Nothing here knows a node, a job or the loop. A step is a tuple of media and integers; whoever planned it holds the
requests' tickets and keeps the media open until `execute` has returned.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, count
from operator import itemgetter
from typing import Final, NamedTuple, TypeVar, cast

from blockjobs.base.offload import Starter
from blockjobs.base.units import MiB
from blockjobs.block.medium import Medium


class Copy(NamedTuple):
    """Copy `length` bytes from one medium to another."""

    source: Medium
    source_at: int
    target: Medium
    target_at: int
    length: int


class Zero(NamedTuple):
    """Make `length` bytes read as zeroes; the space stays allocated."""

    target: Medium
    target_at: int
    length: int


class Gather(NamedTuple):
    """Copy pieces of the source (place, length) to one run of the target, from `target_at` on."""

    source: Medium
    pieces: list[tuple[int, int]]
    target: Medium
    target_at: int


class Scatter(NamedTuple):
    """Copy pieces of the source (place there, place here, length) to places on the target, which ascend."""

    source: Medium
    pieces: list[tuple[int, int, int]]
    target: Medium


class Patch(NamedTuple):
    """As `Scatter`, from several sources: the pieces (place there, place here, number of the source, length)."""

    sources: list[Medium]
    pieces: list[tuple[int, int, int, int]]
    target: Medium


Step = Copy | Gather | Patch | Scatter | Zero
_Piece = TypeVar("_Piece", bound=tuple[int, ...])

PREALLOCATED_BYTES_MIN: Final = 1 * MiB
"""A file system allocates a run of this length at once for less than it saves in the copies (bench/BASELINE.md)."""
STRIDE_BYTES: Final = 1 * MiB
"""So much is copied before it is asked whether to go on: 0.5 ms, but 10 ms where the kernel slows the writer down. Two
threads share a batch so exactly that neither waits long for the other at its end."""
TOGETHER_BYTES: Final = 4 * MiB
"""So much of short steps is carried out together."""


def always() -> bool:
    """For work that nobody stops."""
    return True


def execute(steps: Sequence[Step], goes_on: Callable[[], bool] = always, start: Starter | None = None) -> int | None:
    """Run `steps`; blocks, so call it in a worker.

    Args:
        steps: no two of them touch the same bytes of a target. They are begun in their order, but for those that are
            close together.
        goes_on: asked about every STRIDE_BYTES, but not before the first ones.
        start: has a second worker help where two are faster (`Medium.is_faster_by_two`).

    Returns:
        None if all is done; how many bytes are, the first ones of the steps in their order, if told to stop.

    Raises:
        OSError: a step failed, perhaps after a part of it; others are done or not. Which side of a copy failed is not
            known: `copy_file_range` does not say.
    """
    work = _Work(steps, goes_on)
    if start is None or not all(target.is_faster_by_two for target in {step.target for step in steps}):
        work.carry_out()
    else:
        work.carry_out_with(start)
    if work.error is not None:
        raise work.error
    return work.stopped_after()


class _Work:
    """Steps in parts, which one or two threads take in turn. Whoever takes a part ends it.

    Attributes:
        error: why a part failed; none is begun after that.
    """

    def __init__(self, steps: Sequence[Step], goes_on: Callable[[], bool]) -> None:
        unwritten = _unwritten(steps)
        self._parts = [part for group in _grouped(_joined(steps)) for part in _parts(group, unwritten)]
        self._goes_on = goes_on
        self._next = count()  # each number is given out once, to whichever thread
        self._taken: list[int] = []
        self._moves = False
        self._is_stopped = False
        self.error: OSError | None = None

    def carry_out(self) -> None:
        """Do what nobody else does. An OSError ends up in `error`."""
        try:
            while self.error is None and not self._is_stopped and len(self._taken) < len(self._parts):
                if self._moves and not self._goes_on():
                    self._is_stopped = True
                    return
                number = next(self._next)
                if number >= len(self._parts):
                    return
                self._taken.append(number)
                do, length = self._parts[number]
                self._moves = self._moves or length > 0
                do()
        except OSError as error:
            self.error = self.error or error

    def carry_out_with(self, start: Starter) -> None:
        """The same with a second worker, if one is free before all is done."""
        if sum(length > 0 for _, length in self._parts) < 2:
            self.carry_out()
            return
        other = start(self.carry_out)
        try:
            self.carry_out()
        finally:
            if not other.cancel():
                other.result()  # its last part must not outlive the batch

    def stopped_after(self) -> int | None:
        """See `execute`. To be asked when no thread is at it."""
        if len(self._taken) == len(self._parts):
            return None
        return sum(self._parts[number][1] for number in self._taken)


_Joined = Gather | Patch | Scatter | Zero
_Unwritten = dict[Medium, range]


def _grouped(steps: Iterable[_Joined]) -> Iterator[list[_Joined]]:
    """The same in their order: short steps to one target together, up to TOGETHER_BYTES; all others alone."""
    group: list[_Joined] = []
    left = 0
    for step in steps:
        length = _length(step)
        is_short = length <= TOGETHER_BYTES // 2 and not isinstance(step, Patch | Scatter)
        if group and not (is_short and length <= left and step.target is group[0].target):
            yield group
            group = []
        if is_short:
            left = (left if group else TOGETHER_BYTES) - length
            group.append(step)
        else:
            yield [step]
    if group:
        yield group


def _length(step: _Joined) -> int:
    return step.length if isinstance(step, Zero) else sum(map(_LENGTH, step.pieces))


def _unwritten(steps: Sequence[Step]) -> _Unwritten:
    """Where targets read as zeroes because nobody has ever written there, up to the last copy.

    What is to be zero there needs no call: the copy behind it moves the end of the medium.
    """
    last: dict[Medium, int] = {}
    for step in steps:
        if isinstance(step, Copy):
            last[step.target] = max(step.target_at, last.get(step.target, 0))
    has_zeroes = {step.target for step in steps if isinstance(step, Zero)}
    return {target: range(target.unwritten_at(), last[target]) for target in has_zeroes if target in last}


def _parts(group: list[_Joined], unwritten: _Unwritten) -> Iterator[tuple[Callable[[], None], int]]:
    """What is to be done for a group, with the bytes that are moved by each part."""
    step = group[0]
    if len(group) > 1:
        yield partial(_together, group, unwritten), sum(map(_length, group))
    elif isinstance(step, Zero):
        yield partial(_zero, step, unwritten), step.length
    else:
        yield partial(_announce, step), 0
        if isinstance(step, Scatter):
            for stride, length in _strides(step.pieces):
                yield partial(step.target.scatter_from, step.source, stride), length
            return
        if isinstance(step, Patch):
            for patches, length in _strides(step.pieces):
                yield partial(_patch, step, patches), length
            return
        at = step.target_at
        for gathered, length in _strides(step.pieces):
            yield partial(step.target.gather_from, step.source, gathered, at), length
            at += length


def _zero(step: Zero, unwritten: _Unwritten) -> None:
    if step.target_at not in unwritten.get(step.target, ()):
        step.target.zero(step.target_at, step.length, unmap=False)


def _patch(step: Patch, patches: Sequence[tuple[int, int, int, int]]) -> None:
    """What comes from one source at once, whatever lies between."""
    for number, source in enumerate(step.sources):
        if pieces := [(source_at, at, length) for source_at, at, each, length in patches if each == number]:
            source.read_ahead([(source_at, length) for source_at, _, length in pieces])
            step.target.scatter_from(source, pieces)


def _together(group: Iterable[_Joined], unwritten: _Unwritten) -> None:
    """Short steps to one target: all that comes from one source at once, whatever lies between."""
    by_source: dict[Medium, list[tuple[int, int, int]]] = {}
    runs: list[list[int]] = []
    for step in group:
        assert not isinstance(step, Patch | Scatter)
        target, at = step.target, step.target_at
        if not runs or runs[-1][1] != at:
            runs.append([at, at])
        if isinstance(step, Zero):
            _zero(step, unwritten)
            at += step.length
        else:
            pieces = by_source.setdefault(step.source, [])
            for source_at, length in step.pieces:
                pieces.append((source_at, at, length))
                at += length
        runs[-1][1] = at
    for start, end in runs:
        if end - start >= PREALLOCATED_BYTES_MIN:
            target.preallocate(start, end - start)
    for source, pieces in by_source.items():
        pieces.sort(key=itemgetter(1))
        if len(pieces) > 1:
            source.read_ahead([(source_at, length) for source_at, _, length in pieces])
        target.scatter_from(source, pieces)


def _joined(steps: Iterable[Step]) -> Iterator[_Joined]:
    """The same steps; copies into one run of a target become one."""
    gather: Gather | None = None
    end = 0
    for step in steps:
        if isinstance(step, Copy):
            source, source_at, target, target_at, length = step
            if gather is None or gather.source is not source or gather.target is not target or target_at != end:
                if gather is not None:
                    yield gather
                gather = Gather(source, [], target, target_at)
            gather.pieces.append((source_at, length))
            end = target_at + length
            continue
        if gather is not None:
            yield gather
        gather = None
        yield step
    if gather is not None:
        yield gather


_LENGTH: Final = itemgetter(-1)


def _strides(pieces: Sequence[_Piece]) -> Iterator[tuple[Sequence[_Piece], int]]:
    """Cut the pieces, places with a length at the end, into groups of at most STRIDE_BYTES; with their bytes."""
    totals = list(accumulate(map(_LENGTH, pieces)))
    first = start = 0
    while first < len(pieces):
        end = bisect_right(totals, start + STRIDE_BYTES, first)
        if end > first:
            yield pieces[first:end], totals[end - 1] - start
        else:
            end = first + 1
            yield from _cut(pieces[first])
        first, start = end, totals[end - 1]


def _cut(piece: _Piece) -> Iterator[tuple[Sequence[_Piece], int]]:
    """The same for a piece that is longer."""
    for offset in range(0, piece[-1], STRIDE_BYTES):
        here = min(STRIDE_BYTES, piece[-1] - offset)
        places = [place + offset for place in piece[:-1][:2]]  # behind them may be the number of a source
        yield [cast("_Piece", (*places, *piece[2:-1], here))], here


def _announce(step: Gather | Patch | Scatter) -> None:
    """Let both sides prepare."""
    if isinstance(step, Patch):
        first, last = step.pieces[0], step.pieces[-1]
        hull = last[1] + last[-1] - first[1]
        if hull >= PREALLOCATED_BYTES_MIN and hull == sum(map(_LENGTH, step.pieces)):
            step.target.preallocate(first[1], hull)
        return
    if len(step.pieces) > 1:
        step.source.read_ahead([(piece[0], piece[-1]) for piece in step.pieces])
    if isinstance(step, Scatter):
        for _, at, length in step.pieces:
            if length >= PREALLOCATED_BYTES_MIN:
                step.target.preallocate(at, length)
        return
    length = sum(map(_LENGTH, step.pieces))
    if length >= PREALLOCATED_BYTES_MIN:
        step.target.preallocate(step.target_at, length)
