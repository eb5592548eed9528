"""Draining: users are told, requests end, and a long wait is explained."""

import asyncio
import logging

import pytest

from blockjobs.base.clock import SystemClock
from blockjobs.block import drain
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.graph import Graph
from blockjobs.block.inflight import InFlight
from blockjobs.block.tally import NodeTally
from blockjobs.testing.disk import SimDisk
from blockjobs.testing.graphs import add_node, run_in_graph

READ, WRITE = Perm.CONSISTENT_READ, Perm.WRITE


class User:
    """A user that parks a little later than asked."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.quiesced, self.parked = log, name, 0, False

    def quiesce_begin(self) -> None:
        self.quiesced += 1
        self.log.append(f"{self.name} begin")

    def is_quiet(self) -> bool:
        return self.parked

    async def quiet(self) -> None:
        await asyncio.sleep(0)
        self.parked = True

    def quiesce_end(self) -> None:
        self.quiesced -= 1
        self.parked = False
        self.log.append(f"{self.name} end")


def test_all_users_above_are_parked_once_and_nobody_else() -> None:
    async def body(graph: Graph) -> None:
        log: list[str] = []
        user, other = User(log, "user"), User(log, "other")
        disk = await graph.open_medium(SimDisk(bytes(4096)), "disk")
        raw = await add_node(graph, driver="raw", node_name="raw", file="disk")
        await graph.open_medium(SimDisk(bytes(4096)), "elsewhere")
        for name in ("raw", "disk"):
            await graph.claim("job", graph.node(name), READ, ALL, user=user)
        await graph.claim("job", graph.node("elsewhere"), READ, ALL, user=other)
        async with graph.drained(disk):
            assert (user.quiesced, user.parked, other.quiesced) == (1, True, 0)
            async with graph.drained(raw):
                assert user.quiesced == 2
        assert user.quiesced == 0
        assert log == ["user begin", "user begin", "user end", "user end"]
        async with graph.drained():
            assert (user.quiesced, other.quiesced) == (1, 1)
        with pytest.raises(RuntimeError, match="inside"):
            async with graph.drained(disk):
                raise RuntimeError("inside")
        assert user.quiesced == 0

    run_in_graph(body)


def test_a_drain_waits_for_requests_on_the_node_and_above_it() -> None:
    async def body(graph: Graph) -> None:
        disk = await graph.open_medium(SimDisk(bytes(4096)), "disk")
        raw = await add_node(graph, driver="raw", node_name="raw", file="disk")
        await graph.claim("x", raw, READ | WRITE, ALL)
        writes = [asyncio.create_task(raw.write(at, b"x")) for at in range(20)]
        await asyncio.sleep(0)
        assert len(raw.in_flight) == 20
        async with graph.drained(disk):
            assert all(task.done() for task in writes)
            assert len(raw.in_flight) == len(disk.in_flight) == 0

    run_in_graph(body)


def test_a_slow_drain_names_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(drain, "DRAIN_S_MAX", 0.01)

    async def body(graph: Graph) -> None:
        node = await add_node(graph, driver="null-co", node_name="slow", latency_ns=60_000_000)
        reading = asyncio.create_task(node.read(4096, 512))
        await asyncio.sleep(0)
        async with graph.drained(node):
            assert reading.done()

    with caplog.at_level(logging.WARNING):
        run_in_graph(body)
    assert "node 'slow' is busy with read at 4096+512" in caplog.text


def test_in_flight_counts_and_wakes() -> None:
    async def main() -> None:
        bag = InFlight(NodeTally(SystemClock()))
        await bag.empty()
        with pytest.raises(ValueError, match="x"), bag.request("write", 0, 1):
            raise ValueError("x")
        assert len(bag) == 0
        with bag.request("read", 5, 6):
            waiters = [asyncio.create_task(bag.empty()) for _ in range(2)]
            await asyncio.sleep(0)
            assert str(bag.oldest) == "read at 5+6"
            assert not any(waiter.done() for waiter in waiters)
        await asyncio.wait_for(asyncio.gather(*waiters), 1)
        assert bag.oldest is None

    asyncio.run(main())
