"""Jobs that shorten the chain below the live disk: nobody who reads its top sees anything of them."""

import asyncio

from live_checks import backing_named
from live_mirrors import ReadyScenario
from live_scenarios import scenario
from live_world import file_of

from blockjobs.block.node import Node
from blockjobs.lifecycle.handle import JobHandle


class ChainScenario(ReadyScenario):
    """What they have in common."""

    def chain(self) -> list[Node]:
        """Images from the top down; filters are skipped."""
        nodes = [self.world.top]
        while (backing := nodes[-1].backing) is not None:
            nodes.append(backing.storage)
        return nodes

    async def end_and_check(self, job: JobHandle) -> bool:
        """Wait for the end; the live disk is then what it was, also after a power cut. Whether it went well."""
        outcome = await self.end(job)
        await self.world.check_live_disk()
        return outcome.error is None


@scenario
class Stream(ChainScenario):
    """`block-stream` into the top or an image between, down to any base."""

    name = "stream"
    command = "block-stream"
    weight = 4
    fates = ("completed", "cancelled", "whole", "part")

    async def play(self) -> None:
        world, chance, chain = self.world, self.chance, self.chain()
        device = 0 if chance.random() < 0.7 else chance.randrange(len(chain))
        below = chain[device + 1 :]
        how = {}
        base = None
        if below and chance.random() < 0.6:
            index = chance.randrange(len(below))
            base = below[index]
            if index and chance.random() < 0.5:
                how["bottom"] = below[index - 1].name
            else:
                how["base-node"] = base.name
        world.trouble(file_of(chain[device]), 0.25, sync=False)
        job = await self.try_to_start(
            "block-stream",
            device=chain[device].name,
            speed=world.speed(),
            **{"on-error": world.policy()},
            **how,
        )
        if job is None:
            return
        if chance.random() < 0.2:
            await asyncio.sleep(chance.random() ** 3 * 0.05)  # mostly soon: many streams take no longer
            await world.cancel(job)
        if await self.end_and_check(job) and "bottom" not in how:
            node = chain[device]
            now = None if node.backing is None else node.backing.storage
            named = backing_named(world.host.disks[file_of(node)].pages)
            if now is base and node.driver_name == "qcow2":  # else another job has gone on from there
                assert named == (None if base is None else file_of(base)), (named, base)
            world.tally["stream: whole" if base is None else "stream: part"] += 1


@scenario
class Commit(ChainScenario):
    """`block-commit`, of the active layer (ready first, then a pivot) and of images between."""

    name = "commit"
    command = "block-commit"
    weight = 4
    fates = ("completed", "cancelled", "active", "between", "pivot")

    async def play(self) -> None:
        world, chance, chain = self.world, self.chance, self.chain()
        if len(chain) < 2:
            return
        top = 0 if chance.random() < 0.5 else chance.randrange(len(chain) - 1)
        base = chance.randrange(top + 1, len(chain))
        world.trouble(file_of(chain[base]), 0.25, sync=False)
        how = {"top-node": chain[top].name} if top or chance.random() < 0.5 else {}
        job = await self.try_to_start(
            "block-commit",
            device=chain[0].name,
            speed=world.speed(),
            **{"base-node": chain[base].name, "on-error": world.policy()},
            **how,
        )
        if job is None:
            return
        if not top:
            await self.conclude(job, chain[base], ("complete", "complete", "complete", "soft", "force"))
        if await self.end_and_check(job):
            world.tally["commit: active" if not top else "commit: between"] += 1
            if not top and world.top is chain[base]:
                world.tally["commit: pivot"] += 1
