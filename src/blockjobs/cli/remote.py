"""Commands that talk QMP to a running server: ours, a real QEMU or its storage daemon."""

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

from blockjobs.base.errors import UsageError, WireError
from blockjobs.cli.render import jobs_table
from blockjobs.cli.running import run
from blockjobs.monitor.client import Commander, QmpClient, QmpError

CONNECT_S_MAX: Final = 5.0

_VERBS: Final = {
    "pause": "job-pause",
    "resume": "job-resume",
    "complete": "job-complete",
    "finalize": "job-finalize",
    "dismiss": "job-dismiss",
}


def with_server(address: str, work: Callable[[QmpClient], Awaitable[int]]) -> int:
    """Connect, run `work`, hang up; returns the exit code.

    Raises:
        UsageError: nobody answers at `address`.
        WireError: the connection broke, or the other side speaks no QMP.
    """

    async def connected() -> int:
        async with await _connect(address) as client:
            return await work(client)

    return run(connected)


async def _connect(address: str) -> QmpClient:
    try:
        return await QmpClient.connect(address, timeout_s=CONNECT_S_MAX)
    except TimeoutError as error:
        raise UsageError(
            f"'{address}' does not answer: is it a QMP socket? A monitor serves one client at a time"
        ) from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise UsageError(f"Could not connect to '{address}': {reason}: is a daemon listening there?") from error
    except (ValueError, OverflowError) as error:
        raise UsageError(f"'{address}' is neither the path of a socket nor host:port") from error
    except WireError as error:
        raise UsageError(f"'{address}': {error}") from error


async def query_jobs(client: Commander) -> list[dict[str, Any]]:
    """All jobs as `query-jobs` has them, with what `query-block-jobs` adds under `block-job`."""
    jobs: list[dict[str, Any]] = await client.execute("query-jobs")
    block_jobs = {each["device"]: each for each in await client.execute("query-block-jobs")}
    return [{**job, "block-job": block_jobs[job["id"]]} if job["id"] in block_jobs else job for job in jobs]


def list_jobs(address: str, *, as_json: bool) -> int:
    """Print the jobs of a server."""

    async def work(client: QmpClient) -> int:
        jobs = await query_jobs(client)
        print(json.dumps(jobs, indent=4) if as_json else jobs_table(jobs))
        return 0

    return with_server(address, work)


def use_verb(address: str, verb: str, job: str, *, as_json: bool) -> int:
    """Apply `pause`, `resume`, `complete`, `finalize` or `dismiss` to a job.

    Raises:
        UsageError: the server refused.
    """

    async def work(client: QmpClient) -> int:
        await _ask(client, job, _VERBS[verb], id=job)
        return await _tell(client, job, as_json=as_json)

    return with_server(address, work)


def cancel(address: str, job: str, *, force: bool, as_json: bool) -> int:
    """Cancel a job: softly if it is a block job and `force` is not set, as `block-job-cancel` does.

    Raises:
        UsageError: the server refused.
    """

    async def work(client: QmpClient) -> int:
        known = {each["id"]: each for each in await query_jobs(client)}
        if "block-job" in known.get(job, {}):
            await _ask(client, job, "block-job-cancel", device=job, force=force)
        else:
            await _ask(client, job, "job-cancel", id=job)
        return await _tell(client, job, as_json=as_json)

    return with_server(address, work)


def set_speed(address: str, job: str, speed_bytes_per_s: int, *, as_json: bool) -> int:
    """Change the rate limit of a block job; 0 lifts it.

    Raises:
        UsageError: the server refused.
    """

    async def work(client: QmpClient) -> int:
        await _ask(client, job, "block-job-set-speed", device=job, speed=speed_bytes_per_s)
        return await _tell(client, job, as_json=as_json)

    return with_server(address, work)


async def _ask(client: QmpClient, job: str, command: str, **arguments: Any) -> None:
    try:
        await client.execute(command, **arguments)
    except QmpError as error:
        text = str(error)
        if "currently paused" in text:
            text = f"{text}: resume it first, or cancel with --force"
        elif "not found" in text:
            ids = ", ".join(f"'{each['id']}'" for each in await query_jobs(client))
            text = f"{text}: the server has {f'only {ids}' if ids else 'no jobs'}"
        raise UsageError(text if f"'{job}'" in text else f"job '{job}': {text}") from error


async def _tell(client: QmpClient, job: str, *, as_json: bool) -> int:
    """Print what became of the job; it may be on its way to the next status."""
    found = next((each for each in await query_jobs(client) if each["id"] == job), None)
    if as_json:
        print(json.dumps(found))
    else:
        print(f"{job}: {found['status'] if found else 'gone'}")
    return 0
