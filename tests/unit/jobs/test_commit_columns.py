"""Merges of scattered clusters: planned in columns where all is the overlay's data or the base's, else run by run."""

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from test_active_commit import commit as start_active

from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block import mirror_copy
from blockjobs.block.drivers.host_syscalls import Fallocate, fallocate
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.node import Node
from blockjobs.host import Host
from blockjobs.jobs import mirror_begin
from blockjobs.lifecycle.status import JobStatus
from blockjobs.monitor import commands  # noqa: F401  importing it makes the drivers known
from blockjobs.testing.chains import read_all
from blockjobs.testing.clock import run
from blockjobs.testing.host import SimHost

CLUSTER = 64 * KiB
COUNT = 48
SIZE = COUNT * CLUSTER

Clusters = Mapping[int, bytes | None]
"""Content by number; None is a cluster of zeroes that hides what is below."""


async def chain(host: SimHost, *layers: Clusters) -> list[Node]:
    nodes: list[Node] = []
    for number, clusters in enumerate(layers):
        backing = nodes[-1].name if nodes else None
        node = await host.image(f"l{number}", NewImage(size=SIZE), backing=backing)
        async with host.access(node, write=True) as user:
            for at, content in clusters.items():
                if content is None:
                    await user.node.zero(Span(at * CLUSTER, CLUSTER))
                else:
                    await user.node.write(at * CLUSTER, content)
        nodes.append(node)
    return nodes


async def merge(host: Host, nodes: list[Node], *, active: bool) -> None:
    """Merge the second image into the first one."""
    if active:
        job = await start_active(host, nodes[1], nodes[0])
        await job.reached(JobStatus.READY)
        job.complete()
    else:
        job = await host.commit(nodes[2], top_node="l1", base_node="l0")
    assert (await job.outcome()).error is None


def random_clusters(chance: random.Random, share: float, *, zeroes: bool) -> Clusters:
    some = sorted(chance.sample(range(COUNT), int(COUNT * share)))
    return {at: None if zeroes and chance.random() < 0.1 else chance.randbytes(CLUSTER) for at in some}


@pytest.mark.parametrize("zeroes", [False, True], ids=["data", "zeroes, too"])
@pytest.mark.parametrize("active", [False, True], ids=["intermediate", "active"])
@pytest.mark.parametrize("seed", range(12))
def test_the_base_shows_what_the_overlay_showed(seed: int, active: bool, zeroes: bool) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        async with SimHost(seed) as host:
            share = chance.choice([0, 0.3, 1])
            layers = [random_clusters(chance, share, zeroes=False), random_clusters(chance, 0.4, zeroes=zeroes)]
            nodes = await chain(host, *layers, *([] if active else [{}]))
            shown = await read_all(host, nodes[-1])
            await merge(host, nodes, active=active)
            assert await read_all(host, nodes[0]) == shown
            assert await read_all(host, nodes[-1]) == shown

    run(main())


@pytest.mark.parametrize("active", [False, True], ids=["intermediate", "active"])
def test_data_over_nothing_is_not_looked_at_run_by_run(active: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def trace(*arguments: object, **more: object) -> None:
        raise AssertionError("run by run")

    for module in (mirror_copy, mirror_begin):
        monkeypatch.setattr(module, "trace", trace)

    async def main() -> None:
        async with SimHost(1) as host:
            chance = random.Random(1)
            nodes = await chain(host, {}, random_clusters(chance, 0.5, zeroes=False), *([] if active else [{}]))
            shown = await read_all(host, nodes[-1])
            await merge(host, nodes, active=active)
            assert await read_all(host, nodes[0]) == shown

    run(main())


async def image_file(host: Host, path: Path) -> None:
    path.touch()
    file = await host.blockdev_add({"driver": "file", "node-name": "new", "filename": str(path)})
    async with host.access(file, write=True, resize=True):
        await create_image(file, None, NewImage(size=8 * MiB))
    await host.close_nodes(file)


@pytest.mark.parametrize("active", [False, True], ids=["intermediate", "active"])
@pytest.mark.parametrize("where", ["holes", "stored"])
def test_zeroes_above_are_written_over_what_is_below(where: str, active: bool, tmp_path: Path) -> None:
    """Of allocated clusters: holes of the file, and bytes that the base's `detect-zeroes` finds."""

    async def main() -> None:
        async with Host() as host:
            nodes: list[Node] = []
            for name in ("l0", "l1", "l2"):
                await image_file(host, tmp_path / name)
                options = {"driver": "qcow2", "node-name": name, "discard": "unmap"}
                if nodes:
                    options["backing"] = nodes[-1].name
                elif where == "stored":
                    options["detect-zeroes"] = "unmap"
                file = {"driver": "file", "filename": str(tmp_path / name)}
                node = await host.blockdev_add({**options, "file": file})
                nodes.append(node)
                if name != "l2":
                    async with host.access(node, write=True) as user:
                        await user.node.write(0, name.encode() * ((8 if name == "l0" else 7) * MiB // 2))
                        if where == "stored" and name == "l1":
                            await user.node.write(2 * MiB, bytes(4 * MiB))
                        await user.node.flush()
            if where == "holes":
                with (tmp_path / "l1").open("r+b") as hole:
                    end = hole.seek(0, 2) // CLUSTER * CLUSTER
                    mode = Fallocate.PUNCH_HOLE | Fallocate.KEEP_SIZE
                    fallocate(hole.fileno(), mode, end - 6 * MiB, 4 * MiB)
            shown = await read_all(host, nodes[1])
            assert shown.count(0) == 4 * MiB
            await merge(host, nodes[:2] if active else nodes, active=active)
            assert await read_all(host, nodes[0]) == shown

    asyncio.run(main())
