"""blklogwrites: replaying the log gives what was durable at each flush; QEMU writes the same log for the same."""

import asyncio
import json
import random
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB
from blockjobs.block.node import Node
from blockjobs.block.objects import AnyObjectOptions, add_object
from blockjobs.host import Host
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.crash import RecordingMedium, WriteLog, crash_states
from blockjobs.testing.disk import Pages, SimDisk
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation
from blockjobs.testing.little_host import LittleHost, make_disk
from blockjobs.wire.write_log import (
    ENTRY_BYTES,
    SUPER_BYTES,
    Entry,
    EntryFlag,
    is_sector_size,
    pack_entry,
    pack_super,
    unpack_entry,
    unpack_super,
)

SIZE = 256 * KiB
CONTENT = random.Random(3).randbytes(SIZE)

Scenario = Callable[[LittleHost, Node, FaultPlan, FaultPlan], Awaitable[None]]


def with_log(scenario: Scenario, *, log: bytes = b"", **options: object) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            plans = FaultPlan(), FaultPlan()
            for name, content, plan in zip(("disk", "log"), (CONTENT, log), plans, strict=True):
                host.disks[name] = make_disk(content)
                await host.disk(name, b"", medium=FaultyMedium(host.disks[name], plan))
            node = await host.add(
                driver="blklogwrites", node_name="n", file="disk", log="log", discard="unmap", **options
            )
            guest = await host.guest(node)
            await scenario(host, node, *plans)
            await host.graph.release(guest)

    run(main())


def entries_of(log: bytes) -> Iterator[tuple[Entry, bytes]]:
    """The entries that count, each with its payload."""
    head = unpack_super(log[:SUPER_BYTES])
    at, unit = head.sector_bytes, head.sector_bytes
    for _ in range(head.entries):
        entry = unpack_entry(log[at : at + ENTRY_BYTES])
        assert not any(log[at + ENTRY_BYTES : at + unit])
        end = at + unit + entry.stored_sectors * unit
        payload = log[at + unit : end]
        yield entry, payload.ljust(end - at - unit, b"\0")
        at = end


def replayed(log: bytes, start: bytes) -> list[bytes]:
    """The disk after each flush, and at the end."""
    unit = unpack_super(log[:SUPER_BYTES]).sector_bytes
    disk, found = bytearray(start), []
    for entry, payload in entries_of(log):
        at, length = entry.sector * unit, entry.sectors * unit
        if entry.flags & EntryFlag.FLUSH:
            found.append(bytes(disk))
        else:
            disk[at : at + length] = bytes(length) if entry.flags & EntryFlag.DISCARD else payload
    return [*found, bytes(disk[: len(start)])]


def logged(host: LittleHost, name: str = "log") -> bytes:
    disk = host.disks[name]
    return disk.pages.read(0, disk.size())


def shapes(log: bytes) -> list[tuple[int, int, int]]:
    return [(entry.sector, entry.sectors, int(entry.flags)) for entry, _ in entries_of(log)]


def test_what_each_kind_of_request_leaves() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan, log_plan: FaultPlan) -> None:
        assert logged(host) == b""
        await node.write(0, b"a" * 1024)
        await node.write(4096, b"b" * 512, fua=True)
        await node.discard(Span(64 * KiB, 64 * KiB))
        await node.zero(Span(128 * KiB, 64 * KiB))
        await node.write(700, b"c" * 100)  # whole sectors, with what was there
        await node.flush()
        assert shapes(logged(host)) == [
            (0, 2, 0), (8, 1, 0), (0, 0, 1), (128, 128, 4), (256, 128, 0), (1, 1, 0), (0, 0, 1)
        ]  # fmt: skip
        assert unpack_super(logged(host)[:SUPER_BYTES])[2:] == (7, 512)
        assert replayed(logged(host), CONTENT)[-1] == await node.read(0, SIZE)

    with_log(scenario)


@pytest.mark.parametrize("sector", [32, 512, 4096])
@pytest.mark.parametrize("seed", range(3))
def test_the_log_replays_to_what_was_durable_at_each_flush(sector: int, seed: int) -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan, log_plan: FaultPlan) -> None:
        chance = random.Random(seed)
        model = bytearray(CONTENT)
        durable: list[bytes] = []
        for _ in range(40):
            length = chance.choice((1, 512, 5000, 30000))
            at = chance.randrange(SIZE - length)
            match chance.choice(("write", "write", "zero", "flush")):
                case "write":
                    model[at : at + length] = content = chance.randbytes(length)
                    await node.write(at, content)
                case "zero":
                    model[at : at + length] = bytes(length)
                    await node.zero(Span(at, length))
                case "flush":
                    await node.flush()
                    durable.append(bytes(model))
        assert await node.read(0, SIZE) == model
        assert replayed(logged(host), CONTENT)[: len(durable)] == durable

    with_log(scenario, log_sector_size=sector)


