"""Mirrors of the live disk, in all modes and with all endings."""

import asyncio

from live_scenarios import Scenario, scenario
from live_world import KIB, file_of, refused

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.node import Node
from blockjobs.lifecycle.handle import JobHandle, StatusUnreachable
from blockjobs.lifecycle.status import JobStatus


class ReadyScenario(Scenario):
    """What jobs have in common that become ready and are then told how to end."""

    async def conclude(self, job: JobHandle, target: Node, endings: tuple[str, ...]) -> None:
        """Once it is ready, complete or cancel it; the target's disk works from then on."""
        try:
            await job.reached(JobStatus.READY)
        except StatusUnreachable:
            return
        self.world.host.faults[file_of(target)].cure()
        await asyncio.sleep(self.chance.random() * 0.2)
        how = self.chance.choice(endings)
        while job.status in (JobStatus.READY, JobStatus.STANDBY):
            try:
                match how:
                    case "complete":
                        await self.world.execute("job-complete", id=job.id)
                    case "soft":
                        await self.world.execute("block-job-cancel", device=job.id)
                    case "force":
                        await self.world.execute("job-cancel", id=job.id)
                self.world.tally[f"{self.name}: {how}"] += 1
                return
            except BlockjobsError:  # it is paused just now, or ended before
                await asyncio.sleep(0.02)


@scenario
class Mirror(ReadyScenario):
    """`blockdev-mirror`: after completion the target is the live disk, after a soft cancel it is a copy."""

    name = "mirror"
    weight = 5
    fates = ("completed", "failed", "cancelled", "complete", "soft", "force", "pivot", "copy")

    async def play(self) -> None:
        world, chance, source = self.world, self.chance, self.world.top
        sync = chance.choice(("full", "full", "top", "none"))
        backing = source.backing if sync == "top" else None
        target = await world.new_target(world.name("mirror"), backing=backing, fails=0.4)
        is_zero = target.driver_name == "qcow2" and backing is None
        job = await self.try_to_start(
            "blockdev-mirror",
            **{
                "device": source.name,
                "target": target.name,
                "sync": sync,
                "speed": world.speed(),
                "granularity": chance.choice((512, 4 * KIB, 64 * KIB)),
                "buf-size": chance.choice((0, 64 * KIB)),
                "copy-mode": chance.choice(("background", "write-blocking")),
                "on-source-error": "stop",
                "on-target-error": world.policy(),
                "target-is-zero": is_zero and chance.random() < 0.5,
            },
        )
        if job is None:
            await world.remove(target)
            return
        if chance.random() < 0.3:
            await self._change(job)
        # With `none` the target holds only what was written since: it can take the source's place only as an overlay.
        await self.conclude(job, target, ("soft", "force") if sync == "none" else (*["complete"] * 3, "soft", "force"))
        outcome = await self.end(job)
        if target in [door.node.storage for door in world.doors]:
            assert outcome.error is None, "a mirror that failed has switched over"
            world.tally["mirror: pivot"] += 1
            return
        if outcome.error is None:
            await self._check_copy(job, source, target, sync)
        await world.remove(target)

    async def _check_copy(self, job: JobHandle, source: Node, target: Node, sync: str) -> None:
        world = self.world
        begun, ended = (world.glimpses[job.id, status] for status in (JobStatus.CREATED, JobStatus.PENDING))
        if begun.top is not source or ended.top is not source:
            return  # it was the mirror of an image that guests had left before
        moment = world.moments.get((job.id, JobStatus.PENDING))
        assert moment is not None, "guests were writing when a mirror had ended"
        world.tally["mirror: copy"] += 1
        shown = await world.shows(target)
        if sync != "none":
            world.demand(shown, moment, f"{job.id}, a mirror that was cancelled softly")
            await world.check_durable(file_of(target), moment, f"{job.id}, a mirror that was cancelled softly")
        else:
            for at in range(0, world.size, 512):
                if begun.wrong_sector(moment.content[at : at + 512], at) is not None:
                    assert moment.wrong_sector(shown[at : at + 512], at) is None, f"{job.id}: a new sector is missing"

    async def _change(self, job: JobHandle) -> None:
        await asyncio.sleep(self.chance.random() * 0.1)
        try:
            await self.world.execute(
                "block-job-change", **{"id": job.id, "type": "mirror", "copy-mode": "write-blocking"}
            )
        except BlockjobsError as error:
            if "cannot accept command verb" not in str(error) and "not found" not in str(error):
                refused(error)
