"""One live disk under jobs: a chain of images, guests that write to its top, an operator who interferes, bad luck.

Everything comes from one seed and happens in virtual time, so a seed is a story that can be told again.
"""

import asyncio
import errno
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from live_checks import check_power_cut, errors_of, shown_by
from live_guests import Connection, Door
from live_model import Model, Moment
from live_nbd import NbdDoor

from blockjobs.base.errors import BlockjobsError, IoFailure, UsageError
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.lifecycle.events import JobStatusChange
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.history import Outcome
from blockjobs.lifecycle.status import JobStatus
from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.schema.command import qmp
from blockjobs.testing.faults import Fault, Operation
from blockjobs.testing.host import SimHost

KIB = 1 << 10
LANES = 4
"""Streams of requests, spread over the connections."""
TROUBLE_S = 1.5
"""For so long things are begun, disks fail and the operator interferes; then everything is let come to its end."""
PATIENCE_S = 60.0
"""Virtual seconds after which a story hangs."""

EXCUSES = (
    "busy",
    "in use",
    "conflict",
    "could not be found",
    "read-only",
    "frozen",
    "Need a root block node",
    # Another job has made the chain shorter meanwhile.
    "not in this backing file chain",
    "is not a backing image of",
    "is not in a chain starting from",
)


class Complaints(logging.Handler):
    """Warnings that no story may cause: silent jobs, endless drains, hooks that fail."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not text.startswith("closing node"):  # a disk that fails may not close cleanly
            self.texts.append(text)


class World:
    """One seed's world.

    Attributes:
        model: what the live disk must hold.
        doors: one for each connection of the guests.
        running: jobs that the operator may interfere with.
        moments: content of the live disk when a job came to a status, by (job id, status), if the guests were at rest.
        glimpses: the same, at rest or not: requests that were under way are loose.
        tally: what was tried and how it ended, for tests of the tests.
    """

    def __init__(self, host: SimHost, chance: random.Random) -> None:
        self.host, self.chance = host, chance
        self.size = chance.choice((192 * KIB, 256 * KIB, 448 * KIB + 512))
        self.running: list[JobHandle] = []
        self.moments: dict[tuple[str, str], Moment] = {}
        self.glimpses: dict[tuple[str, str], Moment] = {}
        self.doors: list[Door] = []
        self.tally: Counter[str] = Counter()
        self.ended = False
        self._count = 0
        self._trouble_until_s = 0.0

    # --- the disk

    async def build(self) -> None:
        """The chain, its content, and the guests' hold on its top."""
        chance = self.chance
        content = await self._build_base()
        self.model = Model(bytearray(content.ljust(self.size, b"\0")))
        below = self._base
        for level in range(chance.choice((0, 0, 1, 1, 2))):
            below = await self._layer(f"mid{level}", below)
            await self._scribble(below)
        self.disk = await self._layer("disk", below)
        await self._scribble(self.disk)
        speaks_nbd = chance.random() < 0.5
        for _ in range(chance.choice((1, 2, LANES))):
            door = NbdDoor(chance) if speaks_nbd else Door()
            await door.attach(self.host, self.disk)
            self.doors.append(door)
        self.tally["nbd" if speaks_nbd else "direct"] += 1
        assert await self.view() == self.model.content

    async def _build_base(self) -> bytes:
        chance = self.chance
        size = chance.choice((self.size, self.size, self.size // 2 // 512 * 512))
        content = b"".join(
            chance.randbytes(512) if chance.random() < 0.6 else bytes(512) for _ in range(-(-size // 512))
        )
        if chance.random() < 0.4:
            self._base = await self.host.disk("base-file", content)
        else:
            self._base = await self.host.image("base", self.new_image(size=size))
            async with self.host.access(self._base, write=True) as user:
                await user.node.write(0, content)
                await user.node.flush()
        return content

    async def _layer(self, name: str, below: Node) -> Node:
        return await self.host.image(name, self.overlay_of(below), backing=below.name)

    def overlay_of(self, below: Node) -> NewImage:
        """An image whose header says that it lies on `below`."""
        below = below.storage
        backing_file = below.name if below.driver_name == "file" else below.children["file"].name
        return self.new_image(
            backing_file=backing_file, backing_format="raw" if below.driver_name == "file" else "qcow2"
        )

    async def _scribble(self, node: Node) -> None:
        async with self.host.access(node, write=True) as user:
            for _ in range(self.chance.randrange(12)):
                length = self.chance.choice((1, 3, 16, 100)) * 512
                at = self.chance.randrange((self.size - length) // 512) * 512
                new = self.chance.choice((self.chance.randbytes(length), bytes(length)))
                await user.node.write(at, new)
                self.model.content[at : at + length] = new
            await user.node.flush()
        self.model = Model(self.model.content)

    def new_image(self, **options) -> NewImage:
        chance = self.chance
        return NewImage(
            **{
                "size": self.size,
                "cluster_size": chance.choice((512, 2 * KIB, 4 * KIB, 64 * KIB)),
                "refcount_bits": chance.choice((16, 16, 1, 64)),
                "zstd": chance.random() < 0.3,
                **options,
            }
        )

    @property
    def top(self) -> Node:
        """The image that guests write to at present; filters are skipped."""
        return self.doors[0].node.storage

    async def view(self) -> bytes:
        """All of the live disk, as a guest sees it."""
        return await self.doors[0].node.read(0, self.size)

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """Nothing is under way on any node; the model is exact."""
        async with self.host.graph.drained(None):
            assert all(door.is_at_rest for door in self.doors)
            yield

    # --- what scenarios use

    def name(self, kind: str) -> str:
        """A new name."""
        self._count += 1
        return f"{kind}{self._count}"

    async def execute(self, command: str, **arguments):
        """A QMP command.

        Raises:
            BlockjobsError: refused.
        """
        plain = {name.replace("_", "-"): value for name, value in arguments.items()}
        async with self.host.jobs.control:
            return await qmp.bind(command, plain).run(self.host)

    async def start(self, command: str, **arguments) -> JobHandle:
        """A command that starts a job, which the operator may then interfere with."""
        arguments = {"job-id": self.name("job")} | arguments
        await self.execute(command, **arguments)
        return self.watch(arguments["job-id"])

    def watch(self, job_id: str) -> JobHandle:
        """Let the operator interfere with a job that is there. It may be over already, dismissed by itself."""
        job = self.handles[job_id]
        self.running.append(job)
        return job

    async def outcome(self, job: JobHandle) -> Outcome:
        """Wait for the end of a job."""
        outcome = await job.outcome()
        self.running.remove(job)
        return outcome

    def speed(self) -> int:
        return self.chance.choice((0, 0, 200 * KIB, 2048 * KIB))

    def policy(self) -> str:
        return self.chance.choice(("report", "report", "stop", "ignore", "enospc"))

    async def new_target(self, name: str, *, backing: Node | None = None, fails: float = 0.4) -> Node:
        """An image to copy to, on a disk that perhaps fails."""
        if backing is None and self.chance.random() < 0.25:
            file = f"{name}-file"
            node = await self.host.disk(file, self.chance.randbytes(self.size))
            self.trouble(file, fails)
            return node
        image = self.new_image() if backing is None else self.overlay_of(backing)
        node = await self.host.image(name, image, backing=None if backing is None else backing.storage.name)
        self.trouble(f"{name}-file", fails)
        return node

    def trouble(self, file: str, likely: float = 1.0, *, sync: bool = True) -> None:
        """Perhaps let a disk fail at some time; `sync`: in a way that only opening it anew cures, too."""
        chance = self.chance
        if self.is_over or chance.random() >= likely:
            return
        kinds = (Operation.WRITE, Operation.WRITE, Operation.READ, Operation.ZERO, Operation.SYNC)
        operation = chance.choice(kinds if sync else kinds[:-1])
        self.host.faults[file].add(
            Fault(
                nth=chance.randrange(1, 3 if operation is Operation.SYNC else 25),
                operation=operation,
                errno=chance.choice((errno.EIO, errno.ENOSPC)),
                times=chance.randrange(1, 5),
                short=chance.random() < 0.5,
            )
        )

    async def cancel(self, job: JobHandle) -> None:
        """End a job, unless it has ended meanwhile."""
        with suppress(BlockjobsError):
            await self.execute("job-cancel", id=job.id)

    def demand(self, shown: bytes, expected: Moment, what: str) -> None:
        """A view must be that of a moment."""
        assert len(shown) == len(expected.content), what
        where = expected.wrong_sector(shown)
        assert where is None, f"{what}: sector {where} is wrong"

    async def shows(self, node: Node) -> bytes:
        """All of a node, on a disk that works again."""
        self.host.faults[file_of(node)].cure()
        async with self.host.access(node):
            return await node.read(0, node.length)

    async def check_durable(self, file: str, expected: Moment, what: str) -> None:
        """What was completed survives a power cut, by the image alone; only for chains that its headers name."""
        pages = {name: disk.after_power_cut(self.chance.randrange(1 << 30)) for name, disk in self.host.disks.items()}
        self.demand(await shown_by(pages, file), expected, f"{what} after a power cut")

    async def check_live_disk(self) -> None:
        """A power cut now would leave what guests were promised."""
        seed = self.chance.randrange(1 << 30)
        disks = {name: disk.after_power_cut(seed) for name, disk in self.host.disks.items()}
        await check_power_cut(disks, file_of(self.top), self.model.allowed())

    async def remove(self, node: Node) -> None:
        """Close a node and the file below it; then the image has no errors."""
        file = file_of(node)
        self.host.faults[file].cure()
        for name in dict.fromkeys((node.name, file)):
            with suppress(IoFailure):
                await self.execute("blockdev-del", node_name=name)
        assert not (errors := await errors_of(self.host.disks[file].pages)), (file, errors)

    # --- the story

    @property
    def is_over(self) -> bool:
        """The time of trouble has passed."""
        return asyncio.get_running_loop().time() > self._trouble_until_s

    async def live(self, scenarios: list) -> None:
        """Tell the whole story."""
        self.handles: dict[str, JobHandle] = {}
        complaints = Complaints()
        logging.getLogger("blockjobs").addHandler(complaints)
        try:
            async with asyncio.timeout(PATIENCE_S):
                with self.host.bus.listening(self._notice):
                    await self.build()
                    self._trouble_until_s = asyncio.get_running_loop().time() + TROUBLE_S
                    await self._play(scenarios)
                    await self._finish()
        finally:
            logging.getLogger("blockjobs").removeHandler(complaints)
        # What a disk that failed has not taken cannot be made durable, so its image cannot become read-only again.
        may_stay_writable = any(plan.hits for plan in self.host.faults.values())
        texts = [text for text in complaints.texts if not ("stays writable" in text and may_stay_writable)]
        assert not texts, texts

    def _notice(self, event: object) -> None:
        if isinstance(event, JobStatusChange):
            moment = self.glimpses[event.id, event.status] = self.model.moment(self.top)
            if all(door.is_at_rest for door in self.doors):
                self.moments[event.id, event.status] = moment
            if event.status is JobStatus.CREATED:
                self.handles[event.id] = self.host.jobs.get(event.id)

    async def _play(self, scenarios: list) -> None:
        connections = [
            Connection(self.doors[lane % len(self.doors)], self.model, self.chance, lane, LANES)
            for lane in range(LANES)
        ]
        async with asyncio.TaskGroup() as tasks:
            for connection in connections:
                tasks.create_task(connection.live(lambda: self.ended))
            tasks.create_task(self._operate())
            tasks.create_task(self._cut_power())
            async with asyncio.TaskGroup() as actors:
                for _ in range(self.chance.choice((1, 2, 2))):
                    actors.create_task(self._act(scenarios))
            self.ended = True

    async def _act(self, scenarios: list) -> None:
        weights = [scenario.weight for scenario in scenarios]
        while not self.is_over:
            await asyncio.sleep(self.chance.random() * 0.2)
            scenario = self.chance.choices(scenarios, weights)[0](self)
            self.tally[f"{scenario.name}: begun"] += 1
            await scenario.play()

    async def _operate(self) -> None:
        """An operator who tries things; what is refused is refused."""
        while not self.ended:
            await asyncio.sleep(self.chance.random() * 0.1)
            if self.is_over:
                await self._relent()
            elif self.running:
                await self._interfere(self.chance.choice(self.running))

    async def _interfere(self, job: JobHandle) -> None:
        chance = self.chance
        with suppress(BlockjobsError):
            match chance.choice(("pause", "resume", "resume", "speed", "drain", "look", "cancel", "nothing")):
                case "pause":
                    job.pause()
                case "resume":
                    job.resume()
                case "speed":
                    job.set_speed(chance.choice((0, 100 * KIB, 10240 * KIB)))
                case "drain":
                    async with self.host.graph.drained(self.top if chance.random() < 0.5 else None):
                        await asyncio.sleep(chance.random() * 0.02)
                case "look":
                    async with self.at_rest():
                        with suppress(IoFailure):
                            self.demand(await self.view(), self.model.moment(), "the live disk")
                case "cancel" if chance.random() < 0.2:
                    await self.execute("block-job-cancel", device=job.id, force=chance.random() < 0.5)

    async def _relent(self) -> None:
        """Nothing fails any more, and whatever stands is set going."""
        for plan in self.host.faults.values():
            plan.cure()
        for job in self.running:
            with suppress(UsageError):
                job.set_speed(0)
            with suppress(UsageError):
                job.resume()
        # A disk that once failed to sync cannot be relied on until it is opened anew: a job that waits for it is given
        # up, as by a person. Whatever else does not end now hangs.
        if any(plan.failed_syncs for plan in self.host.faults.values()) and self.running:
            await self.cancel(self.running[0])

    async def _cut_power(self) -> None:
        """At some instant, look at what would be left of the live disk."""
        if self.chance.random() < 0.5:
            await asyncio.sleep(self.chance.random() * TROUBLE_S)
            await self.check_live_disk()
            self.tally["power cut"] += 1

    async def _finish(self) -> None:
        """The guests are gone: everything is there, durable, and no filter is left."""
        for plan in self.host.faults.values():
            plan.cure()
        self.demand(await self.view(), self.model.moment(), "the live disk at the end")
        assert self.doors[0].node is self.top, "a filter was left behind"
        assert len({door.node for door in self.doors}) == 1
        assert not self.host.jobs.jobs()
        mark = self.model.flush_begin()
        await self.doors[0].node.flush()
        self.model.flush_end(mark)
        await self.check_live_disk()
        for door in self.doors:
            await door.detach(self.host)


def file_of(node: Node) -> str:
    """The disk that an image is on."""
    return node.children.get("file", node).name


def refused(error: BlockjobsError) -> None:
    """An operator's attempt may be refused for what others do at the time, never for nonsense."""
    text = str(error)
    assert any(excuse in text for excuse in EXCUSES), text
