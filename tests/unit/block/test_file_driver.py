"""The file driver through a graph: real files, direct I/O, write protection, corruption that becomes an event."""

import os
import random
import struct
from pathlib import Path

import pytest

from blockjobs.base.errors import BlockjobsError, ImageCorrupt
from blockjobs.base.offload import ThreadOffload
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers import file as file_driver
from blockjobs.block.drivers.file import File
from blockjobs.block.drivers.file_medium import PEEKS_MAX, FileMedium
from blockjobs.block.events import BlockImageCorrupted
from blockjobs.block.extents import Extent
from blockjobs.block.graph import Graph
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.reopen_plan import reopen
from blockjobs.block.vocabulary import Kind
from blockjobs.schema.command import convert
from blockjobs.testing.graphs import add_node, new_graph, run_in_graph

K = 1024
READ, WRITE = Perm.CONSISTENT_READ, Perm.WRITE


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("direct", [False, True])
def test_a_real_file_behaves_like_a_byte_array(direct: bool) -> None:
    Path("r.img").write_bytes(bytes(256 * K + 512))

    async def body(graph: Graph) -> None:
        file = {"driver": "file", "filename": "r.img"}
        cache = {"direct": direct, "no-flush": False}
        node = await add_node(graph, driver="raw", node_name="n", cache=cache, discard="unmap", file=file)
        assert node.children["file"].settings.direct is direct
        await graph.claim("x", node, READ | WRITE, ALL)
        model, chance = bytearray(node.length), random.Random(4)
        for _ in range(200):
            at = chance.randrange(len(model))
            at = at if chance.random() < 0.5 else at // 4096 * 4096
            length = min(chance.choice([1, 512, 4096, 8192, 70 * K]), len(model) - at)
            match chance.randrange(4):
                case 0:
                    model[at : at + length] = content = chance.randbytes(length)
                    await node.write(at, content, fua=chance.random() < 0.1)
                case 1:
                    model[at : at + length] = bytes(length)
                    await (node.zero(Span(at, length)) if chance.random() < 0.5 else node.discard(Span(at, length)))
                case _:
                    assert await node.read(at, length) == model[at : at + length]
        await node.flush()
        assert Path("r.img").read_bytes() == model

    run_in_graph(body, new_graph(offload=ThreadOffload()))


def test_holes_are_seen() -> None:
    with open("r.img", "wb") as file:
        file.truncate(256 * K)
        file.seek(128 * K)
        file.write(b"x" * 64 * K)

    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="file", filename="r.img", node_name="n")
        assert await node.block_status(Span(0, 256 * K)) == [
            Extent(0, 128 * K, Kind.ZERO, 1),
            Extent(128 * K, 64 * K, Kind.DATA, 1),
            Extent(192 * K, 64 * K, Kind.ZERO, 1),
        ]

    run_in_graph(body)


def test_auto_read_only_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("r.img").write_bytes(bytes(512))
    real_open = os.open

    def protected(path: str, flags: int, *rest: object, **options: object) -> int:
        if path == "r.img" and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", protected)

    async def body(graph: Graph) -> None:
        with pytest.raises(BlockjobsError, match=r"^Could not open 'r.img': Permission denied$"):
            await add_node(graph, driver="file", filename="r.img", node_name="n")
        node = await add_node(graph, driver="file", filename="r.img", node_name="n", auto_read_only=True)
        assert node.read_only
        with pytest.raises(BlockjobsError, match=r"^Block node is read-only$"):
            await graph.claim("x", node, WRITE, ALL)

    run_in_graph(body)


def test_a_file_replaced_while_it_is_opened_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("r.img").write_bytes(bytes(512))
    Path("new.img").write_bytes(bytes(512))
    real = file_driver.are_supported

    def replace_then_look(descriptor: int) -> bool:
        if Path("new.img").exists():
            os.rename("new.img", "r.img")
        return real(descriptor)

    monkeypatch.setattr(file_driver, "are_supported", replace_then_look)

    async def body(graph: Graph) -> None:
        file = {"driver": "file", "filename": "r.img"}
        with pytest.raises(BlockjobsError, match="was replaced while it was being opened"):
            await add_node(graph, driver="raw", node_name="n", file=file)
        node = await add_node(graph, driver="raw", node_name="n", file=file)
        os.unlink("r.img")  # later it is nobody's business
        await graph.claim("x", node, WRITE, ALL)

    run_in_graph(body)


