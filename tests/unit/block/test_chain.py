import asyncio
import os
from pathlib import Path

import pytest

from blockjobs.block.chain import chain_of, edges_between, header_names, images_of, named_in_chain, overlays_of
from blockjobs.block.node import Node
from blockjobs.host import Host


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "below").mkdir()
    (tmp_path / "disks" / "old").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def chain(host: Host) -> list[Node]:
    """`top` over a throttle filter over `middle` over `base`, each in its own directory."""
    await host.create_image("below/base.qcow2", "qcow2", 1 << 20)
    await host.create_image(
        "disks/old/middle.qcow2", "qcow2", 1 << 20, backing_file="../../below/base.qcow2", backing_fmt="qcow2"
    )
    await host.create_image("disks/top.qcow2", "qcow2", 1 << 20, backing_file="old/middle.qcow2", backing_fmt="qcow2")
    nodes = []
    for name, filename in (("base", "below/base"), ("middle", "disks/old/middle"), ("top", "disks/top")):
        options = {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": f"{filename}.qcow2"}}
        if name == "top":
            options["backing"] = "filter"
        elif nodes:
            options["backing"] = nodes[-1].name
        nodes.append(await host.blockdev_add(options))
        if name == "middle":
            nodes.append(await host.blockdev_add({"driver": "copy-on-read", "node-name": "filter", "file": name}))
    return nodes


def test_chains_are_walked_through_filters(folder: Path) -> None:
    async def main() -> None:
        async with Host() as host:
            base, middle, filter_node, top = await chain(host)
            assert list(chain_of(top)) == [top, filter_node, middle, base]
            assert images_of(top) == [top, middle, base]
            assert overlays_of(middle) == [top] and overlays_of(base) == [middle]
            assert [edge.parent for edge in edges_between(top, middle)] == [top, filter_node]

    asyncio.run(main())


def test_images_are_found_by_any_of_their_names(folder: Path) -> None:
    async def main() -> None:
        async with Host() as host:
            base, middle, _, top = await chain(host)
            for name in ("below/base.qcow2", str(folder / "below" / "base.qcow2"), "../../below/base.qcow2"):
                assert named_in_chain(top, name) is base, name
            assert named_in_chain(top, "old/middle.qcow2") is middle
            assert named_in_chain(top, "disks/top.qcow2") is None  # it is no backing image of itself
            assert named_in_chain(top, "base.qcow2") is None

    asyncio.run(main())


def test_headers_get_names_that_lead_to_the_file(folder: Path) -> None:
    async def main() -> None:
        async with Host() as host:
            base, middle, _, top = await chain(host)
            file = base.children["file"]
            assert header_names(top, middle, given=None, mask_protocol=False) == ("old/middle.qcow2", "qcow2")
            absolute = str(folder / "below" / "base.qcow2")
            assert header_names(top, base, given=None, mask_protocol=False) == (absolute, "qcow2")
            assert header_names(top, base, given="x", mask_protocol=False) == ("x", "qcow2")
            assert header_names(top, file, given="x", mask_protocol=True) == ("x", "raw")
            assert header_names(top, file, given="x", mask_protocol=False) == ("x", "file")
            assert os.path.samefile(absolute, "below/base.qcow2")

    asyncio.run(main())
