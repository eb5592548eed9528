"""Any options on any image: it is what they say and shows what it did, or not one byte of the file is another."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from blockjobs.base.span import Span
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.host import Host

SIZE = 320 << 10
images = st.fixed_dictionaries(
    {"cluster_size": st.sampled_from([512, 4096, 16384])},
    optional={
        "kind": st.sampled_from(
            [
                {"version": "v2"},
                {"extended_l2": True, "cluster_size": 16384},
                {"refcount_bits": 1},
                {"refcount_bits": 8, "lazy_refcounts": True},
                {"refcount_bits": 64, "compression_type": "zstd"},
            ]
        ),
        "backing": st.just(True),
        "snapshots": st.integers(1, 3),
    },
)
options = st.fixed_dictionaries(
    {},
    optional={
        "version": st.sampled_from(["v2", "v2", "v3", "v4"]),
        "refcount_bits": st.sampled_from([1, 2, 8, 16, 16, 64, 5]),
        "lazy_refcounts": st.booleans(),
        "size": st.sampled_from([SIZE, SIZE + 512, SIZE * 3, SIZE - 64 * 1024, SIZE + 100, 1 << 50, 1 << 62]),
        "backing_file": st.sampled_from(["", "base.raw", "base.raw", "x" * 300, "x" * 1023, "x" * 1024]),
        "backing_fmt": st.sampled_from(["raw", "raw", "a-name-that-is-too-long"]),
        "data_file": st.sampled_from(["d.raw"]),
        "data_file_raw": st.booleans(),
        "encrypt": st.just({"format": "luks", "state": "active", "new-secret": "s"}),
    },
)


async def make(host: Host, folder: Path, image: dict[str, Any]) -> None:
    """An image with data, zeroes that have clusters and zeroes that have none, a compressed cluster, snapshots."""
    made = {"cluster_size": image["cluster_size"], **image.get("kind", {})}
    (folder / "base.raw").write_bytes(b"b" * SIZE)
    if image.get("backing"):
        made |= {"backing_file": "base.raw", "backing_fmt": "raw"}
    await host.create_image(str(folder / "i"), "qcow2", SIZE, **made)
    node = await host.open(str(folder / "i"))
    async with host.access(node, write=True) as root:
        await root.node.write(3000, b"d" * 90_000)
        await root.node.zero(Span(16384, 16384), mode=ZeroMode.KEEP)
        await root.node.zero(Span(131072, 32768))
        await root.node.write(SIZE - 16384, b"c" * 16384, compressed=True)
        snapshots = node.driver.internal_snapshots
        assert snapshots is not None
        if made.get("refcount_bits") != 1:
            for number in range(image.get("snapshots", 0)):
                await snapshots.create(f"s{number}", date_ns=0)
    await host.close_nodes(node)


async def shown(host: Host, path: Path) -> bytes:
    node = await host.open(str(path), read_only=True)
    async with host.access(node) as root:
        content = await root.node.read(0, min(SIZE, node.length))
    await host.close_nodes(node)
    return content


async def changed(folder: Path, image: dict[str, Any], amended: dict[str, Any], *, force: bool) -> None:
    path = folder / "i"
    async with Host() as host:
        await make(host, folder, image)
        content, before = await shown(host, path), path.read_bytes()
        node = await host.open(str(path))
        job = await host.amend(node, force=force, **amended)
        while job.status != "concluded":
            await asyncio.sleep(0.001)
        error = job.error
        job.dismiss()
        header = node.driver.image.header
        await host.close_nodes(node)
        if error is not None:
            assert path.read_bytes() == before, error
            return
        assert header.version == {"v2": 2, "v3": 3}.get(amended.get("version", ""), header.version)
        assert header.refcount_bits == amended.get("refcount_bits", header.refcount_bits)
        assert header.size == amended.get("size", SIZE)
        result = await host.check_image({"driver": "file", "filename": str(path)})
        assert not (result.corruptions or result.check_errors), result.problems
        if amended.get("backing_file", "base.raw") == "base.raw" and (
            image.get("backing") or "backing_file" not in amended
        ):
            assert await shown(host, path) == content[: header.size]


@settings(max_examples=40, deadline=None)
@given(image=images, amended=options, force=st.booleans())
def test_all_or_nothing(image: dict[str, Any], amended: dict[str, Any], force: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(changed(Path(folder), image, amended, force=force))
