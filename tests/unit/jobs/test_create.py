import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.base.entropy import SeededEntropy
from blockjobs.base.errors import UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.graph import Graph
from blockjobs.block.options import BlockdevOptions
from blockjobs.jobs.create import CreateJob
from blockjobs.jobs.create_image import create_image
from blockjobs.jobs.create_options import NOT_CREATABLE, BlockdevCreateOptions
from blockjobs.lifecycle.progress import Progress
from blockjobs.schema.command import convert

PROBES = Path(__file__).parents[2] / "conformance/data/transcripts/create_probe.jsonl"


def options(members):
    return convert(members, BlockdevCreateOptions)


def in_graph(tmp_path, monkeypatch, scenario):
    """Run a coroutine with a graph that has the empty file node `nf`."""
    monkeypatch.chdir(tmp_path)

    async def main():
        graph = Graph(clock=SystemClock(), offload=InlineOffload(), entropy=SeededEntropy(1), bus=Bus())
        try:
            await create_image(graph, options({"driver": "file", "filename": "n.img", "size": 0}))
            described = {"driver": "file", "filename": "n.img", "node-name": "nf"}
            await graph.open(convert(described, BlockdevOptions))
            return await scenario(graph)
        finally:
            await graph.close()

    return asyncio.run(main())


def probes():
    """(options, error or None) of every job in the recording."""
    found = []
    for line in PROBES.read_text().splitlines():
        message = json.loads(line)
        request = message.get(">", {})
        if request.get("execute") == "blockdev-create":
            found.append([request["arguments"]["options"], None])
        jobs = message.get("<", {}).get("return")
        if isinstance(jobs, list):
            found[-1][1] = jobs[0].get("error")
    return found


def test_every_recorded_probe_ends_as_it_did_in_qemu(tmp_path, monkeypatch):
    async def scenario(graph):
        differences = []
        for members, expected in probes():
            error = None
            try:
                await create_image(graph, options(members))
            except UsageError as refused:
                error = str(refused)
            if error != expected:
                differences.append((members, expected, error))
        return differences

    assert len(probes()) == 23
    assert in_graph(tmp_path, monkeypatch, scenario) == []


@pytest.mark.parametrize("driver", NOT_CREATABLE)
def test_drivers_that_make_nothing_are_refused_before_a_job_exists(driver):
    with pytest.raises(UsageError, match="Driver does not support blockdev-create"):
        CreateJob(None, options({"driver": driver}))
    with pytest.raises(UsageError) as caught:
        options({"driver": driver, "size": 1})
    assert str(caught.value) == "Parameter 'size' is unexpected"


def test_nodes_that_cannot_be_written(tmp_path, monkeypatch):
    async def scenario(graph):
        qcow2 = {"driver": "qcow2", "size": 65536}
        texts = []
        for number, file in enumerate(("nosuch", {"driver": "file", "filename": "none"}, "reading", "nf")):
            if file == "reading":
                described = {"driver": "file", "filename": "n.img", "node-name": "reading", "read-only": True}
                await graph.open(convert(described, BlockdevOptions))
            user = await graph.claim("another", graph.node("nf"), Perm(0), ALL & ~Perm.RESIZE) if number == 3 else None
            with pytest.raises(UsageError) as caught:
                await create_image(graph, options(qcow2 | {"file": file}))
            texts.append(str(caught.value))
            if user is not None:
                await graph.release(user)
        assert {node.name for node in graph.nodes()} == {"nf", "reading"}
        return texts

    assert in_graph(tmp_path, monkeypatch, scenario) == [
        "Cannot find device='nosuch' nor node-name='nosuch'",
        "Could not open 'none': No such file or directory",
        "Block node is read-only",
        "Permission conflict on node 'nf': permissions 'resize' are both required by an unnamed block device "
        "(uses node 'nf' as 'root' child) and unshared by another (uses node 'nf' as 'root' child).",
    ]
    assert (tmp_path / "n.img").stat().st_size == 0


def test_encryption_without_a_secret_writes_nothing(tmp_path, monkeypatch):
    async def scenario(graph):
        luks = {"driver": "qcow2", "file": "nf", "size": 65536, "encrypt": {"format": "luks", "key-secret": "s"}}
        with pytest.raises(UsageError, match="No secret with id 's'"):
            await create_image(graph, options(luks))

    in_graph(tmp_path, monkeypatch, scenario)
    assert (tmp_path / "n.img").stat().st_size == 0


@pytest.mark.qemu
def test_an_image_with_a_data_file_names_it(tmp_path, monkeypatch):
    async def scenario(graph):
        await create_image(graph, options({"driver": "file", "filename": "data.raw", "size": 1 << 20}))
        members = {"driver": "qcow2", "file": "nf", "size": 1 << 20, "data-file-raw": True}
        members["data-file"] = {"driver": "file", "filename": "data.raw"}
        await create_image(graph, options(members))
        with pytest.raises(UsageError, match="Permission conflict on node 'nf'"):
            await create_image(graph, options(members | {"data-file": "nf"}))

    in_graph(tmp_path, monkeypatch, scenario)
    text = subprocess.run(
        ["qemu-img", "info", "--output=json", "n.img"], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert json.loads(text)["format-specific"]["data"]["data-file"] == "data.raw"
    subprocess.run(["qemu-img", "check", "-q", "n.img"], check=True, cwd=tmp_path)


class OnlyProgress:
    def __init__(self):
        self.progress = Progress()


@pytest.mark.parametrize("size", [512, 511])
def test_progress_is_complete_even_after_a_failure(tmp_path, monkeypatch, size):
    async def scenario(graph):
        ctx = OnlyProgress()
        job = CreateJob(graph, options({"driver": "qcow2", "file": "nf", "size": size}))
        try:
            await job.run(ctx)
        except UsageError:
            assert size == 511
        return ctx.progress.current, ctx.progress.total

    assert in_graph(tmp_path, monkeypatch, scenario) == (1, 1)
