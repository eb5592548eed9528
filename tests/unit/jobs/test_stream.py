import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.units import KiB, MiB
from blockjobs.block.node import Node
from blockjobs.jobs.block_job import block_job_info
from blockjobs.jobs.events import BlockJobError
from blockjobs.lifecycle.status import JobStatus
from blockjobs.testing.chains import Layer, guest_of, make_chain, random_layers, read_all, run_guest, shown_by_headers
from blockjobs.testing.clock import run
from blockjobs.testing.disk import Pages
from blockjobs.testing.faults import Fault, Operation
from blockjobs.testing.host import SimHost

PLAIN = [Layer(4 * MiB, 64 * KiB), Layer(4 * MiB, 64 * KiB), Layer(4 * MiB, 64 * KiB)]


def on_chain(
    scenario: Callable[[SimHost, list[Node]], Awaitable[None]], layers: list[Layer] = PLAIN, seed: int = 1
) -> None:
    async def main() -> None:
        async with SimHost(seed) as host:
            nodes = await make_chain(host, layers, random.Random(seed), writes=0)
            for index, node in enumerate(nodes):
                async with host.access(node, write=True) as user:
                    await user.node.write(index * MiB, bytes([index + 1]) * MiB)
                    await user.node.flush()
            await scenario(host, nodes)

    run(main())


def test_a_whole_chain_is_taken_in_and_let_go() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[2])
        outcome = await (await host.stream(nodes[2])).outcome()
        assert outcome.error is None and outcome.current == outcome.total == 4 * MiB
        assert nodes[2].backing is None
        await host.close_nodes(nodes[1], nodes[0])
        assert await read_all(host, nodes[2]) == before
        assert await shown_by_headers({"l2-file": host.disks["l2-file"].pages}, "l2-file") == before

    on_chain(scenario)


def test_what_has_completed_is_durable() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[2])
        await (await host.stream(nodes[2], base_node="l0")).outcome()
        for disk in host.disks.values():
            disk.cut_power(seed=3)
        disks = {name: host.disks[name].pages for name in ("l0-file", "l2-file")}
        assert await shown_by_headers(disks, "l2-file") == before

    on_chain(scenario)


def test_holes_stay_holes() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        await (await host.stream(nodes[2])).outcome()
        assert host.disks["l2-file"].allocated_size() < 3 * MiB + 512 * KiB

    on_chain(scenario)


def test_an_image_in_the_middle_is_made_writable_and_read_only_again() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[2])
        await host.graph.set_read_only(nodes[1], read_only=True)
        job = await host.stream(nodes[1], speed_bytes_per_s=1024)
        assert not nodes[1].read_only
        job.set_speed(0)
        assert (await job.outcome()).error is None
        assert nodes[1].read_only and nodes[1].backing is None and nodes[2].backing is nodes[1]
        assert await read_all(host, nodes[2]) == before

    on_chain(scenario)


def test_an_image_that_cannot_be_made_read_only_again_is_let_go_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        await host.graph.set_read_only(nodes[1], read_only=True)
        host.faults["l1-file"].add(Fault(nth=1, operation=Operation.SYNC))
        assert (await (await host.stream(nodes[1])).outcome()).error == "Input/output error"
        nodes[1].check_op("stream")

    with pytest.raises(IoFailure):  # when the image is closed: what it took in cannot be made durable
        on_chain(scenario)
    assert "stays writable" in caplog.text and "must not fail" not in caplog.text


def test_nodes_are_held_until_the_job_is_dismissed() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        job = await host.stream(nodes[2], base_node="l0", auto_dismiss=False)
        await job.reached(JobStatus.CONCLUDED)
        with pytest.raises(UsageError, match="Node 'l1' is busy: block device is in use by block job: stream"):
            await host.graph.remove("l1")
        job.dismiss()
        await host.graph.remove("l1")
        assert [node.name for node in host.graph.nodes() if node.driver_name != "file"] == ["l2", "l0"]

    on_chain(scenario)


def test_the_chain_is_frozen_down_to_the_bottom() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        job = await host.stream(nodes[2], base_node="l0", speed_bytes_per_s=1024)
        with pytest.raises(UsageError, match="Cannot change frozen 'backing' link from 'l2' to 'l1'"):
            async with host.graph.edit() as edit:
                await edit.set_child(nodes[2], "backing", None)
        await job.cancel()
        await job.outcome()
        async with host.graph.edit() as edit:
            await edit.set_child(nodes[2], "backing", nodes[0])

    on_chain(scenario)


def test_a_slow_job_goes_in_chunks_of_half_a_mebibyte() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        job = await host.stream(nodes[2], speed_bytes_per_s=1024)
        await asyncio.sleep(1)
        assert block_job_info(job).offset == 512 * KiB
        await asyncio.sleep(509)
        assert block_job_info(job).offset == 512 * KiB
        await asyncio.sleep(5)
        assert block_job_info(job).offset == 1 * MiB
        await job.cancel()
        outcome = await job.outcome()
        assert outcome.error == "Operation canceled" and nodes[2].backing is nodes[1]

    on_chain(scenario)


