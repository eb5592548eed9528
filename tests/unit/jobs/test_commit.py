import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest

from blockjobs.base.errors import DeviceNotFound, IoFailure, PermissionConflict, UsageError
from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.reopen_plan import reopen
from blockjobs.jobs.block_job import block_job_info
from blockjobs.jobs.events import BlockJobError
from blockjobs.lifecycle.status import JobStatus
from blockjobs.schema.command import convert
from blockjobs.testing.chains import Layer, guest_of, make_chain, random_layers, read_all, run_guest, shown_by_headers
from blockjobs.testing.clock import run
from blockjobs.testing.disk import Pages
from blockjobs.testing.faults import Fault, Operation
from blockjobs.testing.host import SimHost

PLAIN = [Layer(4 * MiB, 64 * KiB)] * 4


def on_chain(scenario: Callable[[SimHost, list[Node]], Awaitable[None]], layers: list[Layer] = PLAIN) -> None:
    """`l0` to `l3`; each has a mebibyte of its own number at its own place."""

    async def main() -> None:
        async with SimHost(1) as host:
            nodes = await make_chain(host, layers, random.Random(1), writes=0)
            for index, node in enumerate(nodes):
                async with host.access(node, write=True) as user:
                    await user.node.write(index * MiB, bytes([index + 1]) * MiB)
                    await user.node.flush()
            await scenario(host, nodes)

    run(main())


def disks_of(host: SimHost) -> dict[str, Pages]:
    return {name: disk.pages.copy() for name, disk in host.disks.items()}


def test_the_middle_is_merged_down_and_the_overlay_names_the_base() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[3])
        job = await host.commit(nodes[3], top_node="l2", base_node="l0")
        outcome = await job.outcome()
        assert outcome.error is None and outcome.current == outcome.total == 4 * MiB
        assert nodes[3].backing is nodes[0]
        assert await read_all(host, nodes[3]) == before
        assert (await read_all(host, nodes[0]))[: 3 * MiB] == before[: 3 * MiB]
        await host.close_nodes(nodes[2], nodes[1])
        for disk in host.disks.values():
            disk.cut_power(seed=1)
        assert await shown_by_headers(disks_of(host), "l3-file") == before

    on_chain(scenario)


def test_the_base_stays_sparse_and_grows_but_never_shrinks() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        await (await host.commit(nodes[3], top_node="l2", base_node="l1")).outcome()
        assert nodes[1].length == 4 * MiB
        assert host.disks["l1-file"].allocated_size() < 2 * MiB + 512 * KiB

    on_chain(scenario, [PLAIN[0], Layer(3 * MiB, 64 * KiB), *PLAIN[2:]])


def test_what_a_short_image_hid_stays_hidden() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        async with host.access(nodes[0], write=True) as user:
            await user.node.write(3 * MiB, b"x" * MiB)
            await user.node.flush()
        before = await read_all(host, nodes[3])
        outcome = await (await host.commit(nodes[3], top_node="l2", base_node="l0")).outcome()
        assert outcome.error is None and nodes[0].length == 5 * MiB
        assert await read_all(host, nodes[3]) == before

    layers = [Layer(5 * MiB, 64 * KiB), PLAIN[1], Layer(3 * MiB, 64 * KiB), Layer(5 * MiB, 64 * KiB)]
    on_chain(scenario, layers)


def test_a_read_only_base_is_read_only_again() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        for node in nodes[:3]:
            await host.graph.set_read_only(node, read_only=True)
        before = await read_all(host, nodes[3])
        outcome = await (await host.commit(nodes[3], top_node="l1")).outcome()
        assert outcome.error is None
        assert nodes[0].read_only and nodes[2].read_only and nodes[2].backing is nodes[0]
        assert await read_all(host, nodes[3]) == before
        assert await shown_by_headers(disks_of(host), "l3-file") == before

    on_chain(scenario)


def test_a_base_that_cannot_be_made_read_only_again_is_let_go_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        for node in nodes[:3]:
            await host.graph.set_read_only(node, read_only=True)
        host.faults["l0-file"].add(Fault(nth=1, operation=Operation.SYNC))
        outcome = await (await host.commit(nodes[3], top_node="l1")).outcome()
        assert outcome.error == "Input/output error"
        nodes[0].check_op("commit-target")

    with pytest.raises(IoFailure):  # when the image is closed: what it took in cannot be made durable
        on_chain(scenario)
    assert "stays writable" in caplog.text and "must not fail" not in caplog.text


