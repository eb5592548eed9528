"""Where runs are stored, against qemu-img map."""

import asyncio
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from blockjobs.block.chain_map import MapRun
from blockjobs.host import Host

MIB = 1 << 20
KEYS = ("start", "length", "depth", "present", "zero", "data", "offset")


def ours(path: Path, format: str) -> list[MapRun]:
    async def run() -> list[MapRun]:
        async with Host() as host:
            node = await host.open(str(path), format=format, read_only=True)
            async with host.access(node):
                return [each async for each in host.map(node)]

    return asyncio.run(run())


def theirs(path: Path, format: str) -> list[dict[str, Any]]:
    words = ["qemu-img", "map", "--output=json", "-f", format, str(path)]
    found: list[dict[str, Any]] = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    return found


def run(*words: str, cwd: Path) -> None:
    subprocess.run(words, cwd=cwd, check=True, capture_output=True)


def coverage(runs: list[tuple[int, int, Any]]) -> list[tuple[int, Any]]:
    """Status by 512 bytes, run-length joined: indifferent to where runs are cut."""
    joined: list[tuple[int, Any]] = []
    for at, length, status in runs:
        if not joined or joined[-1][1] != status:
            joined.append((at, status))
        assert length > 0
    return joined


def assert_agrees(path: Path, format: str, options: str = "") -> list[MapRun]:
    """Same depth and presence everywhere, same zero runs and same places of data."""
    mine, reference = ours(path, format), theirs(path, format)
    assert mine[0].at == 0
    assert all(a.at + a.length == b.at for a, b in pairwise(mine))
    assert mine[-1].at + mine[-1].length == reference[-1]["start"] + reference[-1]["length"]
    assert coverage([(each.at, each.length, (each.depth, each.present)) for each in mine]) == coverage(
        [(each["start"], each["length"], (each["depth"], each["present"])) for each in reference]
    )

    def at(position: int) -> dict[str, Any]:
        return next(each for each in reference if each["start"] <= position < each["start"] + each["length"])

    for each in mine:
        same = at(each.at)
        assert each.is_data == same["data"]
        assert each.zero == same["zero"]
        if each.zero and each.offset == 0 and "offset" not in same:
            assert "data_file" in options  # 7.2 takes zeroes at place 0 of a data file for such without a place
        elif each.offset is not None:
            assert each.offset - each.at == same["offset"] - same["start"]
        else:
            assert each.zero or each.compressed
            # Of subclusters that are not present qemu-img says where they would be.
            assert "offset" not in same or not same["present"]
    return mine