def test_a_write_that_completes_during_a_flush_stands_behind_it() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("disk", CONTENT)
            await host.disk("log", 0)
            group = {"qom-type": "throttle-group", "id": "g", "limits": {"bps-write": 1024}}
            add_object(host.graph.objects, convert(group, AnyObjectOptions), host.clock)
            slow = {"driver": "throttle", "throttle-group": "g", "file": "disk"}
            node = await host.add(driver="blklogwrites", node_name="n", file=slow, log="log")
            guest = await host.guest(node)
            await node.write(0, b"a" * 4096)
            late = asyncio.ensure_future(node.write(4096, b"b" * 512))
            await asyncio.sleep(1)
            await node.flush()
            assert not late.done()
            await late
            await node.flush()
            assert shapes(logged(host)) == [(0, 8, 0), (0, 0, 1), (8, 1, 0), (0, 0, 1)]
            await host.graph.release(guest)

    run(main())


def test_requests_that_fail_are_not_in_the_log() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan, log_plan: FaultPlan) -> None:
        plan.add(Fault(nth=2, operation=Operation.WRITE))
        plan.add(Fault(nth=1, operation=Operation.ZERO))
        await node.write(0, b"a" * 512)
        for request in (node.write(0, b"b" * 512), node.zero(Span(0, 512))):
            with pytest.raises(IoFailure):
                await request
        plan.add(Fault(nth=1, operation=Operation.SYNC))
        with pytest.raises(IoFailure):
            await node.flush()
        plan.cure()
        await node.write(512, b"c" * 512)
        driver = node.driver
        await driver.log.flush()
        assert shapes(logged(host)) == [(0, 1, 0), (0, 0, 0), (1, 1, 0)]

    with_log(scenario)


def test_a_log_that_cannot_be_written_fails_the_request_and_all_later_flushes() -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan, log_plan: FaultPlan) -> None:
        await node.write(0, b"a" * 512)
        await node.flush()
        log_plan.add(Fault(nth=1, operation=Operation.WRITE))
        with pytest.raises(IoFailure):
            await node.write(0, b"b" * 512)
        await node.write(512, b"c" * 512)
        with pytest.raises(IoFailure):
            await node.flush()
        assert shapes(logged(host)) == [(0, 1, 0), (0, 0, 1)]

    with pytest.raises(IoFailure):  # closing says it once more
        with_log(scenario)


