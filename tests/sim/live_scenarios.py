"""What an operator may do with a live disk; a new kind of job is one more class here."""

from abc import ABC, abstractmethod
from typing import ClassVar

from live_world import World, refused

from blockjobs.base.errors import UsageError
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.history import Outcome

SCENARIOS: list[type["Scenario"]] = []


class Scenario(ABC):
    """One undertaking, from its first command to the check of its result.

    Attributes:
        name: for the tally.
        weight: how often it is chosen.
        command: what it needs.
        fates: how it must be seen to end, over many seeds.
    """

    name: ClassVar[str]
    command: ClassVar[str] = "blockdev-backup"
    fates: ClassVar[tuple[str, ...]] = ("completed", "failed", "cancelled")
    weight: ClassVar[int] = 2

    def __init__(self, world: World) -> None:
        self.world, self.chance = world, world.chance

    @abstractmethod
    async def play(self) -> None:
        """Do it and check it. What is refused because of others' doings is no failure."""

    async def try_to_start(self, command: str, **arguments) -> JobHandle | None:
        """Start a job, or find out that it is refused now."""
        try:
            return await self.world.start(command, **arguments)
        except UsageError as error:
            refused(error)
            self.world.tally[f"{self.name}: refused"] += 1
            return None

    async def end(self, job: JobHandle) -> Outcome:
        """Wait for a job's end and count it."""
        outcome = await self.world.outcome(job)
        self.world.tally[f"{self.name}: {outcome.fate}"] += 1
        return outcome


def scenario(kind: type[Scenario]) -> type[Scenario]:
    """Enter a class among the things that happen."""
    SCENARIOS.append(kind)
    return kind
