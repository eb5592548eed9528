"""The job `amend`, and what it refuses, beside qemu-img on the same images."""

import asyncio
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blockjobs.base.span import Span
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.host import Host
from blockjobs.lifecycle.handle import JobHandle

SIZE = 2 << 20


async def ended(job: JobHandle) -> str | None:
    while job.status != "concluded":
        await asyncio.sleep(0.001)
    error = job.error
    assert job.progress.current == job.progress.total
    job.dismiss()
    return error


def amend(path: Path, options: dict[str, Any], **amended: Any) -> str | None:
    """Make an image, amend it, and return the job's error."""

    async def run() -> str | None:
        async with Host() as host:
            await host.create_image(str(path), "qcow2", SIZE, **options)
            node = await host.open(str(path))
            return await ended(await host.amend(node, **amended))

    return asyncio.run(run())


REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"refcount_bits": 8}, {"version": "v2"}, "compat=0.10 requires refcount_bits=16"),
    ({}, {"version": "v2", "refcount_bits": 8}, "Refcount widths other than 16 bits require compatibility level 1.1"),
    ({}, {"size": 1 << 62}, "Failed to grow the L1 table: File too large"),
    (
        {},
        {"backing_file": "b", "backing_fmt": "x" * 16},
        "backing-fmt: no format has a name of more than",
    ),
    ({"extended_l2": True}, {"version": "v2"}, "Cannot downgrade an image with incompatible features 0x10 set"),
    ({"version": "v2"}, {"lazy_refcounts": True}, "Lazy refcounts only supported with compatibility level 1.1 and"),
    ({"version": "v2"}, {"refcount_bits": 8}, "Refcount widths other than 16 bits require compatibility level 1.1"),
    ({}, {"refcount_bits": 3}, "Refcount width must be a power of two and may not exceed 64 bits"),
    ({}, {"version": "v9"}, "Unknown compatibility level v9"),
    ({}, {"data_file": "x"}, "data-file can only be set for images that use an external data file"),
    ({}, {"data_file_raw": True}, "data-file-raw cannot be set on existing images"),
    ({}, {"size": SIZE - 512}, "Shrinking an image deletes the data beyond its new end: say so with 'force'"),
    ({}, {"size": SIZE + 1}, "The new size must be a multiple of 512"),
    ({}, {"backing_fmt": "raw"}, "backing-fmt is the format of a backing file: name one with backing-file"),
    ({}, {"backing_file": "x" * 1024}, "Invalid argument"),
    ({}, {"encrypt": {"format": "luks", "state": "active", "new-secret": "s"}}, "image is not encrypted, can't amend"),
]


@pytest.mark.parametrize(("options", "amended", "text"), REFUSALS)
def test_refusals(tmp_path: Path, options: dict[str, Any], amended: dict[str, Any], text: str) -> None:
    assert (amend(tmp_path / "i", options, **amended) or "").startswith(text)


def test_a_count_that_does_not_fit(tmp_path: Path) -> None:
    async def run() -> None:
        async with Host() as host:
            await host.create_image(str(tmp_path / "i"), "qcow2", SIZE)
            node = await host.open(str(tmp_path / "i"))
            async with host.access(node, write=True) as root:
                await root.node.write(0, b"x")
            assert node.driver.internal_snapshots is not None
            await node.driver.internal_snapshots.create("s", date_ns=0)
            error = await ended(await host.amend(node, refcount_bits=1))
            assert error is not None
            assert error.startswith("Cannot decrease refcount entry width to 1 bits: Cluster at offset 0x")
            assert error.endswith(" has a refcount of 2")

    asyncio.run(run())


def test_a_snapshot_of_another_length_prevents_a_downgrade(tmp_path: Path) -> None:
    """Version 2 has no place for the length that a snapshot's disk had."""

    async def run() -> None:
        async with Host() as host:
            await host.create_image(str(tmp_path / "i"), "qcow2", SIZE)
            node = await host.open(str(tmp_path / "i"))
            async with host.access(node, write=True, resize=True) as root:
                assert node.driver.internal_snapshots is not None
                await node.driver.internal_snapshots.create("s", date_ns=0)
                await root.node.resize(2 * SIZE)
            expected = "Internal snapshots prevent downgrade of image"
            assert await ended(await host.amend(node, version="v2")) == expected
            assert await ended(await host.amend(node, version="v2", size=3 * SIZE)) == expected
            # At the end the lengths would be equal again.
            assert await ended(await host.amend(node, version="v2", size=SIZE, force=True)) is None

    asyncio.run(run())


