"""QEMU's answer to every verb in every observable state, recorded in verb-matrix.json, given by jobs without disks."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from stage import Stage, play

from blockjobs.base.errors import BlockjobsError
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.status import JobStatus
from blockjobs.testing.jobs import ToyJob

MATRIX = json.loads((Path(__file__).parents[2] / "conformance" / "data" / "verb-matrix.json").read_text())["matrix"]
CELLS = [(command, state) for command, row in MATRIX.items() for state in row]
EVENTS = {
    "ready": "BLOCK_JOB_READY",
    "pending": "BLOCK_JOB_PENDING",
    "completed": "BLOCK_JOB_COMPLETED",
    "cancelled": "BLOCK_JOB_CANCELLED",
}


class Create(ToyJob):
    is_block_job = False


async def bring_to(stage: Stage, state: str) -> None:
    """As when the matrix was recorded: a backup, a mirror for ready and standby, a create job for the last column."""
    match state:
        case "none":
            pass
        case "running" | "paused":
            job = stage.start(ticks=10**6, auto_dismiss=False)
            await asyncio.sleep(0.05)
            if state == "paused":
                job.pause()
        case "ready" | "standby":
            job = stage.start(type="mirror", wants_completion=True, soft=True, auto_dismiss=False)
            await job.reached(JobStatus.READY)
            if state == "standby":
                job.pause()
        case "waiting":
            group = stage.engine.new_group()
            job = stage.start(group=group, auto_dismiss=False)
            stage.start("k", ticks=10**6, group=group, auto_dismiss=False)
            await job.reached(JobStatus.WAITING)
        case "pending":
            await stage.start(auto_finalize=False, auto_dismiss=False).reached(JobStatus.PENDING)
        case "concluded":
            await stage.start(auto_dismiss=False).outcome()
        case "create-concluded":
            await stage.start(type="create", toy=Create, auto_dismiss=False).outcome()


async def issue(stage: Stage, command: str) -> None:
    name, _, force = command.partition(" ")
    is_block = name.startswith("block-")
    job: JobHandle = stage.engine.block_job("j") if is_block else stage.engine.get("j")
    match name.removeprefix("block-").removeprefix("job-"):
        case "pause":
            job.pause()
        case "resume":
            job.resume()
        case "cancel" if is_block:
            await job.block_cancel(force=bool(force))
        case "cancel":
            await job.cancel()
        case "complete":
            job.complete()
        case "finalize":
            await job.finalize()
        case "dismiss":
            job.dismiss()
        case "set-speed":
            job.set_speed(1024)


def as_recorded(told: list[str]) -> list[str]:
    events = []
    for line in told:
        job, is_milestone, milestone = line.partition(": ")
        if not is_milestone:
            job, status = line.split()
            events.append(f"JOB_STATUS_CHANGE:{status}({job})")
        elif milestone in EVENTS:
            events.append(f"{EVENTS[milestone]}:({job})")
    return events


@pytest.mark.parametrize(("command", "state"), CELLS)
def test_cell(command: str, state: str) -> None:
    expected = MATRIX[command][state]
    answer: dict[str, Any] = {}

    async def scenario(stage: Stage) -> None:
        await bring_to(stage, state)
        stage.take()
        try:
            await issue(stage, command)
            answer["ok"] = True
        except BlockjobsError as error:
            answer["error"] = {"class": error.error_class, "desc": str(error)}
        await asyncio.sleep(0.12)
        answer["events"] = as_recorded(stage.take())

    play(scenario)
    assert answer == expected


def test_the_matrix_is_whole() -> None:
    assert len(CELLS) == 14 * 9
