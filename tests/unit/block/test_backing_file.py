"""Another name for the backing file: in the header only, also of read-only images, and nothing if it cannot be."""

import json
import subprocess
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.block.backing_file import check_in_chain, name_backing_file, root_node
from blockjobs.block.graph import Graph
from blockjobs.testing.graphs import add_node, run_in_graph

pytestmark = pytest.mark.qemu


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["a.img", "1M"], ["-b", "a.img", "-F", "qcow2", "b.img"], ["-b", "b.img", "-F", "qcow2", "c.img"]):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *command], check=True)


def header_of(image: str) -> tuple[str | None, str | None]:
    told = subprocess.run(["qemu-img", "info", "-U", "--output=json", image], check=True, capture_output=True).stdout
    info = json.loads(told)
    return info.get("backing-filename"), info.get("backing-filename-format")


def test_names_change_on_disk_and_the_chain_stays() -> None:
    async def body(graph: Graph) -> None:
        top = await add_node(graph, driver="qcow2", node_name="c", file={"driver": "file", "filename": "c.img"})
        image = top.backing
        assert image is not None and image.read_only
        below = image.backing
        check_in_chain(top, image)
        await name_backing_file(graph, image, "./a.img", "qcow2")
        assert header_of("b.img") == ("./a.img", "qcow2")
        assert image.read_only and image.backing is below
        await name_backing_file(graph, top, None, "qcow2")
        assert header_of("c.img") == (None, None)
        assert top.backing is image and top.filename.startswith("json:")

    run_in_graph(body)


def test_refusals_change_nothing() -> None:
    async def body(graph: Graph) -> None:
        top = await add_node(graph, driver="qcow2", node_name="c", file={"driver": "file", "filename": "c.img"})
        other = await add_node(
            graph,
            driver="qcow2",
            node_name="b",
            file={"driver": "file", "filename": "b.img"},
            backing=None,
            read_only=True,
        )
        with pytest.raises(UsageError, match="not allowing backing file change on an image without a backing file"):
            check_in_chain(top, other)
        with pytest.raises(UsageError, match="'b' and image file are not in the same chain"):
            check_in_chain(other, top)
        with pytest.raises(UsageError, match="Invalid argument"):
            await name_backing_file(graph, top, "x" * 1024, "qcow2")
        with pytest.raises(UsageError, match="Operation not supported"):
            await name_backing_file(graph, top.children["file"], "x", "qcow2")
        assert header_of("c.img") == ("b.img", "qcow2")
        await add_node(graph, driver="raw", node_name="above", file="c")
        with pytest.raises(UsageError, match="Need a root block node"):
            root_node(graph, "c")
        assert root_node(graph, "above").children["file"] is top

    run_in_graph(body)
