"""Commands that copy, serve or steer bitmaps take images by description too: `json:{...}`, `--image-opts`, `file:`."""

from __future__ import annotations

import json
import subprocess

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu


def names_of(file: str, fmt: str = "qcow2") -> dict[str, list[str]]:
    """The same image in each way to name it."""
    return {
        "json": ["json:" + json.dumps({"driver": fmt, "file": {"driver": "file", "filename": file}})],
        "image-opts": ["--image-opts", f"driver={fmt},file.driver=file,file.filename={file}"],
        "file": ["-f", fmt, f"file:{file}"],
    }


WAYS = ["json", "image-opts", "file"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", ["backup", "mirror"])
def test_copies(tmp_path, command, way):
    disks.make_full(tmp_path, "a.qcow2", mib=4)
    (tmp_path / "a.qcow2").chmod(0o600)
    *flags, source = names_of("a.qcow2")[way]
    tool.quick(command, *flags, source, "b.qcow2", cwd=tmp_path)
    assert disks.same_content(tmp_path, "a.qcow2", "qcow2", "b.qcow2", "qcow2")
    assert (tmp_path / "b.qcow2").stat().st_mode & 0o777 == 0o600
    taken = tool.refused(command, *flags, source, "a.qcow2", "--force", cwd=tmp_path)
    assert "is the source itself" in taken


def test_a_described_source_may_have_filters_and_limits(tmp_path):
    disks.make_full(tmp_path, "a.qcow2", mib=4)
    window = {"driver": "raw", "offset": 1 << 20, "size": 1 << 20, "file": {"driver": "qcow2", "file": "DISK"}}
    window["file"]["file"] = {"driver": "file", "filename": "a.qcow2"}
    tool.quick("backup", "json:" + json.dumps(window), "b.raw", cwd=tmp_path)
    disks.run("qemu-img", "convert", "-O", "raw", "a.qcow2", "whole.raw", cwd=tmp_path)
    assert (tmp_path / "b.raw").read_bytes() == (tmp_path / "whole.raw").read_bytes()[1 << 20 : 2 << 20]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_incremental_backups_of_described_images(tmp_path, way, fmt):
    disks.make(tmp_path, "a", size="4M", fmt=fmt)
    *flags, source = names_of("a", fmt)[way]
    tool.quick("backup", *flags, source, "full.qcow2", "--bitmap", "day", cwd=tmp_path)
    [found] = tool.quick("bitmap", "list", *flags, source, "--json", cwd=tmp_path).json
    assert found["name"] == "day" and found["recording"]
    base = ("--incremental", "day", "--base", "full.qcow2")
    tool.quick("backup", *flags, source, "more.qcow2", *base, cwd=tmp_path)
    assert disks.same_content(tmp_path, "a", fmt, "more.qcow2", "qcow2")


@pytest.mark.parametrize("way", WAYS)
def test_bitmaps(tmp_path, way):
    disks.make(tmp_path, "a.qcow2", size="4M")
    *flags, image = names_of("a.qcow2")[way]
    tool.quick("bitmap", "add", *flags, image, "one", cwd=tmp_path)
    tool.quick("bitmap", "add", *flags, image, "two", "--disabled", cwd=tmp_path)
    tool.quick("bitmap", "merge", *flags, image, "one", "two", cwd=tmp_path)
    tool.quick("bitmap", "clear", *flags, image, "one", cwd=tmp_path)
    tool.quick("bitmap", "enable", *flags, image, "two", cwd=tmp_path)
    tool.quick("bitmap", "disable", *flags, image, "one", cwd=tmp_path)
    found = tool.quick("bitmap", "list", *flags, image, "--json", cwd=tmp_path).json
    assert {each["name"]: each["recording"] for each in found} == {"one": False, "two": True}
    tool.quick("bitmap", "remove", *flags, image, "one", cwd=tmp_path)
    assert "two" in tool.quick("bitmap", "list", *flags, image, cwd=tmp_path).out


def test_bitmaps_that_have_no_place_are_refused(tmp_path):
    null = 'json:{"driver": "null-co", "size": 1048576}'
    assert "--bitmap-file" in tool.refused("bitmap", "add", null, "one", cwd=tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_serve(tmp_path, way):
    disks.make_full(tmp_path, "a.qcow2", mib=4)
    *flags, image = names_of("a.qcow2")[way]
    server = tool.start("nbd", "serve", *flags, image, "--socket", "s", "--json", cwd=tmp_path)
    try:
        tool.wait_for(tmp_path / "s", server)
        told = json.loads(server.stdout.readline())
        [name] = told["nodes"]
        assert name == "a"
        words = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", told["nbd"][name], "a.qcow2"]
        # The server holds the image's lock for reading only.
        assert subprocess.run(words, cwd=tmp_path, check=False, capture_output=True).returncode == 0
    finally:
        server.terminate()
        server.communicate(timeout=20)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["backup", "json:{", "b.qcow2"], "Could not parse the JSON options"),
        (["backup", "--image-opts", "driver=nope,file.filename=a", "b.qcow2"], "Unknown driver 'nope'"),
        (["mirror", "json:[1]", "b.qcow2"], "Expecting an object"),
        (["nbd", "serve", "--socket", "s", 'json:{"driver": "qcow2"}'], 'A block device must be specified for "file"'),
        (["bitmap", "list", "json:{}"], "Must specify either driver or file"),
        (["backup", "--image-opts", "x=1", "b.qcow2", "--connect", "s"], "--image-opts"),
    ],
)
def test_refusals(tmp_path, words, text):
    assert text in tool.refused(*words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
