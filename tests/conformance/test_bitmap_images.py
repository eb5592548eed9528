"""Persistent bitmaps in images of ours read by QEMU's tools and daemon, and the other way round."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import player
import pytest

from blockjobs.base.span import Span
from blockjobs.block.bitmaps import BlockDirtyBitmapAdd, add_bitmap, bitmap_at, bitmap_sha256, remove_bitmap
from blockjobs.block.info import dirty_infos
from blockjobs.host import Host

pytestmark = pytest.mark.qemu

MIB = 1 << 20
SIZE = 64 * MIB + 512
GRANULARITIES = [512, 4096, 65536, 64 * MIB]
CONTENTS = ["clean", "full", "scattered"]


def tool(*words: str, cwd: Path) -> str:
    return subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True).stdout


def create(directory: Path, cluster: str = "64k", size: int = SIZE, **options: str) -> None:
    given = ",".join([f"cluster_size={cluster}", *(f"{name}={value}" for name, value in options.items())])
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", given, "disk", str(size), cwd=directory)


def check(directory: Path) -> None:
    found = json.loads(tool("qemu-img", "check", "--output=json", "disk", cwd=directory))
    assert not found.get("leaks") and not found.get("corruptions") and not found["check-errors"], found


def spans(content: str) -> list[Span]:
    if content == "full":
        return [Span(0, SIZE)]
    rng = random.Random(content)
    return [Span(rng.randrange(SIZE // 512) * 512, 512) for _ in range(500)] if content == "scattered" else []


def ask(daemon: player.Daemon, command: str, **arguments: Any) -> Any:
    plain = {name.replace("_", "-"): value for name, value in arguments.items()}
    reply = daemon.qmp.ask({"execute": command, "arguments": plain})[0]
    assert "return" in reply, (command, reply)
    return reply["return"]


def as_qemu_sees(directory: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Checksum and listing of every bitmap, from QEMU's daemon."""
    with player.Daemon(player.QEMU, directory) as qemu:
        ask(qemu, "blockdev-add", node_name="n", driver="qcow2", file={"driver": "file", "filename": "disk"})
        listed = next(each for each in ask(qemu, "query-named-block-nodes") if each["node-name"] == "n")
        return {
            each["name"]: (ask(qemu, "x-debug-block-dirty-bitmap-sha256", node="n", name=each["name"])["sha256"], each)
            for each in listed.get("dirty-bitmaps", [])
        }