def test_the_superblock_never_counts_what_a_power_cut_may_take() -> None:
    changes = WriteLog()

    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("disk", CONTENT)
            await host.disk("log", b"", medium=RecordingMedium(SimDisk(), changes, "log"))
            options = {"driver": "blklogwrites", "node_name": "n", "file": "disk", "log": "log"}
            node = await host.add(**options, log_super_update_interval=3)
            guest = await host.guest(node)
            for step in range(20):
                await node.write(step * 1024, bytes([step + 1]) * 512)
                if step % 7 == 6:
                    await node.flush()
            await host.graph.release(guest)

    run(main())
    counted = set()
    for state in crash_states(changes, {"log": Pages()}, seed=1):
        image = state.images["log"]
        log = image.read(0, image.size)
        if any(log[:SUPER_BYTES]):
            counted.add(unpack_super(log[:SUPER_BYTES]).entries)
            for entry, payload in entries_of(log):
                assert entry.flags == EntryFlag.FLUSH or payload == bytes([entry.sector // 2 + 1]) * 512
    assert len(counted) > 5


def test_appending_goes_on_where_the_log_ends() -> None:
    first: list[bytes] = []

    async def begin(host: LittleHost, node: Node, plan: FaultPlan, log_plan: FaultPlan) -> None:
        await node.write(0, b"a" * 4096)
        await node.discard(Span(64 * KiB, 64 * KiB))
        await node.flush()
        first.append(logged(host))

    async def go_on(host: LittleHost, node: Node, plan: FaultPlan, log_plan: FaultPlan) -> None:
        await node.write(8192, b"b" * 4096)
        await node.flush()
        log = logged(host)
        assert unpack_super(log[:SUPER_BYTES]).sector_bytes == 4096
        assert log[4096 : len(first[0])] == first[0][4096:]
        assert shapes(log) == [(0, 1, 0), (16, 16, 4), (0, 0, 1), (2, 1, 0), (0, 0, 1)]

    async def begin_anew(host: LittleHost, node: Node, plan: FaultPlan, log_plan: FaultPlan) -> None:
        await node.write(0, b"c" * 512)
        assert shapes(logged(host)) == []  # the old entries do not count any more
        await node.flush()
        assert shapes(logged(host)) == [(0, 1, 0), (0, 0, 1)]

    with_log(begin, log_sector_size=4096)
    with_log(go_on, log=first[0], log_append=True)
    with_log(begin_anew, log=first[0])
    with_log(begin_anew, log_append=True)


@pytest.mark.parametrize(
    ("options", "log", "text"),
    [
        *[({"log_sector_size": size}, b"", f"Invalid log sector size {size}") for size in (0, 16, 100, 1 << 24)],
        ({"log_super_update_interval": 0}, b"", "Invalid log superblock update interval 0"),
        ({"log_append": True, "log_sector_size": 512}, b"", "log-append and log-sector-size are mutually exclusive"),
        ({"log_append": True}, b"x" * 4096, "Invalid log superblock magic"),
        ({"log_append": True}, pack_super(0, 512)[:8] + b"\2" + bytes(503), "Unsupported log version 2"),
        ({"log_append": True}, pack_super(0, 100), "Invalid log sector size 100"),
        ({"log_append": True}, pack_super(9, 512), "The log ends before entry 0 of 9"),
        (
            {"log_append": True},
            pack_super(1, 512) + pack_entry(Entry(0, 0, 0x20), 512),
            "Invalid flags 0x20 in log entry 0",
        ),
    ],
)
def test_refused(options: dict[str, object], log: bytes, text: str) -> None:
    async def scenario(host: LittleHost, node: Node, plan: FaultPlan, log_plan: FaultPlan) -> None:
        raise AssertionError("opened")

    with pytest.raises(UsageError) as caught:
        with_log(scenario, log=log, **options)
    assert str(caught.value) == text


def test_the_codec() -> None:
    assert unpack_super(pack_super(7, 512)[:SUPER_BYTES])[2:] == (7, 512)
    assert len(pack_super(7, 4096)) == 4096
    entry = Entry(1, 2, EntryFlag.FUA)
    assert unpack_entry(pack_entry(entry, 512)[:ENTRY_BYTES]) == entry
    assert [size for size in range(70) if is_sector_size(size)] == [32, 64]
    assert entry._replace(flags=EntryFlag.DISCARD).stored_sectors == 0


@pytest.mark.qemu
@pytest.mark.parametrize("sector", [None, 4096])
def test_qemu_writes_the_same_log(sector: int | None, tmp_path: Path) -> None:
    requests = [
        ("write", 0, 1024), ("write -f", 8192, 4096), ("discard", 65536, 65536), ("write -z", 131072, 65536),
        ("write -zu", 196608, 4096), ("flush", 0, 0), ("write", 700, 100), ("write", 4000, 8192), ("flush", 0, 0),
    ]  # fmt: skip
    options = {"driver": "blklogwrites", "discard": "unmap"}
    if sector is not None:
        options["log-sector-size"] = sector

    def described(folder: str) -> dict[str, object]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "disk").write_bytes(CONTENT)
        (tmp_path / folder / "log").touch()
        nodes = {
            name: {"driver": "file", "filename": str(tmp_path / folder / name), "discard": "unmap"}
            for name in ("disk", "log")
        }
        return {**options, "file": nodes["disk"], "log": nodes["log"]}

    theirs = described("qemu")
    words = [
        word
        for number, (what, at, length) in enumerate(requests)
        for word in (
            "-c",
            what
            if what == "flush"
            else f"{what} {f'-P {number + 1} ' if what in ('write', 'write -f') else ''}{at} {length}",
        )
    ]
    command = ["qemu-io", "-t", "writeback", *words, f"json:{json.dumps(theirs)}"]
    subprocess.run(command, check=True, capture_output=True)

    async def ours() -> None:
        async with Host() as host:
            node = await host.blockdev_add({"node-name": "n", **described("ours")})
            async with host.access(node, write=True):
                for number, (what, at, length) in enumerate(requests):
                    match what:
                        case "flush":
                            await node.flush()
                        case "discard":
                            await node.discard(Span(at, length))
                        case "write" | "write -f":
                            await node.write(at, bytes([number + 1]) * length, fua=what == "write -f")
                        case _:
                            await node.zero(Span(at, length))

    asyncio.run(ours())
    mine, other = ((tmp_path / folder / "log").read_bytes() for folder in ("ours", "qemu"))
    found, expected = list(entries_of(mine)), list(entries_of(other))
    assert found == expected[: len(found)]
    assert {int(entry.flags) for entry, _ in expected[len(found) :]} <= {EntryFlag.FLUSH}  # when qemu-io closes it
    assert replayed(mine, CONTENT)[-1] == (tmp_path / "ours" / "disk").read_bytes()
    assert (tmp_path / "ours" / "disk").read_bytes() == (tmp_path / "qemu" / "disk").read_bytes()
