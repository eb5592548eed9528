"""Backups of the live disk, in all modes."""

import asyncio
from dataclasses import dataclass

from live_model import Moment
from live_scenarios import Scenario, scenario
from live_world import KIB, file_of, refused

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap, find_bitmap
from blockjobs.lifecycle.history import Fate
from blockjobs.lifecycle.status import JobStatus


class BackupScenario(Scenario):
    """What backups have in common."""

    def arguments(self, target: Node) -> dict[str, object]:
        chance, world = self.chance, self.world
        perf: dict[str, object] = {"max-workers": chance.choice((1, 3, 64))}
        if chance.random() < 0.3:
            perf["max-chunk"] = chance.choice((64, 128, 256)) * KIB
        if chance.random() < 0.2:
            perf["min-cluster-size"] = 64 * KIB
        return {
            "job-id": world.name("job"),
            "device": world.top.name,
            "target": target.name,
            "speed": world.speed(),
            "on-source-error": "stop",
            "on-target-error": world.policy(),
            "on-cbw-error": chance.choice(("break-guest-write", "break-snapshot")),
            "compress": target.driver_name == "qcow2" and chance.random() < 0.3,
            "x-perf": perf,
        }

    def first_moment(self, job_id: str, source: Node) -> Moment | None:
        """The source at the instant of the command; None if somebody else put an overlay on it just before."""
        moment = self.world.moments.get((job_id, JobStatus.CREATED))
        assert moment is not None, "a backup began while guests were writing"
        return moment if moment.top is source else None

    def check_copy(self, shown: bytes, job_id: str, source: Node) -> None:
        """A copy is the source at the first moment."""
        moment = self.first_moment(job_id, source)
        if moment is not None:
            self.world.demand(shown, moment, f"{job_id}, {self.name}")


@scenario
class FullOrTop(BackupScenario):
    """`sync=full`, or `sync=top` onto an image with the same backing."""

    name = "backup"
    weight = 4

    async def play(self) -> None:
        world, top = self.world, self.world.top
        on_top = top.backing is not None and self.chance.random() < 0.4
        target = await world.new_target(world.name("backup"), backing=top.backing if on_top else None)
        arguments = self.arguments(target) | {"device": top.name, "sync": "top" if on_top else "full"}
        job = await self.try_to_start("blockdev-backup", **arguments)
        if job is not None:
            outcome = await self.end(job)
            if outcome.error is None:
                self.check_copy(await world.shows(target), job.id, top)
                moment = self.first_moment(job.id, top)
                if moment is not None and not on_top:
                    await world.check_durable(file_of(target), moment, job.id)
        await world.remove(target)


@scenario
class Group(BackupScenario):
    """Two backups in one transaction, which share their instant and their fate."""

    name = "group"

    async def play(self) -> None:
        world = self.world
        targets = [await world.new_target(world.name("member"), fails=0.3) for _ in range(2)]
        members = [self.arguments(target) | {"sync": "full"} for target in targets]
        try:
            await world.execute(
                "transaction",
                actions=[{"type": "blockdev-backup", "data": member} for member in members],
                properties={"completion-mode": "grouped"},
            )
        except UsageError as error:
            refused(error)
        else:
            jobs = [world.watch(member["job-id"]) for member in members]
            outcomes = [await self.end(job) for job in jobs]
            fates = {outcome.error is None for outcome in outcomes}
            assert len(fates) == 1, "a group has one fate"
            source = world.host.graph.node(members[0]["device"])
            moments = [world.moments[job.id, JobStatus.CREATED] for job in jobs]
            assert moments[0].content == moments[1].content, "a group has one instant"
            if fates == {True}:
                for job, target in zip(jobs, targets, strict=True):
                    self.check_copy(await world.shows(target), job.id, source)
        for target in targets:
            await world.remove(target)


