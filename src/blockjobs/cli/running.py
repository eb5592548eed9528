"""Running asynchronous work from the command line: signals cancel it, and say so in the exit code."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from blockjobs.base.errors import UsageError
from blockjobs.cli.objects import OBJECTS

if TYPE_CHECKING:
    from blockjobs.host import Host

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(work: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run `work` to its end and return its exit code, or 128 + the number of the signal that stopped it.

    The first signal cancels the work, which then cleans up. A second one ends the process at once.
    """
    caught: list[int] = []

    async def watched() -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            caught.append(number)
            for each in STOP_SIGNALS:
                loop.remove_signal_handler(each)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            task.cancel()

        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, stop, number)
        return await work()

    try:
        return asyncio.run(watched())
    except asyncio.CancelledError:
        assert caught, "nobody else cancels the main task"
        return 128 + caught[0]


def new_host(*, image_roots: Sequence[str] = ()) -> "Host":
    """A host with the objects of the command line.

    Raises:
        UsageError: they make no sense.
    """
    from blockjobs.block.objects import AnyObjectOptions, add_object
    from blockjobs.host import Host
    from blockjobs.schema.keyval import parse

    host = Host(image_roots=image_roots)
    for text in OBJECTS.get():
        try:
            add_object(host.objects, parse(text, AnyObjectOptions, implied="qom-type"), host.clock)
        except UsageError as error:
            raise UsageError(f"--object {text.partition(',')[0]}: {error}") from error
    return host


def run_in_host(work: Callable[["Host"], Awaitable[int]], *, image_roots: Sequence[str] = ()) -> int:
    """As `run`, with a host that is closed afterwards; `image_roots` as for `Host`."""
    from blockjobs.base.collector import relax_collector

    relax_collector()

    async def hosted() -> int:
        async with new_host(image_roots=image_roots) as host:
            return await work(host)

    return run(hosted)
