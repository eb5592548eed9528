"""Carrying out the plain steps of a batch: in a worker, in turn with others, and only as far as its job goes on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import NamedTuple

from blockjobs.base.clock import Clock
from blockjobs.base.errors import ImageCorrupt
from blockjobs.base.offload import Offload
from blockjobs.base.span import Span
from blockjobs.block.execute import Step, always, execute
from blockjobs.block.pace import LATE_NS
from blockjobs.block.placing import Placing


class Moved(NamedTuple):
    """What has become of plain steps.

    Attributes:
        began_ns: when the transfer began, without the wait for the lane.
        failed: a step or the publishing failed; nothing is visible.
        left: what was not moved because the job does not go on; the rest is visible.
    """

    began_ns: int
    failed: bool = False
    left: tuple[Span, ...] = ()


async def move_plainly(
    steps: Sequence[Step],
    spans: list[Span],
    placing: Placing,
    *,
    unit: int,
    offload: Offload,
    clock: Clock,
    lane: AbstractAsyncContextManager[object] | None = None,
    goes_on: Callable[[], bool] | None = None,
) -> Moved:
    """Run the steps and publish them, and give back what is not published.

    A batch may take ten times what it should, when the kernel makes a writer wait that has filled too much memory. So
    it ends early, with what has been moved, once the job is to stand still or the batch is late. Something is moved
    nevertheless, unless the job was stopped while it waited for the lane: whoever pauses a job again and again slows it
    down, but does not hold it for ever.

    Args:
        steps: they move `spans`, in this order.
        spans: what is copied, ascending.
        placing: where to.
        unit: a batch ends early at whole units, of so many bytes, that are whole allocation units of the target.
        lane: entered while the worker moves.
        goes_on: asked by the worker and here; None: all of it is to be moved.

    Waits: for the lane and for I/O. Checkpoint: no.
    """
    began_ns = clock.now_ns()
    start = offload.start if offload.cores > 1 else None
    try:
        went_on = goes_on is None or goes_on()
        async with lane or nullcontext():
            began_ns = clock.now_ns()
            if goes_on is not None and went_on and not goes_on():
                done: int | None = 0
            elif goes_on is None or not placing.is_divisible:
                done = await offload.run(execute, steps, always, start)
            else:
                may_go_on = goes_on
                ends_ns = began_ns + LATE_NS
                done = await offload.run(execute, steps, lambda: may_go_on() and clock.now_ns() < ends_ns, start)
        if done is None:
            await placing.publish()
            return Moved(began_ns)
        done -= done % unit
        if done:
            await placing.publish(done)
        return Moved(began_ns, left=_behind(spans, done))
    except (OSError, ImageCorrupt):
        return Moved(began_ns, failed=True)
    finally:
        await placing.release()


def _behind(spans: list[Span], done: int) -> tuple[Span, ...]:
    """`spans` without their first bytes."""
    left: list[Span] = []
    for at, length in spans:
        skipped = min(length, done)
        done -= skipped
        if skipped < length:
            left.append(Span(at + skipped, length - skipped))
    return tuple(left)