@pytest.mark.parametrize("name", [None, "filter"])
@pytest.mark.parametrize("backing", [None, "l0", "l1"])
def test_an_overlay_stays_on_the_filter_while_the_base_is_no_disk_of_its_own(
    name: str | None, backing: str | None
) -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[3])
        job = await host.commit(nodes[3], top_node="l2", base_node="l0", filter_node_name=name, speed_bytes_per_s=1024)
        wanted = {"driver": "qcow2", "node-name": "l3", "file": "l3-file", "backing": backing}
        with pytest.raises(UsageError) as refused:
            await reopen(host.graph, [convert(wanted, BlockdevOptions)])
        assert str(refused.value) == (
            "Cannot replace implicit backing child of l3"
            if name is None
            else "Cannot change frozen 'backing' link from 'l3' to 'filter'"
        )
        job.set_speed(0)
        assert (await job.outcome()).error is None
        assert await read_all(host, nodes[3]) == before
        await reopen(host.graph, [convert(wanted, BlockdevOptions)])  # frozen no longer

    on_chain(scenario)


def test_a_reopen_names_what_is_below_a_filter_that_it_does_not_know_of() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        job = await host.commit(nodes[3], top_node="l2", base_node="l0", speed_bytes_per_s=1024)
        above = nodes[3].backing
        wanted = {"driver": "qcow2", "node-name": "l3", "file": "l3-file", "backing": "l2", "discard": "unmap"}
        await reopen(host.graph, [convert(wanted, BlockdevOptions)])
        assert nodes[3].backing is above is not nodes[2]
        job.set_speed(0)
        assert (await job.outcome()).error is None
        assert nodes[3].backing is nodes[0]

    on_chain(scenario)


def test_all_overlays_of_the_top_are_told() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        image = NewImage(size=4 * MiB, backing_file="l2-file", backing_format="qcow2")
        sibling = await host.image("sibling", image, backing="l2")
        before = await read_all(host, nodes[3]), await read_all(host, sibling)
        assert (await (await host.commit(nodes[3], top_node="l2", base_node="l0")).outcome()).error is None
        assert (await read_all(host, nodes[3]), await read_all(host, sibling)) == before
        assert await shown_by_headers(disks_of(host), "l3-file") == before[0]
        assert await shown_by_headers(disks_of(host), "sibling-file") == before[1]

    on_chain(scenario)


def test_what_would_become_invalid_may_not_be_read_meanwhile() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        reader = host.access(nodes[1])
        async with reader:
            with pytest.raises(PermissionConflict, match="'consistent read' are both required by this program"):
                await host.commit(nodes[3], top_node="l2", base_node="l0")
        assert len(host.graph.nodes()) == 8 and nodes[3].backing is nodes[2]
        job = await host.commit(nodes[3], top_node="l2", base_node="l0", speed_bytes_per_s=1024)
        with pytest.raises(PermissionConflict):
            async with host.access(nodes[1]):
                pass
        await job.cancel()
        await job.outcome()

    on_chain(scenario)


def test_a_header_that_cannot_be_written_leaves_everything_as_it_was() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[3])
        outcome = await (await host.commit(nodes[3], top_node="l2", backing_file="x" * 1024)).outcome()
        assert outcome.error == "Invalid argument"
        assert nodes[3].backing is nodes[2] and len(host.graph.nodes()) == 8
        assert await read_all(host, nodes[3]) == before
        assert await shown_by_headers(disks_of(host), "l3-file") == before

    on_chain(scenario)


def test_a_slow_job_goes_in_chunks_of_half_a_mebibyte_and_can_be_cancelled() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[3])
        job = await host.commit(nodes[3], top_node="l1", speed_bytes_per_s=1024)
        await asyncio.sleep(1)
        assert block_job_info(job).offset == 1 * MiB + 512 * KiB  # what only the base has is free
        await job.cancel()
        assert (await job.outcome()).error == "Operation canceled"
        assert nodes[2].backing is nodes[1] and await read_all(host, nodes[3]) == before

    on_chain(scenario)


def test_nodes_are_held_until_the_job_is_dismissed() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        job = await host.commit(nodes[3], top_node="l1", auto_dismiss=False)
        await job.reached(JobStatus.CONCLUDED)
        for name in ("l1", "l0"):
            with pytest.raises(UsageError, match=f"Node '{name}' is busy: block device is in use by block job: commit"):
                await host.graph.remove(name)
        job.dismiss()
        await host.graph.remove("l1")

    on_chain(scenario)


