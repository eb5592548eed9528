"""Live disks under jobs, in simulated time: several guests write, jobs of all kinds run, disks fail, all from a seed.

Whatever happens: a copy is the source of the promised instant; guests find what they wrote, and what they flushed is
there after a power cut; a clean bit means that nothing differs; images have no errors; nobody waits for ever.

`BLOCKJOBS_SIM_SEEDS=1000 pytest tests/sim` goes on for longer, `make sim` until something fails. A failure names its
seed, and `make sim SEED=<seed>` plays it again.
"""

import os
import random
from collections import Counter
from contextlib import suppress

import live_chains  # noqa: F401  importing it enters its scenarios
import live_mirrors  # noqa: F401  the same
import live_snapshots  # noqa: F401  the same
import pytest
from live_checks import errors_of
from live_guests import AT_ONCE, write_at_once
from live_scenarios import SCENARIOS
from live_world import World

from blockjobs.base.errors import IoFailure
from blockjobs.export import transmission
from blockjobs.schema.command import qmp
from blockjobs.testing.clock import run
from blockjobs.testing.host import SimHost

FIRST, SEEDS = int(os.environ.get("BLOCKJOBS_SIM_FIRST", "0")), int(os.environ.get("BLOCKJOBS_SIM_SEEDS", "300"))
TALLY: Counter[str] = Counter()
POSSIBLE = [scenario for scenario in SCENARIOS if scenario.command in qmp.commands]


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transmission, "write_now", write_at_once)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_seed(seed: int) -> None:
    async def story() -> None:
        chance = random.Random(seed)
        host = SimHost(seed, latency_s_max=chance.choice((0.0, 0.002, 0.02)), cached_share=seed % 3 / 2)
        world = World(host, chance)
        with suppress(IoFailure):  # an image on a disk that failed may not close cleanly
            async with host:
                await world.live(POSSIBLE)
        for name, disk in host.disks.items():
            assert not (errors := await errors_of(disk.pages)), (name, errors)
        TALLY.update(world.tally)

    run(story())


@pytest.mark.skipif(SEEDS < 100, reason="chance needs seeds")
def test_everything_was_seen_to_succeed_and_to_fail() -> None:
    """The stories are worth something only if things come to their end in them, well and badly."""
    if not TALLY:
        pytest.skip("the stories ran in other processes")
    for scenario in POSSIBLE:
        for fate in scenario.fates:
            assert TALLY[f"{scenario.name}: {fate}"], (scenario.name, fate, TALLY)
    assert min(TALLY["power cut"], TALLY["nbd"], TALLY["direct"]) > SEEDS // 10
    assert min(AT_ONCE["write"], AT_ONCE["read"]) > SEEDS, "requests at once and jobs were hardly tried together"
