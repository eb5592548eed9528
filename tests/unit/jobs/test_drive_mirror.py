"""`drive-mirror` on real files, and a mirror that takes the place of a quorum's child."""

import asyncio
import random
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.units import KiB, MiB
from blockjobs.host import Host
from blockjobs.jobs.drive_mirror import start_drive_mirror
from blockjobs.jobs.mirror_options import BlockdevMirror, DriveMirror
from blockjobs.jobs.mirror_start import start_blockdev_mirror
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.little_host import LittleHost

SIZE = 1 * MiB


async def start(host: Host, target: Path, **members: object) -> JobHandle:
    plain = {"job-id": "job0", "device": "source", "target": str(target), "sync": "full", "node-name": "copy"}
    plain |= {name.replace("_", "-"): value for name, value in members.items()}
    async with host.jobs.control:
        return await start_drive_mirror(host, convert(plain, DriveMirror))


@pytest.mark.parametrize("sync", ["full", "top", "none"])
@pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
def test_the_copy_shows_the_same_with_its_backing_node(tmp_path: Path, sync: str, mode: str) -> None:
    async def main() -> None:
        chance = random.Random(1)
        base, overlay, target = (tmp_path / f"{name}.qcow2" for name in ("base", "overlay", "target"))
        async with Host() as host:
            await host.create_image(str(base), "qcow2", SIZE)
            node = await host.open(str(base), node_name="below")
            async with host.access(node, write=True):
                await node.write(0, chance.randbytes(SIZE // 2))
            await host.close_nodes(node)
            await host.create_image(str(overlay), "qcow2", SIZE, backing_file=str(base), backing_fmt="qcow2")
            if mode == "existing":
                named = {"full": None, "top": base, "none": overlay}[sync]
                more = {"backing_file": str(named), "backing_fmt": "qcow2"} if named and sync == "top" else {}
                await host.create_image(str(target), "qcow2", SIZE, **more)
            source = await host.open(str(overlay), node_name="source")
            async with host.access(source, write=True) as user:
                await user.node.write(100 * KiB, chance.randbytes(300 * KiB))
                job = await start(host, target, sync=sync, mode=mode)
                await job.reached(JobStatus.READY)
                # Part of a cluster: what surrounds it must come along, as the copy has no backing node yet.
                await user.node.write(450 * KiB + 5, b"partly")
                content = await user.node.read(0, SIZE)
                job.complete()
                assert (await job.outcome()).error is None
                assert user.node.name == "copy"
                if not (mode == "existing" and sync == "none"):
                    assert await user.node.read(0, SIZE) == content
                    backing = user.node.backing
                    wanted = {"full": None, "top": str(base), "none": str(overlay)}[sync]
                    assert (backing.filename if backing else None) == wanted
                assert await user.node.read(450 * KiB, 11) == content[450 * KiB : 450 * KiB + 11]
            await host.close_nodes(source)
            assert [each for each in host.graph.nodes() if each.name == "copy"] == []
            if mode == "absolute-paths":
                again = await host.open(str(target), node_name="again", read_only=True)
                async with host.access(again):
                    assert await again.read(0, SIZE) == content
                await host.close_nodes(again)

    asyncio.run(main())


def test_refusals(tmp_path: Path) -> None:
    async def main() -> None:
        async with Host() as host:
            await host.create_image(str(tmp_path / "source.qcow2"), "qcow2", SIZE)
            await host.open(str(tmp_path / "source.qcow2"), node_name="source")
            new = tmp_path / "new.qcow2"
            for members, text in (
                ({"format": "foo"}, "Unknown file format 'foo'"),
                (
                    {"replaces": "source", "node_name": None, "format": "foo"},
                    "a node-name must be provided",
                ),
                ({"sync": "incremental"}, "Sync mode 'incremental' not supported"),
                ({"format": "raw", "sync": "none"}, "Backing file not supported for file format 'raw'"),
                ({"node_name": "source"}, "Duplicate nodes with node-name='source'"),
                ({"device": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
            ):
                before = [node.name for node in host.graph.nodes()]
                kept = {name: value for name, value in members.items() if value is not None}
                if members.get("node_name", "") is None:
                    plain = {"job-id": "job0", "device": "source", "target": str(new), "sync": "full", **kept}
                    with pytest.raises(UsageError, match=text):
                        await start_drive_mirror(host, convert(plain, DriveMirror))
                else:
                    with pytest.raises(UsageError, match=text):
                        await start(host, new, **kept)
                assert [node.name for node in host.graph.nodes()] == before

    asyncio.run(main())


def test_a_broken_child_of_a_quorum_is_replaced() -> None:
    async def main() -> None:
        async with LittleHost() as host:
            content = random.Random(2).randbytes(SIZE)
            await host.disk("one", content)
            await host.disk("two", content)
            await host.disk("bad", random.Random(3).randbytes(SIZE))
            await host.disk("new", SIZE)
            quorum = await host.add(driver="quorum", node_name="q", vote_threshold=2, children=["one", "two", "bad"])
            guest = await host.guest(quorum)
            plain = {"job-id": "j", "device": "q", "target": "new", "sync": "full", "replaces": "bad"}
            job = await start_blockdev_mirror(host, convert(plain, BlockdevMirror))
            await job.reached(JobStatus.READY)
            await guest.node.write(10, b"in the meantime")
            job.complete()
            assert (await job.outcome()).error is None
            assert guest.node is quorum
            assert [child.name for child in quorum.children.values()] == ["one", "two", "new"]
            await guest.node.write(SIZE - 3, b"end")
            shown = await guest.node.read(0, SIZE)
            assert host.disks["new"].pages.read(0, SIZE) == shown
            assert shown == content[:10] + b"in the meantime" + content[25:-3] + b"end"
            await host.graph.release(guest)

    run(main())