def test_locks_that_a_file_system_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("r.img").write_bytes(bytes(512))
    monkeypatch.setattr(file_driver, "are_supported", lambda descriptor: False)

    async def body(graph: Graph) -> None:
        for name in ("a", "b"):
            node = await add_node(graph, driver="file", filename="r.img", node_name=name)
            await graph.claim("x", node, WRITE, READ)
        with pytest.raises(BlockjobsError, match="locking=on"):
            await add_node(graph, driver="file", filename="r.img", node_name="c", locking="on")

    run_in_graph(body)


def test_sizes_are_remembered_but_never_stale() -> None:
    Path("r.img").write_bytes(bytes(512))
    medium = FileMedium(os.open("r.img", os.O_RDWR))
    assert medium.size() == 512
    medium.write(600, b"x")
    assert medium.size() == 601
    medium.zero(700, 100, unmap=False)
    medium.zero(800, 100, unmap=True)
    assert medium.size() == 900
    medium.truncate(10)
    assert medium.size() == 10
    medium.copy_from(medium, 0, 20, 5)
    assert medium.size() == 25
    buffer = memoryview(bytearray(10))
    answers = [medium.read_cached(0, buffer) for _ in range(PEEKS_MAX)]
    assert answers.count(False) >= 1
    assert not medium.read_cached(20, buffer)  # short: not all of it is there
    medium.close()


@pytest.mark.qemu
def test_a_write_on_metadata_is_an_event_as_qemu_has_it() -> None:
    os.system("qemu-img create -q -f qcow2 c.img 1M && qemu-io -c 'write 0 64k' c.img > /dev/null")
    with open("c.img", "r+b") as file:
        (l1_at,) = struct.unpack(">Q", file.read(48)[40:])
        file.seek(l1_at)
        l2_at = struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00
        file.seek(l2_at)
        file.write(struct.pack(">Q", 1 << 63 | l1_at))

    async def body(graph: Graph) -> None:
        said: list[object] = []
        with graph.bus.listening(said.append):
            node = await add_node(graph, driver="qcow2", node_name="c", file={"driver": "file", "filename": "c.img"})
            await graph.claim("x", node, READ | WRITE, ALL)
            with pytest.raises(ImageCorrupt):
                await node.write(0, bytes(65536))
        (event,) = said
        text = "Preventing invalid write on metadata (overlaps with active L1 table)"
        assert event == BlockImageCorrupted(device="", node_name="c", msg=text, offset=l1_at, size=65536, fatal=True)

    run_in_graph(body)
    assert os.system("qemu-img info c.img | grep -q 'corrupt: true'") == 0


@pytest.mark.qemu
@pytest.mark.parametrize("read_only", [False, True])
def test_corruption_is_an_event(read_only: bool) -> None:
    os.system("qemu-img create -q -f qcow2 c.img 1M && qemu-io -c 'write 0 64k' c.img > /dev/null")
    with open("c.img", "r+b") as file:
        (l1_at,) = struct.unpack(">Q", file.read(48)[40:])
        file.seek(l1_at)
        l2_at = struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00
        file.seek(l2_at)
        file.write(struct.pack(">Q", 1 << 63 | 0x50200))

    async def body(graph: Graph) -> None:
        said: list[object] = []
        with graph.bus.listening(said.append):
            file = {"driver": "file", "filename": "c.img"}
            node = await add_node(graph, driver="qcow2", node_name="c", read_only=read_only, file=file)
            for _ in range(2):
                with pytest.raises(ImageCorrupt):
                    await node.read(0, 512)
            assert await node.read(512 * K, 2) == bytes(2)
        (event,) = said
        assert isinstance(event, BlockImageCorrupted)
        assert (event.device, event.node_name, event.fatal) == ("", "c", not read_only)

    run_in_graph(body)


def test_who_drops_flushes_does_not_begin_to_write_either() -> None:
    Path("r.img").write_bytes(bytes(64 * K))

    async def body(graph: Graph) -> None:
        for before in (True, False):
            cache = {"direct": False, "no-flush": before}
            node = await add_node(graph, driver="file", filename="r.img", node_name="n", cache=cache)
            driver = node.driver
            assert isinstance(driver, File) and isinstance(driver.medium, FileMedium)
            assert driver.medium.writeback.is_wanted is not before
            for direct in (False, True):
                for now in (before, not before):
                    cache = {"direct": direct, "no-flush": now}
                    wanted = {"driver": "file", "filename": "r.img", "node-name": "n", "cache": cache}
                    await reopen(graph, [convert(wanted, BlockdevOptions)])
                    assert isinstance(driver.medium, FileMedium)
                    assert (driver.medium.is_direct, driver.medium.writeback.is_wanted) == (direct, not now)
            await graph.remove("n")

    run_in_graph(body)
