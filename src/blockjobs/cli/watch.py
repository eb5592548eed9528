"""`blockjobs watch`: follow jobs of a server until they have ended."""

import asyncio
from typing import Any, Final

from blockjobs.base.errors import UsageError
from blockjobs.cli.progress import View, choose_view
from blockjobs.cli.remote import query_jobs, with_server
from blockjobs.monitor.client import QmpClient

REFRESH_S: Final = 0.2
_ENDED: Final = ("concluded", "null")


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
        return await _Watch(client, [each["id"] for each in jobs], as_json=as_json).until_ended()

    return with_server(address, work)


class _Watch:
    """Views of some jobs, and what is known of each."""

    def __init__(self, client: QmpClient, ids: list[str], *, as_json: bool) -> None:
        self._client = client
        # Several bars would fight for the same lines.
        self._views = {each: choose_view(each, as_json=as_json, quiet=len(ids) > 1) for each in ids}
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
                        open_views[each].show(job["status"], job["current-progress"], job["total-progress"])
                    if job is None or job["status"] in _ENDED:
                        view = open_views.pop(each)
                        view.done(self._outcome(each, job))
                        view.__exit__(None, None, None)
        finally:
            for view in open_views.values():
                view.__exit__(None, None, None)
        return 1 if self._failed else 0

    async def _listen(self) -> None:
        """Take in events for a moment."""
        try:
            async with asyncio.timeout(REFRESH_S):
                while (event := await self._client.event()) is not None:
                    self._note(event)
        except TimeoutError:
            return

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
        return {
            "id": id,
            "type": last.get("type"),
            "status": job["status"] if job else "null",
            "fate": ending.get("fate", "failed" if error else "completed"),
            "error": error,
            "current": ending.get("current", last.get("current-progress", 0)),
            "total": ending.get("total", last.get("total-progress", 0)),
        }
