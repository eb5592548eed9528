"""An engine in virtual time with everything that happens written down, for the tests of this folder."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from blockjobs.base.bus import Bus
from blockjobs.lifecycle.engine import Engine
from blockjobs.lifecycle.events import JobStatusChange
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.spec import Group
from blockjobs.testing.clock import VirtualClock, run
from blockjobs.testing.jobs import ToyJob


class Stage:
    """`diary` mixes status changes (`j running`), hooks and milestones (`j: prepare`) in the order they happened."""

    def __init__(self, engine: Engine, bus: Bus, clock: VirtualClock) -> None:
        self.engine, self.bus, self.clock = engine, bus, clock
        self.diary: list[str] = []

    def note(self, event: object) -> None:
        assert isinstance(event, JobStatusChange)
        self.diary.append(f"{event.id} {event.status}")

    def create(self, id: str = "j", *, type: str = "backup", group: Group | None = None, **wishes: Any) -> JobHandle:
        flags = {
            key: wishes.pop(key) for key in ("auto_finalize", "auto_dismiss", "speed_bytes_per_s") if key in wishes
        }
        toy = wishes.pop("toy", ToyJob)(name=id, diary=Diary(self.diary), **wishes)
        return self.engine.create(type, toy, id=id, group=group, **flags)

    def start(self, id: str = "j", **wishes: Any) -> JobHandle:
        handle = self.create(id, **wishes)
        handle.start()
        return handle

    @property
    def now_s(self) -> float:
        return self.clock.now_ns() / 1e9

    def take(self) -> list[str]:
        """What was written since the last time."""
        told, self.diary[:] = list(self.diary), []
        return told

    @contextmanager
    def only(self) -> Iterator[list[str]]:
        """What is written inside the block."""
        self.take()
        told: list[str] = []
        yield told
        told += self.take()


class Diary(list[tuple[str, str]]):
    """Turns a toy job's notes into lines of the stage's diary."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def append(self, note: tuple[str, str]) -> None:
        self.lines.append(": ".join(note))


def play(scenario: Callable[[Stage], Awaitable[None]]) -> Stage:
    """Run a scenario on a fresh stage; the engine is shut down at the end of it."""

    async def main() -> Stage:
        bus, clock = Bus(), VirtualClock()
        engine = Engine(clock, bus)
        stage = Stage(engine, bus, clock)
        with bus.listening(stage.note):
            async with engine:
                await scenario(stage)
        return stage

    return run(main())


def lines(text: str) -> list[str]:
    """`j running, j: prepare` as a list."""
    return [line.strip() for line in text.split(",") if line.strip()]
