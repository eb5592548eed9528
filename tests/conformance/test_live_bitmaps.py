"""Dirty-bitmap dialogues with QEMU's storage daemon and with ours: the same replies, listings and checksums."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import player
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.qemu

MIB = 1 << 20
ODD = 4 * MIB + 3 * 512
"""No multiple of any granularity above 512."""


def ask(command: str, **arguments: Any) -> dict[str, Any]:
    return {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}


def op(verb: str, node: str, name: str, **arguments: Any) -> dict[str, Any]:
    return ask(f"block-dirty-bitmap-{verb}", node=node, name=name, **arguments)


def merge(node: str, target: str, *bitmaps: Any) -> dict[str, Any]:
    return ask("block-dirty-bitmap-merge", node=node, target=target, bitmaps=list(bitmaps))


def together(*actions: dict[str, Any]) -> dict[str, Any]:
    return ask("transaction", actions=[{"type": each["execute"], "data": each["arguments"]} for each in actions])


def sha(node: str, name: str) -> dict[str, Any]:
    return ask("x-debug-block-dirty-bitmap-sha256", node=node, name=name)


def qcow2(name: str, **options: Any) -> dict[str, Any]:
    return ask("blockdev-add", node_name=name, driver="qcow2", file={"driver": "file", "filename": name}, **options)


ABORT = {"execute": "abort", "arguments": {}}
OTHER = {"node": "c", "name": "x"}

STORIES = {
    "names and granularities": [
        op("add", "a", "x" * 1023),
        op("add", "a", "é" * 512),
        op("add", "a", "g0", granularity=0),
        op("add", "a", "g4G", granularity=1 << 32),
        op("add", "a", "g2G", granularity=1 << 31),
        op("add", "a", "g512", granularity=512),
        op("add", "a", "g768", granularity=768),
        op("add", "two", "g"),
        op("add", "tiny", "g"),
        op("add", "odd", "g"),
        op("add", "nope", "g"),
        op("add", "a", "d", disabled=True),
    ],
    "checksums": [
        *(op("add", "odd", f"g{size}", granularity=size) for size in (512, 4096, 1 << 20)),
        *(sha("odd", f"g{size}") for size in (512, 4096, 1 << 20)),
        op("add", "empty", "e"),
        sha("empty", "e"),
        sha("a", "nope"),
        sha("nope", "e"),
    ],
    "merges": [
        op("add", "a", "x"),
        op("add", "a", "fine", granularity=512),
        op("add", "a", "coarse", granularity=MIB, disabled=True),
        op("add", "b", "x"),
        op("add", "c", "x"),
        merge("a", "x", "fine", "coarse", {"node": "b", "name": "x"}),
        merge("a", "fine", "coarse"),
        merge("a", "x", "x"),
        merge("a", "x", OTHER),
        merge("a", "x", "fine", OTHER),
        merge("a", "zz", "qq"),
        merge("nope", "x", "x"),
        merge("a", "x", {"node": "nope", "name": "x"}),
        merge("a", "x", {"node": "b", "name": "zz"}),
        merge("a", "x", 5),
        merge("a", "x", {"node": "b"}),
    ],
    "transactions": [
        op("add", "a", "x"),
        op("add", "a", "y", disabled=True),
        together(op("remove", "a", "x"), op("clear", "a", "x")),
        together(op("remove", "a", "x"), op("remove", "a", "x")),
        together(op("remove", "a", "x"), op("add", "a", "x")),
        together(op("add", "a", "n"), op("clear", "a", "n"), merge("a", "n", "x"), op("remove", "a", "n")),
        together(op("add", "a", "n"), op("disable", "a", "x"), op("enable", "a", "y"), ABORT),
        together(op("remove", "a", "x"), ABORT),
        together(op("remove", "a", "x"), op("remove", "a", "nope")),
        together(op("disable", "a", "x"), op("enable", "a", "y")),
        together(merge("a", "x", {"node": "nope", "name": "x"})),
        op("remove", "a", "x"),
        op("remove", "a", "x"),
    ],
    "lengths change": [
        op("add", "odd", "x", granularity=4096),
        ask("block_resize", node_name="odd", size=8 * MIB),
        sha("odd", "x"),
        ask("block_resize", node_name="odd", size=MIB),
        sha("odd", "x"),
        op("add", "a", "x"),
        ask("block_resize", node_name="a", size=8 * MIB),
        sha("a", "x"),
        merge("odd", "x", {"node": "a", "name": "x"}),
    ],
    "persistent": [
        op("add", "a", "p", persistent=True),
        op("add", "a", "off", persistent=True, disabled=True),
        op("add", "a", "p"),
        op("add", "v2", "p", persistent=True),
        op("add", "huge", "p", persistent=True, granularity=512),
        op("add", "huge", "p", persistent=True, granularity=1 << 20),
        op("add", "odd", "p", persistent=True),
        together(op("remove", "a", "p"), ABORT),
        together(op("remove", "a", "p"), op("add", "a", "q", persistent=True)),
        op("remove", "a", "off"),
        ask("block_resize", node_name="a", size=8 * MIB),
        sha("a", "q"),
    ],
    "readonly": [
        *(op(verb, "ro", "kept") for verb in ("clear", "disable", "enable", "remove")),
        sha("ro", "kept"),
        merge("ro", "kept", "kept"),
        op("add", "a", "x"),
        merge("a", "x", {"node": "ro", "name": "kept"}),
        op("add", "ro", "memory"),
        merge("ro", "memory", "kept"),
        op("clear", "ro", "memory"),
        op("add", "ro", "lost", persistent=True),
        together(op("remove", "ro", "kept"), op("clear", "ro", "kept")),
    ],
    "inconsistent": [
        *(op(verb, "killed", "kept") for verb in ("clear", "disable", "enable")),
        merge("killed", "kept", "kept"),
        op("add", "a", "x"),
        merge("a", "x", {"node": "killed", "name": "kept"}),
        op("add", "killed", "kept"),
        ask("blockdev-backup", job_id="j", device="killed", target="b", sync="incremental", bitmap="kept"),
        together(op("remove", "killed", "kept"), ABORT),
        op("remove", "killed", "kept"),
        op("remove", "killed", "kept"),
    ],
    "what is wrong first": [
        op("add", "a", "x", disabled=True),
        op("add", "a", "y", disabled=True),
        op("add", "a", "fine"),
        op("add", "c", "x"),
        ask("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd"}}),
        ask("block-export-add", type="nbd", id="e", node_name="a", bitmaps=["x", "y"]),
        merge("a", "x", "y"),
        merge("a", "x", "nope"),
        merge("a", "x", "fine", "nope"),
        merge("a", "fine", "y", "nope"),
        merge("a", "fine", "nope", "y"),
        merge("a", "x", OTHER),
        merge("a", "fine", OTHER, "y"),
        merge("a", "fine", "y", OTHER),
    ],
    "in use by a job": [
        op("add", "a", "old", disabled=True),
        op("add", "a", "x"),
        ask("blockdev-backup", job_id="j", device="a", target="b", sync="none"),
        op("clear", "a", "x"),
        op("remove", "a", "old"),
    ],
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp(name) for name in ("qemu", "ours")]


@pytest.fixture
def daemons(directories: list[Path]) -> Iterator[list[player.Daemon]]:
    for directory in directories:
        for name, size, cluster in (
            ("a", 4, "64k"),
            ("b", 4, "64k"),
            ("c", 2, "64k"),
            ("two", 4, "2M"),
            ("tiny", 4, 512),
        ):
            words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", name, f"{size}M"]
            subprocess.run(words, cwd=directory, check=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "huge", "1P"], cwd=directory, check=True)
        v2 = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "v2", "4M"]
        subprocess.run(v2, cwd=directory, check=True)
        for name in ("ro", "killed"):
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", name, "4M"], cwd=directory, check=True)
            subprocess.run(["qemu-img", "bitmap", "--add", name, "kept"], cwd=directory, check=True)
        with player.Daemon(player.QEMU, directory) as victim:
            victim.qmp.ask(qcow2("killed"))
            victim.process.kill()
            victim.process.wait()
        (directory / "odd").write_bytes(bytes(ODD))
        (directory / "empty").write_bytes(b"")
    with player.Daemon(player.QEMU, directories[0]) as qemu, player.Daemon(player.OURS, directories[1]) as ours:
        for daemon in (qemu, ours):
            for name in ("a", "b", "c", "two", "tiny", "huge", "v2", "killed"):
                assert daemon.qmp.ask(qcow2(name))[0] == {"return": {}}
            assert daemon.qmp.ask(qcow2("ro", read_only=True))[0] == {"return": {}}
            for name in ("odd", "empty"):
                assert daemon.qmp.ask(ask("blockdev-add", node_name=name, driver="file", filename=name))[0] == {
                    "return": {}
                }
        yield [qemu, ours]
        assert "Traceback" not in ours.stderr


def listed(daemon: player.Daemon) -> list[Any]:
    nodes = daemon.qmp.ask(ask("query-named-block-nodes", flat=True))[0]["return"]
    return [
        (node["drv"] if node["node-name"].startswith("#") else node["node-name"], node.get("dirty-bitmaps"))
        for node in nodes
    ]


@pytest.mark.parametrize("story", STORIES)
def test_both_daemons_say_the_same(story: str, daemons: list[player.Daemon]) -> None:
    qemu, ours = daemons
    for request in STORIES[story]:
        theirs, mine = (daemon.qmp.ask(request)[0] for daemon in daemons)
        assert mine == theirs, json.dumps(request)[:300]
        assert listed(ours) == listed(qemu), json.dumps(request)[:300]
