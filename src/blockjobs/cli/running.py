"""Running asynchronous work from the command line: signals cancel it, and say so in the exit code."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from blockjobs.base.errors import UsageError
from blockjobs.cli.objects import OBJECTS

if TYPE_CHECKING:
    from blockjobs.host import Host, ImageHost

H = TypeVar("H", bound="ImageHost")

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
    from blockjobs.host import Host

    host = Host(image_roots=image_roots)
    _make_objects(host)
    return host


def new_image_host(*, image_roots: Sequence[str] = ()) -> "ImageHost":
    """As `new_host`, for commands that run no jobs."""
    from blockjobs.host import ImageHost

    host = ImageHost(image_roots=image_roots)
    _make_objects(host)
    return host


def _make_objects(host: "ImageHost") -> None:
    texts = OBJECTS.get()
    if not texts:
        return
    from blockjobs.block.objects import AnyObjectOptions, add_object
    from blockjobs.schema.keyval import parse

    for text in texts:
        try:
            add_object(host.objects, parse(text, AnyObjectOptions, implied="qom-type"), host.clock)
        except UsageError as error:
            raise UsageError(f"--object {text.partition(',')[0]}: {error}") from error


def run_in_host(work: Callable[["Host"], Awaitable[int]], *, image_roots: Sequence[str] = ()) -> int:
    """As `run`, with a host that is closed afterwards; `image_roots` as for `Host`."""
    return _run_hosted(lambda: new_host(image_roots=image_roots), work)


def run_on_images(work: Callable[["ImageHost"], Awaitable[int]], *, image_roots: Sequence[str] = ()) -> int:
    """As `run_in_host`, for commands that run no jobs."""
    return _run_hosted(lambda: new_image_host(image_roots=image_roots), work)


def _run_hosted(make: Callable[[], H], work: Callable[[H], Awaitable[int]]) -> int:
    from blockjobs.base.collector import relax_collector

    relax_collector()

    async def hosted() -> int:
        async with make() as host:
            return await work(host)

    return run(hosted)
