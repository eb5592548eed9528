"""Every state that a power cut may leave, for every sequence of up to three requests, and for random longer ones.

States are judged by `judge`, which shares no code with the program; some of them also by the program itself and by the
real tools. `make crash` goes on with longer runs for as long as one likes.
"""

import asyncio
import os
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from exhaustive import Report, Session, harm, long_runs, own_opinion, short_runs
from replay import qemu_errors
from sectors import Disks, pages_of
from short_runs import SETUPS, Content

DEPTH = 3
SECONDS = float(os.environ.get("BLOCKJOBS_CRASH_SECONDS", "0"))
"""How long to go on with random runs."""
LEAST = {
    "plain": (72_000, 42_000),
    "lazy refcounts": (72_000, 42_000),
    "extended L2": (97_000, 44_000),
    "data file": (30_000, 9_000),
    "raw data file": (31_000, 9_300),
    "discard-no-unref": (8_500, 4_700),
    "discard-no-unref, enciphered": (2_500, 1_500),
    "data file, enciphered": (2_200, 1_000),
    "refcounts of 1 bit": (38_000, 22_000),
    "refcounts of 64 bits": (55_000, 36_000),
    "enciphered": (52_000, 28_500),
    "enciphered on the disk": (16_000, 10_900),  # 11,000 and more when each cluster was punched by itself
    "version 2": (18_000, 12_000),
}
"""How many states of all short runs are looked at, and how many distinct ones: less would be a hole in the test."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SETUPS)
def test_short_runs(name: str, workers: ProcessPoolExecutor) -> None:
    setup, total = SETUPS[name], Report()
    for each in [workers.submit(short_runs, name, first, DEPTH) for first in setup.requests]:
        total.add(each.result())
    assert not total.complaints, "\n".join(total.complaints)
    assert total.runs == sum(len(setup.requests) ** length for length in range(1, DEPTH + 1))
    assert total.states >= LEAST[name][0]
    assert total.distinct >= LEAST[name][1]
    assert total.repaired or "create" in setup.without or setup.image.is_v2
    for story, disks, content in total.sample:
        assert not (wrong := asyncio.run(own_opinion(disks, setup, content))), f"{story}: {wrong}"


@pytest.mark.qemu
@pytest.mark.parametrize("name", SETUPS)
def test_real_tools_agree(name: str, tmp_path: Path) -> None:
    report = short_runs(name, "write", 2)
    report.add(short_runs(name, SETUPS[name].requests[:5][-1], 2))
    for story, disks, content in report.sample:
        if SETUPS[name].cipher:  # it is not one of theirs
            content = ()
        assert not (wrong := qemu_opinion(disks, content, tmp_path)), f"{story}: {wrong}"
    assert report.sample


def qemu_opinion(disks: Disks, content: Content, folder: Path) -> str:
    """What qemu-img and qemu-io say about a state that was judged to be good."""
    errors = qemu_errors({name: pages_of(sectors) for name, sectors in disks.items()}, folder)
    if harm(errors) or (errors and "OFLAG_COPIED" not in errors):
        return errors
    if not content:
        return ""
    data = ",data-file.driver=file,data-file.filename=data" if "data" in disks else ""
    options = f"driver=qcow2,file.driver=file,file.filename=disk{data}"
    subprocess.run(["qemu-img", "convert", "--image-opts", "-O", "raw", options, "raw"], check=True, cwd=folder)
    if (folder / "raw").read_bytes() != b"".join(content):
        return "qemu-img reads something else"
    # For writing: whatever the crash has left to be repaired is repaired.
    command = ["qemu-io", "--image-opts", "-c", "write -P 7 0 512", "-c", "read -P 7 0 512", options]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return run.stdout + run.stderr if run.returncode or "failed" in run.stdout else ""


@pytest.mark.serial
@pytest.mark.timeout(SECONDS * 2 + 120)
def test_long_runs(workers: ProcessPoolExecutor) -> None:
    """Random runs of six requests: a few in the suite, for a given time by `make crash`."""
    began, seed, totals = time.monotonic(), 0, {name: Report() for name in SETUPS}
    while not seed or time.monotonic() - began < SECONDS:
        tasks = {name: workers.submit(long_runs, name, seed, 4 if not SECONDS else 50, 6) for name in SETUPS}
        for name, task in tasks.items():
            totals[name].add(task.result())
            assert not totals[name].complaints, f"seed {seed}:\n" + "\n".join(totals[name].complaints)
        seed += 1
    for name, total in totals.items():
        print(f"{name}: {total.runs} runs of 6 requests, {total.states} states, {total.distinct} of them distinct")


@pytest.mark.parametrize("name", SETUPS)
def test_missing_syncs_are_found(name: str) -> None:
    """The tool itself: were there no syncs, many states would be bad."""
    session = Session(SETUPS[name], skip_syncs=True)
    report = asyncio.run(session.all_of([("write", "flush", "zero", "write")], share=False))
    assert len(report.complaints) > 2