def test_checks() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        async def refused(text: str, device: Node = nodes[3], **options: object) -> None:
            with pytest.raises(UsageError, match=text):
                await host.commit(device, **options)

        with pytest.raises(DeviceNotFound):
            await host.commit(await _gone(host))
        await refused("Need a root block node", nodes[1])
        await refused("'top-node' and 'top' are mutually exclusive", top_node="l1", top="l1-file")
        await refused("'base-node' and 'base' are mutually exclusive", base_node="l0", base="l0-file")
        await refused("Top image file zz not found", top="zz")
        await refused("Can't find 'zz' in the backing chain", base="zz")
        await refused("'l3' is not in this backing file chain", top_node="l1", base_node="l3")
        await refused("cannot commit an image into itself", top_node="l0")
        await refused("'backing-file' specified, but 'top' is the active layer", backing_file="x")
        async with host.access(nodes[2], write=True):
            await refused("'backing-file' specified, but 'top' has a writer on it", top_node="l2", backing_file="x")
        job = await host.commit(nodes[3], top="l2-file", base="l1-file")
        assert (await job.outcome()).error is None and nodes[3].backing is nodes[1]

    on_chain(scenario)


async def _gone(host: SimHost) -> Node:
    node = await host.disk("gone", b"x")
    await host.close_nodes(node)
    return node


@pytest.mark.parametrize(("policy", "side"), [("report", "l1"), ("ignore", "l1"), ("stop", "l0"), ("ignore", "l0")])
def test_error_policies(policy: str, side: str) -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[3])
        operation = Operation.READ if side == "l1" else Operation.WRITE
        host.faults[f"{side}-file"].add(Fault(nth=1, times=2, operation=operation, errno=errno.EIO))
        job = await host.commit(nodes[3], top_node="l1", on_error=policy)
        if policy == "stop":
            await job.reached(JobStatus.PAUSED)
            host.faults[f"{side}-file"].cure()
            job.resume()
        outcome = await job.outcome()
        errors = [event for event in host.events if isinstance(event, BlockJobError)]
        assert errors and {event.operation for event in errors} == {"read" if side == "l1" else "write"}
        assert (outcome.error is None) == (policy != "report")
        assert nodes[2].backing is (nodes[1] if policy == "report" else nodes[0])
        host.faults[f"{side}-file"].cure()
        assert await read_all(host, nodes[3]) == before

    on_chain(scenario)


def test_jobs_on_disjoint_parts_of_one_chain() -> None:
    async def scenario(host: SimHost, nodes: list[Node]) -> None:
        before = await read_all(host, nodes[3])
        upper = await host.stream(nodes[3], base_node="l1", speed_bytes_per_s=1024)
        lower = await host.stream(nodes[1], speed_bytes_per_s=1024)
        with pytest.raises(UsageError, match="is busy: block device is in use by block job: stream"):
            await host.stream(nodes[2])
        lower.set_speed(0)
        assert (await lower.outcome()).error is None
        upper.set_speed(0)
        assert (await upper.outcome()).error is None
        assert nodes[3].backing is nodes[1] and nodes[1].backing is None
        assert await read_all(host, nodes[3]) == before
        assert await shown_by_headers(disks_of(host), "l3-file") == before

    on_chain(scenario)


@pytest.mark.parametrize("seed", range(40))
def test_random_chains_under_a_guest_never_change_what_they_show(seed: int) -> None:
    async def main() -> None:
        chance = random.Random(seed)
        async with SimHost(seed, latency_s_max=0.05) as host:
            nodes = await make_chain(host, random_layers(chance, chance.randrange(3, 6)), chance)
            active = nodes[-1]
            top = chance.choice(nodes[1:-1])
            base = chance.choice(nodes[: nodes.index(top)])
            merged = await read_all(host, top)
            model = bytearray(await read_all(host, active))
            guest = await guest_of(host, active)
            job = await host.commit(active, top_node=top.name, base_node=base.name)
            async with asyncio.TaskGroup() as group:
                group.create_task(run_guest(guest, model, chance, writes=25, pause_s=0.05))
                outcome = await job.outcome()
            assert outcome.error is None
            assert nodes[nodes.index(top) + 1].backing is base
            assert await read_all(host, active) == model
            assert (await read_all(host, base))[: len(merged)] == merged
            await guest.node.flush()
            await host.graph.release(guest)
            disks = disks_of(host)
        assert await shown_by_headers(disks, f"{active.name}-file") == model

    run(main())
