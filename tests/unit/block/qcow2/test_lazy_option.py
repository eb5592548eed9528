"""`lazy-refcounts` of a node allows late counts and does not ask for them: ours are exact at every flush, so that a
writer that dies leaves nothing to rebuild (docs/adr/0017-counts-are-always-exact.md)."""

import subprocess
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.reopen_plan import reopen
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.host import SimHost
from blockjobs.wire.qcow2 import Compatible, Header, Incompatible

TOO_OLD = "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"


def options(is_lazy: bool | None) -> dict[str, object]:
    found: dict[str, object] = {"driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": None}
    return found if is_lazy is None else found | {"lazy-refcounts": is_lazy}


@pytest.mark.qemu
@pytest.mark.parametrize("in_header", [False, True])
def test_a_writer_that_dies_leaves_exact_counts_and_the_header_bit(tmp_path: Path, in_header: bool) -> None:
    async def main() -> None:
        async with SimHost(1) as host:
            node = await host.image("disk", NewImage(size=1 << 20, lazy_refcounts=in_header))
            async with host.access(node, write=True) as user:
                for number, is_lazy in enumerate((True, False, None, True)):
                    await reopen(host.graph, [convert(options(is_lazy), BlockdevOptions)])
                    await user.node.write(number << 17, b"x" * 70_000)
                    await user.node.flush()
                    pages = host.disks["disk-file"].pages
                    raw = pages.read(0, pages.size)
                    header = Header.decode_fields(raw[:512])
                    assert not header.incompatible & Incompatible.DIRTY
                    assert bool(header.compatible & Compatible.LAZY_REFCOUNTS) == in_header
                    (tmp_path / "disk.qcow2").write_bytes(raw)
                    words = ["qemu-img", "check", str(tmp_path / "disk.qcow2")]
                    told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                    assert "No errors were found" in told

    run(main())


def test_an_old_image_allows_none_when_it_is_opened_and_reopened() -> None:
    async def main() -> None:
        async with SimHost(1) as host:
            node = await host.image("disk", NewImage(size=1 << 20, is_v2=True))
            with pytest.raises(UsageError, match=TOO_OLD):
                await reopen(host.graph, [convert(options(True), BlockdevOptions)])
            await reopen(host.graph, [convert(options(False), BlockdevOptions)])
            async with host.access(node, write=True) as user:
                await user.node.write(0, b"still")
                assert await user.node.read(0, 5) == b"still"
            await host.close_nodes(node)
            file = await host.disk("other-file", host.disks["disk-file"].pages)
            with pytest.raises(UsageError, match=TOO_OLD):
                await host.blockdev_add(options(True) | {"file": file.name})

    run(main())
