"""Images that QEMU made, with each feature, read back; and written to so that QEMU finds no fault."""

import subprocess

import pytest

from blockjobs.base.offload import ThreadOffload
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.policy import OpenPolicy
from blockjobs.testing.graphs import add_node, new_graph, run_in_graph

pytestmark = pytest.mark.qemu
SIZE = 3 << 20

FEATURES = {
    "version 2": "compat=0.10",
    "512-byte clusters": "cluster_size=512",
    "2 MiB clusters": "cluster_size=2M",
    "1-bit refcounts": "refcount_bits=1",
    "4-bit refcounts": "refcount_bits=4",
    "64-bit refcounts": "refcount_bits=64",
    "zstd": "compression_type=zstd",
    "subclusters": "extended_l2=on",
    "small subclusters": "extended_l2=on,cluster_size=16k",
    "data file": "data_file=d.raw",
    "raw data file": "data_file=d.raw,data_file_raw=on",
    "preallocated tables": "preallocation=metadata",
    "lazy refcounts": "lazy_refcounts=on",
}


def qemu(cwd, *words):
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def content_of(cwd, name="disk.qcow2", *options):
    qemu(cwd, "qemu-img", "convert", *options, "-O", "raw", name, "shown.raw")
    return bytearray((cwd / "shown.raw").read_bytes())


def fill(cwd, *, compressed):
    """Clusters of every kind, by QEMU: plain, compressed, zero with and without space, parts of clusters."""
    compressible = ["write -c -P 1 2M 64k", "write -c -P 2 2112k 64k"] if compressed else []
    commands = [
        *compressible,
        "write -P 3 0 200k",
        "write -P 4 300k 1k",
        "write -z 64k 64k",
        "write -z -u 128k 16k",
        "discard 1M 64k",
        "write -P 5 2900k 172k",
    ]
    qemu(cwd, "qemu-io", "-f", "qcow2", *[word for each in commands for word in ("-c", each)], "disk.qcow2")


def with_disk(cwd, body, **options):
    async def inside(graph):
        node = await add_node(
            graph,
            driver="qcow2",
            node_name="disk",
            discard="unmap",
            file={"driver": "file", "filename": str(cwd / "disk.qcow2")},
            **options,
        )
        needs = Perm.CONSISTENT_READ if node.read_only else Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
        user = await graph.claim("a test", node, needs, ALL)
        await body(node)
        await graph.release(user)

    graph = new_graph(offload=ThreadOffload(2), policy=OpenPolicy(image_roots=(str(cwd),)))
    run_in_graph(inside, graph)


@pytest.mark.parametrize("feature", FEATURES)
def test_what_qemu_made_is_read_and_written(feature, tmp_path):
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-o", FEATURES[feature], "disk.qcow2", str(SIZE))
    has_data_file = "data_file" in FEATURES[feature]
    fill(tmp_path, compressed=not has_data_file and feature not in ("2 MiB clusters", "preallocated tables"))
    shown = content_of(tmp_path)

    async def read(node):
        assert await node.read(0, SIZE) == shown
        assert await node.read(65536 * 33 - 100, 200) == shown[65536 * 33 - 100 : 65536 * 33 + 100]

    with_disk(tmp_path, read, read_only=True)

    async def change(node):
        for at, content in ((10_000, b"a" * 5000), (100_000, b"b" * 100_000), (2 * 65536 * 16 + 5, b"c" * 70_000)):
            await node.write(at, content)
            shown[at : at + len(content)] = content
        await node.zero(Span(300_000, 100_000))
        shown[300_000:400_000] = bytes(100_000)
        compress = node.driver.compressor("default")
        assert (compress is None) == has_data_file
        if compress is not None:
            unit = node.cluster_size
            start = (1 << 20) // unit * unit
            places = [at for at in range(start, start + 4 * unit, unit) if at + unit <= SIZE]
            pieces = {at: bytes([at % 251]) * unit for at in places}
            await node.driver.write_compressed([(at, compress(piece)) for at, piece in pieces.items()])
            for at, piece in pieces.items():
                shown[at : at + unit] = piece
        assert await node.read(0, SIZE) == shown

    with_disk(tmp_path, change)
    qemu(tmp_path, "qemu-img", "check", "disk.qcow2")
    assert content_of(tmp_path) == shown


