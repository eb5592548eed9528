"""Filters come and go, nodes are replaced: all or nothing, under requests."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.copy_before_write import CopyBeforeWriteOptions
from blockjobs.block.drivers.throttle import ThrottleOptions
from blockjobs.block.drivers.throttle_group import ThrottleGroupOptions
from blockjobs.block.graph import Graph
from blockjobs.block.objects import add_object
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.graphs import add_node, run_in_graph

READ, WRITE = Perm.CONSISTENT_READ, Perm.WRITE


async def prepared(graph: Graph) -> None:
    """disk <- src (raw), dst, and a throttle group that limits nothing."""
    add_object(graph.objects, ThrottleGroupOptions(id="g"), graph.clock)
    await graph.open_medium(SimDisk(bytes(range(256)) * 1024), "disk")
    await graph.open_medium(SimDisk(bytes(256 * 1024)), "dst")
    await add_node(graph, driver="raw", node_name="src", file="disk")


def test_a_filter_takes_the_users_over_and_gives_them_back() -> None:
    async def body(graph: Graph) -> None:
        await prepared(graph)
        src = graph.node("src")
        export = await graph.claim("an unnamed block device", src, READ | WRITE, ALL & ~Perm.RESIZE)
        above = await add_node(graph, driver="raw", node_name="above", file="src")
        own = await graph.claim("backup job 'j'", src, Perm(0), ALL, name="main node", follows=False)
        generation = graph.generation
        async with graph.edit() as edit:
            top = await edit.insert(
                above=src, filter=CopyBeforeWriteOptions(node_name="flt", file="src", target="dst"), implicit=True
            )
        assert graph.generation > generation
        assert (export.node, above.children["file"], own.node) == (top, top, src)
        assert top.implicit
        assert top.children["file"] is src
        before = await src.read(0, 4096)
        await export.node.write(100, b"new")
        assert await graph.node("dst").read(0, 4096) == before  # the filter sees writes
        assert await above.read(100, 3) == b"new"
        assert graph.node("dst").rights == (WRITE, ALL & ~Perm.RESIZE)
        async with graph.edit() as edit:
            await edit.drop(top)
        assert (export.node, above.children["file"]) == (src, src)
        with pytest.raises(BlockjobsError):
            graph.node("flt")
        await export.node.write(128 * 1024, b"unseen")
        assert await graph.node("dst").read(128 * 1024, 6) == bytes(6)

    run_in_graph(body)


@pytest.mark.parametrize("fails_in", ["block", "rights", "open"])
def test_a_failed_edit_leaves_everything_as_it_was(fails_in: str) -> None:
    async def body(graph: Graph) -> None:
        await prepared(graph)
        src = graph.node("src")
        export = await graph.claim("an unnamed block device", src, READ | WRITE, ALL & ~Perm.RESIZE)
        if fails_in == "rights":
            await graph.claim("an unnamed block device", graph.node("dst"), READ, READ)
        names = {node.name for node in graph.nodes()}

        async def change() -> None:
            async with graph.edit() as edit:
                group = "no" if fails_in == "open" else "g"
                first = await edit.insert(above=src, filter=ThrottleOptions(file="src", throttle_group="g"))
                await edit.insert(
                    above=first, filter=ThrottleOptions(file=first.name, throttle_group=group), implicit=True
                )
                await edit.insert(above=export.node, filter=CopyBeforeWriteOptions(file=export.node.name, target="dst"))
                if fails_in == "block":
                    raise ZeroDivisionError

        with pytest.raises((BlockjobsError, ZeroDivisionError)):
            await change()
        assert export.node is src
        assert {node.name for node in graph.nodes()} == names
        assert src.rights == (READ | WRITE, ALL & ~Perm.RESIZE)
        await src.write(0, b"x")
        async with graph.drained():
            pass

    run_in_graph(body)


def test_requests_survive_filters_that_come_and_go() -> None:
    async def body(graph: Graph) -> None:
        await prepared(graph)
        src = graph.node("src")
        stop = False

        class Writer:
            """An export's worth of requests; parks for drains."""

            depth, busy, count = 0, 0, 0

            def quiesce_begin(self) -> None:
                self.depth += 1

            def is_quiet(self) -> bool:
                return self.busy == 0

            async def quiet(self) -> None:
                while self.busy:
                    await asyncio.sleep(0)

            def quiesce_end(self) -> None:
                self.depth -= 1

            async def run(self, offset: int) -> None:
                while not stop:
                    if self.depth:
                        await asyncio.sleep(0)
                        continue
                    self.busy += 1
                    content = bytes([self.count % 256]) * 512
                    await export.node.write(offset, content)
                    assert await export.node.read(offset, 512) == content
                    self.busy -= 1
                    self.count += 1

        writers = [Writer() for _ in range(1)]
        export = await graph.claim("an unnamed block device", src, READ | WRITE, ALL, user=writers[0])
        async with asyncio.TaskGroup() as group:
            group.create_task(writers[0].run(0))
            for _ in range(10):
                async with graph.edit() as edit:
                    top = await edit.insert(above=src, filter=ThrottleOptions(file="src", throttle_group="g"))
                assert export.node is top
                await asyncio.sleep(0.002)
                async with graph.edit() as edit:
                    await edit.drop(top)
                assert export.node is src
                await asyncio.sleep(0.002)
            stop = True
        assert writers[0].count > 20
        assert writers[0].depth == 0

    run_in_graph(body)


def test_replace_moves_users_but_makes_no_cycle() -> None:
    async def body(graph: Graph) -> None:
        await prepared(graph)
        src, dst = graph.node("src"), graph.node("dst")
        export = await graph.claim("an unnamed block device", src, READ, ALL)
        above = await add_node(graph, driver="raw", node_name="above", file="src")
        async with graph.edit() as edit:
            await edit.replace(src, dst)
        assert (export.node, above.children["file"]) == (dst, dst)
        async with graph.edit() as edit:
            await edit.replace(graph.node("disk"), above)  # src stays on disk: it is no user inside above any more
        assert src.children["file"] is above
        with pytest.raises(UsageError, match="is not a filter"):
            async with graph.edit() as edit:
                await edit.drop(src)

    run_in_graph(body)


@pytest.mark.qemu
def test_an_overlay_of_the_source_may_be_the_target(tmp_path: Path) -> None:
    """Fleecing: the target shows the source's old content, so it must stay below the filter."""

    async def body(graph: Graph) -> None:
        await prepared(graph)
        src = graph.node("src")
        export = await graph.claim("an unnamed block device", src, READ, ALL)
        file = {"driver": "file", "filename": path}
        overlay = await add_node(graph, driver="qcow2", node_name="overlay", file=file, backing="src")
        async with graph.edit() as edit:
            options = CopyBeforeWriteOptions(node_name="flt", file="src", target="overlay")
            top = await edit.insert(above=src, filter=options)
        assert overlay.backing is src
        assert export.node is top

    path = str(tmp_path / "overlay.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "256k"], check=True)
    run_in_graph(body)


def test_cycles_are_refused() -> None:
    async def body(graph: Graph) -> None:
        await prepared(graph)
        src, disk = graph.node("src"), graph.node("disk")
        with pytest.raises(UsageError, match=r"^Making 'src' a file child of 'disk' would create a cycle$"):
            graph.attach(disk, "file", src, src.rights)

    run_in_graph(body)
