"""Images that their last writer left in doubt: marked dirty, because counts lag behind, or corrupt."""

import asyncio
import json
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.block.node import Node
from blockjobs.host import Host

pytestmark = pytest.mark.qemu

SIZE = 4 << 20
WRITTEN = b"\x07" * (1 << 20)
INCOMPATIBLE_AT, DIRTY, CORRUPT = 79, 1, 2
"""The byte of the header with both marks."""


def qemu(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def marks(path: Path) -> int:
    return path.read_bytes()[INCOMPATIBLE_AT] & (DIRTY | CORRUPT)


def make_dirty(path: Path, **options: str) -> None:
    """QEMU writes with lazy refcounts, flushes, and is killed."""
    joined = ",".join(f"{name}={value}" for name, value in {"lazy_refcounts": "on", **options}.items())
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", joined, path, str(SIZE))
    qemu("qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {len(WRITTEN)}", "-c", "flush", "-c", "sigraise 9", path)
    assert marks(path) == DIRTY
    assert "ERROR cluster" in qemu("qemu-img", "check", path), "counts lag behind"


def make_corrupt(path: Path) -> None:
    make_dirty(path)
    raw = bytearray(path.read_bytes())
    raw[INCOMPATIBLE_AT] = CORRUPT
    path.write_bytes(raw)


def with_node(path: Path, body: Callable[[Host, Node], Awaitable[None]], *, read_only: bool) -> None:
    async def run() -> None:
        async with Host() as host:
            node = await host.open(str(path), read_only=read_only)
            await body(host, node)
            await host.close_nodes(node)

    asyncio.run(run())


async def reads_what_was_flushed(host: Host, node: Node) -> None:
    async with host.access(node) as root:
        assert await root.node.read(0, SIZE) == WRITTEN.ljust(SIZE, b"\0")


@pytest.mark.parametrize(
    "options",
    [{}, {"refcount_bits": "1"}, {"refcount_bits": "64", "extended_l2": "on"}, {"cluster_size": "512"}],
    ids=str,
)
def test_counts_that_lag_are_made_anew_before_the_first_write(options: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "disk"
    make_dirty(path, **options)

    async def write(host: Host, node: Node) -> None:
        await reads_what_was_flushed(host, node)
        async with host.access(node, write=True) as root:
            await root.node.write(2 << 20, WRITTEN)

    with_node(path, write, read_only=False)
    assert marks(path) == 0
    assert "No errors" in qemu("qemu-img", "check", path)
    told = qemu(
        "qemu-io", "-f", "qcow2", "-c", "read -P 7 0 1M", "-c", "read -P 0 1M 1M", "-c", "read -P 7 2M 1M", path
    )
    assert "failed" not in told and told.count("read ") == 3


def test_whoever_only_reads_leaves_the_mark_and_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    make_dirty(path)
    before = path.read_bytes()
    with_node(path, reads_what_was_flushed, read_only=True)
    assert path.read_bytes() == before


def test_our_writers_never_leave_an_image_dirty_that_asks_for_lazy_counts(tmp_path: Path) -> None:
    """At every flush the counts are exact, so that another program may believe them (docs/adr/0017)."""
    path = tmp_path / "disk"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, str(SIZE))

    async def run() -> None:
        async with Host() as host:
            file = {"driver": "file", "filename": str(path)}
            node = await host.blockdev_add(
                {"driver": "qcow2", "node-name": "n", "lazy-refcounts": True, "file": {**file, "locking": "off"}}
            )
            async with host.access(node, write=True) as root:
                for at in (0, 1 << 20):
                    await root.node.write(at, WRITTEN)
                    await root.node.flush()
                    assert marks(path) == 0
                    assert "No errors" in qemu("qemu-img", "check", "-U", path)
            await host.close_nodes(node)

    asyncio.run(run())
    info = json.loads(qemu("qemu-img", "info", "--output=json", path))
    assert info["format-specific"]["data"]["lazy-refcounts"] and not info["dirty-flag"]


def test_a_corrupt_image_is_read_only_until_it_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    make_corrupt(path)
    before = path.read_bytes()
    with pytest.raises(UsageError) as refused:
        with_node(path, reads_what_was_flushed, read_only=False)
    assert "qcow2: Image is corrupt; cannot be opened read/write" in str(refused.value)
    assert str(refused.value).split(": ", 1)[-1] in qemu("qemu-io", "-f", "qcow2", "-c", "read 0 512", path)
    with_node(path, reads_what_was_flushed, read_only=True)
    assert path.read_bytes() == before

    async def repair() -> None:
        async with Host() as host:
            found = await host.repair_image({"driver": "file", "filename": str(path)})
            assert (found.corruptions, found.leaks) == (0, 0)

    asyncio.run(repair())
    assert marks(path) == 0
    assert "No errors" in qemu("qemu-img", "check", path)
    with_node(path, reads_what_was_flushed, read_only=False)


def test_what_qemu_marks_corrupt_and_repairs_we_take_again(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    make_corrupt(path)
    assert "Repairing" in qemu("qemu-img", "check", "-r", "all", path)
    assert marks(path) == 0
    with_node(path, reads_what_was_flushed, read_only=False)
    assert "No errors" in qemu("qemu-img", "check", path)
