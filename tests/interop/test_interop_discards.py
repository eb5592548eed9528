"""What becomes of space that is no longer needed: with the same options, the same as with QEMU.

Both programs begin with the same image and do the same to it. Afterwards the guest's map must be the same, and the file
system must have got back as much.
"""

import asyncio
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from disk_model import NOISE, Step
from image_kinds import KIB, MIB, Kind
from programs import Ours, Theirs

from blockjobs.base.errors import UsageError
from blockjobs.host import Host

pytestmark = pytest.mark.qemu

SIZE = 4 * MIB
METADATA_BYTES_MAX = 192 * KIB
"""What the programs may differ in: tables at other places, and free clusters that were used for a time."""


class Disk4M(Kind):
    """A kind of four megabytes."""

    @property
    def size(self) -> int:
        return SIZE


PLAIN = Disk4M()
KINDS = [PLAIN, replace(PLAIN, version="v2"), replace(PLAIN, extended_l2=True), replace(PLAIN, data="file")]
NOT_GIVEN = ("", "on", "off")
ERASED = [Step("discard", MIB, MIB), Step("unmap", 2 * MIB, MIB), Step("zero", 3 * MIB, MIB // 2)]
WRITTEN = [Step("write", 0, SIZE, number=7)]
ZERO_BYTES = [Step("zero bytes", MIB, MIB)]


def prepare(folder: Path, kind: Kind, *, is_compressed: bool = False, has_snapshot: bool = False) -> None:
    """A full image, made by QEMU; of compressed clusters of half their size, or with a snapshot of another content."""
    folder.mkdir()
    theirs = Theirs(folder, kind)
    theirs.create("")
    content = NOISE * (SIZE // len(NOISE))
    if is_compressed:
        half = 32 * KIB
        content = b"".join(content[at : at + half] + bytes(half) for at in range(0, SIZE, 2 * half))
    (folder / "content").write_bytes(content)
    theirs.io([f"write {'-c ' if is_compressed else ''}-s content 0 {SIZE}"])
    if has_snapshot:
        theirs.img("snapshot", "-c", "kept")
        theirs.io([f"write -P 1 0 {SIZE}"])


def compare(
    tmp_path: Path, kind: Kind, options: Mapping[str, str], steps: list[Step], *, same_space: bool = True
) -> int:
    """Let both do the steps to copies of the image in `start`; returns how many bytes less are stored after ours."""
    given = {name: value for name, value in options.items() if value}
    start, one, other = (tmp_path / name for name in ("start", "theirs", "ours"))
    for copy in (one, other):
        copy.mkdir()
        for each in start.iterdir():
            shutil.copyfile(each, copy / each.name)
    before = stored_bytes(other)
    Theirs(one, kind, given).play(steps)

    async def play() -> None:
        async with Host() as host:
            ours = Ours(other, kind, host, given)
            await ours.play(steps)
            await ours.check()

    asyncio.run(play())
    for folder in (one, other):
        Theirs(folder, kind).check()
    assert guest_map(other, kind) == guest_map(one, kind)
    assert Theirs(other, kind).shown() == Theirs(one, kind).shown()
    if same_space:
        assert abs(stored_bytes(other) - stored_bytes(one)) <= METADATA_BYTES_MAX
    return before - stored_bytes(other)


def stored_bytes(folder: Path) -> int:
    """What the file system stores of the image and its data file."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.name in ("disk.qcow2", "data.raw"))


def guest_map(folder: Path, kind: Kind) -> list[tuple[int, bool, bool, bool]]:
    """Starts of what differs to the guest: where it is, whether it reads as zeroes, whether bytes are stored."""
    found: list[tuple[int, bool, bool, bool]] = []
    for each in json.loads(Theirs(folder, kind).img("map", "--output=json")):
        shown = each["start"], each["present"], each["zero"], each["data"]
        if not found or found[-1][1:] != shown[1:]:
            found.append(shown)
    return found


@pytest.mark.parametrize("discard", ["unmap", "ignore"])
@pytest.mark.parametrize("passed", NOT_GIVEN)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_a_guest_gives_up(kind: Kind, passed: str, discard: str, tmp_path: Path) -> None:
    prepare(tmp_path / "start", kind)
    # With discard=ignore, QEMU frees clusters for zeroes that may be unmapped; our node keeps their space.
    steps = [step for step in ERASED if step.kind != "unmap" or (discard, passed) != ("ignore", "on")]
    freed = compare(tmp_path, kind, {"discard": discard, "pass-discard-request": passed}, steps)
    if discard == "unmap":
        assert (freed > MIB) is (passed != "off")
    elif passed != "on":
        assert freed <= METADATA_BYTES_MAX


@pytest.mark.parametrize("passed", NOT_GIVEN)
def test_what_a_deleted_snapshot_held(passed: str, tmp_path: Path) -> None:
    prepare(tmp_path / "start", PLAIN, has_snapshot=True)
    options = {"discard": "unmap", "pass-discard-snapshot": passed}
    freed = compare(tmp_path, PLAIN, options, [Step("delete", name="kept")])
    assert (freed > 3 * MIB) is (passed != "off")


@pytest.mark.parametrize("passed", NOT_GIVEN)
def test_what_compressed_clusters_took_that_are_overwritten(passed: str, tmp_path: Path) -> None:
    prepare(tmp_path / "start", PLAIN, is_compressed=True)
    options = {"discard": "unmap", "pass-discard-other": passed}
    # QEMU 7.2 gives nothing of them back with `on` either.
    grown = -compare(tmp_path, PLAIN, options, WRITTEN, same_space=passed != "on")
    assert (grown < 5 * MIB // 2) is (passed == "on")


@pytest.mark.parametrize("discard", ["unmap", "ignore"])
@pytest.mark.parametrize("detected", ["off", "on", "unmap"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_zeroes_that_a_guest_writes(kind: Kind, detected: str, discard: str, tmp_path: Path) -> None:
    prepare(tmp_path / "start", kind)
    options = {"discard": discard, "detect-zeroes": detected}
    if (detected, discard) == ("unmap", "ignore"):
        with pytest.raises(UsageError) as refused:
            asyncio.run(_open(tmp_path / "start", kind, options))
        with pytest.raises(AssertionError) as told:
            Theirs(tmp_path / "start", kind, options).io([f"read 0 {KIB}"])
        assert str(refused.value) in str(told.value)
        return
    freed = compare(tmp_path, kind, options, ZERO_BYTES)
    if kind.version == "v3":
        assert (freed > MIB // 2) is (detected == "unmap")


async def _open(folder: Path, kind: Kind, options: Mapping[str, str]) -> None:
    async with Host() as host:
        await Ours(folder, kind, host, options).open()
