"""A power cut during a backup: the target is always whole, after COMPLETED it is the source of the first moment.

The source's guest goes on writing meanwhile; its disk must keep the guest's promises with the job's filter above it.
"""

import asyncio
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from replay import SEEDS, Guest, blank, opened, own_errors, qemu_errors, shown
from workload import STATES_MAX, states_of

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import BlockjobsError
from blockjobs.base.offload import InlineOffload, Offload, Started, ThreadOffload
from blockjobs.block import execute
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.medium import Medium
from blockjobs.block.users import Root
from blockjobs.jobs.events import BlockJobCompleted
from blockjobs.jobs.transaction import TransactionAction, run_transaction
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.crash import CrashState, RecordingMedium, WriteLog
from blockjobs.testing.disk import Act, Pages, SimDisk
from blockjobs.testing.little_host import LittleHost

Recorder = Callable[[SimDisk, WriteLog, str], RecordingMedium]

KIB, MIB = 1 << 10, 1 << 20
SIZE, UNIT = MIB, 64 * KIB
QEMU_SAMPLE = 6


@dataclass(frozen=True)
class Setup:
    """A backup: `job` are arguments of blockdev-backup.

    Attributes:
        over: the target is full of something else.
        layered: the source lies on a raw image.
    """

    target: NewImage
    job: dict[str, object]
    source: NewImage | None = None
    over: bool = False
    layered: bool = False


BIG, SMALL = NewImage(size=SIZE), NewImage(size=SIZE, cluster_size=4 * KIB)
SUBCLUSTERS = NewImage(size=SIZE, extended_l2=True)
DATA_FILE = NewImage(size=SIZE, data_file_name="data")
RAW_DATA_FILE = NewImage(size=SIZE, data_file_name="data", data_file_raw=True)
SETUPS = {
    "full": Setup(BIG, {"sync": "full"}, SMALL),
    "compressed": Setup(BIG, {"sync": "full", "compress": True}, SMALL),
    "compressed into small clusters": Setup(SMALL, {"sync": "full", "compress": True}, BIG),
    "slow, into small clusters": Setup(SMALL, {"sync": "full", "speed": 500 * KIB}, SMALL),
    "of a raw disk": Setup(SMALL, {"sync": "full"}),
    "discarding its source": Setup(SMALL, {"sync": "full", "discard-source": True}),
    "top": Setup(SMALL, {"sync": "top"}, SMALL),
    "over a full copy": Setup(SMALL, {"sync": "full", "speed": 0}, SMALL, over=True),
    "of a chain": Setup(BIG, {"sync": "full", "speed": 0}, BIG, layered=True),
    "from and to subclusters": Setup(SUBCLUSTERS, {"sync": "full", "speed": 0}, SUBCLUSTERS),
    "to a data file": Setup(DATA_FILE, {"sync": "full", "speed": 0}, BIG),
    "to a raw data file": Setup(RAW_DATA_FILE, {"sync": "full", "speed": 0}, BIG),
}


@dataclass
class Recorded:
    """What happened, and what was promised."""

    log: WriteLog
    start: dict[str, Pages]
    guest: Guest
    content: bytes
    completed: int
    source_options: dict[str, object]
    moves: bool = False
    before: bytes = bytes(SIZE)
    is_data_file_raw: bool = False