@scenario
class Fleecing(BackupScenario):
    """`sync=none` onto an overlay of the source: whoever reads it sees the first moment."""

    name = "fleecing"
    fates = ("failed", "cancelled")

    async def play(self) -> None:
        world = self.world
        self.source = world.top
        target = await world.new_target(world.name("fleece"), backing=self.source, fails=0.2)
        arguments = self.arguments(target) | {"sync": "none", "compress": False, "device": self.source.name}
        job = await self.try_to_start("blockdev-backup", **arguments)
        if job is not None:
            file = world.host.faults[file_of(target)]
            while not (world.is_over or job.status is JobStatus.NULL):
                await self._read(target, job, file, arguments["on-cbw-error"])
                await asyncio.sleep(self.chance.random() * 0.05)
            if job.status is not JobStatus.NULL:
                await world.cancel(job)
            outcome = await self.end(job)
            assert outcome.fate is Fate.CANCELLED or arguments["on-cbw-error"] == "break-snapshot"
        await world.remove(target)

    async def _read(self, target: Node, job, file, on_cbw_error: str) -> None:
        length = self.chance.choice((512, 10 * KIB, 100 * KIB))
        at = self.chance.randrange(self.world.size - length)
        try:
            async with self.world.host.access(target):
                shown = await target.read(at, length)
        except IoFailure:
            return
        if job.status not in (JobStatus.RUNNING, JobStatus.PAUSED):
            return
        if file.hits and on_cbw_error == "break-snapshot":
            return
        moment = self.first_moment(job.id, self.source)
        where = None if moment is None else moment.wrong_sector(shown, at)
        assert where is None, f"{job.id}, fleecing: sector {where} is not of the first moment"


@dataclass
class Pair:
    """A bitmap of the live disk and a copy; what the bitmap does not mark is equal on both.

    Attributes:
        valid: a first full copy has succeeded.
        in_use: some scenario works on it.
    """

    node: Node
    bitmap: NodeBitmap
    target: Node
    valid: bool = False
    in_use: bool = False


@scenario
class Incremental(BackupScenario):
    """Backups by one bitmap to one target, again and again, in all modes, whatever their fate."""

    name = "incremental"
    weight = 5

    async def play(self) -> None:
        pairs = self.world.__dict__.setdefault("pairs", [])
        for pair in [pair for pair in pairs if not pair.in_use and pair.node is not self.world.top]:
            pairs.remove(pair)
            await self._dissolve(pair)
        pair = next((pair for pair in pairs if not pair.in_use), None)
        if pair is None:
            pair = await self._new_pair()
            pairs.append(pair)
        pair.in_use = True
        await self._copy(pair)
        pair.in_use = False

    async def _new_pair(self) -> Pair:
        world = self.world
        target = await world.new_target(world.name("pair"), fails=0.0)
        name, node = world.name("bitmap"), world.top
        granularity = self.chance.choice((512, 4 * KIB, 64 * KIB, 128 * KIB))
        await world.execute("block-dirty-bitmap-add", node=node.name, name=name, granularity=granularity)
        bitmap = find_bitmap(node.bitmaps, name)
        assert bitmap is not None
        return Pair(node, bitmap, target)

    async def _dissolve(self, pair: Pair) -> None:
        await self.world.execute("block-dirty-bitmap-remove", node=pair.node.name, name=pair.bitmap.name)
        await self.world.remove(pair.target)

    async def _copy(self, pair: Pair) -> None:
        world, chance = self.world, self.chance
        file = file_of(pair.target)
        world.trouble(file, 0.5)
        if pair.valid and chance.random() < 0.8:
            mode = chance.choice(("on-success", "never", "always", None))
            how = {"sync": "bitmap", "bitmap-mode": mode} if mode else {"sync": "incremental"}
        else:
            how = {"sync": "full", "bitmap-mode": chance.choice(("on-success", "always"))}
        what = {"device": pair.node.name, "bitmap": pair.bitmap.name, "compress": False}
        arguments = self.arguments(pair.target) | how | what
        job = await self.try_to_start("blockdev-backup", **arguments)
        if job is None:
            return
        outcome = await self.end(job)
        world.host.faults[file].cure()
        world.tally[f"{how['sync']} {how.get('bitmap-mode')}: {outcome.fate}"] += 1
        if outcome.error is None:
            # A target whose disk once failed to sync cannot succeed again before it is opened anew.
            self.check_copy(await world.shows(pair.target), job.id, pair.node)
            pair.valid = True
        if pair.valid or how == {"sync": "full", "bitmap-mode": "always"}:
            await self._check(pair, outcome.id)

    async def _check(self, pair: Pair, job_id: str) -> None:
        """False clean never: what no bit marks is the same on both sides."""
        world, bitmap = self.world, pair.bitmap
        async with world.host.access(pair.target), world.at_rest():
            if pair.node is not world.top:
                return  # what guests write now goes to an overlay
            shown, expected = await pair.target.read(0, world.size), world.model.moment()
            assert bitmap.successor is None and not bitmap.busy
            for at in range(0, world.size, 512):
                if expected.wrong_sector(shown[at : at + 512], at) is not None:
                    assert bitmap.map.any(Span(at, 512)), f"after {job_id} sector {at // 512} is clean but differs"
