"""Nodes become read-only and writable again: files, locks, what is in memory, rights; or nothing changes."""

import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.file import File
from blockjobs.block.drivers.file_medium import FileMedium
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.testing.graphs import add_node, run_in_graph
from blockjobs.wire.qcow2 import FIELD_FEATURES, Header, Incompatible

READ, WRITE = Perm.CONSISTENT_READ, Perm.WRITE
NO_RESIZE = ALL & ~Perm.RESIZE
SIZE = 1 << 20

pytestmark = pytest.mark.qemu


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
    return str(path)


def file_options(image: str, **more: object) -> dict[str, object]:
    return {"driver": "file", "filename": image, "node-name": "prot", **more}


def is_open_for_writing(node: Node) -> bool:
    assert isinstance(node.driver, File) and isinstance(node.driver.medium, FileMedium)
    return fcntl.fcntl(node.driver.medium.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def state_of(graph: Graph) -> list[object]:
    return [
        (
            node.name,
            node.read_only,
            node.rights,
            node.options,
            list(node.children),
            [(parent.holder, parent.rights) for parent in node.parents],
            is_open_for_writing(node) if isinstance(node.driver, File) else None,
        )
        for node in graph.nodes()
    ]


def others_may_write(image: str) -> bool:
    written = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 64k", image], capture_output=True, text=True, check=False
    )
    return "lock" not in written.stdout + written.stderr


def test_a_read_only_image_is_written_to_and_goes_back(image: str) -> None:
    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="qcow2", node_name="base", read_only=True, file=file_options(image))
        prot = graph.node("prot")
        descriptors = len(os.listdir("/proc/self/fd"))
        await graph.set_read_only(node, read_only=False)
        assert not node.read_only and not prot.read_only and is_open_for_writing(prot)
        writer = await graph.claim("a job", node, READ | WRITE, NO_RESIZE)
        await node.write(4096, b"committed")
        with pytest.raises(UsageError, match="Read-only block node 'base' cannot support read-write users"):
            await graph.set_read_only(node, read_only=True)
        await node.write(8192, b"more")
        await graph.release(writer)
        await graph.set_read_only(node, read_only=True)
        assert node.read_only and prot.read_only and not is_open_for_writing(prot)
        # All is in the file: another process sees it, and the image is whole.
        subprocess.run(["qemu-img", "check", "-q", image], check=True)
        subprocess.run(["qemu-io", "-r", "-c", "read -P 99 4096 1", image], check=True, capture_output=True)
        with pytest.raises(IoFailure):
            node.check_write(0, 512)
        assert await node.read(4096, 9) == b"committed"
        assert len(os.listdir("/proc/self/fd")) == descriptors

    run_in_graph(body)


def test_locks_follow(image: str) -> None:
    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="qcow2", node_name="base", file=file_options(image))
        assert not others_may_write(image)
        await graph.set_read_only(node, read_only=True)
        assert others_may_write(image) is False  # a reader of a format does not let others change it
        prot = graph.node("prot")
        assert isinstance(prot.driver, File)
        assert prot.driver.rights == (READ, READ | Perm.WRITE_UNCHANGED)
        reader = subprocess.run(["qemu-io", "-r", "-c", "read 0 512", image], capture_output=True, check=False)
        assert reader.returncode == 0
        await graph.set_read_only(node, read_only=False)
        refused = subprocess.run(["qemu-io", "-r", "-c", "read 0 512", image], capture_output=True, check=False)
        assert refused.returncode and b'Failed to get shared "write" lock' in refused.stderr

    run_in_graph(body)


