"""Command lines of qemu-img's grammar do with ours what they do with qemu-img: exit code, words, JSON.

Lines that change images have copies of their own. What differs on purpose is in `grammar.toml`, each with its reason.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tool import quick

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
TABLE = tomllib.loads((Path(__file__).parent / "grammar.toml").read_text())


def run_qemu_img(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["qemu-img", *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for line in TABLE["images"]:
        done = run_qemu_img(*line.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    tops = [f"{name}.qcow2" for name in ("long", "short", "oldtop", "subtop", "exttop", "snaptop")]
    for name in ("plain.qcow2", "top.qcow2", "flat.img", "v2.qcow2", "zstd.qcow2", *tops):
        format = "raw" if name.endswith(".img") else "qcow2"
        for command in ("write -P 1 64k 100k", "write -z 256k 64k"):
            subprocess.run(["qemu-io", "-f", format, "-c", command, name], cwd=folder, check=True, capture_output=True)
    leaky = bytearray((folder / "plain.qcow2").read_bytes()) + bytes(65536)
    table = int.from_bytes(leaky[48:56], "big")
    block = int.from_bytes(leaky[table : table + 8], "big")
    cluster = len(leaky) // 65536 - 1
    leaky[block + 2 * cluster : block + 2 * cluster + 2] = b"\0\1"
    (folder / "leaky.qcow2").write_bytes(leaky)
    first = int.from_bytes(leaky[40:48], "big")
    at = int.from_bytes(leaky[first : first + 8], "big") & 0x00FFFFFFFFFFFE00
    leaky[at + 8 : at + 16] = (0x8000000000000000 | 5 << 40).to_bytes(8, "big")
    (folder / "bad.qcow2").write_bytes(leaky)
    (folder / "text.img").write_bytes(b"hello" * 1000)
    (folder / "odd.img").write_bytes(bytes(index * 7 % 251 for index in range(10001)))
    other = bytearray((folder / "flat.img").read_bytes())
    other[70001] ^= 1
    (folder / "other.img").write_bytes(other)
    return folder


def _normal(text: str) -> str:
    """Without what changes from run to run: allocation of the host, and progress."""
    text = re.sub(r"^disk size: .*$", "disk size: X", text, flags=re.MULTILINE)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", re.sub(r" +\(\d+\.\d+/100%\)[\r\n]*", "", text))


def _without(value: Any, extra: set[str]) -> Any:
    if isinstance(value, list):
        return [_without(item, extra) for item in value]
    if isinstance(value, dict):
        return {name: _without(item, extra) for name, item in value.items() if name not in extra}
    return value


def _lines() -> list[Any]:
    return [pytest.param(line, id=line.replace(" ", "_")) for line in TABLE["lines"]]


@pytest.mark.parametrize("line", _lines())
def test_a_line_does_the_same(line: str, images: Path, tmp_path: Path) -> None:
    differs = TABLE["differences"].get(line, {})
    words = line.split()
    only_looks = words[0] in ("info", "map") or (words[0] == "check" and "-r" not in words)
    theirs, ours = (images, images) if only_looks else (tmp_path / "theirs", tmp_path / "ours")
    if not only_looks:
        for folder in (theirs, ours):
            shutil.copytree(images, folder)
    expected = run_qemu_img(*words, cwd=theirs)
    got = quick(*words, cwd=ours, code=None)
    assert got.code == differs.get("code", expected.returncode), got.err + expected.stderr
    if got.code and not got.out and "-q" not in words:
        assert got.err.startswith("blockjobs: "), "an error says what is wrong"
        assert "internal error" not in got.err
    if not differs.get("output", False):
        if ("--output=json" in words or "--output json" in line) and expected.stdout:
            extra = {"compressed", "actual-size", "date-sec", "date-nsec"}
            assert _without(json.loads(got.out), extra) == _without(json.loads(expected.stdout), extra)
        else:
            assert _normal(got.out) == _normal(expected.stdout)
    if not only_looks and not differs.get("state", False):
        changed = _changed(ours, images) | _changed(theirs, images)
        said = _said(ours, changed)
        assert said == _said(theirs, changed)
        for name, info in said.items():
            if info != "unreadable":
                assert _compared(ours / name, theirs / name, info["format"]) != 1, name
                assert words[0] not in ("commit", "resize") or _own(ours / name) == _own(theirs / name), name


def _changed(folder: Path, images: Path) -> set[str]:
    """Files that are new or have other bytes than they had."""
    names = {path.name for path in folder.iterdir()}
    return {
        name
        for name in names
        if not (images / name).exists() or (images / name).read_bytes() != (folder / name).read_bytes()
    }


def _said(folder: Path, names: set[str]) -> dict[str, Any]:
    """What images say, asked of qemu-img. Ours notes no instruction count: no machine was there."""
    extra = {"actual-size", "date-sec", "date-nsec", "uuid", "iters", "master-key-iters", "icount"}
    said = {}
    for name in names:
        info = run_qemu_img("info", "-U", "--output=json", name, cwd=folder)
        said[name] = _without(json.loads(info.stdout), extra) if info.returncode == 0 else "unreadable"
    return said


def _compared(one: Path, other: Path, format: str) -> int:
    """The exit code of a comparison: 1 if they read differently, 2 if one cannot be read (a spoiled image)."""
    words = ["compare", "-q", "-U", "-f", format, "-F", format, one.name, str(other)]
    return run_qemu_img(*words, cwd=one.parent).returncode


def _own(image: Path) -> list[Any]:
    """What an image holds itself."""
    if image.suffix != ".qcow2":
        return []
    runs = json.loads(run_qemu_img("map", "-U", "--output=json", image.name, cwd=image.parent).stdout)
    joined: list[tuple[int, int]] = []
    for run in runs:
        if run["depth"] == 0 and run["present"]:
            start, length = run["start"], run["length"]
            if joined and sum(joined[-1]) == start:
                start, length = joined[-1][0], joined.pop()[1] + length
            joined.append((start, length))
    return joined


def test_every_difference_is_used_and_has_a_reason() -> None:
    for line, differs in TABLE["differences"].items():
        assert line in TABLE["lines"], line
        assert len(differs["reason"]) > 15, line
