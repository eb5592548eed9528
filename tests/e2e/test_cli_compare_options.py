"""`blockjobs compare` says what `qemu-img compare` says: options, and random pairs of images."""

from __future__ import annotations

import random
import subprocess

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("words", [["-q"], ["-q", "-s"], ["-U"], ["-U", "-q", "-s"], []])
@pytest.mark.parametrize("other", ["same.raw", "longer.raw", "different.raw"])
def test_output_and_exit_code_are_those_of_qemu_img(tmp_path, words, other):
    content = b"a" * disks.MIB
    names = {"one.raw": content, "same.raw": content, "longer.raw": content + bytes(disks.MIB)}
    for name, held in (names | {"different.raw": content[:-512] + b"b" * 512}).items():
        (tmp_path / name).write_bytes(held)
    reference = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "raw", *words, "one.raw", other],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    ours = tool.quick("compare", *words, "one.raw", other, cwd=tmp_path, code=reference.returncode)
    assert ours.out == reference.stdout


def _format(name):
    return name.rpartition(".")[2]


def _random_image(folder, chance, name, cluster):
    """An image with data, stored zeroes and holes here and there."""
    disks.make(folder, name, size="1M", options=f"cluster_size={cluster}")
    commands = []
    for _ in range(chance.randint(0, 5)):
        at, length = 512 * chance.randrange(1024), 512 * chance.randrange(1, 1024)
        commands += ["-c", f"write {chance.choice(['-P 1', '-P 1', '-P 0', '-z', '-zu'])} {at} {length}"]
    if commands:
        disks.run("qemu-io", "-f", "qcow2", *commands, name, cwd=folder)


@pytest.mark.parametrize("seed", range(12))
def test_random_pairs(tmp_path, seed):
    chance = random.Random(seed)
    _random_image(tmp_path, chance, "a.qcow2", "64k")
    _random_image(tmp_path, chance, "b.qcow2", chance.choice(["4k", "64k"]))
    disks.run("qemu-img", "convert", "-O", "raw", "a.qcow2", "c.raw", cwd=tmp_path)
    with (tmp_path / "c.raw").open("r+b") as file:
        file.seek(chance.randrange(disks.MIB))
        file.write(b"\x77")
    for words in (["a.qcow2", "b.qcow2"], ["a.qcow2", "c.raw"], ["c.raw", "b.qcow2"]):
        for options in ([], ["-s"]):
            line = ["compare", *options, "-f", _format(words[0]), "-F", _format(words[1]), *words]
            theirs = subprocess.run(
                ["qemu-img", *line],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            ours = tool.quick(
                *line, "-f", _format(words[0]), "-F", _format(words[1]), cwd=tmp_path, code=theirs.returncode
            )
            assert ours.out == theirs.stdout, line
