"""The old encryption of qcow2 (AES with the passphrase as key): QEMU and we read and write the same images."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import disks
import pytest
import tool

from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.objects import SecretOptions, add_object
from blockjobs.host import Host

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu
MIB = 1 << 20
NEW = "encrypt.format=aes,encrypt.key-secret=key"
PASSWORDS = ["short", "exactly sixteen!", "more than sixteen bytes of which QEMU takes the first", ""]


def secret(password: str) -> tuple[str, str]:
    return "--object", f"secret,id=key,data={password}"


def opts(name: str) -> tuple[str, str]:
    return "--image-opts", f"driver=qcow2,encrypt.key-secret=key,file.filename={name}"


async def opened(host: Host, path: Path, password: str, **more: Any) -> Any:
    if "key" not in host.objects:
        add_object(host.objects, SecretOptions(id="key", data=password), host.clock)
    encrypt = {"format": "aes", "key-secret": "key"}
    file = {"driver": "file", "filename": str(path)}
    return await host.blockdev_add({"driver": "qcow2", "node-name": "n", "file": file, "encrypt": encrypt, **more})


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("maker", ["ours", "theirs"])
def test_both_write_to_one_image_in_turns(tmp_path: Path, maker: str, password: str) -> None:
    key, chance, model = secret(password), random.Random(password), bytearray(2 * MIB)
    if maker == "ours":
        tool.blockjobs("create", *key, "a.qcow2", "2M", "-o", f"{NEW},cluster_size=4k", cwd=tmp_path)
    else:
        words = ("qemu-img", "create", "-q", "-f", "qcow2", *key, "-o", f"{NEW},cluster_size=4k", "a.qcow2", "2M")
        disks.run(*words, cwd=tmp_path)

    async def ours() -> None:
        async with Host() as host:
            node = await opened(host, tmp_path / "a.qcow2", password)
            async with host.access(node, write=True) as user:
                assert await user.node.read(0, 2 * MIB) == model
                for _ in range(20):  # clusters come to lie in another order than on the disk
                    at, length = chance.randrange(2 * MIB - 40_000), chance.choice([100, 512, 4096, 40_000])
                    model[at : at + length] = content = chance.randbytes(length)
                    await user.node.write(at, content)
                await user.node.zero(Span(8192, 4096))
                model[8192:12288] = bytes(4096)
                for _ in range(50):
                    at = chance.randrange(2 * MIB - 9000)
                    assert await user.node.read(at, 9000) == model[at : at + 9000]
            await host.close_nodes(node)

    def theirs() -> None:
        writes = []
        for _ in range(10):
            at, byte = chance.randrange(2 * MIB - 10_000), chance.randrange(256)
            writes += ["-c", f"write -P {byte} {at} 10000"]
            model[at : at + 10_000] = bytes([byte]) * 10_000
        disks.run("qemu-io", *key, *opts("a.qcow2"), *writes, cwd=tmp_path)

    for _ in range(2):
        asyncio.run(ours())
        theirs()
        assert "No errors" in disks.run("qemu-img", "check", *key, *opts("a.qcow2"), cwd=tmp_path)
        disks.run("qemu-img", "convert", *key, *opts("a.qcow2"), "-O", "raw", "a.raw", cwd=tmp_path)
        assert (tmp_path / "a.raw").read_bytes() == model
        tool.blockjobs("check", "a.qcow2", cwd=tmp_path)
    tool.blockjobs("convert", *key, "a.qcow2", "b.raw", cwd=tmp_path)
    assert (tmp_path / "b.raw").read_bytes() == model


@pytest.mark.parametrize(
    "options",
    ["compat=0.10", "extended_l2=on", "cluster_size=512", "data_file=d.raw", "data_file=d.raw,data_file_raw=on"],
)
def test_copies_of_every_shape_are_the_same_to_both(tmp_path: Path, options: str) -> None:
    key = secret("sesame")
    for name in ("d.raw", "e.raw"):
        (tmp_path / name).touch()
    (tmp_path / "plain.raw").write_bytes(random.Random(1).randbytes(MIB) + bytes(MIB))
    tool.blockjobs("convert", *key, "-o", f"{NEW},{options}", "plain.raw", "ours.qcow2", cwd=tmp_path)
    theirs = ("qemu-img", "convert", *key, "-O", "qcow2", "-o", f"{NEW},{options.replace('d.raw', 'e.raw')}")
    disks.run(*theirs, "-f", "raw", "plain.raw", "theirs.qcow2", cwd=tmp_path)
    for name in ("ours.qcow2", "theirs.qcow2"):
        assert "identical" in tool.blockjobs("compare", *key, name, "plain.raw", cwd=tmp_path).out
        disks.run("qemu-img", "convert", *key, *opts(name), "-O", "raw", "shown.raw", cwd=tmp_path)
        assert (tmp_path / "shown.raw").read_bytes() == (tmp_path / "plain.raw").read_bytes(), name
        assert "format: aes" in disks.run("qemu-img", "info", name, cwd=tmp_path)
    ours, theirs_told = (tool.blockjobs("info", "ours.qcow2", cwd=tmp_path).out,
                         disks.run("qemu-img", "info", "ours.qcow2", cwd=tmp_path))  # fmt: skip
    for line in ("encrypted: yes", "    encrypt:\n        format: aes"):
        assert line in ours and line in theirs_told


def test_snapshots_and_commands_that_change_it(tmp_path: Path) -> None:
    key = secret("sesame")
    tool.blockjobs("create", *key, "-o", "encryption=on,encrypt.key-secret=key", "a.qcow2", "1M", cwd=tmp_path)
    disks.run("qemu-io", *key, *opts("a.qcow2"), "-c", "write -P 1 64k 128k", cwd=tmp_path)
    tool.blockjobs("snapshot", *key, "-c", "s", "a.qcow2", cwd=tmp_path)
    disks.run("qemu-io", *key, *opts("a.qcow2"), "-c", "write -P 2 100k 8k", cwd=tmp_path)
    tool.blockjobs("resize", *key, "a.qcow2", "3M", cwd=tmp_path)
    tool.blockjobs("amend", *key, "-o", "refcount_bits=32", "a.qcow2", cwd=tmp_path)
    read = ["-c", "read -P 1 64k 36k", "-c", "read -P 2 100k 8k", "-c", "read -P 0 192k 800k"]
    assert "failed" not in disks.run("qemu-io", *key, *opts("a.qcow2"), *read, cwd=tmp_path)
    tool.blockjobs("convert", *key, "-l", "s", "a.qcow2", "s.raw", cwd=tmp_path)
    assert (tmp_path / "s.raw").read_bytes()[: 256 << 10] == bytes(64 << 10) + b"\1" * (128 << 10) + bytes(64 << 10)
    tool.blockjobs("snapshot", *key, "-d", "s", "a.qcow2", cwd=tmp_path)
    tool.blockjobs("amend", *key, "-o", "refcount_bits=16,compat=0.10", "a.qcow2", cwd=tmp_path)
    assert "failed" not in disks.run("qemu-io", *key, *opts("a.qcow2"), *read, cwd=tmp_path)
    assert "No errors" in disks.run("qemu-img", "check", *key, *opts("a.qcow2"), cwd=tmp_path)


def test_a_machines_state_is_enciphered_at_its_place_behind_the_disk(tmp_path: Path) -> None:
    key, state = secret("sesame"), random.Random(2).randbytes(100_000)
    tool.blockjobs("create", *key, "-o", NEW, "a.qcow2", "1M", cwd=tmp_path)

    async def work() -> None:
        async with Host() as host:
            node = await opened(host, tmp_path / "a.qcow2", "sesame")
            async with host.access(node, write=True):
                await node.driver.internal_snapshots.write_vm_state(0, state)
                await node.driver.internal_snapshots.create("s", date_ns=0, vm_state_bytes=len(state))
            await host.close_nodes(node)

    asyncio.run(work())
    disks.run("qemu-img", "snapshot", *key, "-a", "s", *opts("a.qcow2"), cwd=tmp_path)
    shown = disks.run("qemu-io", *key, *opts("a.qcow2"), "-c", "read -b -v 0 512", cwd=tmp_path)
    assert state[:16].hex(" ") in shown
    assert state[:64] not in (tmp_path / "a.qcow2").read_bytes()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["map", "a.qcow2"], "'a.qcow2' is enciphered: give its passphrase with --object secret,id=key,file="),
        (["create", "-o", "encrypt.format=aes", "b.qcow2", "1M"], "Parameter 'encrypt.key-secret' is required"),
        (["create", "-o", "encryption=on", "b.qcow2", "1M"], "Parameter 'encrypt.key-secret' is required"),
        (["create", "-o", f"encryption=on,{NEW}", "b.qcow2", "1M"], "'encrypt.format' and its alias 'encryption'"),
        (["create", "-o", "encryption=off,encrypt.key-secret=key", "b.qcow2", "1M"], "encrypt.format' is missing"),
        (["create", "-o", f"{NEW},encrypt.cipher-alg=aes-256", "b.qcow2", "1M"], "encrypt.cipher-alg' is unexpected"),
        (["create", "-o", "encrypt.format=xor", "b.qcow2", "1M"], "aes, luks"),
        (
            ["amend", *secret("x"), "-o", "encrypt.state=active,encrypt.new-secret=key", "a.qcow2"],
            "Only LUKS encryption options can be amended",
        ),
    ],
)
def test_refusals(tmp_path: Path, words: list[str], text: str) -> None:
    tool.blockjobs("create", *secret("x"), "-o", NEW, "a.qcow2", "1M", cwd=tmp_path)
    before = (tmp_path / "a.qcow2").read_bytes()
    assert text in tool.refused(*words, cwd=tmp_path)
    assert (tmp_path / "a.qcow2").read_bytes() == before and not (tmp_path / "b.qcow2").exists()


def test_nothing_tells_a_wrong_secret_but_the_kind_must_be_right(tmp_path: Path) -> None:
    tool.blockjobs("create", *secret("right"), "-o", NEW, "a.qcow2", "1M", cwd=tmp_path)
    disks.run("qemu-io", *secret("right"), *opts("a.qcow2"), "-c", "write -P 7 0 1M", cwd=tmp_path)
    tool.blockjobs("convert", *secret("wrong"), "a.qcow2", "ours.raw", cwd=tmp_path)
    disks.run("qemu-img", "convert", *secret("wrong"), *opts("a.qcow2"), "-O", "raw", "theirs.raw", cwd=tmp_path)
    shown = (tmp_path / "ours.raw").read_bytes()
    assert shown == (tmp_path / "theirs.raw").read_bytes() != b"\7" * MIB

    async def work() -> None:
        async with Host() as host:
            luks = {"format": "luks", "key-secret": "key"}
            with pytest.raises(UsageError) as caught:
                await opened(host, tmp_path / "a.qcow2", "right", encrypt=luks)
            assert str(caught.value) == "Header reported 'aes' encryption format but options specify 'luks'"

    asyncio.run(work())


def test_measured_as_if_there_were_no_encryption(tmp_path: Path) -> None:
    words = ("--size", "10M", "-O", "qcow2", "-o")
    ours = tool.blockjobs("measure", *secret("x"), *words, NEW, cwd=tmp_path).out
    assert ours == disks.run("qemu-img", "measure", *secret("x"), *words, NEW, cwd=tmp_path)