@pytest.mark.qemu
def test_a_chain_of_three(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "raw", "base.raw", "8M", cwd=tmp_path)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "-c", "write -P 2 6M 64k", "base.raw", cwd=tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2", "12M", cwd=tmp_path)
    writes = ("-c", "write -P 3 512k 64k", "-c", "write -z 6M 128k", "-c", "write -P 4 9M 1M")
    run("qemu-io", *writes, "mid.qcow2", cwd=tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "16M", cwd=tmp_path)
    run("qemu-io", "-c", "write -c -P 5 2M 64k", "-c", "write -P 6 15M 64k", "top.qcow2", cwd=tmp_path)
    runs = assert_agrees(tmp_path / "top.qcow2", "qcow2")
    stored = {(each.at // (1 << 16), Path(each.filename).name) for each in runs if each.is_data and not each.zero}
    assert {(0, "base.raw"), (8, "mid.qcow2"), (32, "top.qcow2"), (144, "mid.qcow2"), (240, "top.qcow2")} <= stored


@pytest.mark.qemu
@pytest.mark.parametrize("options", ["preallocation=falloc", "extended_l2=on", "cluster_size=4k", "compat=0.10"])
def test_kinds_of_qcow2(tmp_path: Path, options: str) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "4M", cwd=tmp_path)
    run("qemu-io", "-c", "write -P 1 100k 200k", "-c", "write -P 1 2M 3k", "a.qcow2", cwd=tmp_path)
    assert_agrees(tmp_path / "a.qcow2", "qcow2")


@pytest.mark.qemu
@pytest.mark.parametrize(
    "options",
    ["", "extended_l2=on", "cluster_size=512", "data_file=d.raw", "data_file=d.raw,data_file_raw=on", "compat=0.10"],
)
def test_zeroes_that_keep_their_place(tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # qemu-img looks for data files from there
    words = ("-o", options) if options else ()
    run("qemu-img", "create", "-q", "-f", "qcow2", *words, "a.qcow2", "4M", cwd=tmp_path)
    writes = ("write 0 1M", "write -z 0 64k", "write -z 256k 64k", "write -z -u 512k 64k", "write -z 640k 2k")
    beside = ("write -z 2M 128k", "write 2112k 64k")
    run("qemu-io", *(word for each in (*writes, *beside) for word in ("-c", each)), "a.qcow2", cwd=tmp_path)
    runs = assert_agrees(tmp_path / "a.qcow2", "qcow2", options)
    assert any(each.zero and each.offset is not None for each in runs) is ("compat" not in options)


@pytest.mark.qemu
def test_raw_with_holes_and_a_ragged_end(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    with path.open("wb") as out:
        out.truncate(5 * MIB + 100)
        out.write(b"x")
        out.seek(3 * MIB)
        out.write(b"y" * 8192)
    assert_agrees(path, "raw")


def test_fragmented_files_take_no_quadratic_time(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    with path.open("wb") as out:
        for number in range(4000):
            out.seek(number * 16384)
            out.write(b"x")
        out.truncate(4000 * 16384)
    runs = ours(path, "raw")
    assert len(runs) == 8000
    assert sum(each.length for each in runs) == 4000 * 16384


def shown(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


SCATTERED: dict[str, tuple[str, ...]] = {
    "raw base": ("-b", "base.raw", "-F", "raw"),
    "data file": ("-o", "data_file={}/data"),
    "compressed": (),
}


@pytest.mark.qemu
@pytest.mark.parametrize("kind", SCATTERED)
def test_scattered_images_are_shown_as_qemu_img_shows_them(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    cluster = 1 << 16
    run("qemu-img", "create", "-q", "-f", "raw", "base.raw", "6M", cwd=tmp_path)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 1M 1M", "-c", "write -P 2 4M 300k", "base.raw", cwd=tmp_path)
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        *(each.format(tmp_path) for each in SCATTERED[kind]),
        "top.qcow2",
        "24M",
        cwd=tmp_path,
    )
    places = rng.sample(range(24 * MIB // cluster), 200)
    writes = [f"write -P {1 + number % 200} {place * cluster} 64k" for number, place in enumerate(places[:120])]
    writes += [f"write -z {place * cluster} 64k" for place in places[120:150]]
    if kind == "compressed":
        writes += [f"write -c -P 7 {place * cluster} 64k" for place in places[150:]]
    run("qemu-io", *[word for write in writes for word in ("-c", write)], "top.qcow2", cwd=tmp_path)
    path = str(tmp_path / "top.qcow2")
    program = (sys.executable, "-c", "from blockjobs.cli.main import run_and_exit; run_and_exit()", "map")

    ours, reference = json.loads(shown(*program, "--output=json", path)), theirs(Path(path), "qcow2")
    assert [{name: each[name] for name in each if name != "compressed"} for each in ours] == reference
    lines = shown(*program, "--output=json", path).splitlines()
    assert lines == [
        ("[" if number == 0 else "") + json.dumps(each) + ("," if number < len(ours) - 1 else "]")
        for number, each in enumerate(ours)
    ]
    if kind != "compressed":  # of which qemu-img shows no lines
        assert shown(*program, path) == shown("qemu-img", "map", path)
    part = ("--start-offset=1000000", "--max-length=9000000")
    ours = json.loads(shown(*program, "--output=json", *part, path))
    assert (ours[0]["start"], ours[-1]["start"] + ours[-1]["length"]) == (1000000, 10000000)
    assert all(a["start"] + a["length"] == b["start"] for a, b in pairwise(ours))
