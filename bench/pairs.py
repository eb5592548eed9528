"""Paired measurement: ours and the peer's in turn, ratio by ratio, because the machine itself drifts."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pairs:
    """Seconds of each run, in the order they were made."""

    name: str
    ours_s: list[float]
    peer_s: list[float]

    @property
    def ratios(self) -> list[float]:
        """Peer's time divided by ours, pair by pair: 2 means twice as fast as the peer."""
        return [peer / ours for ours, peer in zip(self.ours_s, self.peer_s, strict=True)]

    def __str__(self) -> str:
        ours_s, peer_s = statistics.median(self.ours_s), statistics.median(self.peer_s)
        ratios = self.ratios
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        speed = f"{statistics.median(ratios):5.2f} x the peer's speed {spread}"
        return f"{self.name:44s} ours {ours_s:7.3f} s   peer {peer_s:7.3f} s   {speed}"


def measure(name: str, ours: Callable[[], float], peer: Callable[[], float], *, runs: int) -> Pairs:
    """Run both `runs` times in turn, after one uncounted turn; each callable prepares, runs, and returns seconds."""
    ours()
    peer()
    ours_s, peer_s = [], []
    for number in range(runs):
        first, second = (ours, peer) if number % 2 == 0 else (peer, ours)
        times = {first: first(), second: second()}
        ours_s.append(times[ours])
        peer_s.append(times[peer])
    return Pairs(name, ours_s, peer_s)
