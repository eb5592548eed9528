"""Running one job to its end, on a server or on a host in this process: the same commands, the same view."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from blockjobs.base.errors import BlockjobsError, UsageError, WireError
from blockjobs.cli.remote import query_jobs, with_server
from blockjobs.cli.watch import Look, Watch
from blockjobs.monitor.client import Commander, QmpError

if TYPE_CHECKING:
    from blockjobs.host import Host

GIVE_UP_S_MAX: Final = 10.0
"""A cancelled job whose storage does not answer cannot end; nobody waits for it longer than this."""
Work = Callable[[Commander], Awaitable[int]]


async def run_job(
    client: Commander,
    command: str,
    *,
    id: str,
    arguments: Mapping[str, Any],
    as_json: bool,
    quiet: bool = False,
    look: Look | None = None,
    before: Sequence[Mapping[str, Any]] = (),
    ends_softly: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Start a job, show its progress, and wait for its end. If the wait is cancelled, so is the job.

    Args:
        client: where the job runs.
        command: the QMP command that starts it.
        id: of the job.
        arguments: of the command, spelled as on the wire; those that are None are left out.
        as_json: progress and outcome as JSON lines.
        quiet: no bar.
        look: see `Watch`; what it raises cancels the job.
        before: transaction actions that are to take effect at the very instant at which the job begins.
        ends_softly: asked if the wait is cancelled: whether the job can be told to end well instead.

    Returns:
        The outcome: id, type, status, fate, error, current, total, seconds.

    Raises:
        UsageError: the server refused, or `look` gave up.
        BlockjobsError: the job failed.
        WireError: the server went away; what became of the job is not known.
    """
    began_s = time.monotonic()
    await _start(client, command, {"job-id": id, **arguments}, before)
    watch = Watch(client, [id], as_json=as_json, quiet=quiet, look=look, began_s=began_s)
    try:
        await watch.until_ended()
    except asyncio.CancelledError:
        softly = ends_softly() and await _end(client, id, "block-job-cancel", device=id, force=False)
        if not softly and not await _end(client, id, "job-cancel", id=id):
            _say_it_lives(id)
        raise
    except BaseException as error:
        if await _end(client, id, "job-cancel", id=id):
            raise
        if isinstance(error, UsageError):
            raise UsageError(f"{error}; {_lives(id)}") from error
        _say_it_lives(id)
        raise
    outcome = watch.outcomes[id]
    if outcome["error"]:
        raise BlockjobsError(f"{id}: {outcome['error']}")
    return outcome


async def _start(
    client: Commander, command: str, arguments: Mapping[str, Any], before: Sequence[Mapping[str, Any]]
) -> None:
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        if before:
            await client.command("transaction", {"actions": [*before, {"type": command, "data": given}]})
        else:
            await client.command(command, given)
    except QmpError as error:
        raise UsageError(str(error)) from error


def _lives(id: str) -> str:
    return f"job '{id}' is cancelled, but has not ended: it ends when its storage answers"


def _say_it_lives(id: str) -> None:
    print(f"blockjobs: {_lives(id)}", file=sys.stderr)


async def _end(client: Commander, job: str, command: str, /, **arguments: Any) -> bool:
    """Tell the job to end; False if it is not gone soon, because it waits for storage or the server is busy."""
    with suppress(QmpError, WireError):
        try:
            async with asyncio.timeout(GIVE_UP_S_MAX):
                await client.execute(command, **arguments)
                while any(each["id"] == job for each in await query_jobs(client)):
                    if await client.event() is None:
                        return True
        except TimeoutError:
            return False
    return True


def on_server(address: str, work: Work) -> int:
    """Run `work` with a connection to a QMP server; returns the exit code."""
    return with_server(address, work)


async def in_process(host: "Host", work: Work) -> int:
    """Run `work` on a host of our own."""
    from blockjobs.monitor.local import LocalClient

    async with LocalClient(host) as client:
        return await work(client)
