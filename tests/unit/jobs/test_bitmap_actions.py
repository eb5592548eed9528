"""Bitmap actions of transactions: all or nothing, and what was recorded is never lost by an undo."""

from typing import Any

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.bitmaps import (
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
    add_bitmap,
    bitmap_sha256,
    default_granularity,
    merge_bitmaps,
)
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.info import dirty_infos
from blockjobs.block.node_bitmap import NodeBitmap, find_bitmap
from blockjobs.jobs import bitmap_actions  # noqa: F401  registers them
from blockjobs.jobs.transaction import Action, TransactionAction, run_transaction
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.little_host import LittleHost

GRANULE = 64 * KiB


def action(verb: str, **members: Any) -> Action:
    kind = "abort" if verb == "abort" else f"block-dirty-bitmap-{verb}"
    return convert({"type": kind, "data": members}, TransactionAction)


async def bitmap(host: LittleHost, node: str, name: str, **members: Any) -> NodeBitmap:
    return (await add_bitmap(host.graph, BlockDirtyBitmapAdd(node=node, name=name, **members)))[1]


@pytest.mark.parametrize(
    "verb",
    [
        action("add", node="d", name="new"),
        action("remove", node="d", name="b"),
        action("clear", node="d", name="b"),
        action("disable", node="d", name="b"),
        action("enable", node="d", name="off"),
        action("merge", node="d", target="b", bitmaps=["off"]),
    ],
    ids=lambda each: each.__struct_config__.tag,
)
def test_a_failed_transaction_leaves_the_bitmaps_as_they_were(verb: Action) -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            node = await host.disk("d", 1 * MiB)
            one = await bitmap(host, "d", "b")
            other = await bitmap(host, "d", "off", disabled=True)
            one.map.set(Span(0, GRANULE))
            other.map.set(Span(GRANULE, GRANULE))
            before = dirty_infos(node), bitmap_sha256(one), bitmap_sha256(other)
            with pytest.raises(UsageError, match="Abort action"):
                await run_transaction(host, [verb, action("abort")])
            assert (dirty_infos(node), bitmap_sha256(one), bitmap_sha256(other)) == before
            await run_transaction(host, [verb])
            assert (dirty_infos(node), bitmap_sha256(one), bitmap_sha256(other)) != before
            assert find_bitmap(node.bitmaps, "off") is other

    run(scenario())


def test_all_granularities_merge_both_ways() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            await host.disk("d", 1 * MiB + 512)
            fine = await bitmap(host, "d", "fine", granularity=512)
            coarse = await bitmap(host, "d", "coarse", granularity=1 << 20)
            fine.map.set(Span(1 * MiB, 512))
            await merge_bitmaps(host.graph, BlockDirtyBitmapMerge(node="d", target="coarse", bitmaps=["fine"]))
            assert list(coarse.map.runs()) == [Span(1 * MiB, 512)]
            assert coarse.map.count_bytes() == 1 * MiB
            coarse.map.set(Span(0, 1))
            await merge_bitmaps(host.graph, BlockDirtyBitmapMerge(node="d", target="fine", bitmaps=["coarse", "fine"]))
            assert fine.map.count_bytes() == 1 * MiB + 512

    run(scenario())


def test_a_merge_that_fails_late_changes_nothing_and_an_empty_one_succeeds() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            await host.disk("d", 1 * MiB)
            await host.disk("small", 1 * KiB)
            target, source = await bitmap(host, "d", "t"), await bitmap(host, "d", "s")
            await bitmap(host, "small", "x")
            source.map.set_all()
            wanted = convert({"node": "d", "target": "t", "bitmaps": ["s", {"node": "small", "name": "x"}]}, MERGE)
            with pytest.raises(UsageError, match="different sizes"):
                await merge_bitmaps(host.graph, wanted)
            assert not target.map.any()
            await merge_bitmaps(host.graph, BlockDirtyBitmapMerge(node="d", target="t", bitmaps=[]))
            assert not target.map.any()

    run(scenario())


MERGE = BlockDirtyBitmapMerge


def test_a_bitmap_too_large_for_memory_is_refused_before_it_is_made() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            await host.qcow2("huge", NewImage(size=1 << 50, cluster_size=1 << 21))
            with pytest.raises(UsageError, match="larger granularity"):
                await bitmap(host, "huge", "b", granularity=512)

    run(scenario())


def test_the_default_granularity_is_the_cluster_size_within_bounds() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            for size, wanted in ((512, 4 * KiB), (8 * KiB, 8 * KiB), (2 * MiB, 64 * KiB)):
                node = await host.qcow2(f"q{size}", NewImage(size=1 * MiB, cluster_size=size))
                assert default_granularity(node) == wanted
                raw = await host.add(driver="raw", node_name=f"raw{size}", file=node.name)
                assert default_granularity(raw) == wanted
            assert default_granularity(await host.disk("d", 1 * MiB)) == 64 * KiB

    run(scenario())