def test_another_process_in_the_way_leaves_all_as_it_was(image: str) -> None:
    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="qcow2", node_name="base", read_only=True, file=file_options(image))
        before = state_of(graph)
        other = subprocess.Popen(["qemu-io", "-r", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert other.stdin is not None and other.stdout is not None
            other.stdin.write(b"read 0 512\n")
            other.stdin.flush()
            other.stdout.readline()
            with pytest.raises(UsageError, match='Failed to get "write" lock'):
                await graph.set_read_only(node, read_only=False)
        finally:
            other.communicate()
        assert state_of(graph) == before
        assert await node.read(0, 512) == bytes(512)
        await graph.set_read_only(node, read_only=False)
        assert not node.read_only

    run_in_graph(body)


def test_an_image_that_was_not_closed_is_repaired_before_it_is_written(image: str) -> None:
    with open(image, "r+b") as file:
        header = Header.decode_fields(file.read(512))
        file.seek(FIELD_FEATURES.at)
        file.write(replace(header, incompatible=int(Incompatible.DIRTY)).encode_field(FIELD_FEATURES))

    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="qcow2", node_name="base", read_only=True, file=file_options(image))
        assert node.driver.info()["dirty-flag"]
        await graph.set_read_only(node, read_only=False)
        assert not node.driver.info()["dirty-flag"]

    run_in_graph(body)
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_a_corrupt_image_stays_read_only(image: str) -> None:
    with open(image, "r+b") as file:
        header = Header.decode_fields(file.read(512))
        file.seek(FIELD_FEATURES.at)
        file.write(replace(header, incompatible=int(Incompatible.CORRUPT)).encode_field(FIELD_FEATURES))

    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="qcow2", node_name="base", read_only=True, file=file_options(image))
        before = state_of(graph)
        with pytest.raises(UsageError, match="Image is corrupt; cannot be opened read/write"):
            await graph.set_read_only(node, read_only=False)
        assert state_of(graph) == before

    run_in_graph(body)


def test_a_child_by_reference_is_not_touched(image: str) -> None:
    async def body(graph: Graph) -> None:
        await add_node(graph, driver="file", node_name="prot", filename=image, read_only=True)
        node = await add_node(graph, driver="qcow2", node_name="base", read_only=True, file="prot")
        before = state_of(graph)
        with pytest.raises(UsageError, match="Block node is read-only"):
            await graph.set_read_only(node, read_only=False)
        assert state_of(graph) == before

    run_in_graph(body)


def test_a_node_that_ignores_locks_stays_read_only(image: str) -> None:
    async def body(graph: Graph) -> None:
        node = await add_node(
            graph, driver="qcow2", node_name="base", read_only=True, force_share=True, file=file_options(image)
        )
        with pytest.raises(UsageError, match="force-share=on can only be used with read-only images"):
            await graph.set_read_only(node, read_only=False)

    run_in_graph(body)


def test_what_another_program_did_meanwhile_is_seen(image: str) -> None:
    async def body(graph: Graph) -> None:
        node = await add_node(
            graph,
            driver="qcow2",
            node_name="base",
            read_only=True,
            file=file_options(image, locking="off"),
        )
        assert await node.read(0, 512) == bytes(512)
        subprocess.run(["qemu-io", "-c", "write -P 7 0 64k", image], check=True, capture_output=True)
        await graph.set_read_only(node, read_only=False)
        assert await node.read(0, 512) == b"\x07" * 512

    run_in_graph(body)


@pytest.mark.parametrize("step", ["prepare", "apply", "activate"])
def test_a_failure_at_any_step_leaves_all_as_it_was(image: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="qcow2", node_name="base", file=file_options(image))
        writer = await graph.claim("a job", node, READ | WRITE, NO_RESIZE)
        await node.write(0, b"before")
        await graph.release(writer)
        before = state_of(graph)
        descriptors = len(os.listdir("/proc/self/fd"))
        fail(monkeypatch, step)
        with pytest.raises((UsageError, IoFailure)):
            await graph.set_read_only(node, read_only=True)
        monkeypatch.undo()
        assert state_of(graph) == before
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert not others_may_write(image)
        writer = await graph.claim("a job", node, READ | WRITE, NO_RESIZE)
        await node.write(6, b" after")
        assert await node.read(0, 12) == b"before after"
        await node.discard(Span(0, 512))

    run_in_graph(body)
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def fail(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def refuse(error: Exception) -> Callable[..., None]:
        def body(*arguments: object) -> None:
            raise error

        return body

    async def refuse_later(*arguments: object) -> None:
        raise UsageError("told to fail")

    if step == "prepare":
        monkeypatch.setattr(Qcow2, "write_all", refuse(IoFailure(28, "told to fail")))
    elif step == "apply":
        monkeypatch.setattr(
            "blockjobs.block.drivers.locks.ImageLock.move_to", refuse(OSError(37, "No locks available"))
        )
    else:
        monkeypatch.setattr("blockjobs.block.drivers.file_reopen.FileSwitch.activate", refuse_later)
