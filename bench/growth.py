"""How the time of a backup grows with allocated size, with the length of the chain, and with fragmentation.

Each point is one disk, backed up by ours and by qemu-storage-daemon in turn; the median of the runs is drawn.
"""

import functools
import random
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from backup import CLUSTER, backup
from daemons import OURS, PEER, lasting
from pairs import Pairs, in_folder, job_options, measure

MiB = 1 << 20


class Point(NamedTuple):
    """The medians of both at one place of the x-axis."""

    at: float
    ours_s: float
    peer_s: float


@dataclass(frozen=True)
class Curve:
    """One picture: what grows along `axis`, and the points."""

    title: str
    axis: str
    points: list[Point]


def write_clusters(image: Path, clusters: Iterable[int]) -> None:
    """Write the clusters of a qcow2 image in the order given, which is the order that they get in the file."""
    script = "".join(f"write -q -P {1 + cluster % 254} {cluster * CLUSTER} 64k\n" for cluster in clusters)
    command = ["qemu-io", "-f", "qcow2", str(image)]
    subprocess.run(command, input=script, text=True, check=True, stdout=subprocess.DEVNULL)


def allocated(folder: Path, length: int, mib: int) -> Path:
    """A disk with its first `mib` MiB written in a row."""
    image = folder / "source.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(length)], check=True)
    write_clusters(image, range(mib * MiB // CLUSTER))
    return image


def chained(folder: Path, length: int, layers: int) -> Path:
    """A quarter of the disk, scattered, and each cluster in one of the `layers` images of a chain."""
    chance = random.Random(4)
    clusters = chance.sample(range(length // CLUSTER), length // CLUSTER // 4)
    below: list[str] = []
    for number in range(layers):
        image = folder / ("source.qcow2" if number == layers - 1 else f"layer{number}.qcow2")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, str(image), str(length)], check=True)
        write_clusters(image, clusters[number::layers])
        below = ["-b", str(image), "-F", "qcow2"]
    return image


def fragmented(folder: Path, length: int, run_clusters: int) -> Path:
    """A quarter of the disk in runs of so many clusters, the runs in random order."""
    chance = random.Random(5)
    spans = length // CLUSTER // run_clusters
    starts = chance.sample(range(spans), max(1, spans // 4))
    image = folder / "source.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(length)], check=True)
    write_clusters(image, (start * run_clusters + each for start in starts for each in range(run_clusters)))
    return image


KINDS: tuple[tuple[str, str, Callable[[Path, int, int], Path], tuple[int, ...]], ...] = (
    ("allocated size", "MiB allocated, in a row", allocated, (16, 64, 128, 256, 1024)),
    ("length of the chain", "images in the chain", chained, (1, 4, 8, 16)),
    ("fragmentation", "KiB in a run (a quarter of the disk)", fragmented, (1, 4, 16, 64)),
)


def curves(folder: Path, mib: int, runs: int) -> Iterator[tuple[Curve, list[Pairs]]]:
    """Measure on disks of `mib` MiB, `runs` pairs a point; with each curve come the pairs behind it."""
    with lasting():
        yield from _curves(folder, mib, runs)


def _curves(folder: Path, mib: int, runs: int) -> Iterator[tuple[Curve, list[Pairs]]]:
    for title, axis, make, places in KINDS:
        points, behind = [], []
        for place in places:
            if make is allocated and place > mib:
                continue
            for old in folder.iterdir():
                old.unlink()
            source = make(folder, mib * MiB, place)
            options = job_options(__doc__, [f"--mib={mib}"])
            run = functools.partial(backup, source=source, formats=("qcow2", "qcow2"), options=options, compress=None)
            pairs = measure(
                f"{title}: {place}",
                functools.partial(run, OURS),
                functools.partial(run, PEER),
                runs=runs,
                budget_s=0,  # the first turn counts
            )
            middle = [statistics.median(took.wall_s for took in side) for side in (pairs.ours, pairs.peer)]
            at = place * CLUSTER // 1024 if make is fragmented else place
            points.append(Point(at, *middle))
            behind.append(pairs)
        yield Curve(title, axis, points), behind


def main() -> None:
    """Print a line for each point."""
    options = job_options(__doc__)

    def run_cases(folder: Path, _: object) -> None:
        for _curve, behind in curves(folder, options.mib, options.runs):
            for pairs in behind:
                print(pairs, flush=True)

    in_folder(run_cases, options)


if __name__ == "__main__":
    main()
