"""Following jobs: what is to be done about one is done when its event comes, not at the next refresh."""

import asyncio
from typing import Any

import pytest

from blockjobs.cli import watch as module
from blockjobs.cli.watch import Watch


class Server:
    """Has one job, whose status changes when its next event is taken."""

    def __init__(self, *statuses: str) -> None:
        self.status = "created"
        self._statuses = list(statuses)
        self.looked_at: list[str] = []
        self.completed = asyncio.Event()

    async def execute(self, name: str, /, **arguments: Any) -> Any:
        if name == "query-block-jobs" or self.status == "null":
            return []
        return [{"id": "a", "type": "commit", "status": self.status, "current-progress": 1, "total-progress": 2}]

    async def event(self) -> dict[str, Any]:
        if self.status == "ready":
            await self.completed.wait()
        if not self._statuses:
            await asyncio.Event().wait()
        self.status = self._statuses.pop(0)
        return {"event": "JOB_STATUS_CHANGE", "data": {"id": "a", "status": self.status}}

    async def look(self, job: dict[str, Any]) -> dict[str, Any]:
        self.looked_at.append(job["status"])
        if job["status"] == "ready":
            self.completed.set()
        return {}


def follow(server: Server, refresh_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_S", refresh_s)

    async def main() -> None:
        watch = Watch(server, ["a"], as_json=False, quiet=True, look=server.look)  # type: ignore[arg-type]
        assert await asyncio.wait_for(watch.until_ended(), 20) == 0
        assert watch.outcomes["a"]["fate"] == "completed"

    asyncio.run(main())


@pytest.mark.parametrize("end", [("concluded",), ("concluded", "null"), ("null",)])
def test_nobody_waits_for_a_job_that_waits(end: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("running", "ready", "waiting", "pending", *end)
    follow(server, 1000, monkeypatch)
    assert server.looked_at[0] == "ready" and len(server.looked_at) <= 2, "what ends soon after is asked for at once"


def test_what_is_not_urgent_is_shown_at_the_next_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("running", "paused", "running", "standby", "concluded")
    follow(server, 1000, monkeypatch)
    assert server.looked_at == ["concluded"]
