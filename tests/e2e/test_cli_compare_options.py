"""`blockjobs compare -q` and `-U`, as qemu-img has them."""

from __future__ import annotations

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
