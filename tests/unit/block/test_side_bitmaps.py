"""Bitmaps of raw images in real side files: kept, marked, and never believed of an image that has changed."""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import MiB
from blockjobs.block.bitmaps import BlockDirtyBitmapAdd, add_bitmap, bitmap_at, bitmap_sha256, remove_bitmap
from blockjobs.block.node import Node
from blockjobs.block.node_bitmap import NodeBitmap
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.reopen_plan import reopen
from blockjobs.host import Host
from blockjobs.schema.command import convert
from blockjobs.wire.side_bitmaps import Directory, SideBitmap, decode, encode

SIZE = 4 * MiB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    return tmp_path


async def open_disk(host: Host, folder: Path, **options: object) -> Node:
    described = {"driver": "raw", "node-name": "n", "bitmap-file": str(folder / "side"), "discard": "unmap"}
    described |= {"file": {"driver": "file", "filename": str(folder / "disk")}, **options}
    return await host.blockdev_add(described)


def session(folder: Path, body: Callable[[Host, Node], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with Host() as host:
            await body(host, await open_disk(host, folder, **options))

    asyncio.run(main())


async def add(host: Host, name: str = "b", **members: object) -> NodeBitmap:
    wanted = BlockDirtyBitmapAdd(node="n", name=name, **{"persistent": True, **members})
    return (await add_bitmap(host.graph, wanted))[1]


async def write(host: Host, node: Node, at: int) -> None:
    async with host.access(node, write=True) as root:
        await root.node.write(at, b"g" * 512)


async def make(host: Host, node: Node) -> None:
    await add(host, granularity=4096)
    await add(host, "off", disabled=True)
    await write(host, node, 8192)


def state_of(folder: Path, **options: object) -> dict[str, tuple[bool, bool, list[Span]]]:
    """Name: inconsistent, enabled, dirty runs."""
    found: dict[str, tuple[bool, bool, list[Span]]] = {}

    async def look(host: Host, node: Node) -> None:
        for each in node.bitmaps:
            found[each.name or ""] = each.inconsistent, each.enabled, list(each.map.runs())

    session(folder, look, **options)
    return found


KEPT = {"b": (False, True, [Span(8192, 4096)]), "off": (False, False, [])}
BROKEN = {"b": (True, True, []), "off": (True, False, [])}


def test_bitmaps_are_there_again(folder: Path) -> None:
    session(folder, make)
    assert state_of(folder) == KEPT
    assert state_of(folder, **{"read-only": True}) == KEPT
    assert sorted(os.listdir(folder)) == ["disk", "side"]
    before = (folder / "side").read_bytes()
    assert state_of(folder) == KEPT
    assert (folder / "side").read_bytes() == before

    async def more(host: Host, node: Node) -> None:
        await write(host, node, 0)
        assert decode((folder / "side").read_bytes()).directory.in_use

    session(folder, more)
    assert state_of(folder)["b"] == (False, True, [Span(0, 4096), Span(8192, 4096)])

    async def drop(host: Host, node: Node) -> None:
        await remove_bitmap(*bitmap_at(host.graph, "n", "b"))

    session(folder, drop)
    assert list(state_of(folder)) == ["off"]

    async def drop_last(host: Host, node: Node) -> None:
        await remove_bitmap(*bitmap_at(host.graph, "n", "off"))

    session(folder, drop_last)
    assert os.listdir(folder) == ["disk"]


def _touch_in_place(folder: Path) -> None:
    with (folder / "disk").open("r+b") as file:
        file.write(b"x")


def _same_times(folder: Path) -> None:
    status = (folder / "disk").stat()
    _touch_in_place(folder)
    os.utime(folder / "disk", ns=(status.st_atime_ns, status.st_mtime_ns))


def _another_file(folder: Path) -> None:
    shutil.copy2(folder / "disk", folder / "copy")
    os.rename(folder / "copy", folder / "disk")


def _longer(folder: Path) -> None:
    os.truncate(folder / "disk", SIZE + 512)


@pytest.mark.parametrize("change", [_touch_in_place, _same_times, _another_file, _longer])
def test_an_image_that_somebody_else_has_changed_is_not_the_one_the_bitmaps_are_about(
    folder: Path, change: Callable[[Path], None]
) -> None:
    session(folder, make)
    change(folder)
    assert state_of(folder) == BROKEN
    assert state_of(folder) == BROKEN


def test_a_change_right_after_closing_shows(folder: Path) -> None:
    """Within one tick of the kernel's clock the times of a file stay the same: closing waits for the next."""
    for _ in range(5):
        session(folder, make if not (folder / "side").exists() else _write_again)
        _touch_in_place(folder)
        assert state_of(folder) == BROKEN
        (folder / "side").unlink()


async def _write_again(host: Host, node: Node) -> None:
    await write(host, node, 0)


def test_nobody_else_may_write_while_the_bitmaps_are_kept(folder: Path) -> None:
    async def idle(host: Host, node: Node) -> None:
        async with Host() as other:
            stranger = await other.open(str(folder / "disk"), format="raw")
            with pytest.raises(UsageError):
                async with other.access(stranger, write=True):
                    pass

    session(folder, idle)


def test_switching_to_read_only_stores(folder: Path) -> None:
    async def switch(host: Host, node: Node) -> None:
        await make(host, node)
        await host.graph.set_read_only(node, read_only=True)
        assert not decode((folder / "side").read_bytes()).directory.in_use
        _, bitmap = bitmap_at(host.graph, "n", "b")
        with pytest.raises(UsageError, match="readonly"):
            await remove_bitmap(node, bitmap)
        await host.graph.set_read_only(node, read_only=False)
        assert bitmap_at(host.graph, "n", "b")[1] is bitmap and not bitmap.readonly
        await write(host, node, 0)
        assert decode((folder / "side").read_bytes()).directory.in_use

    session(folder, switch)
    assert state_of(folder)["b"] == (False, True, [Span(0, 4096), Span(8192, 4096)])


def test_windows_have_bitmaps_of_their_own(folder: Path) -> None:
    session(folder, make, offset=4096, size=1 * MiB)
    assert state_of(folder, offset=4096, size=1 * MiB) == KEPT
    assert state_of(folder, offset=8192, size=1 * MiB) == BROKEN


def test_a_window_with_bitmaps_stays(folder: Path) -> None:
    async def move(host: Host, node: Node) -> None:
        await make(host, node)
        file = {"driver": "file", "filename": str(folder / "disk")}
        options = {"driver": "raw", "node-name": "n", "bitmap-file": str(folder / "side"), "file": file, "offset": 512}
        request = convert(options, BlockdevOptions)
        with pytest.raises(UsageError, match="Cannot change the window of a node with a 'bitmap-file'"):
            await reopen(host.graph, [request])

    session(folder, move)
    assert state_of(folder) == KEPT


def test_resizing_keeps_them(folder: Path) -> None:
    async def resize(host: Host, node: Node) -> None:
        await make(host, node)
        await host.graph.resize(node, 2 * SIZE)

    session(folder, resize)
    assert state_of(folder) == KEPT


def good(**members: object) -> bytes:
    entry = SideBitmap(**{"name": "b", "granularity": 512, "length": 512, "enabled": True, "stored": 1} | members)
    return encode(Directory(image=[1], in_use=False, bitmaps=[entry]), [b"\1"])


BAD = {
    "empty": b"",
    "something else": b"important bytes of another program" * 10,
    "cut off": good()[:-1],
    "too long": good() + b"x",
    "one bit wrong": good()[:-1] + b"\0",
    "version 2": good()[:11] + b"\2" + good()[12:],
    "granularity 3": good(granularity=3),
    "no name": good(name=""),
    "a name for terminals": good(name="\x1b[2J", granularity=3),
    "negative": good(length=-512),
    "bits for less": good(length=1 << 30),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_make_no_sense_are_refused_and_left_alone(folder: Path, kind: str) -> None:
    (folder / "side").write_bytes(BAD[kind])
    with pytest.raises(UsageError, match="Could not read the bitmap file") as caught:
        state_of(folder)
    assert str(caught.value).isprintable()
    assert (folder / "side").read_bytes() == BAD[kind]


def test_only_regular_files_have_side_files(folder: Path) -> None:
    with pytest.raises(UsageError, match="requires the image to be a regular file"):
        state_of(folder, file={"driver": "null-co", "size": SIZE})
    (folder / "side").mkdir()
    with pytest.raises(BlockjobsError):
        state_of(folder)


def test_a_file_that_is_about_another_image_is_not_believed(folder: Path) -> None:
    (folder / "side").write_bytes(good())
    assert state_of(folder) == {"b": (True, True, [])}


def test_closing_without_bitmaps_takes_no_time(folder: Path) -> None:
    async def nothing(host: Host, node: Node) -> None:
        await write(host, node, 0)

    began = time.monotonic()
    session(folder, nothing)
    assert time.monotonic() - began < 5
    assert os.listdir(folder) == ["disk"]


def test_the_directory_can_be_read_by_people(folder: Path) -> None:
    session(folder, make)
    raw = (folder / "side").read_bytes()
    told = json.loads(raw[56 : 56 + int.from_bytes(raw[12:16], "big")])
    assert [each["name"] for each in told["bitmaps"]] == ["off", "b"]
    assert told["image"][0] == (folder / "disk").stat().st_ino


def test_checksums_are_the_same_again(folder: Path) -> None:
    sums: list[str] = []

    async def scatter(host: Host, node: Node) -> None:
        bitmap = await add(host, granularity=512)
        for at in range(0, SIZE, 7 * 512):
            bitmap.map.set(Span(at, 512))
        sums.append(bitmap_sha256(bitmap))

    async def look(host: Host, node: Node) -> None:
        sums.append(bitmap_sha256(bitmap_at(host.graph, "n", "b")[1]))

    session(folder, scatter)
    session(folder, look)
    assert sums[0] == sums[1]
