"""`blockdev-reopen`: what it changes, that a failure anywhere changes nothing, and nodes that change places."""

import subprocess
from pathlib import Path

import pytest

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.file import File
from blockjobs.block.drivers.file_medium import FileMedium
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.drivers.throttle_group import ThrottleGroupOptions
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.objects import add_object
from blockjobs.block.options import BlockdevOptions, DetectZeroes
from blockjobs.block.reopen_plan import reopen
from blockjobs.schema.command import convert
from blockjobs.testing.graphs import add_node, run_in_graph

READ, WRITE = Perm.CONSISTENT_READ, Perm.WRITE

pytestmark = pytest.mark.qemu


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", f"{name}.img", "1M"], check=True)
        subprocess.run(["qemu-io", "-c", f"write -P {ord(name)} 0 64k", f"{name}.img"], check=True, capture_output=True)
    Path("r.img").write_bytes(bytes(range(256)) * 4096)


def qcow2(name: str, **options: object) -> dict[str, object]:
    file = {"driver": "file", "filename": f"{name}.img", "node-name": f"{name}f"}
    return {"driver": "qcow2", "node-name": name, "file": file, "backing": None, **options}


async def add(graph: Graph, options: dict[str, object]) -> Node:
    return await add_node(graph, **{name.replace("-", "_"): value for name, value in options.items()})


async def again(graph: Graph, *wanted: dict[str, object]) -> None:
    await reopen(graph, [convert(options, BlockdevOptions) for options in wanted])


def state_of(graph: Graph) -> list[object]:
    return [
        (
            node.name,
            node.options,
            node.settings,
            node.rights,
            list(node.children.items()),
            list(node.edges.items()),
            [(parent, parent.holder, parent.rights) for parent in node.parents],
            node.driver.medium if isinstance(node.driver, File) else None,
            node.driver.image if isinstance(node.driver, Qcow2) else None,
        )
        for node in graph.nodes()
    ]


def test_what_is_left_out_goes_back_to_its_default() -> None:
    async def body(graph: Graph) -> None:
        given = {"read-only": True, "discard": "unmap", "detect-zeroes": "on", "cache": {"direct": True}}
        node = await add(graph, qcow2("a", **given))
        file = graph.node("af")
        assert isinstance(file.driver, File) and isinstance(file.driver.medium, FileMedium)
        assert file.driver.medium.is_direct and file.driver.medium.read_only
        await again(graph, qcow2("a"))
        assert not (node.read_only or node.settings.unmap or node.settings.direct or file.read_only)
        assert node.settings.detect_zeroes is DetectZeroes.OFF
        assert not (file.driver.medium.is_direct or file.driver.medium.read_only)
        assert await node.read(0, 1) == b"a"
        await again(graph, qcow2("a", file="af", **given))
        assert node.read_only and file.read_only and node.settings.direct and file.driver.medium.is_direct

    run_in_graph(body)


def test_a_backing_image_comes_goes_and_is_replaced_under_a_writer() -> None:
    async def body(graph: Graph) -> None:
        node = await add(graph, qcow2("a", backing=qcow2("b")))
        await add(graph, qcow2("c"))
        export = await graph.claim("an export", node, READ | WRITE, ALL)
        await export.node.write(0, b"guest")
        with pytest.raises(UsageError, match="backing is missing for 'a'"):
            await again(graph, {name: value for name, value in qcow2("a").items() if name != "backing"})
        await again(graph, qcow2("a", backing="c"))
        assert node.backing is graph.node("c") and "b" not in {each.name for each in graph.nodes()}
        await again(graph, qcow2("a", backing=None))
        assert node.backing is None
        assert await node.read(0, 6) == b"guesta"
        with pytest.raises(UsageError, match="Making 'a' a backing child of 'a' would create a cycle"):
            await again(graph, qcow2("a", backing="a"))

    run_in_graph(body)


def test_nodes_change_places() -> None:
    async def body(graph: Graph) -> None:
        a, b, c = [await add(graph, qcow2(name)) for name in "abc"]
        await again(graph, qcow2("a", backing="b"), qcow2("b", backing="c"))
        assert (a.backing, b.backing, c.backing) == (b, c, None)
        await again(graph, qcow2("a"), qcow2("b", backing="a"), qcow2("c", backing="b"))
        assert (c.backing, b.backing, a.backing) == (b, a, None)
        before = state_of(graph)
        with pytest.raises(UsageError, match="cycle"):
            await again(graph, qcow2("a", backing="c"))
        assert state_of(graph) == before

    run_in_graph(body)


