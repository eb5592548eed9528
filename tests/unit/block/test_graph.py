"""Names, references, lifetime and the words of refusals; texts are those of QSD (transcripts nodes, filters, locks)."""

from pathlib import Path

import pytest

from blockjobs.base.errors import BlockjobsError, NodeNotFound
from blockjobs.block.claims import ALL, NONE, Perm
from blockjobs.block.graph import Graph
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.graphs import add_node, run_in_graph

READ, WRITE = Perm.CONSISTENT_READ, Perm.WRITE


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.img").write_bytes(bytes(1 << 20))
    Path("odd.img").write_bytes(bytes(1000))
    Path("dir").mkdir()


FILE = {"driver": "file", "filename": "r.img"}


async def refused(graph: Graph, **options: object) -> str:
    before = graph.nodes()
    with pytest.raises(BlockjobsError) as caught:
        await add_node(graph, **options)
    assert graph.nodes() == before
    return str(caught.value)


def test_names() -> None:
    async def body(graph: Graph) -> None:
        assert await refused(graph, driver="raw", file=FILE) == "'node-name' must be specified for the root node"
        for name, text in [
            ("1a", "Invalid node-name: '1a'"),
            ("", "Invalid node-name: ''"),
            ("#block0", "Invalid node-name: '#block0'"),
            ("x" * 32, "Node name too long"),
        ]:
            assert await refused(graph, driver="raw", node_name=name, file=FILE) == text
        await add_node(graph, driver="raw", node_name="x" * 31, file=FILE)
        await add_node(graph, driver="raw", node_name="a", file=FILE)
        assert await refused(graph, driver="raw", node_name="a", file=FILE) == "Duplicate nodes with node-name='a'"
        inner = {**FILE, "node-name": "b"}
        assert await refused(graph, driver="raw", node_name="b", file=inner) == "Duplicate nodes with node-name='b'"
        inner = {**FILE, "node-name": "1b"}
        assert await refused(graph, driver="raw", node_name="b", file=inner) == "Invalid node-name: '1b'"
        assert next(node.name for node in graph.nodes()) == "a"
        assert graph.nodes()[1].name.startswith("#block")

    run_in_graph(body)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"driver": "bogus"}, "Parameter 'driver' does not accept value 'bogus'"),
        ({"driver": "raw"}, "Parameter 'file' is missing"),
        ({"driver": "raw", "file": {"driver": "file"}}, "Parameter 'file.filename' is missing"),
        ({"driver": "file", "filename": "r.img", "bogus": 1}, "Parameter 'bogus' is unexpected"),
        ({"driver": "file", "filename": ""}, "The 'file' block driver requires a file name"),
        ({"driver": "file", "filename": "no"}, "Could not open 'no': No such file or directory"),
        (
            {"driver": "file", "filename": "r.img", "aio": "native"},
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ),
        (
            {"driver": "file", "filename": "r.img", "pr-manager": "x"},
            "No persistent reservation manager with id 'x'",
        ),
        ({"driver": "file", "filename": "dir"}, "Could not open 'dir': Is a directory"),
        ({"driver": "file", "filename": "/dev/null"}, "'file' driver requires '/dev/null' to be a regular file"),
        (
            {"driver": "host_device", "filename": "r.img"},
            "'host_device' driver requires 'r.img' to be either a character or block device",
        ),
        ({"driver": "raw", "file": "no"}, "Cannot find device='no' nor node-name='no'"),
        ({"driver": "raw", "file": "n"}, "Cannot find device='n' nor node-name='n'"),
        ({"driver": "raw", "file": {"driver": "raw", "file": "no"}}, "Cannot find device='no' nor node-name='no'"),
        (
            {"driver": "raw", "file": FILE, "force-share": True},
            "force-share=on can only be used with read-only images",
        ),
        (
            {"driver": "raw", "file": FILE, "detect-zeroes": "unmap"},
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
        (
            {"driver": "raw", "file": FILE, "offset": 8388608},
            "Offset (8388608) cannot be greater than size of the containing file (1048576)",
        ),
        (
            {"driver": "raw", "file": {"driver": "file", "filename": "odd.img"}, "size": 1536},
            "The sum of offset (0) and size (1536) has to be smaller or equal to the  actual size of the containing "
            "file (1024)",
        ),
        ({"driver": "raw", "file": FILE, "size": 1000}, "Specified size is not multiple of 512"),
        ({"driver": "throttle", "throttle-group": "g", "file": FILE}, "Throttle group 'g' does not exist"),
    ],
)
def test_refusals(options: dict[str, object], text: str) -> None:
    async def body(graph: Graph) -> None:
        assert await refused(graph, node_name="n", **options) == text

    run_in_graph(body)


def test_a_fifo_neither_opens_nor_hangs() -> None:
    import os

    os.mkfifo("fifo")

    async def body(graph: Graph) -> None:
        text = await refused(graph, driver="file", node_name="f", filename="fifo")
        assert text == "'file' driver requires 'fifo' to be a regular file"

    run_in_graph(body)


def test_inline_children_live_as_long_as_a_parent_and_inherit() -> None:
    async def body(graph: Graph) -> None:
        inner = {**FILE, "node-name": "f"}
        await add_node(graph, driver="raw", node_name="a", read_only=True, file=inner)
        assert graph.node("f").read_only
        await add_node(graph, driver="raw", node_name="b", file="f")
        await graph.remove("a")
        assert [node.name for node in graph.nodes()] == ["b", "f"]
        await graph.remove("b")
        assert graph.nodes() == []

    run_in_graph(body)


