"""--image-opts: what a command line says of a node is what is opened."""

import asyncio
import re
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.cli.image_opts import given_image
from blockjobs.host import Host


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    async def make() -> None:
        async with Host() as host:
            await host.create_image("a.qcow2", "qcow2", 1 << 20)

    monkeypatch.chdir(tmp_path)
    asyncio.run(make())
    (tmp_path / "b.img").write_bytes(b"\1" * 1024 + b"\2" * 512 + b"\3" * 512)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "format", "path", "length"),
    [
        ("driver=qcow2,file.driver=file,file.filename=a.qcow2", "qcow2", "a.qcow2", 1 << 20),
        ("driver=qcow2,file.filename=a.qcow2,lazy-refcounts=on", "qcow2", "a.qcow2", 1 << 20),
        ("file.filename=a.qcow2", "qcow2", "a.qcow2", 1 << 20),
        ("file.filename=b.img", "raw", "b.img", 2048),
        ("driver=raw,file.filename=b.img,offset=1024,size=512", "raw", "b.img", 512),
        ("driver=raw,size=1024,file.driver=raw,file.offset=512,file.file.filename=b.img", "raw", "b.img", 1024),
        ("driver=file,filename=b.img", "file", "b.img", 2048),
        ("driver=null-co,size=1048576,read-zeroes=on", "null-co", "", 1 << 20),
    ],
)
def test_options_open_what_they_describe(folder, text, format, path, length) -> None:
    image = given_image(text, None, image_opts=True)
    assert (image.format, image.path) == (format, path)

    async def opened() -> tuple[str, int]:
        async with Host() as host:
            node = await image.open(host, name="image")
            return node.driver_name, node.length

    assert asyncio.run(opened()) == (format, length)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("foo=1", "Must specify either driver or file"),
        ("filename=b.img", "Must specify either driver or file"),
        ("a.qcow2", "Expected '=' after parameter 'a.qcow2'"),
        ("driver=qcow2", 'A block device must be specified for "file"'),
        ("driver=nope,file.filename=a", "Unknown driver 'nope'"),
        ("driver=qcow2,file=a.qcow2", "Cannot find node-name='a.qcow2'"),
        ("driver=raw,file.filename=b.img,offset=x", "offset"),
        ("file.filename=none", "Could not open 'none': No such file or directory"),
        ("driver=raw,file.driver=raw,file.file=q", "Cannot find node-name='q'"),
    ],
)
def test_options_that_make_no_sense(folder, text, error) -> None:
    with pytest.raises(UsageError, match=re.escape(error)):
        given_image(text, None, image_opts=True)


def test_an_option_that_the_format_does_not_have(folder) -> None:
    image = given_image("driver=qcow2,file.filename=a.qcow2,foo=1", None, image_opts=True)

    async def work() -> None:
        async with Host() as host:
            await image.open(host, name="image")

    with pytest.raises(UsageError, match=r"'a\.qcow2': Parameter 'foo' is unexpected"):
        asyncio.run(work())


def test_a_format_is_said_once(folder) -> None:
    with pytest.raises(UsageError, match="--image-opts and --format are mutually exclusive"):
        given_image("driver=qcow2,file.filename=a.qcow2", "qcow2", image_opts=True)
    assert given_image("a.qcow2", "raw").format == "raw"