async def filled(image: NewImage | None, chance: random.Random) -> dict[str, Pages]:
    """The disks of a source with some content; raw if there is no image."""
    if image is None:
        pages = Pages(chance.randbytes(SIZE // 2) + bytes(SIZE // 2))
        return {"source-disk": pages}
    disks = {name: SimDisk(pages) for name, pages in (await blank(image)).items()}
    async with opened(disks, {"file": "disk"}) as node:
        for _ in range(12):
            await node.write(
                chance.randrange(SIZE // 512 - 128) * 512, chance.randbytes(chance.randrange(1, 128) * 512)
            )
    return {"source-disk": disks["disk"].pages}


async def new_target(setup: Setup, chance: random.Random) -> dict[str, Pages]:
    """Its disks, full of something else if that is wanted."""
    disks = {name: SimDisk(pages) for name, pages in (await blank(setup.target)).items()}
    if setup.over:
        async with opened(disks, {"file": "disk"}) as node:
            await node.write(0, chance.randbytes(SIZE))
    return {name: disk.pages for name, disk in disks.items()}


async def write_on(guest: Guest, user: Root, chance: random.Random, *, writes: int) -> None:
    """A guest that writes and flushes now and then."""
    for _ in range(writes):
        await asyncio.sleep(chance.random() * 0.1)
        at, content = chance.randrange(SIZE // 512 - 64) * 512, chance.randbytes(chance.randrange(1, 64) * 512)
        await guest.change(at, content, lambda at=at, content=content: user.node.write(at, content))
        if chance.random() < 0.4:
            await guest.flush(user.node.flush)


def record(
    setup: Setup, seed: int, *, recorder: Recorder = RecordingMedium, offload: Offload | None = None
) -> Recorded:
    """Run the backup under a writing guest."""

    async def scenario() -> Recorded:
        chance = random.Random(seed)
        log, completed = WriteLog(), [0]
        start = await filled(setup.source, chance)
        if setup.layered:
            start["base-disk"] = Pages(
                b"".join(chance.choice((bytes(UNIT), chance.randbytes(UNIT))) for _ in range(SIZE // UNIT))
            )
        start |= {f"target-{name}": pages for name, pages in (await new_target(setup, chance)).items()}
        moves = "discard-source" in setup.job
        driver = "qcow2" if setup.source else "raw"
        options: dict[str, object] = {"driver": driver, "file": "source-disk", "discard": "unmap"}
        async with LittleHost(seed=seed, offload=offload) as host:

            def note(event: object) -> None:
                if isinstance(event, BlockJobCompleted):
                    assert event.error is None
                    completed[0] = log.mark("completed")

            for name, pages in start.items():
                await host.graph.open_medium(recorder(SimDisk(pages), log, name), name)
            if setup.layered:
                options["backing"] = "base-disk"
            source = await host.add(node_name="source", **options)
            more = {"data_file": "target-data"} if "target-data" in start else {}
            target = await host.add(node_name="target", driver="qcow2", file="target-disk", discard="unmap", **more)
            before = await target.read(0, SIZE)
            content = await source.read(0, SIZE)
            guest = Guest(log, content, SIZE)
            user = await host.graph.claim("a guest", source, needs=Perm.CONSISTENT_READ | Perm.WRITE, shares=ALL)
            with host.bus.listening(note):
                described = {"job-id": "job0", "device": "source", "target": "target", "speed": 2 * MIB, **setup.job}
                await run_transaction(
                    host, [convert({"type": "blockdev-backup", "data": described}, TransactionAction)]
                )
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(write_on(guest, user, chance, writes=0 if moves else 12))
                    await host.jobs.get("job0").outcome()
            assert await target.read(0, SIZE) == content
            await host.graph.release(user)
        return Recorded(log, start, guest, content, completed[0], options, moves, before, setup.target.data_file_raw)

    return run(scenario())


async def complaint(state: CrashState, recorded: Recorded) -> str:
    """What is wrong with a crash state; empty if nothing."""
    target, source = (disks_of(state, name) for name in ("target", "source"))
    try:
        if errors := await own_errors(target):
            return f"{state.story}: target: {errors}"
        copied = await shown(target, {"file": "disk", **({"data-file": "data"} if "data" in target else {})})
        if recorded.is_data_file_raw and target["data"].read(0, SIZE) != copied:
            return f"{state.story}: the data file alone does not show the disk"
        if state.issued > recorded.completed and copied != recorded.content:
            return f"{state.story}: completed, but the copy is not there"
        left = await source_content(source, recorded)
        if recorded.moves:
            return "" if is_somewhere(left, copied, recorded.content) else f"{state.story}: content is on neither side"
        if lies := recorded.guest.lies(left, state.issued):
            return f"{state.story}: source: wrong sectors {lies[:10]}"
    except BlockjobsError as error:
        return f"{state.story}: cannot be read: {error!r}"
    return foreign(copied, recorded)


def disks_of(state: CrashState, side: str) -> dict[str, Pages]:
    return {name.removeprefix(f"{side}-"): pages for name, pages in state.images.items() if name.startswith(side)}


async def source_content(source: Mapping[str, Pages], recorded: Recorded) -> bytes:
    if recorded.source_options["driver"] == "raw":
        return source["disk"].read(0, SIZE)
    below = recorded.source_options.get("backing")
    base = {"base-disk": recorded.start["base-disk"]} if below else {}
    return await shown({**source, **base}, {"file": "disk", **({"backing": below} if below else {})})


def is_somewhere(left: bytes, copied: bytes, content: bytes) -> bool:
    """Whether each sector is on one side at least."""
    return all(
        content[at : at + 512] in (left[at : at + 512], copied[at : at + 512]) for at in range(0, len(content), 512)
    )


def foreign(copied: bytes, recorded: Recorded) -> str:
    """The target shows the point in time or what it had before, never what the guest wrote later."""
    for start in range(0, SIZE, 16 * KIB):
        stretch, right, before = (
            each[start : start + 16 * KIB] for each in (copied, recorded.content, recorded.before)
        )
        if stretch in (right, before):
            continue
        for at in range(0, 16 * KIB, 512):
            sector = stretch[at : at + 512]
            if sector != right[at : at + 512] and sector != before[at : at + 512]:
                return f"sector {(start + at) // 512} of the target is neither what was there nor the source's"
    return ""


def judge(recorded: Recorded, states: list[CrashState], seed: int) -> None:
    """Every one of these states keeps what was promised."""

    async def look() -> None:
        for state in states:
            assert not (wrong := await complaint(state, recorded)), f"seed {seed}, {wrong}"

    asyncio.run(look())


class TwoWorkers(InlineOffload):
    """Work is done in the loop's thread, at one instant of virtual time; a second worker may be a thread of its own."""

    cores = 2

    def __init__(self) -> None:
        self._pool = ThreadOffload(1)

    def start(self, work: Callable[[], None]) -> Started:
        loop = asyncio.get_running_loop()

        def beside() -> None:
            asyncio._set_running_loop(loop)  # it asks what time it is, which the loop knows
            try:
                work()
            finally:
                asyncio._set_running_loop(None)

        return self._pool.start(beside)

    def close(self) -> None:
        self._pool.close()


class SlowerBeside(RecordingMedium):
    """Is copied to by two; what the second thread writes arrives late, and is recorded when it does."""

    is_faster_by_two = True

    def __init__(self, inner: SimDisk, log: WriteLog, disk: str) -> None:
        super().__init__(inner, log, disk)
        self._one_by_one = threading.Lock()

    def write(self, at: int, content: Buffer) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.02)
            self.log.mark("beside")
        with self._one_by_one:
            super().write(at, content)


class Rewritten(RecordingMedium):
    """Does not say where nobody has ever written."""

    def unwritten_at(self) -> int:
        return Medium.unwritten_at(self)


def test_replays_meet_zeroes_that_are_left_to_the_end_of_the_file() -> None:
    """Else the states above would not be those of a real file, where a copy behind them makes them."""

    def zeroed(recorder: Recorder) -> int:
        log = record(SETUPS["full"], 0, recorder=recorder).log
        return sum(change.act is Act.ZERO and change.disk == "target-disk" for change in log.changes)

    assert zeroed(RecordingMedium) < zeroed(Rewritten)


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoWorkers]:
    monkeypatch.setattr(execute, "STRIDE_BYTES", 16 * KIB)
    monkeypatch.setattr(execute, "TOGETHER_BYTES", 16 * KIB)
    offload = TwoWorkers()
    yield offload
    offload.close()


@pytest.mark.parametrize("name", ["full", "of a raw disk"])
def test_a_backup_by_two_workers(name: str, two_workers: TwoWorkers) -> None:
    """Nothing is shown before both of them have written it."""
    for seed in range(SEEDS):
        recorded = record(SETUPS[name], seed, recorder=SlowerBeside, offload=two_workers)
        assert recorded.completed
        assert any(label == "beside" for _, label in recorded.log.marks(recorded.completed))
        judge(recorded, states_of(recorded.log, recorded.start, seed, least=50, most=STATES_MAX), seed)


@pytest.mark.parametrize("name", SETUPS)
def test_backup(name: str, tmp_path: Path) -> None:
    for seed in range(SEEDS):
        recorded = record(SETUPS[name], seed)
        assert recorded.completed
        least, most = (10, 1000) if recorded.moves else (50, STATES_MAX)
        states = states_of(recorded.log, recorded.start, seed, least=least, most=most)

        judge(recorded, states, seed)
        if shutil.which("qemu-img"):
            for state in random.Random(seed).sample(states, QEMU_SAMPLE):
                errors = qemu_errors(disks_of(state, "target"), tmp_path)
                assert not errors, f"seed {seed}, {state.story}: {errors}"
