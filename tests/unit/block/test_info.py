"""What nodes tell about themselves; shapes as recorded from QSD, values compared with qemu-img."""

import json
import subprocess
from pathlib import Path

import msgspec
import pytest

from blockjobs.base.offload import ThreadOffload
from blockjobs.block.graph import Graph
from blockjobs.block.info import image_info
from blockjobs.block.kept_info import node_info
from blockjobs.block.node import Node
from blockjobs.block.write_threshold import set_write_threshold
from blockjobs.testing.graphs import add_node, new_graph, run_in_graph


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


async def told(node: Node, *, flat: bool = False) -> dict[str, object]:
    decoded: dict[str, object] = json.loads(msgspec.json.encode(await node_info(node, flat=flat)))
    return decoded


def test_a_plain_node() -> None:
    Path("r.img").write_bytes(bytes(4096))

    async def body(graph: Graph) -> None:
        file = {"driver": "file", "filename": "r.img", "node-name": "f"}
        await add_node(graph, driver="raw", node_name="r", cache={"direct": False, "no-flush": True}, file=file)
        got = await told(graph.node("r"))
        assert got.pop("image") == {
            "filename": "r.img", "format": "raw", "dirty-flag": False, "virtual-size": 4096,
            "actual-size": Path("r.img").stat().st_blocks * 512,
        }  # fmt: skip
        assert got == {
            "file": "r.img", "node-name": "r", "ro": False, "drv": "raw", "backing_file_depth": 0, "encrypted": False,
            "active": True,
            "children": [{"child": "file", "node-name": "f"}], "detect_zeroes": "off", "bps": 0, "bps_rd": 0,
            "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0, "write_threshold": 0,
            "cache": {"writeback": True, "direct": False, "no-flush": True},
        }  # fmt: skip

    run_in_graph(body)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"driver": "raw", "file": "f"}, "r.img"),
        (
            {"driver": "raw", "offset": 512, "file": "f"},
            'json:{"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "r.img"}}',
        ),
        ({"driver": "null-co"}, "null-co://"),
        ({"driver": "null-co", "size": 512}, 'json:{"driver": "null-co", "size": 512}'),
        ({"driver": "copy-before-write", "file": "f", "target": "f2"}, "r.img"),
        (
            {"driver": "blkdebug", "image": "f", "inject-error": [{"event": "none", "errno": 5}]},
            'json:{"driver": "blkdebug", "inject-error.0.event": "none", "inject-error.0.errno": 5, '
            '"image": {"driver": "file", "filename": "r.img"}}',
        ),
    ],
)
def test_names_of_nodes(options: dict[str, object], name: str) -> None:
    Path("r.img").write_bytes(bytes(4096))

    async def body(graph: Graph) -> None:
        for each in ("f", "f2"):
            await add_node(graph, driver="file", filename="r.img", node_name=each)
        node = await add_node(graph, node_name="n", **options)
        assert node.filename == name
        assert image_info(node).filename == name

    run_in_graph(body)


@pytest.mark.qemu
@pytest.mark.parametrize(
    "options",
    ["compat=0.10", "extended_l2=on,lazy_refcounts=on,refcount_bits=64,compression_type=zstd", "cluster_size=512"],
)
def test_images_as_qemu_img_describes_them(options: str) -> None:
    def run(*words: str) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", "base.qcow2", "-F", "qcow2", "a.qcow2")
    run("qemu-img", "snapshot", "-c", "s1", "a.qcow2")
    wanted = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", "a.qcow2"))

    async def body(graph: Graph) -> None:
        file = {"driver": "file", "filename": "a.qcow2"}
        node = await add_node(graph, driver="qcow2", node_name="a", read_only=True, file=file)
        got = await told(node)
        flat = await told(node, flat=True)
        assert (got["backing_file_depth"], flat["backing_file_depth"]) == (1, 0)
        assert got["backing_file"] == flat["backing_file"] == "base.qcow2"
        image = got["image"]
        assert isinstance(image, dict)
        assert image.pop("backing-image") == wanted[1]
        assert image == wanted[0] == flat["image"]

    run_in_graph(body, new_graph(offload=ThreadOffload()))


@pytest.mark.qemu
def test_a_name_of_any_bytes_does_not_break_the_answer() -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", b"b\xff", "-F", "raw", "a.qcow2", "1M"], check=True
    )

    async def body(graph: Graph) -> None:
        file = {"driver": "file", "filename": "a.qcow2"}
        node = await add_node(graph, driver="qcow2", node_name="a", file=file, backing=None)
        image = (await told(node))["image"]
        assert isinstance(image, dict)
        assert image["backing-filename"] == "b\ufffd"

    run_in_graph(body)


def test_nothing_is_described_twice_but_every_change_shows() -> None:
    Path("r.img").write_bytes(bytes(4096))

    async def body(graph: Graph) -> None:
        file = {"driver": "file", "filename": "r.img", "node-name": "f"}
        await add_node(graph, driver="raw", node_name="r", file=file)
        node, below = graph.node("r"), graph.node("f")
        before = await node_info(node)
        assert await node_info(node) is before
        assert (await node_info(node, flat=True)) == before
        set_write_threshold(graph, "r", 512)
        assert (await told(node))["write_threshold"] == 512
        await graph.resize(below, 1 << 20)
        assert (await node_info(below)).image.virtual_size == 1 << 20
        with Path("r.img").open("r+b") as image:
            image.write(b"x" * 65536)
        assert (await node_info(node)).image.actual_size == Path("r.img").stat().st_blocks * 512 > 4096
        await graph.set_read_only(node, read_only=True)
        assert (await told(node))["ro"]

    run_in_graph(body)