def test_order_of_refusals_to_delete() -> None:
    async def body(graph: Graph) -> None:
        async def kept(name: str) -> str:
            with pytest.raises(BlockjobsError) as caught:
                await graph.remove(name)
            return str(caught.value)

        f = await add_node(graph, **FILE, node_name="f")
        a = await add_node(graph, driver="raw", node_name="a", file="f")
        await add_node(graph, driver="raw", node_name="c", file={**FILE, "node-name": "inline"})
        assert await kept("no") == "Failed to find node with node-name='no'"
        assert await kept("f") == "Block device f is in use"
        assert await kept("inline") == "Node inline is not owned by the monitor"
        owner = object()
        f.block("block device is in use by block job: backup", owner)
        assert await kept("f") == "Node 'f' is busy: block device is in use by block job: backup"
        root = await graph.claim("an unnamed block device", f, READ, ALL)
        assert await kept("f") == "Node f is in use"
        await graph.release(root)
        f.unblock(owner)
        hold = await graph.claim("backup job 'j'", a, NONE, ALL, name="main node")
        assert await kept("a") == "Block device a is in use"
        await graph.release(hold)
        await graph.remove("a")
        await graph.remove("f")
        assert [node.name for node in graph.nodes()] == ["c", "inline"]
        with pytest.raises(NodeNotFound, match=r"^Cannot find device='' nor node-name='a'$"):
            graph.node("a")

    run_in_graph(body)


def test_rights_of_users_and_the_words_of_a_conflict() -> None:
    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="raw", node_name="dst", file=FILE)
        export = await graph.claim("an unnamed block device", node, READ | WRITE, ALL & ~Perm.RESIZE)
        with pytest.raises(BlockjobsError) as caught:
            await graph.claim("an unnamed block device", node, WRITE, Perm.WRITE_UNCHANGED)
        assert str(caught.value) == (
            "Permission conflict on node 'dst': permissions 'consistent read, write' are both required by an unnamed "
            "block device (uses node 'dst' as 'root' child) and unshared by an unnamed block device (uses node 'dst' "
            "as 'root' child)."
        )
        assert node.children["file"].rights == (READ | WRITE, ALL & ~Perm.RESIZE)
        with pytest.raises(BlockjobsError, match="permissions 'resize' are both required"):
            await graph.resize(node, 4096)
        await graph.change_claim(export, needs=READ, shares=ALL)
        await graph.resize(node, 4096)
        assert node.length == 4096
        await graph.release(export)
        window = await add_node(graph, driver="raw", node_name="w", offset=512, file=node.children["file"].name)
        assert window.length == 3584
        with pytest.raises(BlockjobsError, match="unshared by node 'w'"):
            await graph.resize(node, 8192)

    run_in_graph(body)


def test_read_only_nodes_have_no_writers() -> None:
    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="raw", node_name="ro", read_only=True, file=FILE)
        for needs in (WRITE, Perm.WRITE_UNCHANGED):
            with pytest.raises(BlockjobsError, match=r"^Block node is read-only$"):
                await graph.claim("x", node, needs, ALL)
        with pytest.raises(BlockjobsError, match=r"^Image is read-only$"):
            await graph.resize(node, 512)
        above = await add_node(graph, driver="raw", node_name="rw", file="ro")
        with pytest.raises(BlockjobsError, match=r"^Block node is read-only$"):
            await graph.claim("x", above, WRITE, ALL)
        assert not node.permits(WRITE)

    run_in_graph(body)


def test_two_descriptions_of_one_file_conflict_by_their_locks() -> None:
    async def body(graph: Graph) -> None:
        one = await add_node(graph, driver="raw", node_name="one", file=FILE)
        two = await add_node(graph, driver="raw", node_name="two", file=FILE)
        writer = await graph.claim("x", one, READ | WRITE, READ)
        with pytest.raises(BlockjobsError, match=r'^Failed to get "write" lock$'):
            await graph.claim("x", two, READ | WRITE, ALL)
        assert two.rights.needs == NONE
        await graph.release(writer)
        await graph.release(await graph.claim("x", two, READ | WRITE, ALL))

    run_in_graph(body)


def test_resize_words() -> None:
    async def body(graph: Graph) -> None:
        fixed = await add_node(graph, driver="raw", node_name="fixed", size=1024, file=FILE)
        null = await add_node(graph, driver="null-co", node_name="null")
        for node, length, text in [
            (fixed, 2048, "Cannot resize fixed-size raw disks"),
            (null, 2048, "Image format driver does not support resize"),
            (null, -1, "Parameter 'size' expects a >0 size"),
        ]:
            with pytest.raises(BlockjobsError) as caught:
                await graph.resize(node, length)
            assert str(caught.value) == text
        fixed.block("it is busy", "me")
        with pytest.raises(BlockjobsError, match="Node 'fixed' is busy: it is busy"):
            await graph.resize(fixed, 1024)
        fixed.unblock("me")

    run_in_graph(body)


def test_a_given_medium_is_a_file_node() -> None:
    async def body(graph: Graph) -> None:
        await graph.open_medium(SimDisk(b"abc" * 1000), "disk")
        raw = await add_node(graph, driver="raw", node_name="r", file="disk")
        assert raw.length == 3072  # whole sectors, as QEMU
        assert await raw.read(2998, 10) == b"bc" + bytes(8)
        with pytest.raises(BlockjobsError, match="Duplicate"):
            await graph.open_medium(SimDisk(), "disk")

    run_in_graph(body)


def test_a_failing_close_is_told_after_everything_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="raw", node_name="r", file=FILE)
        closed = []

        async def failing() -> None:
            closed.append("raw")
            raise BlockjobsError("disk full")

        monkeypatch.setattr(node.driver, "close", failing)
        with pytest.raises(BlockjobsError, match="disk full"):
            await graph.remove("r")
        assert closed == ["raw"]
        assert graph.nodes() == []

    run_in_graph(body)
