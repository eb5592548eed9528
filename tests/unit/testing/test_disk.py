"""The simulated disk, its faults, and the replay of crashes."""

import errno
import random

import pytest

from blockjobs.testing.crash import CrashState, RecordingMedium, WriteLog, crash_states
from blockjobs.testing.disk import Act, Change, Pages, SimDisk, survive
from blockjobs.testing.faults import Fault, FaultPlan, FaultyMedium, Operation

A, B = b"a" * 512, b"b" * 512


def content(disk: SimDisk, at: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(at, memoryview(buffer))
    return bytes(buffer)


def test_pages_behave_as_a_byte_array() -> None:
    chance = random.Random(3)
    pages, plain = Pages(), bytearray()
    for _ in range(400):
        at, length = chance.randrange(20000), chance.randrange(9000)
        match chance.randrange(4):
            case 0:
                written = chance.randbytes(length)
                pages.write(at, written)
                if written:
                    plain.extend(bytes(max(0, at + length - len(plain))))
                    plain[at : at + length] = written
                else:
                    plain.extend(bytes(max(0, at - len(plain))))
            case 1:
                pages.erase(at, length)
                end = min(at + length, len(plain))
                plain[at:end] = bytes(max(0, end - at))
            case 2:
                pages.truncate(at)
                del plain[at:]
                plain.extend(bytes(at - len(plain)))
            case 3:
                assert pages.copy() == pages
        assert pages.size == len(plain)
        assert pages.read(0, len(plain) + 5000) == bytes(plain) + bytes(5000)
    assert pages == Pages(bytes(plain))


def test_a_copy_is_independent() -> None:
    pages = Pages(A + B)
    twin = pages.copy()
    twin.write(0, B)
    assert pages.read(0, 512) == A
    assert pages != twin


def test_disk_is_a_medium() -> None:
    disk = SimDisk()
    disk.write(4096, A)
    disk.writev(4096 + 512, [A, B])
    assert disk.size() == 4096 + 3 * 512
    assert content(disk, 4000, 2000) == bytes(96) + A + A + B + bytes(2000 - 96 - 1536)
    assert [tuple(run) for run in disk.allocations(100, 9000)] == [
        (100, 3996, False),
        (4096, 4096, True),
        (8192, 908, False),
    ]
    disk.zero(4096, 8192, unmap=True)
    assert disk.size() == 12288
    assert disk.allocated_size() == 0
    disk.write(0, A)
    disk.discard(0, 100)
    assert content(disk, 0, 512) == bytes(100) + A[100:]
    other = SimDisk(A + B)
    disk.copy_from(other, 512, 20000, 1024)
    assert content(disk, 20000, 1024) == B + bytes(512)
    disk.truncate(256)
    assert content(disk, 0, 512) == bytes(100) + A[:156] + bytes(256)
    disk.close()
    assert disk.closed


def test_power_cut_keeps_what_was_synced_and_may_lose_the_rest() -> None:
    seen = set()
    for seed in range(40):
        disk = SimDisk()
        disk.write(0, A)
        disk.sync()
        disk.write(512, A + B)
        disk.cut_power(seed)
        assert content(disk, 0, 512) == A
        seen.add(content(disk, 512, 1024))
        disk.write(0, B)
        disk.sync()
        disk.cut_power(seed)
        assert content(disk, 0, 512) == B
    assert seen == {bytes(1024), A + B, A + bytes(512), bytes(512) + B}


def test_torn_changes() -> None:
    pages = Pages(A * 4)
    Change(Act.WRITE, 256, 1024, B * 2).apply(pages, frozenset({0, 2}))
    assert pages.read(0, 2048) == A[:256] + B[:256] + A + B[:256] + A[:256] + A
    Change(Act.ZERO, 0, 4096).apply(pages, frozenset({7}))
    assert pages.size == 4096
    survive(pages, [], random.Random(1))
    assert list(Change(Act.TRUNCATE, length=5).sectors()) == []


def failing(disk: SimDisk, *faults: Fault, space_bytes: int | None = None) -> FaultyMedium:
    return FaultyMedium(disk, FaultPlan(list(faults), space_bytes))


def test_the_nth_request_fails() -> None:
    disk = SimDisk()
    medium = failing(disk, Fault(operation=Operation.WRITE, nth=2, errno=errno.ENOSPC, times=2))
    medium.write(0, A)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device"):
            medium.write(512, B)
    medium.write(512, B)
    assert content(disk, 0, 1024) == A + B
    assert medium.plan.calls == {Operation.WRITE: 4, Operation.GROW: 4, None: 4}
    assert medium.plan.hits == 2


def test_a_disk_that_cannot_grow_takes_the_rest() -> None:
    disk = SimDisk(A)
    medium = failing(disk, Fault(operation=Operation.GROW, nth=1, errno=errno.ENOSPC, short=True, times=3))
    for grow in (
        lambda: medium.write(0, A + A),
        lambda: medium.zero(256, 512, unmap=False),
        lambda: medium.truncate(513),
    ):
        with pytest.raises(OSError, match="No space left on device"):
            grow()
    medium.write(0, B)
    medium.truncate(512)
    assert (content(disk, 0, 512), disk.size()) == (B, 512)


def test_any_operation_can_fail_and_be_cured() -> None:
    medium = failing(SimDisk(A), Fault(nth=1, times=99))
    for call in (
        lambda: medium.read_into(0, memoryview(bytearray(1))),
        lambda: medium.write(0, A),
        lambda: medium.writev(0, [A]),
        lambda: medium.zero(0, 1, unmap=False),
        lambda: medium.discard(0, 1),
        lambda: medium.allocations(0, 1),
        lambda: medium.truncate(0),
        lambda: medium.copy_from(SimDisk(A), 0, 0, 1),
    ):
        with pytest.raises(OSError, match="Input/output error"):
            call()
    medium.plan.cure()
    medium.write(0, B)
    medium.sync()
    assert medium.size() == 512
    assert medium.allocated_size() == 4096
    medium.close()


def test_a_failed_sync_poisons_until_reopened() -> None:
    disk = SimDisk()
    medium = failing(disk, Fault(operation=Operation.SYNC, nth=1))
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            medium.sync()
        medium.plan.cure()
    FaultyMedium(disk, medium.plan).sync()


def test_space_runs_out_in_the_middle_of_a_write() -> None:
    disk = SimDisk()
    medium = failing(disk, space_bytes=1500)
    medium.write(0, A)
    with pytest.raises(OSError, match="No space left on device"):
        medium.write(512, A + B)
    assert content(disk, 512, 1024) == A + bytes(512)
    with pytest.raises(OSError, match="No space left on device"):
        medium.zero(0, 1, unmap=False)
    medium.plan.cure()
    medium.write(512, A)


def test_a_short_write() -> None:
    disk = SimDisk()
    medium = failing(disk, Fault(operation=Operation.WRITE, nth=1, short=True))
    with pytest.raises(OSError, match="Input/output error"):
        medium.write(0, A + B)
    assert content(disk, 0, 1024) == A + bytes(512)


def recorded(run: int) -> tuple[WriteLog, SimDisk]:
    log = WriteLog()
    disk = SimDisk()
    medium = RecordingMedium(disk, log)
    for number in range(run):
        medium.write(number * 512, bytes([number + 1]) * 512)
    medium.sync()
    log.mark("flushed")
    medium.write(0, A + B)
    medium.truncate(512)
    return log, disk


def first_bytes(state: CrashState) -> bytes:
    return bytes(state.images["disk"].read(number * 512, 1)[0] for number in range(4))


def test_every_subset_of_a_short_run() -> None:
    log, disk = recorded(run=3)
    states = list(crash_states(log, {"disk": Pages()}, seed=1, exhaustive_up_to=3))
    before = {first_bytes(state) for state in states if state.synced < 0}
    assert before == {bytes([a, b, c, 0]) for a in (0, 1) for b in (0, 2) for c in (0, 3)}
    after = [state for state in states if state.synced >= 0]
    assert {label for _, label in log.marks(log.changes.__len__())} == {"flushed"}
    assert {state.synced for state in after} == {3}
    assert {state.issued for state in after} == {len(log.changes)}
    assert {first_bytes(state) for state in after} >= {b"\1\2\3\0", b"ab\3\0", b"a\0\0\0", b"\1\0\0\0"}
    assert any(state.images["disk"] == disk.pages for state in after)


def test_torn_states_appear_and_the_seed_decides() -> None:
    log, _ = recorded(run=9)
    log.changes[-1:] = [Change(Act.WRITE, 4096 * number, 4096, A * 8, "disk") for number in range(8)]
    images = [state.images["disk"] for state in crash_states(log, {"disk": Pages()}, seed=7)]
    again = [state.images["disk"] for state in crash_states(log, {"disk": Pages()}, seed=7)]
    other = [state.images["disk"] for state in crash_states(log, {"disk": Pages()}, seed=8)]
    assert images == again
    assert images != other
    half = {bytes(image.read(4096 + at, 1)[0] for at in range(0, 4096, 512)) for image in images}
    assert any(0 in pattern and ord("a") in pattern for pattern in half)


def test_a_sync_of_one_disk_is_none_of_the_other() -> None:
    log = WriteLog()
    media = {name: RecordingMedium(SimDisk(), log, name) for name in ("x", "y")}
    media["x"].write(0, A)
    media["y"].write(0, A)
    media["x"].sync()
    media["y"].sync()
    start = {"x": Pages(), "y": Pages()}
    synced_x = [state for state in crash_states(log, start, seed=1) if state.synced == 2]
    assert {state.images["x"].read(0, 512) for state in synced_x} == {A}
    assert {state.images["y"].read(0, 512) for state in synced_x} == {bytes(512), A}


def test_recorder_passes_everything_on() -> None:
    log, disk = WriteLog(), SimDisk()
    medium = RecordingMedium(disk, log)
    medium.writev(0, [A, B])
    medium.zero(0, 512, unmap=True)
    medium.discard(512, 512)
    medium.copy_from(SimDisk(A), 0, 1024, 512)
    medium.truncate(2048)
    medium.sync()
    buffer = bytearray(512)
    medium.read_into(1024, memoryview(buffer))
    assert bytes(buffer) == A
    assert medium.size() == 2048
    assert medium.allocations(0, 4096) == disk.allocations(0, 4096)
    assert medium.allocated_size() == 4096
    medium.close()
    acts = [change.act for change in log.changes]
    assert acts == [Act.WRITE, Act.ZERO, Act.DISCARD, Act.WRITE, Act.TRUNCATE, Act.SYNC]
