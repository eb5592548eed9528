import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.units import MiB
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.jobs.transaction import TransactionAction, run_transaction
from blockjobs.lifecycle.handle import JobHandle
from blockjobs.schema.command import convert
from blockjobs.testing.clock import run
from blockjobs.testing.little_host import LittleHost

SIZE = 2 * MiB
CONTENT = random.Random(9).randbytes(1 * MiB) + bytes(1 * MiB)


async def drive_backup(host: LittleHost, path: Path, **members: object) -> JobHandle:
    plain = {"job-id": "d", "device": "source", "target": str(path), "sync": "full"}
    plain |= {name.replace("_", "-"): value for name, value in members.items()}
    (job,) = await run_transaction(host, [convert({"type": "drive-backup", "data": plain}, TransactionAction)])
    return job


def with_source(scenario: Callable[[LittleHost], Awaitable[None]]) -> None:
    """A qcow2 source with CONTENT in its backing node and one new cluster of its own."""

    async def main() -> None:
        async with LittleHost() as host:
            await host.disk("base", CONTENT)
            source = await host.qcow2("source", NewImage(size=SIZE), backing="base")
            guest = await host.guest(source)
            await source.write(0, b"own")
            await scenario(host)
            await host.graph.release(guest)

    run(main())


@pytest.mark.parametrize("format_name", ["qcow2", "raw"])
def test_the_target_is_made_filled_and_closed(tmp_path: Path, format_name: str) -> None:
    async def scenario(host: LittleHost) -> None:
        nodes = [node.name for node in host.graph.nodes()]
        job = await drive_backup(host, tmp_path / "new", format=format_name)
        assert len(host.graph.nodes()) > len(nodes)
        assert (await job.outcome()).error is None
        assert [node.name for node in host.graph.nodes()] == nodes
        file = {"driver": "file", "filename": str(tmp_path / "new")}
        target = await host.add(driver=format_name, node_name="target", read_only=True, file=file)
        assert await target.read(0, SIZE) == b"own" + CONTENT[3:]

    with_source(scenario)


def test_without_a_format_the_target_has_the_sources(tmp_path: Path) -> None:
    async def scenario(host: LittleHost) -> None:
        assert (await (await drive_backup(host, tmp_path / "new")).outcome()).error is None
        assert (tmp_path / "new").read_bytes()[:4] == b"QFI\xfb"

    with_source(scenario)


def test_an_existing_target_is_used_as_it_is(tmp_path: Path) -> None:
    async def scenario(host: LittleHost) -> None:
        (tmp_path / "old").write_bytes(b"\xff" * SIZE)
        job = await drive_backup(host, tmp_path / "old", mode="existing", format="raw")
        assert (await job.outcome()).error is None
        assert (tmp_path / "old").read_bytes() == b"own" + CONTENT[3:]

    with_source(scenario)


@pytest.mark.parametrize("format_name", ["qcow2", "raw"])
def test_an_existing_target_keeps_the_backing_file_that_it_names(tmp_path: Path, format_name: str) -> None:
    async def scenario(host: LittleHost) -> None:
        path, file = tmp_path / "old", {"driver": "file", "filename": str(tmp_path / "old")}
        assert (await (await drive_backup(host, path, format=format_name)).outcome()).error is None
        nodes = [node.name for node in host.graph.nodes()]
        job = await drive_backup(host, path, mode="existing", format=format_name, sync="top", job_id="e")
        assert (await job.outcome()).error is None
        assert [node.name for node in host.graph.nodes()] == nodes
        target = await host.add(driver=format_name, node_name="target", read_only=True, file=file)
        assert target.children.keys() == {"file"}
        assert await target.read(0, 3) == b"own"

    with_source(scenario)


def test_a_raw_target_has_no_backing_file_to_be_the_source(tmp_path: Path) -> None:
    async def scenario(host: LittleHost) -> None:
        (tmp_path / "old").write_bytes(bytes(SIZE))
        nodes = [node.name for node in host.graph.nodes()]
        with pytest.raises(UsageError, match=r"^Driver 'raw' of node '#block.*' does not support backing files$"):
            await drive_backup(host, tmp_path / "old", mode="existing", format="raw", sync="none")
        assert [node.name for node in host.graph.nodes()] == nodes

    with_source(scenario)


def test_sync_top_names_the_sources_backing_file(tmp_path: Path) -> None:
    async def main() -> None:
        async with LittleHost() as host:
            base = tmp_path / "base.raw"
            base.write_bytes(CONTENT)
            file = {"driver": "file", "filename": str(base)}
            await host.add(driver="raw", node_name="base", read_only=True, file=file)
            source = await host.qcow2("source", NewImage(size=SIZE), backing="base")
            guest = await host.guest(source)
            await source.write(0, b"own")
            outcome = await (await drive_backup(host, tmp_path / "top", sync="top")).outcome()
            assert (outcome.error, outcome.current) == (None, 65536)
            top = {"driver": "file", "filename": str(tmp_path / "top")}
            target = await host.add(driver="qcow2", node_name="target", read_only=True, file=top)
            assert target.backing is not None and target.backing.filename == str(base)
            assert await target.read(0, SIZE) == b"own" + CONTENT[3:]
            await host.graph.release(guest)

    run(main())


def test_sync_none_fleeces(tmp_path: Path) -> None:
    async def scenario(host: LittleHost) -> None:
        source = host.graph.node("source")
        job = await drive_backup(host, tmp_path / "fleece", sync="none", filter_node_name="flt")
        target = host.graph.node("flt").children["target"]
        guest = next(each for each in host.graph.node("flt").parents if getattr(each, "owner", "") == "a guest")
        await guest.node.write(5, b"new")
        assert (await source.read(0, 8))[5:] == b"new"
        assert await target.read(0, SIZE) == b"own" + CONTENT[3:]
        await job.cancel()
        assert (await job.outcome()).error == "Operation canceled"

    with_source(scenario)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"device": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
        ({"format": "bogus"}, "Unknown file format 'bogus'"),
        ({"target": "/nonexistent/x"}, "Could not create '/nonexistent/x': No such file or directory"),
        ({"target": "missing.img", "mode": "existing"}, "Could not open 'missing.img': No such file or directory"),
        ({"format": "raw", "sync": "none"}, "Backing file not supported for file format 'raw'"),
        ({"job_id": ""}, "Invalid job ID ''"),
        ({"job_id": "1x"}, "Invalid job ID '1x'"),
    ],
)
def test_refusals_leave_no_node_open(tmp_path: Path, members: dict[str, object], text: str) -> None:
    async def scenario(host: LittleHost) -> None:
        nodes = [node.name for node in host.graph.nodes()]
        with pytest.raises(UsageError) as refused:
            await drive_backup(host, tmp_path / "new", **members)
        assert text in str(refused.value)
        assert [node.name for node in host.graph.nodes()] == nodes

    with_source(scenario)
