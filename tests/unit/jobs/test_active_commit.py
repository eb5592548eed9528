"""Active commit in virtual time: the top view never changes, and in the end the base shows it."""

import asyncio
import random
from dataclasses import dataclass

import pytest

from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.jobs.active_commit import start_active_commit
from blockjobs.jobs.events import BlockJobError
from blockjobs.lifecycle.error_policy import OnError
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.lifecycle.status import JobStatus
from blockjobs.testing.clock import run
from blockjobs.testing.faults import Fault, Operation
from blockjobs.testing.host import SimHost

SIZE = 1 * MiB


@dataclass
class Options:
    """What `block-commit` was told."""

    job_id: str | None = "job0"
    speed: int = 0
    on_error: OnError = OnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


async def chain(host: SimHost, seed: int, *, base_size: int = SIZE, base_cluster: int = 64 * KiB) -> list[Node]:
    """base <- mid <- top with random content in each."""
    chance = random.Random(seed)
    sizes = {"base": base_size, "mid": SIZE, "top": SIZE}
    nodes: list[Node] = []
    for name, size in sizes.items():
        image = NewImage(
            size=size,
            cluster_size=base_cluster if name == "base" else 4 * KiB,
            backing_file=f"{nodes[-1].name}.img" if nodes else None,
            backing_format="qcow2" if nodes else None,
        )
        nodes.append(await host.image(name, image, backing=nodes[-1].name if nodes else None))
        async with host.access(nodes[-1], write=True):
            for _ in range(8):
                at = chance.randrange(size // 512 - 64) * 512
                await nodes[-1].write(at, chance.randbytes(chance.randrange(1, 64) * 512))
    return nodes


async def commit(host: SimHost, top: Node, base: Node, **members: object) -> JobHandle:
    async with host.jobs.control:
        return await start_active_commit(host, Options(**members), top, base)


@pytest.mark.parametrize("base_size", [SIZE, SIZE // 2])
@pytest.mark.parametrize("seed", range(6))
def test_users_move_to_a_base_that_shows_what_they_saw(seed: int, base_size: int) -> None:
    async def main() -> None:
        async with SimHost(seed, latency_s_max=0.01) as host:
            clusters = [4 * KiB, 64 * KiB, 256 * KiB]
            base, _, top = await chain(host, seed, base_size=base_size, base_cluster=clusters[seed % 3])
            async with host.access(top, write=True) as user:
                content = bytearray(await top.read(0, SIZE))
                await host.graph.set_read_only(base, read_only=True)
                job = await commit(host, top, base)
                chance = random.Random(seed)
                while job.status is JobStatus.RUNNING:
                    at, new = chance.randrange(SIZE // 512 - 8) * 512, chance.randbytes(chance.randrange(1, 8) * 512)
                    await user.node.write(at, new)
                    content[at : at + len(new)] = new
                    assert await user.node.read(0, SIZE) == content
                    await asyncio.sleep(0.02)
                await user.node.write(5, b"late")
                content[5:9] = b"late"
                job.complete()
                assert (await job.outcome()).error is None
                assert user.node is base and not base.read_only
                assert await user.node.read(0, SIZE) == content
                # The overlay that was left is still a valid one.
                async with host.access(top):
                    assert await top.read(0, SIZE) == content

    run(main())


@pytest.mark.parametrize("how", ["soft", "forced", "failed"])
def test_otherwise_the_chain_is_as_before_and_the_base_read_only(how: str) -> None:
    async def main() -> None:
        async with SimHost(3) as host:
            base, _, top = await chain(host, 3)
            await host.graph.set_read_only(base, read_only=True)
            async with host.access(top, write=True) as user:
                content = await top.read(0, SIZE)
                if how == "failed":
                    host.faults["base-file"].add(Fault(nth=1, operation=Operation.WRITE, times=2))
                job = await commit(host, top, base)
                if how == "failed":
                    assert (await job.outcome()).error == "Input/output error"
                    assert [e.operation for e in host.events if isinstance(e, BlockJobError)] == ["write"]
                    host.faults["base-file"].cure()
                else:
                    assert not base.read_only
                    await job.reached(JobStatus.READY)
                    await (job.block_cancel() if how == "soft" else job.cancel())
                    assert ((await job.outcome()).error is None) == (how == "soft")
                assert user.node is top and base.read_only
                assert await user.node.read(0, SIZE) == content
                assert top.backing is not None and top.backing.backing is base

    run(main())


def test_only_what_is_allocated_above_the_base_counts() -> None:
    async def main() -> None:
        async with SimHost(0) as host:
            base = await host.image("base", NewImage(size=SIZE))
            top = await host.image("top", NewImage(size=SIZE), backing="base")
            async with host.access(base, write=True):
                await base.write(0, b"b" * (SIZE // 2))
            async with host.access(top, write=True):
                await top.write(SIZE // 4, b"t" * 64 * KiB)
                job = await commit(host, top, base)
                await job.reached(JobStatus.READY)
                assert (job.progress.current, job.progress.total, job.type) == (64 * KiB, 64 * KiB, "commit")
                assert "busy" in refused(base) and "commit" in refused(base)
                await job.cancel()
                await job.outcome()

    run(main())


def refused(node: Node) -> str:
    try:
        node.check_op("backup-source")
    except Exception as error:
        return str(error)
    return ""
