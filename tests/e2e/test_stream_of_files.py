"""A stream of real files, as the kernel tells where they have bytes: all that the overlay lacks, and nothing else."""

from __future__ import annotations

import random
import subprocess

import pytest
import tool

pytestmark = pytest.mark.qemu
CLUSTER, CLUSTERS = 64 << 10, 1024


@pytest.mark.parametrize("own", [0, 7, 400])
def test_what_lies_between_the_overlays_own_clusters_is_taken(own, tmp_path):
    chance = random.Random(own)
    base, whole = tmp_path / "base.raw", bytearray(CLUSTERS * CLUSTER)
    with base.open("wb") as out:
        out.truncate(len(whole))
        for cluster in chance.sample(range(CLUSTERS), CLUSTERS // 2):
            content = bytes([chance.randrange(1, 256)]) * CLUSTER
            out.seek(cluster * CLUSTER)
            out.write(content)
            whole[cluster * CLUSTER : (cluster + 1) * CLUSTER] = content
    tool.quick("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2", cwd=tmp_path)
    script = ""
    for cluster in chance.sample(range(CLUSTERS), own):
        script += f"write -q -P {cluster % 255 + 1} {cluster * CLUSTER} 64k\n"
        whole[cluster * CLUSTER : (cluster + 1) * CLUSTER] = bytes([cluster % 255 + 1]) * CLUSTER
    subprocess.run(["qemu-io", "top.qcow2"], cwd=tmp_path, input=script, text=True, check=True, capture_output=True)
    tool.quick("stream", "top.qcow2", cwd=tmp_path)
    base.unlink()
    tool.quick("check", "top.qcow2", cwd=tmp_path)
    subprocess.run(["qemu-img", "convert", "-O", "raw", "top.qcow2", "top.raw"], cwd=tmp_path, check=True)
    assert (tmp_path / "top.raw").read_bytes() == whole
    clusters = tool.quick("map", "--output", "json", "top.qcow2", cwd=tmp_path).json
    assert sum(run["length"] for run in clusters if run["data"]) == len(whole) - CLUSTER * whole_zeroes(whole)


def whole_zeroes(content):
    """How many clusters of zeroes there are."""
    return sum(not any(content[at : at + CLUSTER]) for at in range(0, len(content), CLUSTER))
