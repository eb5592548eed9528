"""A commit between images that is cancelled leaves the chain as it was, under a guest's eyes."""

import random

from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.schema.command import qmp
from blockjobs.testing.chains import Layer, guest_of, make_chain
from blockjobs.testing.clock import run
from blockjobs.testing.host import SimHost

KIB = 1 << 10


def test_the_filter_goes_although_a_guest_reads_the_images_below_it() -> None:
    async def main() -> None:
        async with SimHost() as host:
            base, middle, top = await make_chain(host, [Layer(64 * KIB)] * 3, random.Random(1))
            guest = await guest_of(host, top)
            before = await guest.node.read(0, top.length)
            arguments = {"job-id": "job0", "device": "l2", "top-node": "l1", "base-node": "l0", "speed": 1}
            async with host.jobs.control:
                await qmp.bind("block-commit", arguments).run(host)
            job = host.jobs.get("job0")
            assert top.backing is not middle
            await host.clock.sleep_until(host.clock.now_ns() + 10**9)
            async with host.jobs.control:
                await job.cancel()
            assert (await job.outcome()).error == "Operation canceled"
            assert top.children["backing"] is middle and middle.children["backing"] is base
            assert await guest.node.read(0, top.length) == before
            assert len(host.graph.nodes()) == 6
            middle.check_op("stream")
            await host.graph.release(guest)

    run(main())
