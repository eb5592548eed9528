"""Chains from headers: a hostile image gets an error message and nothing else (spec/durability.md §2, §3)."""

import os
import struct
import time
from pathlib import Path

import pytest

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.drivers import host_syscalls
from blockjobs.block.graph import Graph
from blockjobs.block.policy import CHAIN_DEPTH_MAX, OpenPolicy
from blockjobs.testing.graphs import add_node, new_graph, run_in_graph

CLUSTER = 65536


def overlay(path: Path | str, backing: str, format_name: str | None = "qcow2", size: int = 1 << 20) -> None:
    """An empty qcow2 image whose header names any backing file at all."""
    name = backing.encode("utf-8", "surrogateescape")
    extension = b"" if format_name is None else struct.pack(">II", 0xE2792ACA, len(format_name)) + format_name.encode()
    extension += bytes(-len(extension) % 8) + bytes(8)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb", 3, 104 + len(extension), len(name), 16, size, 0, 1, 3 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 0, 4, 104,
    )  # fmt: skip
    first = header + extension + name
    refcounts = struct.pack(">4H", 1, 1, 1, 1)
    image = first.ljust(CLUSTER, b"\0") + struct.pack(">Q", 2 * CLUSTER).ljust(CLUSTER, b"\0")
    Path(path).write_bytes(image + refcounts.ljust(CLUSTER, b"\0") + bytes(CLUSTER))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work = tmp_path / "images"
    work.mkdir()
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    monkeypatch.chdir(work)
    Path("base.raw").write_bytes(b"b" * 65536)
    return work


def outcome(name: str = "top", policy: OpenPolicy | None = None) -> str:
    """What opening says, or the names of the files that it opened, top first."""
    said: list[str] = []

    async def body(graph: Graph) -> None:
        try:
            node = await add_node(graph, driver="qcow2", node_name="top", file={"driver": "file", "filename": name})
        except BlockjobsError as error:
            said.append(str(error))
            assert graph.nodes() == []
            return
        while node is not None:
            said.append(node.filename)
            node = node.backing
        said[:] = [" <- ".join(said)]

    started = time.monotonic()
    run_in_graph(body, new_graph(policy=policy))
    assert time.monotonic() - started < 2
    assert "\n" not in said[0]
    return said[0]


def test_good_chains_open(here: Path) -> None:
    overlay("top", "mid")
    overlay("mid", "base.raw", "raw")
    assert outcome() == "top <- mid <- base.raw"
    overlay("top", str(here / "mid"))
    assert outcome() == f"top <- {here}/mid <- {here}/base.raw"
    assert outcome(str(here / "top")) == f"{here}/top <- {here}/mid <- {here}/base.raw"
    Path("sub").mkdir()
    overlay("sub/top", "deeper/../../base.raw", "raw")
    Path("sub/deeper").mkdir()
    assert "names a file outside" in outcome("sub/top")
    everywhere = OpenPolicy(image_roots=(str(here),))
    assert outcome("sub/top", everywhere) == "sub/top <- sub/deeper/../../base.raw"
    os.symlink("../base.raw", "sub/link")
    overlay("sub/top", "link", "raw")
    assert outcome("sub/top", everywhere) == "sub/top <- sub/link"


@pytest.mark.parametrize(
    ("backing", "said"),
    [
        ("missing", "Could not open backing file: Could not open 'missing': No such file or directory"),
        (
            "../secret",
            "Could not open backing file: Could not open '../secret': the image names a file outside '{here}'",
        ),
        ("/etc/passwd", "Could not open backing file: Could not open '/etc/passwd': the image names a file outside"),
        ('json:{"driver":"file"}', "an image may only name files, not protocols ('json:')"),
        ("nbd://host/x", "an image may only name files, not protocols ('nbd:')"),
        ("file:base.raw", "an image may only name files, not protocols ('file:')"),
        ("link", "Could not open backing file: Could not open 'link': the image names a file outside '{here}'"),
        ("directory", "Could not open backing file: 'file' driver requires 'directory' to be a regular file"),
        ("fifo", "Could not open backing file: 'file' driver requires 'fifo' to be a regular file"),
        ("device", "Could not open backing file: "),
        ("proc/self/fd/0", "Could not open backing file: "),
        ("a\nb", r"Could not open 'a\nb': the image names a file with unprintable characters"),
        ("\x1b[31m", r"Could not open '\x1b[31m': the image names a file with unprintable characters"),
        ("a\0b", r"Could not open 'a\x00b': the image names a file with unprintable characters"),
        ("\udcff", r"Could not open '\udcff': the image names a file with unprintable characters"),
        ("", "top"),
    ],
)
def test_names_that_reach_out_are_refused(here: Path, backing: str, said: str) -> None:
    os.symlink("../secret", "link")
    os.symlink("/dev/zero", "device")
    os.symlink("/proc", "proc")
    os.mkfifo("fifo")
    Path("directory").mkdir()
    overlay("top", backing, "raw")
    assert said.format(here=here) in outcome()


def test_without_openat2_no_component_may_be_a_link(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("blockjobs.block.policy.open_beneath", unknown)
    overlay("top", "base.raw", "raw")
    assert outcome() == "top <- base.raw"
    os.symlink("base.raw", "inner")
    overlay("top", "inner", "raw")
    assert "Could not open backing file: Could not open 'inner': Too many levels of symbolic links" in outcome()
    assert host_syscalls.Resolve.BENEATH


def test_a_missing_format_is_never_guessed() -> None:
    overlay("top", "base.raw", None)
    assert outcome() == (
        "'top' does not record the format of its backing file 'base.raw': "
        "record it (qemu-img rebase -u -b base.raw -F FORMAT) or give 'backing' explicitly"
    )
    overlay("top", "base.raw", "vmdk")
    assert outcome() == "Could not open backing file: Unknown driver 'vmdk'"
    overlay("top", "base.raw", "blkdebug")
    assert outcome() == "Could not open backing file: Unknown driver 'blkdebug'"


def test_loops_and_long_chains() -> None:
    overlay("top", "top")
    assert outcome() == "Could not open 'top': the backing chain leads back to it"
    overlay("top", "other")
    overlay("other", "./top")
    assert outcome() == "Could not open './top': the backing chain leads back to it"
    os.link("other", "same-file")
    overlay("three", "other")
    overlay("other2", "three")
    for index in range(300):
        overlay(f"n{index}", f"n{index + 1}", size=1 << 16)
    assert outcome("n0") == f"The backing chain of 'n0' is longer than {CHAIN_DEPTH_MAX} images"
    overlay(f"n{CHAIN_DEPTH_MAX}", "base.raw", "raw", size=1 << 16)
    assert "is longer than" in outcome("n0")
    assert outcome("n1").count(" <- ") == CHAIN_DEPTH_MAX


def test_explicit_options_may_go_anywhere_and_override_the_header(tmp_path: Path) -> None:
    overlay("top", "../secret", "raw")

    async def body(graph: Graph) -> None:
        file = {"driver": "file", "filename": "top"}
        alone = await add_node(graph, driver="qcow2", node_name="alone", read_only=True, file=file, backing=None)
        assert alone.backing is None
        assert (
            alone.filename == 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "top"}, "backing": null}'
        )
        secret = {"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "secret")}}
        given = await add_node(graph, driver="qcow2", node_name="given", read_only=True, file=file, backing=secret)
        assert await given.read(0, 3) == b"sss"
        assert given.backing is not None and given.backing.read_only

    run_in_graph(body)
