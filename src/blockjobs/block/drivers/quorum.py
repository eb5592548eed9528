"""The quorum driver: several nodes that hold the same, of which a few may be wrong (spec/block-layer.md §2).

Changes go to all children, and a read is what at least `vote-threshold` of them say. Who fails or differs is reported.
Requests that overlap take turns, or children would end up different and readers would meet half of a write.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar, cast

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import ImageCorrupt, IoFailure, ParameterError, UsageError
from blockjobs.base.span import Span, coalesce, subtract
from blockjobs.block.claims import Perm
from blockjobs.block.driver import Child, OpenContext, ProtocolDriver
from blockjobs.block.drivers.quorum_votes import (
    QuorumFailure,
    QuorumOpType,
    QuorumReportBad,
    Verdict,
    commonest,
    judge,
    sectors_of,
)
from blockjobs.block.options import BlockRef, NodeOptions, driver
from blockjobs.block.tracker import RangeTracker
from blockjobs.block.vocabulary import Kind, Segment, ZeroMode

if TYPE_CHECKING:
    from blockjobs.block.node import Node

T = TypeVar("T")
EDGE: Final = "children."


class QuorumReadPattern(StrEnum):
    """Whom a read asks."""

    QUORUM = "quorum"
    FIFO = "fifo"


class QuorumOptions(NodeOptions, frozen=True, kw_only=True, tag="quorum"):
    """Several children with the same content.

    Attributes:
        blkverify: two children that must agree.
        vote_threshold: so many must agree, or do what they are told.
        rewrite_corrupted: children that lose a vote are corrected.
        read_pattern: all children vote, or the first that can answer does.
    """

    blkverify: bool | None = None
    children: list[BlockRef]
    vote_threshold: int
    rewrite_corrupted: bool | None = None
    read_pattern: QuorumReadPattern | None = None


@driver(QuorumOptions)
@dataclass(eq=False, kw_only=True)
class Quorum(ProtocolDriver):
    """Joins its children. They are in the order in which they were added, at the edges `children.0`, `children.1`, ...

    Attributes:
        threshold: votes that decide.
        rewrites: losers of a vote are corrected.
        in_turn: reads ask one child after the other until one answers.
        is_pair: blkverify: children cannot come or go.
    """

    open_ended: bool = False
    takes_children: ClassVar[bool] = True

    children: dict[str, Child]
    name: str
    publish: Callable[[object], None]
    threshold: int
    rewrites: bool
    in_turn: bool
    is_pair: bool
    _turns: RangeTracker = field(default_factory=RangeTracker)

    @classmethod
    async def open(cls, options: QuorumOptions, children: dict[str, Child], context: OpenContext) -> "Quorum":
        """Check the numbers.

        Raises:
            UsageError: they do not fit together, or the children are of different lengths.
        """
        threshold, count = options.vote_threshold, len(options.children)
        if not count:
            raise UsageError("Number of provided children must be 1 or more")
        if threshold < 1:
            raise ParameterError.expects("vote-threshold", "a value >= 1")
        if threshold > count:
            raise UsageError("threshold may not exceed children count")
        in_turn = options.read_pattern is QuorumReadPattern.FIFO
        if not in_turn and options.blkverify:
            if (count, threshold) != (2, 2):
                raise UsageError("blkverify=on can only be set if there are exactly two files and vote-threshold is 2")
            if options.rewrite_corrupted:
                raise UsageError("rewrite-corrupted=on cannot be used with blkverify=on")
        if len({child.length for child in children.values()}) > 1:
            raise UsageError("Could not refresh total sector count: Input/output error")
        return cls(
            children=children,
            name=context.node_name,
            publish=context.publish,
            threshold=threshold,
            rewrites=bool(options.rewrite_corrupted) and not in_turn,
            in_turn=in_turn,
            is_pair=bool(options.blkverify) and not in_turn,
        )

    @property
    def length(self) -> int:
        """That of any child."""
        return next(iter(self.children.values())).length

    def can_replace(self, child: str) -> bool:
        """See `Driver`: the others tell what a child should hold."""
        return child.startswith("children.")

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`: nobody else may change a child, or it would differ from the others."""
        del child
        if self.rewrites:
            needs |= Perm.WRITE
        return needs, shares & (Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)

    # --- children that come and go

    def edge_for(self, child: Child) -> str:
        """See `Driver`: the number after the greatest in use."""
        if self.is_pair:
            raise UsageError("Cannot add a child to a quorum in blkverify mode")
        if child.length != self.length:
            raise UsageError(
                f"Cannot add node '{child.name}' of {child.length} bytes to a quorum of {self.length} bytes"
            )
        return f"{EDGE}{_number(self._edges()[-1]) + 1}"

    def check_may_lose(self, edge: str) -> None:
        """See `Driver`: enough must be left to decide."""
        del edge
        if len(self.children) <= self.threshold:
            raise UsageError(f"The number of children cannot be lower than the vote threshold {self.threshold}")

    def _edges(self) -> list[str]:
        return sorted(self.children, key=_number)

    # --- requests

    async def read_into(self, at: int, buffer: memoryview) -> None:
        """See `ProtocolDriver`.

        Raises:
            IoFailure: too few children could be read, or too few agree (EIO).
        """
        span = Span(at, len(buffer))
        async with self._turns.shared(span):
            if self.in_turn:
                await self._read_in_turn(span, buffer)
                return
            verdict = await self._vote(span)
        if verdict.losers and self.rewrites:
            async with self._turns.exclusive(span):
                verdict = await self._correct(span)
        buffer[:] = verdict.content

    async def write(self, at: int, content: Buffer, *, fua: bool) -> None:
        """See `ProtocolDriver`."""
        await self._change(Span(at, len(content)), lambda child: child.write(at, content, fua=fua))

    async def zero(self, span: Span, mode: ZeroMode) -> None:
        """See `ProtocolDriver`."""
        await self._change(span, lambda child: child.zero(span, mode=mode))

    async def discard(self, span: Span) -> None:
        """See `ProtocolDriver`: nothing, since children need not show the same where they were discarded."""
        del span

    async def flush(self) -> None:
        """See `ProtocolDriver`: of as many children as a decision takes."""
        done, failures = await self._all(lambda child: child.flush())
        self._report(QuorumOpType.FLUSH, 0, 0, failures)
        if len(done) < self.threshold:
            raise commonest(failures.values())

    async def status(self, span: Span) -> list[Segment]:
        """See `ProtocolDriver`: zeroes only where every child says so; one that cannot tell counts as data."""
        done, failures = await self._all(lambda child: cast("Node", child).block_status(span))
        data = [span] if failures else []
        for extents in done.values():
            data += [Span(extent.at, extent.length) for extent in extents if extent.kind is not Kind.ZERO]
        kinds = dict.fromkeys(coalesce(data), Kind.DATA)
        kinds |= dict.fromkeys(subtract(span, data), Kind.ZERO)
        return [Segment(part.at, part.length, kinds[part], "", part.at) for part in sorted(kinds)]

    async def resize(self, length: int) -> None:
        """See `ProtocolDriver`: refused, as by QEMU."""
        del length
        raise UsageError("Image format driver does not support resize")

    # --- how

    async def _read_in_turn(self, span: Span, buffer: memoryview) -> None:
        failure: IoFailure | None = None
        for edge in self._edges():
            child = self.children[edge]
            try:
                await child.read_into(span.at, buffer)
                return
            except (IoFailure, ImageCorrupt) as error:
                failure = _as_failure(error, child)
                self._report(QuorumOpType.READ, *sectors_of(span), {edge: failure})
        assert failure is not None
        raise failure

    async def _vote(self, span: Span) -> Verdict:
        """Ask all children, and report those that fail or lose."""
        ballots: dict[str, bytearray] = {}

        async def ask(edge: str) -> None:
            content = bytearray(span.length)
            await self.children[edge].read_into(span.at, memoryview(content))
            ballots[edge] = content

        failures = await self._gather(ask)
        self._report(QuorumOpType.READ, *sectors_of(span), failures)
        if len(ballots) < self.threshold:
            self._report_failure(span)
            raise commonest(failures.values())
        verdict = judge({edge: ballots[edge] for edge in self._edges() if edge in ballots}, self.threshold)
        if verdict is None:
            self._report_failure(span)
            raise _disagreement(self.name, span)
        self._report(QuorumOpType.READ, *sectors_of(span), dict.fromkeys(verdict.losers))
        return verdict

    async def _correct(self, span: Span) -> Verdict:
        """Vote again, alone with these bytes, and give the losers what won; one that cannot take it stays wrong."""
        verdict = await self._vote(span)

        async def correct(edge: str) -> None:
            if edge in verdict.losers:
                await self.children[edge].write(span.at, verdict.content)

        await self._gather(correct)
        return verdict

    async def _change(self, span: Span, work: Callable[[Child], Awaitable[None]]) -> None:
        async with self._turns.exclusive(span):
            done, failures = await self._all(work)
        self._report(QuorumOpType.WRITE, *sectors_of(span), failures)
        if len(done) < self.threshold:
            self._report_failure(span)
            raise commonest(failures.values())

    async def _all(self, work: Callable[[Child], Awaitable[T]]) -> tuple[dict[str, T], dict[str, IoFailure]]:
        """Do `work` with all children at once: results, and failures, by edge."""
        done: dict[str, T] = {}

        async def do(edge: str) -> None:
            done[edge] = await work(self.children[edge])

        failures = await self._gather(do)
        return done, failures

    async def _gather(self, work: Callable[[str], Awaitable[None]]) -> dict[str, IoFailure]:
        failures: dict[str, IoFailure] = {}

        async def attempt(edge: str) -> None:
            try:
                await work(edge)
            except (IoFailure, ImageCorrupt) as error:
                failures[edge] = _as_failure(error, self.children[edge])

        async with asyncio.TaskGroup() as group:
            for edge in self._edges():
                group.create_task(attempt(edge))
        return {edge: failures[edge] for edge in self._edges() if edge in failures}

    def _report(self, kind: QuorumOpType, sector: int, sectors: int, bad: Mapping[str, IoFailure | None]) -> None:
        for edge, failure in bad.items():
            self.publish(
                QuorumReportBad(
                    type=kind,
                    error=None if failure is None else str(failure),
                    node_name=self.children[edge].name,
                    sector_num=sector,
                    sectors_count=sectors,
                )
            )

    def _report_failure(self, span: Span) -> None:
        sector, sectors = sectors_of(span)
        self.publish(QuorumFailure(reference=self.name, sector_num=sector, sectors_count=sectors))


def _number(edge: str) -> int:
    return int(edge.removeprefix(EDGE))


def _as_failure(error: IoFailure | ImageCorrupt, child: Child) -> IoFailure:
    return error if isinstance(error, IoFailure) else _broken(child.name, str(error))


def _broken(name: str, text: str) -> IoFailure:
    return IoFailure(errno.EIO, f"node '{name}': {text}")


def _disagreement(name: str, span: Span) -> IoFailure:
    return IoFailure(errno.EIO, f"node '{name}' at {span.at}+{span.length}: too few children agree")
