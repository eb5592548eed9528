"""The host file medium against a bytearray, with and without what the kernel offers."""

import errno
import os
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockjobs.block.drivers import early_writeback, file_medium
from blockjobs.block.drivers.early_writeback import WRITEBACK_BYTES
from blockjobs.block.drivers.file_medium import FileMedium
from blockjobs.block.drivers.host_syscalls import is_in_memory, is_simple_to_close
from blockjobs.block.execute import Gather, execute
from blockjobs.testing.disk import SimDisk

K = 1024
MiB = K * K


def medium_at(path: Path, content: bytes = b"", *, direct: bool = False) -> FileMedium:
    path.write_bytes(content)
    second = os.open(path, os.O_RDWR | os.O_DIRECT) if direct else None
    return FileMedium(os.open(path, os.O_RDWR), direct=second)


def read(medium: FileMedium | SimDisk, at: int, length: int) -> bytes:
    buffer = bytearray(b"?" * length)
    medium.read_into(at, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("crippled", [False, True])
def test_like_a_byte_array(tmp_path: Path, direct: bool, crippled: bool) -> None:
    medium = medium_at(tmp_path / "a", direct=direct)
    if crippled:
        medium._can_punch = medium._can_zero_range = medium._can_seek_holes = False
    model = bytearray()
    chance = random.Random(5)
    for _ in range(150):
        at, length = chance.randrange(0, 96 * K), chance.choice([1, 511, 4 * K, 8 * K, 33 * K])
        if chance.random() < 0.5:
            at = at // (4 * K) * 4 * K
        grown = bytes(max(0, at + length - len(model)))
        match chance.randrange(5):
            case 0:
                content = chance.randbytes(length)
                medium.write(at, content)
                model[:] = model + grown
                model[at : at + length] = content
            case 1:
                parts = [chance.randbytes(length // 3) for _ in range(3)]
                medium.writev(at, list(parts))
                joined = b"".join(parts)
                model[:] = model + bytes(max(0, at + len(joined) - len(model)))
                model[at : at + len(joined)] = joined
            case 2:
                medium.zero(at, length, unmap=chance.random() < 0.5)
                model[:] = model + grown
                model[at : at + length] = bytes(length)
            case 3 if not crippled:
                medium.discard(at, length)
                inside = max(0, min(length, len(model) - at))
                model[at : at + inside] = bytes(inside)
            case _:
                seen = read(medium, at, length)
                assert seen == bytes(model[at : at + length]).ljust(length, b"\0")
        assert medium.size() == len(model)
    medium.sync()
    runs = medium.allocations(0, len(model) + K)
    assert sum(run.length for run in runs) == len(model) + K
    assert all(run.is_data or not any(model[run.at : run.at + run.length]) for run in runs)
    medium.close()


def test_copies_between_files_and_other_media(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 << 20)
    source = medium_at(tmp_path / "s", content)
    target = medium_at(tmp_path / "t")
    target.copy_from(source, 4096, 0, 2 << 20)
    assert read(target, 0, 2 << 20) == content[4096 : 4096 + (2 << 20)]
    target.copy_from(source, len(content) - 10, 100, 200)  # a short source reads as zeroes
    assert read(target, 100, 200) == content[-10:] + bytes(190)
    target.copy_from(SimDisk(b"simulated"), 3, 5, 4)
    assert read(target, 5, 4) == b"ulat"


def test_a_refused_copy_range_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(*arguments: object) -> int:
        calls.append(arguments)
        raise OSError(errno.EXDEV, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    source, target = medium_at(tmp_path / "s", b"abcdef"), medium_at(tmp_path / "t")
    for at in (0, 10):
        target.copy_from(source, 0, at, 6)
        assert read(target, at, 6) == b"abcdef"
    assert len(calls) == 1


def test_an_error_that_means_something_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = medium_at(tmp_path / "s", b"abcdef"), medium_at(tmp_path / "t")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", full)
    monkeypatch.setattr(file_medium, "fallocate", full)
    for work in (
        lambda: target.copy_from(source, 0, 0, 6),
        lambda: target.zero(0, 6, unmap=True),
        lambda: target.zero(0, 6, unmap=False),
    ):
        with pytest.raises(OSError, match="full"):
            work()


def test_a_failed_sync_poisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    medium = medium_at(tmp_path / "a")
    answers = [OSError(errno.EIO, "lost"), None, None]

    def fdatasync(_: int) -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    medium.sync()
    assert len(answers) == 3  # nothing written: nothing to do
    medium.write(0, b"x")
    for _ in range(3):
        with pytest.raises(OSError, match=r"rror|lost"):
            medium.sync()
    assert len(answers) == 2
    medium.write(0, b"y")
    with pytest.raises(OSError, match="error"):
        medium.sync()


@pytest.mark.parametrize("is_cached", [True, False])
def test_scattered_pieces_from_a_disk_are_asked_for_before_they_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    asked: list[tuple[int, int]] = []

    def preadv(descriptor: int, buffers: object, at: int, flags: int = 0) -> int:
        assert flags == os.RWF_NOWAIT, "the copy itself needs no read"
        if not is_cached:
            raise BlockingIOError
        return 1

    source, target = medium_at(tmp_path / "source", bytes(range(200)) * 500), medium_at(tmp_path / "target")
    monkeypatch.setattr(source, "_peek_flags", os.RWF_NOWAIT)  # wherever the tests have their files
    monkeypatch.setattr(file_medium.os, "preadv", preadv)
    monkeypatch.setattr(file_medium.os, "posix_fadvise", lambda fd, at, length, advice: asked.append((at, length)))
    pieces = [(50_000, 300), (200, 400), (99_800, 200)]
    execute([Gather(source, pieces, target, 10)])
    assert asked == ([] if is_cached else pieces)
    whole = bytes(range(200)) * 500
    assert (tmp_path / "target").read_bytes() == bytes(10) + b"".join(whole[at : at + size] for at, size in pieces)


def test_many_pieces_past_short_sources_and_unknown_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(200)) * 500
    whole = content + bytes(300)
    pieces = [(at, 300) for at in range(99_800, 0, -997)]
    expected = b"".join(whole[at : at + size] for at, size in pieces)
    for number, name in enumerate(("known", "unknown")):
        source, target = medium_at(tmp_path / f"source{number}", content), medium_at(tmp_path / f"target{number}")
        if name == "unknown":

            def refuse(*arguments: object) -> int:
                raise OSError(errno.EXDEV, "not between these")

            monkeypatch.setattr(file_medium.os, "copy_file_range", refuse)
        target.gather_from(source, pieces, 10)
        assert (tmp_path / f"target{number}").read_bytes() == bytes(10) + expected


def test_a_failing_piece_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = medium_at(tmp_path / "source", bytes(range(200)) * 500), medium_at(tmp_path / "target")
    calls: list[int] = []

    def copy(here: int, there: int, length: int, source_at: int, at: int) -> int:
        calls.append(source_at)
        if source_at == 200:
            raise OSError(errno.ENOSPC, "full")
        return length

    monkeypatch.setattr(file_medium.os, "copy_file_range", copy)
    with pytest.raises(OSError, match="full"):
        target.gather_from(source, [(0, 100), (200, 100), (400, 100)], 0)
    assert calls == [0, 200, 200]


def test_pieces_go_to_their_places(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(100_000)
    source, target = medium_at(tmp_path / "source", content), medium_at(tmp_path / "target", b"x" * 200_000)
    pieces = [(50_000, 0, 300), (200, 1000, 400), (99_900, 150_000, 300)]  # the last one reaches past the source's end
    target.scatter_from(source, pieces)
    expected = bytearray(b"x" * 200_000)
    for source_at, at, length in pieces:
        expected[at : at + length] = content[source_at : source_at + length].ljust(length, b"\0")
    assert (tmp_path / "target").read_bytes() == expected


def test_one_file_opened_twice_is_the_same(tmp_path: Path) -> None:
    one, other, disk = medium_at(tmp_path / "one"), medium_at(tmp_path / "other"), SimDisk()
    again = FileMedium(os.open(tmp_path / "one", os.O_RDONLY))
    assert one.is_same_as(again) and again.is_same_as(one) and disk.is_same_as(disk)
    assert not (one.is_same_as(other) or one.is_same_as(disk) or disk.is_same_as(one) or disk.is_same_as(SimDisk()))


@pytest.mark.parametrize("direct", [False, True])
def test_pieces_of_what_is_no_file_are_written_together(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(2).randbytes(3 * MiB)
    source, target = SimDisk(), medium_at(tmp_path / "target", b"x" * 200_000, direct=direct)
    source.write(0, content)
    written: list[tuple[int, int]] = []
    write = FileMedium.write

    def noting(self: FileMedium, at: int, view: memoryview) -> None:
        written.append((at, len(view)))
        write(self, at, view)

    monkeypatch.setattr(FileMedium, "write", noting)
    # Two runs on the target: three short pieces, and a long one behind a short one.
    pieces = [(50_000, 0, 300), (200, 300, 400), (0, 700, 4096), (7, 100_000, 500), (5000, 100_500, 2 * MiB)]
    target.scatter_from(source, pieces)
    assert written == [(0, 4796), (100_000, MiB), (100_000 + MiB, MiB), (100_000 + 2 * MiB, 500)]
    expected = bytearray(b"x" * 100_000 + bytes(500 + 2 * MiB))
    for source_at, at, length in pieces:
        expected[at : at + length] = content[source_at : source_at + length]
    assert (tmp_path / "target").read_bytes() == expected


def test_a_long_run_of_bytes_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    medium = medium_at(tmp_path / "a", b"x" * 64 * K)
    medium.truncate(256 * K)
    asked: list[int] = []
    seek = os.lseek

    def counted(descriptor: int, at: int, how: int) -> int:
        asked.append(how)
        return seek(descriptor, at, how)

    monkeypatch.setattr(os, "lseek", counted)
    for at in range(0, 48 * K, 8 * K):
        assert medium.data_runs(at, 8 * K, 1 << 30) == ([at], [8 * K])
    assert asked == [os.SEEK_DATA, os.SEEK_HOLE]
    assert medium.data_runs(48 * K, 48 * K, 1 << 30) == ([48 * K], [16 * K])
    medium.zero(16 * K, 16 * K, unmap=True)
    assert medium.data_runs(0, 256 * K, 1 << 30) == ([0, 32 * K], [16 * K, 32 * K])
    medium.truncate(0)
    assert medium.data_runs(0, 8 * K, 1 << 30) == ([], [])
    medium.write(0, b"y" * 8 * K)
    assert medium.data_runs(0, 8 * K, 1 << 30) == ([0], [8 * K])


def test_who_has_enough_looks_no_further(tmp_path: Path) -> None:
    medium = medium_at(tmp_path / "a")
    medium.truncate(256 * K)
    for at in (0, 64 * K, 128 * K, 192 * K):
        medium.write(at, b"x" * 4 * K)
    assert medium.data_runs(0, 256 * K, 4 * K) == ([0, 64 * K], [4 * K, 4 * K])
    assert medium.data_runs(0, 256 * K, 0) == ([0], [4 * K])


@pytest.mark.parametrize(("has_disk", "is_flushed"), [(True, True), (True, False), (False, True)])
def test_writeback_begins_while_a_copy_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_disk: bool, is_flushed: bool
) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(early_writeback, "start_writeback", lambda _, at, length: begun.append((at, length)))
    monkeypatch.setattr(file_medium, "is_in_memory", lambda _: not has_disk)
    source = medium_at(tmp_path / "source", b"x" * MiB)
    (tmp_path / "target").touch()
    target = FileMedium(os.open(tmp_path / "target", os.O_RDWR), is_flushed=is_flushed)
    for number in range(WRITEBACK_BYTES // MiB):
        target.copy_from(source, 0, number * MiB, MiB)
    expected = [(0, WRITEBACK_BYTES)]
    assert begun == (expected if has_disk and is_flushed else [])
    # However far apart the pieces are, they count for what they are.
    for number in range(WRITEBACK_BYTES // MiB):
        target.scatter_from(source, [(0, number * 8 * MiB, MiB // 2), (0, (number * 8 + 4) * MiB, MiB // 2)])
    expected.append((0, (WRITEBACK_BYTES // MiB * 8 - 4) * MiB + MiB // 2))
    assert begun == (expected if has_disk and is_flushed else [])


def test_a_hint_that_the_disk_holds_up_holds_up_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    given, free = threading.Event(), threading.Event()

    def hold(descriptor: int, at: int, length: int) -> None:
        begun.append(at)
        given.set()
        assert free.wait(10)
        os.fstat(descriptor)  # still open

    monkeypatch.setattr(early_writeback, "start_writeback", hold)
    monkeypatch.setattr(file_medium, "is_in_memory", lambda _: False)
    source = medium_at(tmp_path / "source", b"x" * MiB)
    (tmp_path / "target").touch()
    with ThreadPoolExecutor(2) as pool:
        target = FileMedium(os.open(tmp_path / "target", os.O_RDWR), start=pool.submit)
        for number in range(3 * WRITEBACK_BYTES // MiB):
            target.copy_from(source, 0, number * MiB, MiB)
        assert given.wait(10)
        assert begun == [0]  # and no further one waits behind it
        closing = pool.submit(target.close)
        with pytest.raises(TimeoutError):
            closing.result(0.05)
        free.set()
        closing.result(10)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(target.descriptor)


@pytest.fixture
def memory() -> Path:
    folder = Path("/dev/shm")
    if not folder.is_dir() or folder.stat().st_dev == Path("/").stat().st_dev:
        pytest.skip("no tmpfs here")
    return folder


def test_what_is_in_memory_can_always_be_peeked_at(memory: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=memory) as file:
        file.write(bytes(range(200)))
        file.flush()
        medium = FileMedium(os.open(file.name, os.O_RDWR))
        for at in range(20):
            buffer = bytearray(10)
            assert medium.read_cached(at, memoryview(buffer)) and buffer == bytes(range(at, at + 10))
        assert not medium.read_cached(195, memoryview(bytearray(10)))
        medium.close()


def test_files_in_memory_are_known(memory: Path) -> None:
    with tempfile.TemporaryFile(dir=memory) as file, open("/proc/self/exe", "rb") as program:
        assert is_in_memory(file.fileno()) and not is_in_memory(program.fileno())
    descriptor = os.open("/dev/null", os.O_RDONLY)  # the folder of devices is in memory, what they stand for is not
    assert not is_in_memory(descriptor)
    os.close(descriptor)


def test_only_clean_files_with_a_name_are_closed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    medium = FileMedium(os.open(path, os.O_RDWR))
    assert medium.closes_at_once is is_simple_to_close(medium.descriptor)  # wherever the tests have their files
    medium.write(0, b"x")
    assert not medium.closes_at_once
    medium.sync()
    assert medium.closes_at_once is is_simple_to_close(medium.descriptor)
    path.unlink()
    assert not medium.closes_at_once
    medium.close()
    with open("/proc/self/exe", "rb") as program, open("/proc/self/status", "rb") as status:
        assert is_simple_to_close(program.fileno()) and not is_simple_to_close(status.fileno())