def test_chains_show_what_qemu_shows(tmp_path):
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "raw", "base.raw", "1M")
    qemu(tmp_path, "qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "base.raw")
    middle = ("-b", "base.raw", "-F", "raw", "middle.qcow2", "2M")
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", *middle)
    qemu(tmp_path, "qemu-io", "-f", "qcow2", "-c", "write -P 2 100k 300k", "middle.qcow2")
    top = ("-b", "middle.qcow2", "-F", "qcow2", "disk.qcow2", str(SIZE))
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *top)
    qemu(tmp_path, "qemu-io", "-f", "qcow2", "-c", "write -P 3 300k 10k", "-c", "write -z 500k 100k", "disk.qcow2")
    shown = content_of(tmp_path)

    async def change(node):
        assert await node.read(0, SIZE) == shown
        await node.write(1_000_001, b"x" * 100_000)
        shown[1_000_001:1_100_001] = b"x" * 100_000
        await node.discard(Span(0, 4096))
        shown[:4096] = bytes(4096)
        assert await node.read(0, SIZE) == shown

    with_disk(tmp_path, change)
    qemu(tmp_path, "qemu-img", "check", "disk.qcow2")
    assert content_of(tmp_path) == shown


@pytest.mark.parametrize("options", ["cluster_size=4k", "extended_l2=on", "compat=0.10", "refcount_bits=2"])
def test_snapshots_keep_what_they_show(options, tmp_path):
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "disk.qcow2", str(SIZE))
    fill(tmp_path, compressed=options != "refcount_bits=2")
    qemu(tmp_path, "qemu-img", "snapshot", "-c", "before", "disk.qcow2")
    before = content_of(tmp_path)
    shown = before[:]

    async def change(node):
        assert [snapshot["name"] for snapshot in node.driver.info()["snapshots"]] == ["before"]
        for at in range(0, SIZE - 9000, 90_000):
            await node.write(at, b"z" * 9000)
            shown[at : at + 9000] = b"z" * 9000
        await node.zero(Span(2 << 20, 128 << 10))
        shown[2 << 20 : (2 << 20) + (128 << 10)] = bytes(128 << 10)

    with_disk(tmp_path, change)
    qemu(tmp_path, "qemu-img", "check", "disk.qcow2")
    assert content_of(tmp_path) == shown
    assert content_of(tmp_path, "disk.qcow2", "-l", "before") == before
    qemu(tmp_path, "qemu-img", "snapshot", "-d", "before", "disk.qcow2")
    qemu(tmp_path, "qemu-img", "check", "disk.qcow2")


def test_lazy_refcounts_of_a_writer_that_died_are_rebuilt(tmp_path):
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "disk.qcow2", str(SIZE))
    words = ("qemu-io", "-f", "qcow2", "-c", "write -P 7 100k 300k", "-c", "flush", "-c", "abort", "disk.qcow2")
    subprocess.run(words, cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "disk.qcow2").read_bytes()[79] & 1, "the dirty bit"
    shown = bytearray(SIZE)
    shown[100 << 10 : 400 << 10] = b"\7" * (300 << 10)

    async def change(node):
        await node.write(1 << 20, b"x" * 100_000)
        shown[1 << 20 : (1 << 20) + 100_000] = b"x" * 100_000
        assert await node.read(0, SIZE) == shown

    with_disk(tmp_path, change)
    qemu(tmp_path, "qemu-img", "check", "disk.qcow2")
    assert content_of(tmp_path) == shown