async def as_we_see(directory: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    async with Host() as host:
        node = await host.open(str(directory / "disk"), node_name="n")
        sums = {each.name: bitmap_sha256(each) for each in node.bitmaps}
        found = {}
        for each in dirty_infos(node):
            members = {name: getattr(each, name) for name in each.__struct_fields__}
            found[each.name or ""] = (
                sums[each.name],
                {name: value for name, value in members.items() if value is not None},
            )
        return found


@pytest.mark.parametrize("cluster", ["512", "64k", "2M"])
def test_qemu_reads_what_we_store_and_we_read_what_it_stores_again(cluster: str, tmp_path: Path) -> None:
    create(tmp_path, cluster)

    async def make() -> None:
        async with Host() as host:
            node = await host.open(str(tmp_path / "disk"), node_name="n")
            for granularity in GRANULARITIES:
                for content in CONTENTS:
                    wanted = BlockDirtyBitmapAdd(
                        node="n",
                        name=f"{content}-{granularity}",
                        granularity=granularity,
                        persistent=True,
                        disabled=content == "full",
                    )
                    _, bitmap = await add_bitmap(host.graph, wanted)
                    for span in spans(content):
                        bitmap.map.set(span)
            assert len(node.bitmaps) == len(GRANULARITIES) * len(CONTENTS)

    asyncio.run(make())
    check(tmp_path)
    ours = asyncio.run(as_we_see(tmp_path))
    theirs = as_qemu_sees(tmp_path)
    assert ours == theirs
    assert list(ours) == list(theirs)
    # QEMU has written all of them anew.
    check(tmp_path)
    assert asyncio.run(as_we_see(tmp_path)) == ours
    check(tmp_path)


def test_bitmaps_made_by_qemu_img_follow_our_writes(tmp_path: Path) -> None:
    create(tmp_path)
    tool("qemu-img", "bitmap", "--add", "disk", "b", "-g", "4096", cwd=tmp_path)
    tool("qemu-img", "bitmap", "--add", "--disable", "disk", "off", cwd=tmp_path)
    tool("qemu-io", "-c", "write 0 512", "disk", cwd=tmp_path)

    async def write() -> None:
        async with Host() as host:
            node = await host.open(str(tmp_path / "disk"), node_name="n")
            async with host.access(node, write=True) as root:
                await root.node.write(8 * MIB, b"x" * 512)
                _, bitmap = bitmap_at(host.graph, "n", "b")
                assert list(bitmap.map.runs()) == [Span(0, 4096), Span(8 * MIB, 4096)]
                await add_bitmap(host.graph, BlockDirtyBitmapAdd(node="n", name="new", persistent=True))

    asyncio.run(write())
    check(tmp_path)
    theirs = as_qemu_sees(tmp_path)
    assert {name: entry["count"] for name, (_, entry) in theirs.items()} == {"new": 0, "off": 0, "b": 8192}
    assert theirs == asyncio.run(as_we_see(tmp_path))

    async def remove() -> None:
        async with Host() as host:
            await host.open(str(tmp_path / "disk"), node_name="n")
            await remove_bitmap(*bitmap_at(host.graph, "n", "b"))

    asyncio.run(remove())
    check(tmp_path)
    described = json.loads(tool("qemu-img", "info", "--output=json", "disk", cwd=tmp_path))
    assert sorted(each["name"] for each in described["format-specific"]["data"]["bitmaps"]) == ["new", "off"]
    tool("qemu-img", "bitmap", "--merge", "new", "--merge", "off", "disk", "off", cwd=tmp_path)
    tool("qemu-img", "bitmap", "--remove", "disk", "new", cwd=tmp_path)
    assert list(asyncio.run(as_we_see(tmp_path))) == ["off"]
    check(tmp_path)


@pytest.mark.parametrize("program", player.PROGRAMS, ids=lambda program: program.name)
def test_bitmaps_of_a_killed_daemon_are_inconsistent_for_both(program: player.Program, tmp_path: Path) -> None:
    """A daemon dies with the image in use, after a guest's write; neither side believes the bitmap."""
    create(tmp_path)
    tool("qemu-img", "bitmap", "--add", "disk", "b", cwd=tmp_path)
    with player.Daemon(program, tmp_path) as daemon:
        ask(daemon, "blockdev-add", node_name="n", driver="qcow2", file={"driver": "file", "filename": "disk"})
        ask(daemon, "block-dirty-bitmap-add", node="n", name="c", persistent=True)
        ask(daemon, "block_resize", node_name="n", size=2 * SIZE)
        daemon.process.kill()
        daemon.process.wait()
    found = json.loads(tool("qemu-img", "check", "--output=json", "disk", cwd=tmp_path))
    assert not found.get("corruptions")
    ours, theirs = asyncio.run(as_we_see(tmp_path)), as_qemu_sees(tmp_path)
    assert {name: entry for name, (_, entry) in ours.items()} == {name: entry for name, (_, entry) in theirs.items()}
    assert ours["b"][1]["inconsistent"] and list(ours) == ["b"]


def test_an_image_with_many_bitmaps_and_long_names(tmp_path: Path) -> None:
    create(tmp_path, cluster="512", size=MIB)
    names = [f"{number:04}" + "n" * 1000 for number in range(200)]

    async def make() -> None:
        async with Host() as host:
            await host.open(str(tmp_path / "disk"), node_name="n")
            for name in names:
                await add_bitmap(host.graph, BlockDirtyBitmapAdd(node="n", name=name, persistent=True))

    asyncio.run(make())
    check(tmp_path)
    assert sorted(as_qemu_sees(tmp_path)) == names
    assert sorted(asyncio.run(as_we_see(tmp_path))) == names
