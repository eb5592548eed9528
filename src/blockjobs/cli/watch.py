"""`blockjobs watch`: follow jobs of a server until they have ended."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from blockjobs.base.errors import UsageError
from blockjobs.cli.progress import NOTHING_MORE, View, choose_view
from blockjobs.cli.remote import query_jobs, with_server
from blockjobs.monitor.client import Commander, QmpClient

REFRESH_S: Final = 0.2
Look = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]
_ENDED: Final = ("concluded", "null")
_URGENT: Final = ("ready", "pending", *_ENDED)
"""What somebody may have to do something about soon."""
SOON_S: Final = 0.005
"""So long it is waited for more of it: a thousand jobs that end at once are asked for together."""


def watch(address: str, job: str | None, *, as_json: bool) -> int:
    """Show progress until the job, or all jobs there are now, have ended; 1 if one of them did not succeed.

    Raises:
        UsageError: there is no such job, or nobody answers.
        WireError: the server went away.
    """

    async def work(client: QmpClient) -> int:
        jobs = [each for each in await query_jobs(client) if job in (None, each["id"])]
        if job is not None and not jobs:
            raise UsageError(f"There is no job '{job}' (it may have ended): see blockjobs jobs --connect {address}")
        if not jobs and not as_json:
            print("no jobs")
        return await Watch(client, [each["id"] for each in jobs], as_json=as_json).until_ended()

    return with_server(address, work)


class Watch:
    """Views of some jobs, and what is known of each.

    Attributes:
        outcomes: of those that have ended, by id: id, type, status, fate, error, current, total.
    """

    def __init__(
        self,
        client: Commander,
        ids: list[str],
        *,
        as_json: bool,
        quiet: bool = False,
        look: "Look | None" = None,
        began_s: float | None = None,
    ) -> None:
        """See the class.

        Args:
            client: the server, or the host in this process.
            ids: the jobs.
            as_json: as JSON lines.
            quiet: no bars.
            look: told of each job whenever it was asked for; returns what the view shows besides.
            began_s: when the jobs were started, as `time.monotonic` has it, if that is known.
        """
        self._client, self._look, self._began_s = client, look, began_s
        self.outcomes: dict[str, dict[str, Any]] = {}
        # Several bars would fight for the same lines.
        self._views = {each: choose_view(each, as_json=as_json, quiet=quiet or len(ids) > 1) for each in ids}
        self._last: dict[str, dict[str, Any]] = {}
        self._endings: dict[str, dict[str, Any]] = {}
        self._failed = False

    async def until_ended(self) -> int:
        """Poll, and listen for how jobs end: the dismissed ones are gone before the next poll."""
        open_views: dict[str, View] = {each: view.__enter__() for each, view in self._views.items()}
        try:
            while open_views:
                await self._listen()
                present = {each["id"]: each for each in await query_jobs(self._client)}
                for each in list(open_views):
                    job = present.get(each)
                    if job is not None:
                        self._last[each] = job
                        more = await self._look(job) if self._look else NOTHING_MORE
                        open_views[each].show(job["status"], job["current-progress"], job["total-progress"], more)
                    if job is None or job["status"] in _ENDED:
                        view = open_views.pop(each)
                        self.outcomes[each] = self._outcome(each, job)
                        view.done(self.outcomes[each])
                        view.__exit__(None, None, None)
        finally:
            for view in open_views.values():
                view.__exit__(None, None, None)
        return 1 if self._failed else 0

    async def _listen(self) -> None:
        """Take in events for a moment, a shorter one if a job has come to where it waits, or to its end."""
        is_urgent = False
        try:
            async with asyncio.timeout(REFRESH_S) as limit:
                while (event := await self._client.event()) is not None:
                    self._note(event)
                    if self._is_urgent(event) and not is_urgent:
                        is_urgent = True
                        limit.reschedule(asyncio.get_running_loop().time() + SOON_S)
        except TimeoutError:
            return

    def _is_urgent(self, event: dict[str, Any]) -> bool:
        told = event.get("data", {})
        is_ours = event["event"] == "JOB_STATUS_CHANGE" and told["id"] in self._views
        return is_ours and told["status"] in _URGENT

    def _note(self, event: dict[str, Any]) -> None:
        told = event["data"]
        if event["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
            is_cancelled = event["event"] == "BLOCK_JOB_CANCELLED"
            self._endings[told["device"]] = {
                "fate": "cancelled" if is_cancelled else "failed" if "error" in told else "completed",
                "error": told.get("error", "cancelled" if is_cancelled else None),
                "current": told["offset"],
                "total": told["len"],
            }

    def _outcome(self, id: str, job: dict[str, Any] | None) -> dict[str, Any]:
        last = job or self._last.get(id, {})
        ending = self._endings.get(id, {})
        error = last.get("error") or ending.get("error")
        self._failed = self._failed or bool(error)
        outcome = {
            "id": id,
            "type": last.get("type"),
            "status": job["status"] if job else "null",
            "fate": ending.get("fate", "failed" if error else "completed"),
            "error": error,
            "current": ending.get("current", last.get("current-progress", 0)),
            "total": ending.get("total", last.get("total-progress", 0)),
        }
        if self._began_s is not None:
            outcome["seconds"] = time.monotonic() - self._began_s
        return outcome