@pytest.mark.qemu
@pytest.mark.parametrize("snapshots", [1, 2])
def test_a_downgrade_leaves_no_leaks_of_tables_that_snapshots_share(tmp_path: Path, snapshots: int) -> None:
    path = tmp_path / "i"

    async def run() -> None:
        async with Host() as host:
            await host.create_image(str(path), "qcow2", SIZE, cluster_size=4096)
            node = await host.open(str(path))
            async with host.access(node, write=True) as root:
                await root.node.write(0, b"x" * (SIZE // 2))
                await root.node.zero(Span(0, SIZE // 4), mode=ZeroMode.KEEP)
                assert node.driver.internal_snapshots is not None
                for number in range(snapshots):
                    await node.driver.internal_snapshots.create(f"s{number}", date_ns=0)
                before = await root.node.read(0, SIZE)
            assert await ended(await host.amend(node, version="v2")) is None
            async with host.access(node) as root:
                assert await root.node.read(0, SIZE) == before
            await host.close_nodes(node)
        done = subprocess.run(["qemu-img", "check", str(path)], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stdout.splitlines()[0]) == (0, "No errors were found on the image.")
        for number in range(snapshots):
            shown = ["qemu-img", "convert", "-l", f"snapshot.name=s{number}", "-O", "raw", str(path), f"{path}.raw"]
            subprocess.run(shown, check=True)
            assert Path(f"{path}.raw").read_bytes() == before

    asyncio.run(run())


def test_guests_go_on(tmp_path: Path) -> None:
    """Somebody writes all the time; every write is there afterwards."""

    async def run() -> None:
        async with Host() as host:
            await host.create_image(str(tmp_path / "i"), "qcow2", SIZE, cluster_size=4096)
            node = await host.open(str(tmp_path / "i"))
            chance, content = random.Random(3), bytearray(SIZE)
            async with host.access(node, write=True, resize=True) as root:
                amended = [{"refcount_bits": 64}, {"refcount_bits": 4}, {"refcount_bits": 16}, {"version": "v2"},
                           {"version": "v3"}, {"lazy_refcounts": True}]  # fmt: skip
                for options in amended:
                    job = await host.amend(node, **options)
                    for _ in range(40):
                        at, piece = chance.randrange(SIZE - 9000), chance.randbytes(9000)
                        await root.node.write(at, piece)
                        content[at : at + 9000] = piece
                    assert await ended(job) is None, options
                assert await root.node.read(0, SIZE) == bytes(content)

    asyncio.run(run())


@pytest.mark.qemu
@pytest.mark.parametrize("seed", range(4))
def test_turns_with_qemu_img(tmp_path: Path, seed: int) -> None:
    """The same options, by ours and by qemu-img in turn: the same image for both, and its content stays."""
    chance, path = random.Random(seed), tmp_path / "i.qcow2"

    def qemu(*words: str | Path) -> str:
        done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
        return done.stdout

    async def ours(**options: Any) -> None:
        async with Host() as host:
            node = await host.open(str(path))
            assert await ended(await host.amend(node, **options)) is None, options
            await host.close_nodes(node)

    cluster = chance.choice([512, 4096, 65536])
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, "3M")
    for _ in range(8):
        at = chance.randrange(2 << 20)
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -P {at % 200 + 1} {at} 70000", path)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -z 1M 300k", path)
    qemu("qemu-img", "convert", "-O", "raw", path, tmp_path / "before.raw")
    width, version = 16, "v3"
    for _ in range(8):
        step: dict[str, Any] = {}
        match chance.choice(["width", "version", "lazy"]):
            case "width" if version == "v3":
                step["refcount_bits"] = width = chance.choice([1, 2, 4, 8, 16, 32, 64])
            case "version":
                version = "v2" if version == "v3" else "v3"
                step["version"] = version
                if version == "v2" and width != 16:
                    step["refcount_bits"] = width = 16
            case "lazy" if version == "v3":
                step["lazy_refcounts"] = chance.choice([True, False])
        if not step:
            continue
        if chance.random() < 0.6:
            asyncio.run(ours(**step))
        else:
            names = {"version": "compat", "refcount_bits": "refcount_bits", "lazy_refcounts": "lazy_refcounts"}
            values = {True: "on", False: "off"}
            texts = [f"{names[name]}={values[v] if isinstance(v, bool) else v}" for name, v in step.items()]
            qemu("qemu-img", "amend", "-f", "qcow2", "-o", ",".join(texts), path)
        assert "No errors" in qemu("qemu-img", "check", path), step
        found = json.loads(qemu("qemu-img", "info", "--output=json", path))["format-specific"]["data"]
        assert found["compat"] == ("1.1" if version == "v3" else "0.10")
        assert found["refcount-bits"] == width
        qemu("qemu-img", "convert", "-O", "raw", path, tmp_path / "after.raw")
        assert (tmp_path / "before.raw").read_bytes() == (tmp_path / "after.raw").read_bytes(), step


@pytest.mark.parametrize("ending", ["resume", "cancel"])
def test_a_pause_in_the_middle_of_a_new_width(tmp_path: Path, ending: str) -> None:
    """It parks at the next table, the file says what it said, and goes on or is given up from there."""
    path = tmp_path / "i"

    async def run() -> None:
        async with Host() as host:
            await host.create_image(str(path), "qcow2", SIZE, cluster_size=512, preallocation="metadata")
            before = path.read_bytes()
            node = await host.open(str(path))
            job = await host.amend(node, refcount_bits=64)
            while job.progress.current < 20:
                await asyncio.sleep(0)
            job.pause()
            while job.status != "paused":
                await asyncio.sleep(0)
            done = job.progress.current
            assert done < job.progress.total - 1
            await asyncio.sleep(0.05)
            assert job.progress.current == done
            assert path.read_bytes()[: len(before)] == before
            if ending == "resume":
                job.resume()
                assert await ended(job) is None
                assert node.driver.image.header.refcount_bits == 64
            else:
                await job.cancel(force=True)
                while job.status != "concluded":
                    await asyncio.sleep(0)
                await host.close_nodes(node)
                assert path.read_bytes() == before

    asyncio.run(run())