def test_a_header_that_cannot_be_written_leaves_everything_as_it_was() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[2])
        outcome = await (await host.stream(nodes[2], base_node="l0", backing_file="x" * 1024)).outcome()
        assert outcome.error == "Invalid argument"
        assert nodes[2].backing is nodes[1] and len(host.graph.nodes()) == 6
        disks = {name: disk.pages for name, disk in host.disks.items()}
        assert await shown_by_headers(disks, "l2-file") == before

    on_chain(scenario)


@pytest.mark.parametrize("policy", ["report", "ignore", "stop"])
def test_error_policies(policy: str) -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[2])
        # The batch, its chunk, and nothing later.
        host.faults["l0-file"].add(Fault(nth=1, times=2, operation=Operation.READ, errno=errno.EIO))
        job = await host.stream(nodes[2], on_error=policy)
        if policy == "stop":
            await job.reached(JobStatus.PAUSED)
            job.resume()
        outcome = await job.outcome()
        errors = [event for event in host.events if isinstance(event, BlockJobError)]
        assert [(event.operation, event.action) for event in errors] == [("read", policy)]
        assert (outcome.error is None) == (policy == "stop")
        assert (nodes[2].backing is None) == (policy == "stop")
        if policy == "ignore":
            assert outcome.current == outcome.total == 4 * MiB and outcome.error == "Input/output error"
        host.faults["l0-file"].cure()
        assert await read_all(host, nodes[2]) == before

    on_chain(scenario)


@pytest.mark.parametrize("seed", [*range(40), 155, 189, 217])
def test_random_chains_under_a_guest_never_change_what_they_show(seed: int) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        async with SimHost(seed, latency_s_max=0.05) as host:
            layers = random_layers(chance, chance.randrange(2, 5))
            nodes = await make_chain(host, layers, chance)
            top = nodes[-1]
            device = chance.choice(nodes[1:])
            lower = nodes[: nodes.index(device)]
            base = chance.choice([None, *lower])
            model = bytearray(await read_all(host, top))
            guest = await guest_of(host, top)
            job = await host.stream(device, base_node=base.name if base else None)
            async with asyncio.TaskGroup() as group:
                group.create_task(run_guest(guest, model, chance, writes=25, pause_s=0.05))
                outcome = await job.outcome()
            assert outcome.error is None
            assert await read_all(host, top) == model
            assert device.backing is base
            await guest.node.flush()
            await host.graph.release(guest)
            disks = {name: disk.pages.copy() for name, disk in host.disks.items()}
        assert await shown_by_headers(disks, f"{top.name}-file") == model

    run(main())


@pytest.mark.parametrize("seed", range(8))
def test_a_backup_beside_a_stream_shows_its_point_in_time(seed: int) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        async with SimHost(seed, latency_s_max=0.05) as host:
            nodes = await make_chain(host, random_layers(chance, 3), chance)
            top = nodes[-1]
            target = await host.disk("target", Pages(bytes(top.length)))
            content = await read_all(host, top)
            model = bytearray(content)
            guest = await guest_of(host, top)
            base = chance.choice([None, "l0"])
            jobs = [await host.backup(top, target), await host.stream(top, base_node=base)]
            async with asyncio.TaskGroup() as group:
                group.create_task(run_guest(guest, model, chance, writes=20, pause_s=0.05))
                outcomes = [await job.outcome() for job in jobs]
            assert [outcome.error for outcome in outcomes] == [None, None]
            assert host.disks["target"].pages.read(0, top.length) == content
            assert await read_all(host, top) == model
            await host.graph.release(guest)

    run(main())


def test_a_device_may_be_a_filter_that_a_guest_writes_through() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        options = {"driver": "blkdebug", "node-name": "device", "image": "l2"}
        device = await host.blockdev_add(options)
        model = bytearray(await read_all(host, device))
        guest = await guest_of(host, device)
        job = await host.stream(device, base_node="l0", speed_bytes_per_s=4 * MiB)
        await run_guest(guest, model, random.Random(3), writes=20, pause_s=0.1)
        assert (await job.outcome()).error is None
        assert nodes[2].backing is nodes[0] and guest.node is device
        assert await read_all(host, device) == model
        await host.graph.release(guest)

    on_chain(scenario)


def test_the_chain_may_be_read_meanwhile_but_not_written() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        job = await host.stream(nodes[2], base_node="l0", speed_bytes_per_s=1024)
        assert (await read_all(host, nodes[1]))[:MiB] == b"\1" * MiB
        with pytest.raises(UsageError, match="Permission conflict on node 'l1'"):
            async with host.access(nodes[1], write=True):
                pass
        await job.cancel()
        await job.outcome()

    on_chain(scenario)
