"""After its start a daemon loads what it may need, so that it never loads modules of another version of itself."""

import subprocess
import sys
from pathlib import Path

import blockjobs

PARTS = ("base", "block", "export", "host", "jobs", "lifecycle", "monitor", "schema", "wire")
NEVER_IN_A_DAEMON = {
    "blockjobs.block.chain_map",
    "blockjobs.block.compare",
    "blockjobs.block.drivers.salvage",
    "blockjobs.block.emptying",
    "blockjobs.block.inspect",
    "blockjobs.block.rebase",
    "blockjobs.jobs.measure",
    "blockjobs.monitor.local",
    "blockjobs.monitor.qapi_text",
    "blockjobs.schema.refdoc",
}
WITH_A_LARGE_LIBRARY = {
    "blockjobs.block.drivers.qcow2.check_counts",
    "blockjobs.block.drivers.qcow2.check_outline",
    "blockjobs.block.drivers.qcow2.check_tally",
    "blockjobs.block.drivers.qcow2.check_walk",
    "blockjobs.block.x509",
}
"""Loaded when a dirty image is repaired, or certificates are used: numpy takes 16 MiB, cryptography 14."""


def test_all_modules_of_a_daemon_are_loaded_once_it_serves() -> None:
    script = (
        "import asyncio, sys, blockjobs.daemon.serving; from blockjobs.daemon.warm_up import load_rest;"
        "asyncio.run(load_rest()); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    source = Path(blockjobs.__file__).parent
    paths = [path.relative_to(source).with_suffix("") for part in PARTS for path in (source / part).rglob("*.py")]
    modules = {".".join(("blockjobs", *path.parts)).removesuffix(".__init__") for path in paths}
    assert modules - set(done.stdout.split()) == NEVER_IN_A_DAEMON | WITH_A_LARGE_LIBRARY
    assert done.stderr == ""
