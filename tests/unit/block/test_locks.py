"""Image locks: between two descriptions of one process, and against the installed QEMU both ways."""

import os
import subprocess
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.block.claims import ALL, NONE, Perm
from blockjobs.block.drivers.locks import ImageLock, are_supported
from blockjobs.block.graph import Graph
from blockjobs.testing.graphs import add_node, run_in_graph

READ, WRITE, RESIZE = Perm.CONSISTENT_READ, Perm.WRITE, Perm.RESIZE
FORMAT = READ | WRITE | RESIZE, READ | Perm.WRITE_UNCHANGED
FORMAT_RO = READ, READ | Perm.WRITE_UNCHANGED


@pytest.fixture
def pair(tmp_path: Path) -> tuple[ImageLock, ImageLock]:
    path = tmp_path / "a"
    path.write_bytes(b"")
    descriptors = [os.open(path, os.O_RDWR) for _ in range(2)]
    assert are_supported(descriptors[0])
    return ImageLock(descriptors[0]), ImageLock(descriptors[1])


def refused(lock: ImageLock, needs: Perm, shares: Perm) -> str:
    with pytest.raises(UsageError) as caught:
        lock.change(needs, shares)
    return str(caught.value)


def test_taken_against_denied_and_back(pair: tuple[ImageLock, ImageLock]) -> None:
    one, other = pair
    one.change(*FORMAT)
    assert refused(other, *FORMAT) == 'Failed to get "write" lock'
    assert refused(other, *FORMAT_RO) == 'Failed to get shared "write" lock'
    assert refused(other, RESIZE, ALL) == 'Failed to get "resize" lock'
    other.change(READ, ALL)
    one.change(NONE, ALL)
    other.change(*FORMAT)
    assert refused(one, *FORMAT) == 'Failed to get "write" lock'


def test_a_refusal_leaves_the_locks_as_they_were(pair: tuple[ImageLock, ImageLock]) -> None:
    one, other = pair
    one.change(READ, READ | Perm.WRITE_UNCHANGED)  # keeps writers out
    other.change(READ, ALL)
    assert refused(other, READ | WRITE | RESIZE, READ) == 'Failed to get "write" lock'
    one.change(READ | WRITE, ALL & ~RESIZE)  # would fail if the other had kept what it tried
    assert refused(other, RESIZE, ALL) == 'Failed to get "resize" lock'


def image(path: Path) -> str:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    return str(path)


def qemu_io(*arguments: str) -> str:
    done = subprocess.run(["qemu-io", "-f", "qcow2", *arguments], capture_output=True, text=True, timeout=20)
    return done.stdout + done.stderr


@pytest.mark.qemu
def test_a_writer_here_keeps_qemu_out(tmp_path: Path) -> None:
    path = image(tmp_path / "a.img")

    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="raw", node_name="n", file={"driver": "file", "filename": path})
        assert "wrote 512/512" in qemu_io("-c", "write 0 512", path)  # nobody uses the node: no locks
        root = await graph.claim("a test", node, READ | WRITE, READ | Perm.WRITE_UNCHANGED)
        assert 'Failed to get "write" lock' in qemu_io("-c", "write 0 512", path)
        assert 'Failed to get shared "write" lock' in qemu_io("-r", "-c", "read 0 512", path)
        assert "read 512/512" in qemu_io("-U", "-r", "-c", "read 0 512", path)
        await graph.release(root)
        assert "wrote 512/512" in qemu_io("-c", "write 0 512", path)

    run_in_graph(body)


@pytest.mark.qemu
def test_a_writer_there_keeps_us_out(tmp_path: Path) -> None:
    path = image(tmp_path / "a.img")
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0
    )
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.write("write 0 512\n")
    while "wrote 512/512" not in holder.stdout.readline():
        pass

    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="raw", node_name="n", file={"driver": "file", "filename": path})
        with pytest.raises(UsageError, match=r'^Failed to get "write" lock$'):
            await graph.claim("a test", node, READ | WRITE, ALL)
        with pytest.raises(UsageError, match=r'^Failed to get shared "write" lock$'):
            await graph.claim("a test", node, READ, ALL & ~WRITE)
        unlocked = {"driver": "file", "filename": path, "locking": "off"}
        loose = await add_node(graph, driver="raw", node_name="off", file=unlocked)
        await graph.release(await graph.claim("a test", loose, READ | WRITE, ALL))
        shared = {"driver": "file", "filename": path, "read-only": True, "force-share": True}
        forced = await add_node(graph, driver="raw", node_name="fs", read_only=True, force_share=True, file=shared)
        await graph.release(await graph.claim("a test", forced, READ, READ))
        holder.communicate("quit\n", timeout=20)
        await graph.release(await graph.claim("a test", node, READ | WRITE, ALL))

    try:
        run_in_graph(body)
    finally:
        if holder.poll() is None:
            holder.kill()
            holder.communicate()
