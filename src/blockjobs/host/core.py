"""What a host has besides nodes: jobs, exports, and the machine that the disks belong to."""

import asyncio
from collections.abc import Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

from blockjobs.base.clock import Clock
from blockjobs.base.entropy import Entropy
from blockjobs.base.offload import Offload
from blockjobs.host.nodes import Nodes
from blockjobs.jobs.machine_state import Machine
from blockjobs.lifecycle.engine import Engine

if TYPE_CHECKING:
    from blockjobs.export.registry import Exports


class Core(Nodes):
    """Jobs and exports of one program, on its nodes. See `Host`.

    Attributes:
        jobs: the engine: `submit`, `get`, `jobs`, `history`.
        machine: what the disks belong to; its `without` is where a program puts a `CallbackMachine`.
        quitting: set once `shutdown` has cancelled all jobs; whoever runs the host leaves then.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        offload: Offload | None = None,
        entropy: Entropy | None = None,
        image_roots: Sequence[str] = (),
        history_max: int = 1000,
    ) -> None:
        """See the class.

        Args:
            clock: virtual in tests (`blockjobs.testing.clock`).
            offload: where blocking calls run; threads by default.
            entropy: seeded in simulation.
            image_roots: directories that images may name backing files in; by default their own.
            history_max: outcomes of jobs kept after they were dismissed.
        """
        super().__init__(clock=clock, offload=offload, entropy=entropy, image_roots=image_roots)
        self.jobs = Engine(self.clock, self.bus, history_max=history_max)
        self.machine = Machine(self.objects, self.bus)
        self.quitting = asyncio.Event()

    @cached_property
    def exports(self) -> "Exports":
        """What NBD clients may use: `start_server`, `add`, `remove`, `infos`, `stop_server`."""
        from blockjobs.export.registry import Exports  # with the whole server: many programs export nothing

        return Exports(self.graph, self.bus, self.objects)

    async def __aenter__(self) -> Self:
        await self.jobs.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop all NBD clients, cancel all jobs, wait for them, close all images and stop the workers."""
        try:
            try:
                await self._close_exports()
            finally:
                await self.jobs.__aexit__(kind, error, trace)
        finally:
            await super().__aexit__(kind, error, trace)

    async def shutdown(self) -> None:
        """Drop NBD clients, cancel all jobs, newest first, and set `quitting` (spec/lifecycle.md §5, process exit)."""
        await self._close_exports()
        await self.jobs.cancel_all()
        self.quitting.set()

    async def _close_exports(self) -> None:
        if "exports" in self.__dict__:
            await self.exports.close()
