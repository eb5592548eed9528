"""`blockjobs measure` and `map` say what the real qemu-img says of random images."""

from __future__ import annotations

import json
import random
import subprocess
from typing import TYPE_CHECKING

import disks
import pytest
import tool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu
SEEDS_EACH = 12
TARGETS_EACH = 4


def any_length(rng: random.Random) -> int:
    return rng.choice([rng.randrange(1, 9_000_000), rng.randrange(1, 9000) * 512, rng.randrange(1, 100) * 65536])


def make_raw(rng: random.Random, path: Path) -> None:
    """A file with holes, of any length, which may end with one in the middle of a page."""
    length = any_length(rng)
    with path.open("wb") as file:
        file.truncate(length)
        for _ in range(rng.randrange(9)):
            at = rng.randrange(length)
            at -= at % rng.choice([1, 4096])
            file.seek(at)
            count = min(rng.choice([1, 511, 4096, 65536, rng.randrange(1, 300_000)]), length - at)
            file.write(rng.choice([b"\0", b"x"]) * count)


def make_qcow2(rng: random.Random, name: str, backing: tuple[str, str] | None, *, cwd: Path) -> bool:
    """Fill an image in random ways; returns whether it has a snapshot `s1`."""
    unit = rng.choice([512, 4096, 65536, 65536, 262144, 2097152])
    options = [f"cluster_size={unit}"]
    kind = rng.choice(["", "", "compat=0.10", "lazy_refcounts=on", "extended_l2=on"])
    if kind and not (kind == "extended_l2=on" and unit < 16384):
        options.append(kind)
    if not backing and rng.random() < 0.25:
        options.append("preallocation=" + rng.choice(["metadata", "falloc", "full"]))
    words = ("-b", backing[0], "-F", backing[1]) if backing else ()
    length = -(-any_length(rng) // 512) * 512
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(options), *words, name, length, cwd=cwd)
    commands = []
    for _ in range(rng.randrange(9)):
        at = rng.randrange(length) // (grain := rng.choice([512, 4096, 65536])) * grain
        count = min(rng.choice([512, 4096, 65536, 512 * rng.randrange(1, 900)]), length - at)
        deed = rng.choice(["write -P 1", "write -P 1", "write -P 0", "write -z", "write -z -u", "discard", "write -c"])
        if deed == "write -c":
            at, count = at // unit * unit, min(unit, length - at // unit * unit)
        commands += ["-c", f"{deed} {at} {count}"]
    if commands:
        # It refuses some of the compressed writes, to clusters that are in use.
        subprocess.run(["qemu-io", *commands, name], cwd=cwd, check=False, capture_output=True)
    has_snapshot = rng.random() < 0.25
    if has_snapshot:
        disks.run("qemu-img", "snapshot", "-c", "s1", name, cwd=cwd)
        # No overlay grows: past the snapshot's end QEMU would show the backing file, which no guest has seen there.
        if not backing and kind != "compat=0.10":
            disks.run("qemu-img", "resize", "-q", name, str(length * 2), cwd=cwd)
        disks.run("qemu-io", "-c", f"write -P 3 0 {min(length, 65536)}", name, cwd=cwd)
    if kind != "compat=0.10":
        for number in range(rng.choice([0, 0, 1, 3])):
            granularity = str(rng.choice([512, 4096, 65536, 1 << 20]))
            disks.run("qemu-img", "bitmap", "--add", "-g", granularity, name, f"b{number}" * 5, cwd=cwd)
    return has_snapshot


def any_target(rng: random.Random) -> list[str]:
    if rng.random() < 0.2:
        return ["-O", "raw"]
    unit = rng.choice([512, 4096, 65536, 65536, 262144, 2097152])
    options = [f"cluster_size={unit}"]
    kind = rng.choice(["", "compat=0.10", "lazy_refcounts=on", "extended_l2=on", "refcount_bits=1", "refcount_bits=64"])
    if kind and not (kind == "extended_l2=on" and unit < 16384):
        options.append(kind)
    more = rng.choice(["", "", "backing_file=base,backing_fmt=raw", "preallocation=metadata", "preallocation=full"])
    return ["-O", "qcow2", "-o", ",".join([*options, more] if more else options)]


@pytest.mark.parametrize("part", range(4))
def test_random_images(tmp_path, part):
    for seed in range(part * SEEDS_EACH, (part + 1) * SEEDS_EACH):
        rng, cwd = random.Random(seed), tmp_path / str(seed)
        cwd.mkdir()
        has_snapshot, form = False, rng.choice(["raw", "qcow2", "qcow2", "chain", "chain"])
        if form == "raw":
            make_raw(rng, cwd / "a")
        else:
            backing = None
            if form == "chain":
                backing = ("base", rng.choice(["raw", "qcow2"]))
                if backing[1] == "raw":
                    make_raw(rng, cwd / "base")
                else:
                    make_qcow2(rng, "base", None, cwd=cwd)
            has_snapshot, form = make_qcow2(rng, "a", backing, cwd=cwd), "qcow2"
        for _ in range(TARGETS_EACH):
            words = ["measure", "-f", form, *any_target(rng), rng.choice(["--output=json", "--output=human"])]
            words += ["-l", "s1"] if has_snapshot and rng.random() < 0.5 else []
            wanted = disks.run("qemu-img", *words, "a", cwd=cwd)
            assert tool.quick(*words, "a", cwd=cwd).out == wanted, (seed, words)
        words = ["map", "-f", form, "--output=json", "a"]
        found = tool.quick(*words, cwd=cwd).json
        assert shown(found) == shown(json.loads(disks.run("qemu-img", *words, cwd=cwd))), seed


def shown(runs: list[dict[str, object]]) -> list[tuple[object, ...]]:
    """What is where, neighbours joined. QEMU also tells where clusters lie that read as zeroes."""
    joined: list[tuple[object, ...]] = []
    for run in runs:
        what = (run["depth"], run["present"], run["zero"], run["data"])
        shift = None if run["zero"] or "offset" not in run else run["offset"] - run["start"]
        if not joined or joined[-1][1:] != (*what, shift):
            joined.append((run["start"], *what, shift))
    return joined


def test_holes_show_where_the_image_has_many_more_clusters_than_its_file_has_space(tmp_path):
    """At every number of holes up to the one at which qemu-img begins to show them, and past it."""
    for clusters, step in ((1, 4096), (20, 16384), (40, 65536)):
        options = "cluster_size=65536,preallocation=full"
        disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", clusters * 65536, cwd=tmp_path)
        answers = set()
        for holes in range(0, min(clusters, 6) * 65536 + 1, step):
            if holes:
                end = (tmp_path / "a.qcow2").stat().st_size
                punch = ["fallocate", "-p", "-o", str(end - holes), "-l", str(holes), "a.qcow2"]
                subprocess.run(punch, cwd=tmp_path, check=True)
            wanted = json.loads(disks.run("qemu-img", "map", "--output=json", "a.qcow2", cwd=tmp_path))
            found = tool.quick("map", "--output=json", "a.qcow2", cwd=tmp_path).json
            assert shown(found) == shown(wanted), (clusters, holes)
            answers.add(any(run["zero"] for run in wanted))
        assert answers == {False, True}
