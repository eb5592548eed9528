"""Steering a mirror: what is said to the server, and when it is given up."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.cli.convergence import STALL_S_MAX, Goal
from blockjobs.cli.mirroring import Ending, Mirroring
from blockjobs.monitor.client import QmpError

MIB = 1 << 20


class Server:
    """Notes what it is told; refuses `refused`."""

    def __init__(self, refused: str = "") -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.refused = refused

    async def execute(self, name: str, /, **arguments: Any) -> Any:
        if name == self.refused:
            raise QmpError("CommandNotFound", f"The command {name} has not been found")
        self.told.append((name, arguments))
        return {}

    async def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        return await self.execute(name, **(arguments or {}))

    async def event(self) -> dict[str, Any] | None:
        return None


class Play:
    """A mirror whose progress a test makes up, second by second."""

    def __init__(self, ending: Ending, goal: Goal | None = None, *, refused: str = "") -> None:
        self.now_s = 0.0
        self.server, self.said = Server(refused), []
        said: list[str] = self.said
        self.mirroring = Mirroring(
            self.server, "m", ending=ending, goal=goal, say=said.append, now_s=lambda: self.now_s
        )

    def look(self, status: str, current: int, total: int, *, after_s: float = 1.0) -> dict[str, Any]:
        self.now_s += after_s
        job = {"status": status, "current-progress": current, "total-progress": total}
        return dict(asyncio.run(self.mirroring.look(job)))


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        (Ending.COPY, [("block-job-cancel", {"device": "m", "force": False})]),
        (Ending.PIVOT, [("job-complete", {"id": "m"})]),
        (Ending.STAY, []),
    ],
)
def test_a_ready_mirror_is_ended_once_as_asked(ending: Ending, told: list[Any]) -> None:
    play = Play(ending)
    assert play.look("running", 1 * MIB, 4 * MIB)["remaining"] == 3 * MIB
    assert play.server.told == []
    play.look("ready", 4 * MIB, 4 * MIB)
    play.look("ready", 4 * MIB, 5 * MIB)
    assert play.server.told == told
    assert (ending is Ending.STAY) == bool(play.said)


def test_a_mirror_that_does_not_catch_up_makes_writes_wait_and_is_then_given_up() -> None:
    play = Play(Ending.COPY, Goal(deadline_s=10))
    for second in range(1, 11):
        more = play.look("running", second * MIB, (2 * second + 4) * MIB)
    assert more["ready-in"] is None
    assert play.server.told == []
    play.look("running", 11 * MIB, 26 * MIB)
    assert play.server.told == [("block-job-change", {"id": "m", "type": "mirror", "copy_mode": "write-blocking"})]
    assert play.said == [
        "not catching up, it copies 1.0 MiB/s and 2.0 MiB/s are written: writes wait for the copy from now on"
    ]
    for second in range(12, 22):
        play.look("running", second * MIB, (2 * second + 4) * MIB)
    with pytest.raises(UsageError, match=r"the mirror does not catch up, it copies 1\.0 MiB/s"):
        play.look("running", 22 * MIB, 48 * MIB)


def test_guests_are_not_made_to_wait_for_storage_that_does_not_answer() -> None:
    play = Play(Ending.COPY, Goal(deadline_s=5))
    play.look("running", 1, 10)
    with pytest.raises(UsageError, match="nothing was copied for 4 seconds: the storage does not answer"):
        play.look("running", 1, 10, after_s=5)
    assert play.server.told == []


def test_what_comes_too_late_is_told_how_late() -> None:
    play = Play(Ending.COPY, Goal(deadline_s=10))
    for second in range(1, 22):
        play.look("running", second * MIB, 100 * MIB)
    with pytest.raises(UsageError, match="not ready in time: 78 MiB are left, 78 seconds more at the present speed"):
        play.look("running", 22 * MIB, 100 * MIB)


def test_a_server_that_cannot_make_writes_wait_is_named() -> None:
    play = Play(Ending.COPY, Goal(deadline_s=1), refused="block-job-change")
    play.look("running", 1, 10)
    with pytest.raises(UsageError, match=r"start it with --copy-mode write-blocking \(The command block-job-change"):
        play.look("running", 1, 10)


def test_a_goal_also_holds_between_ready_and_the_end() -> None:
    play = Play(Ending.PIVOT, Goal(deadline_s=3))
    play.look("ready", 4, 4)
    play.look("ready", 4, 9)
    play.look("ready", 5, 12, after_s=5)
    assert [name for name, _ in play.server.told] == ["job-complete", "block-job-change"]


def test_a_mirror_that_stays_in_step_has_no_goal_any_more() -> None:
    play = Play(Ending.STAY, Goal(deadline_s=1))
    play.look("ready", 4, 4)
    play.look("ready", 4, 900, after_s=500)
    assert play.server.told == []


def test_storage_that_does_not_answer_is_noticed() -> None:
    play = Play(Ending.COPY, Goal(passes=100))
    play.look("running", 1, 10)
    with pytest.raises(UsageError, match="nothing was copied for 60 seconds: the storage does not answer"):
        play.look("running", 1, 10, after_s=STALL_S_MAX + 1)


def test_a_paused_mirror_is_left_alone() -> None:
    play = Play(Ending.COPY, Goal(deadline_s=1))
    play.look("paused", 1, 10, after_s=STALL_S_MAX + 100)
    assert play.server.told == []
