"""External snapshots of the live disk, while jobs run on it."""

from live_backups import BackupScenario
from live_scenarios import scenario
from live_world import refused

from blockjobs.base.errors import UsageError


@scenario
class Snapshot(BackupScenario):
    """A new overlay on top; perhaps in one transaction with a backup of what it lies on."""

    name = "snapshot"
    weight = 2
    fates = ("taken", "taken with a backup")

    async def play(self) -> None:
        world, below = self.world, self.world.top
        overlay = await world.host.image(world.name("overlay"), world.overlay_of(below), backing=None)
        actions = [{"type": "blockdev-snapshot", "data": {"node": below.name, "overlay": overlay.name}}]
        target = None
        if self.chance.random() < 0.4:
            target = await world.new_target(world.name("copied"))
            arguments = self.arguments(target) | {"sync": "full", "device": below.name}
            backup = {"type": "blockdev-backup", "data": arguments}
            actions.insert(self.chance.randrange(2), backup)
        try:
            await world.execute("transaction", actions=actions)
        except UsageError as error:
            refused(error)
            await world.remove(overlay)
        else:
            world.tally[f"{self.name}: taken"] += 1
            if target is not None:
                job = world.watch(arguments["job-id"])
                outcome = await self.end(job)
                world.tally[f"{self.name}: taken with a backup"] += outcome.error is None
                if outcome.error is None:
                    moment = world.moments[job.id, "created"]
                    if moment.top in (below, overlay):  # else a mirror has switched over just before
                        world.demand(await world.shows(target), moment, f"{job.id}, with a snapshot")
        if target is not None:
            await world.remove(target)
