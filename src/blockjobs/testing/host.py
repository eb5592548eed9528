"""A whole host in simulated time: real nodes, real jobs, disks in memory, and chance from one seed (design §4.4).

    async def scenario() -> None:
        async with SimHost(seed=7) as host:
            source = await host.disk("source", b"..." * 1000)
            target = await host.image("target", NewImage(size=source.length))
            job = await host.backup(source, target, speed_bytes_per_s=1000)
            host.faults["target-file"].add(Fault(nth=3, operation=Operation.WRITE))
            print(await job.outcome())

    run(scenario())        # blockjobs.testing.clock: an hour of throttling takes no time

The same seed gives the same run, event for event.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TypeVar, TypeVarTuple

from blockjobs.base.entropy import SeededEntropy
from blockjobs.base.offload import InlineOffload
from blockjobs.block.cipher import SectorCipher
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.node import Node
from blockjobs.host import Host
from blockjobs.testing.clock import VirtualClock
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import FaultPlan, FaultyMedium
from blockjobs.testing.nbd_guest import NbdGuest, Wire, attach

T = TypeVar("T")
Args = TypeVarTuple("Args")


class SlowOffload(InlineOffload):
    """Blocking calls in the loop's thread that take a random, virtual time: requests overtake each other."""

    def __init__(self, seed: int, *, latency_s_max: float) -> None:
        self._chance = random.Random(seed)
        self._latency_s_max = latency_s_max

    async def run(self, work: Callable[[*Args], T], *args: *Args) -> T:
        """See `Offload`. The call itself happens at a random moment of its time: at the beginning or at the end."""
        latency_s = self._chance.random() ** 3 * self._latency_s_max
        if self._chance.random() < 0.5:
            await asyncio.sleep(latency_s)
            return work(*args)
        try:
            result = work(*args)
        finally:
            await asyncio.sleep(latency_s)
        return result


class SimHost(Host):
    """A `Host` in virtual time.

    Attributes:
        disks: what the file nodes are on, by node name; they outlive the host.
        faults: what fails there; empty plans at first.
        events: everything published, in order.
    """

    def __init__(self, seed: int = 0, *, latency_s_max: float = 0.0, cached_share: float = 0.0) -> None:
        """See the class.

        Args:
            seed: everything that is random comes from it.
            latency_s_max: longest virtual time of a disk request; 0 keeps requests in order.
            cached_share: of short requests, 0 to 1, how many find their bytes in memory.
        """
        offload = SlowOffload(seed, latency_s_max=latency_s_max) if latency_s_max else InlineOffload()
        super().__init__(clock=VirtualClock(), offload=offload, entropy=SeededEntropy(seed))
        self._cached, self._cached_share = random.Random(seed), cached_share
        self.disks: dict[str, SimDisk] = {}
        self.faults: dict[str, FaultPlan] = {}
        self.events: list[object] = []
        self._wires: list[Wire] = []
        self._listening = ExitStack()

    async def __aenter__(self) -> Self:
        self._listening.enter_context(self.bus.listening(self.events.append))
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `Host`; faults are over first."""
        for plan in self.faults.values():
            plan.cure()
        with self._listening:
            await super().__aexit__(kind, error, trace)
        for wire in self._wires:
            wire.abort()
        await asyncio.sleep(0)

    async def disk(self, name: str, content: bytes | Pages = b"", *, read_only: bool = False) -> Node:
        """A file node of that name over a disk in memory.

        Raises:
            UsageError: the name is taken.
        """
        self.disks[name] = SimDisk(content)
        self.faults[name] = FaultPlan()
        medium = FaultyMedium(
            self.disks[name],
            self.faults[name],
            is_cached=lambda: self._cached.random() < self._cached_share,
        )
        return await self.graph.open_medium(medium, name, read_only=read_only)

    async def image(
        self,
        name: str,
        image: NewImage | Pages,
        *,
        backing: str | None = None,
        cipher: SectorCipher | None = None,
        tweaks_on_disk: bool = False,
    ) -> Node:
        """A qcow2 node of that name; its disk is `<name>-file`.

        Args:
            image: what to make, or an image that is there already.
            backing: name of the backing node.
            cipher: what enciphers the disk, although the header does not say so.
            tweaks_on_disk: it counts from the beginning of the disk and not of the file.

        Raises:
            UsageError: the name is taken, or no such image can be made.
        """
        file = await self.disk(f"{name}-file", image if isinstance(image, Pages) else b"")
        if isinstance(image, NewImage):
            user = await self.graph.claim("a test", file, needs=Perm.WRITE | Perm.RESIZE, shares=ALL)
            await create_image(file, None, image)
            await self.graph.release(user)
        options = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": backing, "discard": "unmap"}
        node = await self.blockdev_add(options)
        if cipher is not None:
            assert isinstance(node.driver, Qcow2)
            node.driver.image.encipherment = Encipherment(cipher, None if tweaks_on_disk else 0)
        return node

    async def nbd_attach(self) -> Wire:
        """A client of the NBD server that has not said anything yet."""
        assert self.exports.server is not None
        wire = await attach(self.exports.server)
        self._wires.append(wire)
        return wire

    async def nbd_guest(
        self,
        export: str,
        *,
        structured: bool = True,
        extended: bool = False,
        contexts: Sequence[str] = (),
    ) -> NbdGuest:
        """A guest at work on an export. Raises: as `NbdGuest.negotiate`."""
        guest = NbdGuest(await self.nbd_attach())
        await guest.negotiate(export, structured=structured, extended=extended, contexts=contexts)
        return guest
