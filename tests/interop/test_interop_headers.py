"""What a header may hold that the programs do not know, or only just: both treat it alike."""

import asyncio
import json
import struct
import subprocess
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.host import Host

pytestmark = pytest.mark.qemu

SIZE = 1 << 20
INCOMPATIBLE_AT, AUTOCLEAR_AT, HEADER_BYTES_AT = 72, 88, 100
UNKNOWN_BIT = 1 << 40
UNKNOWN_TYPE, UNKNOWN_CONTENT = 0x1234ABCD, b"kept as it is..."
FEATURE_NAMES = 0x6803F857


def qemu(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def ours(path: Path, *, read_only: bool = False, content: bytes = b"") -> str:
    """Open the image, write to it if there is something to write; returns why it was refused."""

    async def run() -> str:
        async with Host() as host:
            try:
                node = await host.open(str(path), read_only=read_only)
            except UsageError as error:
                return str(error)
            async with host.access(node, write=bool(content)) as root:
                if content:
                    await root.node.write(0, content)
                await root.node.read(0, SIZE)
            await host.close_nodes(node)
        return ""

    return asyncio.run(run())


def make(path: Path, *, maker: str) -> None:
    async def create() -> None:
        async with Host() as host:
            await host.create_image(str(path), "qcow2", SIZE)

    if maker == "ours":
        asyncio.run(create())
    else:
        assert "Formatting" in qemu("qemu-img", "create", "-f", "qcow2", path, str(SIZE))


def field(path: Path, at: int) -> int:
    return int.from_bytes(path.read_bytes()[at : at + 8], "big")


def set_bits(path: Path, at: int, bits: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + 8] = (field(path, at) | bits).to_bytes(8, "big")
    path.write_bytes(raw)


def extensions(path: Path) -> dict[int, bytes]:
    raw = path.read_bytes()
    found: dict[int, bytes] = {}
    at = int.from_bytes(raw[HEADER_BYTES_AT : HEADER_BYTES_AT + 4], "big")
    while (head := struct.unpack_from(">II", raw, at))[0]:
        found[head[0]] = raw[at + 8 : at + 8 + head[1]]
        at += 8 + -(-head[1] // 8) * 8
    return found


def add_extension(path: Path, kind: int, content: bytes) -> None:
    """Put an extension behind those that are there."""
    raw = bytearray(path.read_bytes())
    at = int.from_bytes(raw[HEADER_BYTES_AT : HEADER_BYTES_AT + 4], "big")
    while (head := struct.unpack_from(">II", raw, at))[0]:
        at += 8 + -(-head[1] // 8) * 8
    padded = content.ljust(-(-len(content) // 8) * 8, b"\0")
    raw[at : at + 8 + len(padded)] = struct.pack(">II", kind, len(content)) + padded
    path.write_bytes(raw)


@pytest.mark.parametrize("maker", ["ours", "theirs"])
def test_unknown_extensions_stay_when_the_header_is_written_anew(maker: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make(path, maker=maker)
    add_extension(path, UNKNOWN_TYPE, UNKNOWN_CONTENT)

    async def rename() -> None:
        async with Host() as host:
            node = await host.open(str(path))
            async with host.access(node, write=True) as root:
                await root.node.driver.name_backing_file("base.raw", "raw")
                await root.node.driver.name_backing_file(None, None)
            await host.close_nodes(node)

    asyncio.run(rename())
    assert extensions(path)[UNKNOWN_TYPE] == UNKNOWN_CONTENT
    qemu("qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=on", path)
    assert extensions(path)[UNKNOWN_TYPE] == UNKNOWN_CONTENT
    assert ours(path, content=b"x" * 512) == ""
    assert "No errors" in qemu("qemu-img", "check", path)


def test_unknown_autoclear_bits_go_with_the_first_opening_for_writing(tmp_path: Path) -> None:
    path, twin = tmp_path / "disk.qcow2", tmp_path / "twin.qcow2"
    for image in (path, twin):
        make(image, maker="theirs")
        set_bits(image, AUTOCLEAR_AT, UNKNOWN_BIT)
    assert ours(path, read_only=True) == ""
    assert field(path, AUTOCLEAR_AT) == UNKNOWN_BIT
    assert ours(path, content=b"x" * 512) == ""
    qemu("qemu-io", "-f", "qcow2", "-c", "write 0 512", twin)
    assert field(path, AUTOCLEAR_AT) == field(twin, AUTOCLEAR_AT) == 0


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("read_only", [True, False])
def test_unknown_incompatible_bits_are_refused_with_their_names(named: bool, read_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make(path, maker="ours")
    set_bits(path, INCOMPATIBLE_AT, UNKNOWN_BIT)
    if named:
        add_extension(path, FEATURE_NAMES, bytes([0, 40]) + b"time travel".ljust(46, b"\0"))
    before = path.read_bytes()
    refusal = ours(path, read_only=read_only, content=b"" if read_only else b"x" * 512)
    told = qemu("qemu-io", *(["-r"] if read_only else []), "-f", "qcow2", "-c", "read 0 512", path)
    assert refusal and refusal in told
    assert ("time travel" in refusal) is named
    assert path.read_bytes() == before


@pytest.mark.parametrize("maker", ["ours", "theirs"])
def test_a_backing_name_may_have_1023_bytes(maker: str, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"below" * 2000 + bytes(240))
    path = tmp_path / "disk.qcow2"

    def attempt(name: str) -> str:
        async def create() -> str:
            async with Host() as host:
                try:
                    await host.create_image(str(path), "qcow2", SIZE, backing_file=name, backing_fmt="raw")
                except UsageError as error:
                    return str(error)
            return ""

        if maker == "ours":
            return asyncio.run(create())
        told = qemu("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path, str(SIZE))
        return told.strip()

    longest = "./" * 509 + "/base"
    assert len(longest) == 1023
    assert attempt(longest) == ""
    assert ours(path) == ""
    assert json.loads(qemu("qemu-img", "info", "--output=json", path))["backing-filename"] == longest
    assert "wrote 512/512" in qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 1024 512", path)
    assert "verification failed" not in qemu("qemu-io", "-f", "qcow2", "-c", "read -P 9 1024 512", path)

    async def read() -> bytes:
        async with Host() as host:
            node = await host.open(str(path), read_only=True)
            async with host.access(node) as root:
                return bytes(await root.node.read(0, 2048))

    assert asyncio.run(read()) == (b"below" * 205)[:1024] + b"\x09" * 512 + (b"below" * 410)[1536:2048]
    path.unlink()
    assert "Invalid argument" in attempt("/" + longest)