def test_a_frozen_link_stays() -> None:
    async def body(graph: Graph) -> None:
        node = await add(graph, qcow2("a", backing=qcow2("b")))
        node.edges["backing"].freeze(body)
        before = state_of(graph)
        with pytest.raises(UsageError, match="Cannot change frozen 'backing' link from 'a' to 'b'"):
            await again(graph, qcow2("a", backing=None))
        assert state_of(graph) == before
        await again(graph, qcow2("a", backing="b", **{"read-only": True}))  # this does not change the link
        assert node.read_only
        node.edges["backing"].thaw(body)

    run_in_graph(body)


def test_several_nodes_together_or_none() -> None:
    async def body(graph: Graph) -> None:
        a, b = [await add(graph, qcow2(name)) for name in "ab"]
        await graph.claim("a writer", b, WRITE, ALL)
        before = state_of(graph)
        text = "Read-only block node 'b' cannot support read-write users"
        with pytest.raises(UsageError, match=text):
            await again(graph, qcow2("a", **{"read-only": True}), qcow2("b", **{"read-only": True}))
        assert state_of(graph) == before
        await again(graph, qcow2("a", **{"read-only": True}), qcow2("b", **{"detect-zeroes": "on"}))
        assert a.read_only and b.settings.detect_zeroes is DetectZeroes.ON

    run_in_graph(body)


def test_raw_windows_throttle_groups_and_tuning() -> None:
    async def body(graph: Graph) -> None:
        for group in ("g", "h"):
            add_object(graph.objects, ThrottleGroupOptions(id=group), graph.clock)
        file = {"driver": "file", "filename": "r.img", "node-name": "rf"}
        window = await add(graph, {"driver": "raw", "node-name": "r", "file": file})
        top = await add(graph, {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "r"})
        await again(graph, {"driver": "raw", "node-name": "r", "file": "rf", "offset": 5, "size": 512})
        assert (top.length, await top.read(0, 2)) == (512, b"\5\6")
        for bad in ({"size": 513}, {"offset": 1 << 21}, {"offset": 512, "size": 1 << 20}):
            before = state_of(graph)
            with pytest.raises(UsageError):
                await again(graph, {"driver": "raw", "node-name": "r", "file": "rf", **bad})
            assert state_of(graph) == before and window.length == 512
        throttle = {"driver": "throttle", "node-name": "t", "file": "r"}
        await again(graph, {**throttle, "throttle-group": "h"})
        assert not graph.objects["g"].in_use and graph.objects["h"].in_use
        with pytest.raises(UsageError, match="Throttle group 'x' does not exist"):
            await again(graph, {**throttle, "throttle-group": "x"})
        assert await top.read(0, 1) == b"\5"
        image = await add(graph, qcow2("a"))
        await again(graph, qcow2("a", **{"l2-cache-size": 1 << 20, "pass-discard-other": True}))
        assert isinstance(image.driver, Qcow2) and image.driver.image.tuning.l2_cache_bytes == 1 << 20
        assert await image.read(0, 1) == b"a"

    run_in_graph(body)


REFUSED = [
    ([{"driver": "qcow2", "file": "af"}], "node-name not specified"),
    ([{"driver": "qcow2", "node-name": "x", "file": "af"}], "Failed to find node with node-name='x'"),
    ([{"driver": "raw", "node-name": "a", "file": "af"}], "Cannot change the option 'driver'"),
    ([{"driver": "file", "node-name": "af", "filename": "b.img"}], "Cannot change the option 'filename'"),
    ([qcow2("a", file="nope")], "Cannot find device='' nor node-name='nope'"),
    ([qcow2("a", backing=qcow2("b"))], "Cannot change the option 'backing.driver'"),
    ([qcow2("a", **{"force-share": True, "read-only": True})], "Cannot change the option 'force-share'"),
    ([qcow2("a", **{"l2-cache-entry-size": 3})], "L2 cache entry size must be a power of two"),
    ([qcow2("a", **{"detect-zeroes": "unmap"})], "setting detect-zeroes to unmap is not allowed"),
    ([qcow2("a"), {"driver": "null-co", "node-name": "n"}], "Option 'size' cannot be reset to its default value"),
    ([{"driver": "copy-before-write", "node-name": "w", "file": "n", "target": "n2"}], "does not support reopening"),
]


@pytest.mark.parametrize(("wanted", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_refusals_change_nothing(wanted: list[dict[str, object]], text: str) -> None:
    async def body(graph: Graph) -> None:
        await add(graph, qcow2("a"))
        for name in ("n", "n2"):
            await add(graph, {"driver": "null-co", "node-name": name, "size": 65536, "read-zeroes": True})
        await add(graph, {"driver": "copy-before-write", "node-name": "w", "file": "n", "target": "n2"})
        before = state_of(graph)
        with pytest.raises(BlockjobsError) as refused:
            await again(graph, *wanted)
        assert text in str(refused.value)
        assert state_of(graph) == before

    run_in_graph(body)


def test_nothing_to_do_is_no_crash() -> None:
    async def body(graph: Graph) -> None:
        await again(graph)

    run_in_graph(body)
