"""Enciphered disks made by us are opened by QEMU, and QEMU's by us: every cipher, mode and digest that both know."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.block.objects import SecretOptions, add_object
from blockjobs.host import Host

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu
SECRETS = ("--object", "secret,id=s,data=first", "--object", "secret,id=t,data=second")
KINDS = [
    {},
    {"cipher-alg": "aes-128"},
    {"cipher-alg": "aes-192", "ivgen-alg": "plain"},
    {"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha256"},
    {"cipher-mode": "cbc", "ivgen-alg": "plain64", "hash-alg": "sha1"},
    {"cipher-mode": "ecb", "hash-alg": "sha512"},
    {"cipher-mode": "ctr", "hash-alg": "ripemd160"},
    {"cipher-mode": "ctr", "ivgen-alg": "essiv"},
    {"cipher-alg": "cast5-128", "cipher-mode": "cbc", "hash-alg": "md5"},
    {"cipher-alg": "cast5-128", "cipher-mode": "ctr"},
    {"cipher-alg": "cast5-128", "cipher-mode": "ctr", "ivgen-alg": "essiv", "ivgen-hash-alg": "md5"},
]
SIZE = 1 << 20


def run(*words: str | Path) -> str:
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout


def qemu_create(path: Path, format: str, options: dict[str, str], size: str = "1M") -> None:
    prefix = "encrypt." if format == "qcow2" else ""
    given = {"format": "luks"} if format == "qcow2" else {}
    given |= {"key-secret": "s", "iter-time": "10", **options}
    text = ",".join(f"{prefix}{name}={value}" for name, value in given.items())
    for _ in range(20):  # with so short a time it sometimes finds that it has none
        words = ["qemu-img", "create", "-q", "-f", format, *SECRETS, "-o", text, path, size]
        if not subprocess.run(list(map(str, words)), check=False, capture_output=True).returncode:
            return
    raise AssertionError(f"qemu-img makes no such image: {text}")


def opts(path: Path, format: str, secret: str = "s") -> list[str]:
    key = "encrypt.format=luks,encrypt.key-secret" if format == "qcow2" else "key-secret"
    return ["--image-opts", f"driver={format},{key}={secret},file.driver=file,file.filename={path}"]


def node_options(path: Path, format: str, secret: str = "s", **more: Any) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path)}
    key: dict[str, Any] = {"key-secret": secret}
    if format == "qcow2":
        key = {"encrypt": {"format": "luks", **key}}
    return {"driver": format, "node-name": "n", "file": file, **key, **more}


async def with_secrets(host: Host) -> None:
    for name, data in (("s", "first"), ("t", "second")):
        add_object(host.objects, SecretOptions(id=name, data=data), host.clock)


async def create(host: Host, path: Path, format: str, kind: dict[str, str], **more: Any) -> None:
    from blockjobs.jobs.create_image import create_image
    from blockjobs.jobs.create_options import BlockdevCreateOptions
    from blockjobs.schema.command import convert

    path.touch()
    key: dict[str, Any] = {"key-secret": "s", "iter-time": 10, **kind}
    if format == "qcow2":
        key = {"encrypt": {"format": "luks", **key}}
    file = {"driver": "file", "filename": str(path)}
    await create_image(host.graph, convert({"driver": format, "file": file, "size": SIZE, **key, **more},
                                           BlockdevCreateOptions))  # fmt: skip


@pytest.mark.parametrize(
    ("format", "kind"),
    # The header is the same code in both; what differs is where sectors are counted from.
    [("luks", kind) for kind in KINDS] + [("qcow2", kind) for kind in (KINDS[0], KINDS[3], KINDS[6])],
    ids=str,
)
def test_theirs_and_ours(tmp_path: Path, format: str, kind: dict[str, str]) -> None:
    theirs, ours, raw = tmp_path / "theirs", tmp_path / "ours", tmp_path / "raw"
    content = random.Random(1).randbytes(SIZE)
    raw.write_bytes(content)
    qemu_create(theirs, format, kind)
    run("qemu-io", *SECRETS, *opts(theirs, format), "-c", f"write -s {raw} 0 1M")

    async def work() -> None:
        async with Host() as host:
            await with_secrets(host)
            node = await host.blockdev_add(node_options(theirs, format))
            async with host.access(node, write=True) as root:
                assert await root.node.read(0, SIZE) == content
                assert await root.node.read(1234, 70_000) == content[1234:71_234]
                await root.node.write(70_001, b"ours" * 999)
            await host.close_nodes(node)
            await create(host, ours, format, kind)
            node = await host.blockdev_add(node_options(ours, format))
            async with host.access(node, write=True) as root:
                await root.node.write(0, content)
                await root.node.write(70_001, b"ours" * 999)
            await host.close_nodes(node)

    asyncio.run(work())
    expected = content[:70_001] + b"ours" * 999 + content[70_001 + 3996 :]
    for path in (theirs, ours):
        run("qemu-img", "convert", *SECRETS, *opts(path, format), "-O", "raw", raw)
        assert raw.read_bytes() == expected, path
        if format == "qcow2":
            assert "No errors" in run("qemu-img", "check", *SECRETS, *opts(path, format))
    infos = [json.loads(run("qemu-img", "info", "--output=json", "-f", format, path)) for path in (theirs, ours)]
    specific = [each["format-specific"]["data"] for each in infos]
    crypts = [each.get("encrypt", each) for each in specific]
    for each in crypts:
        del each["uuid"], each["master-key-iters"]
        for slot in each["slots"]:
            slot.pop("iters", None)
    assert crypts[0] == crypts[1]


@pytest.mark.parametrize("format", ["luks", "qcow2"])
def test_info_needs_no_key(tmp_path: Path, format: str) -> None:
    qemu_create(tmp_path / "i", format, {})

    async def work() -> dict[str, Any]:
        import msgspec

        async with Host() as host:
            found = await host.image_info({"driver": "file", "filename": str(tmp_path / "i")}, format=format)
            return json.loads(msgspec.json.encode(found))

    ours = {name: value for name, value in asyncio.run(work()).items() if value is not None}
    theirs = json.loads(run("qemu-img", "info", "--output=json", "-f", format, tmp_path / "i"))
    for each in (ours, theirs):
        each.pop("actual-size")
        each.pop("dirty-flag", None)
    assert _without_none(ours) == theirs


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("format", "change", "text"),
    [
        ("luks", {"key-secret": None}, "Parameter 'key-secret' is required for cipher"),
        ("luks", {"key-secret": "t"}, "Invalid password, cannot unlock any keyslot"),
        ("luks", {"key-secret": "nix"}, "No secret with id 'nix'"),
        ("qcow2", {"encrypt": None}, "Parameter 'encrypt.key-secret' is required for cipher"),
        ("qcow2", {"encrypt": {"format": "luks", "key-secret": "t"}}, "Invalid password, cannot unlock any keyslot"),
        ("qcow2", {"encrypt": {"format": "aes"}}, "Header reported 'luks' encryption format but options specify 'aes'"),
        ("luks", {"file": {"driver": "null-co", "size": 1 << 20}}, "Volume is not in LUKS format"),
    ],
)
def test_refusals(tmp_path: Path, format: str, change: dict[str, Any], text: str) -> None:
    qemu_create(tmp_path / "i", format, {})
    described = {**node_options(tmp_path / "i", format), **change}
    described = {name: value for name, value in described.items() if value is not None}

    async def work() -> None:
        async with Host() as host:
            await with_secrets(host)
            with pytest.raises(UsageError, match=text):
                await host.blockdev_add(described)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ({"cipher-alg": "3des"}, "Algorithm '3des' not supported"),
        (
            {"cipher-alg": "cast5-128", "cipher-mode": "cbc", "ivgen-alg": "essiv"},
            "Cipher cast5-128 not supported with essiv",
        ),
        ({"cipher-alg": "serpent-256"}, "Algorithm 'serpent-256' not supported"),
        ({"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha1"}, "No AES cipher with key size 20"),
        ({"key-secret": "nix"}, "No secret with id 'nix'"),
    ],
)
def test_creation_refusals(tmp_path: Path, kind: dict[str, str], text: str) -> None:
    async def work() -> None:
        async with Host() as host:
            await with_secrets(host)
            for format in ("luks", "qcow2"):
                with pytest.raises(UsageError, match=text):
                    await create(host, tmp_path / format, format, kind)

    asyncio.run(work())


def test_preallocated_shows_zeroes_and_jobs_change_the_key(tmp_path: Path) -> None:
    async def work() -> None:
        async with Host() as host:
            await with_secrets(host)
            await create(host, tmp_path / "a", "qcow2", {}, preallocation="metadata")
            await create(host, tmp_path / "b", "luks", {"cipher-alg": "aes-128"})
            one = await host.blockdev_add(node_options(tmp_path / "a", "qcow2"))
            other = await host.blockdev_add(node_options(tmp_path / "b", "luks", **{"node-name": "m"}))
            async with host.access(one, write=True) as root:
                assert not any(await root.node.read(0, SIZE))
                await root.node.write(100, b"content" * 10_000)
            job = await host.backup(one, other)
            assert (await job.outcome()).error is None
            assert one.driver.internal_snapshots is not None
            async with host.access(one, write=True) as root:
                await one.driver.internal_snapshots.write_vm_state(0, b"state" * 9000)
                made = await one.driver.internal_snapshots.create("s", date_ns=0, vm_state_bytes=45_000)
                await root.node.write(0, b"other" * 1000)
                assert await one.driver.internal_snapshots.read_vm_state(made.id, 5, 300) == b"state" * 60
                await one.driver.internal_snapshots.apply(made.id)
                assert (await root.node.read(0, 800))[100:] == b"content" * 100
            async with host.access(other) as root:
                assert (await root.node.read(0, 800))[100:] == b"content" * 100
            await host.close_nodes(one, other)

    asyncio.run(work())
    raw = tmp_path / "raw"
    run("qemu-img", "convert", *SECRETS, *opts(tmp_path / "b", "luks"), "-O", "raw", raw)
    assert raw.read_bytes() == (bytes(100) + b"content" * 10_000).ljust(SIZE, b"\0")
    assert b"content" not in (tmp_path / "a").read_bytes()
    assert b"state" not in (tmp_path / "a").read_bytes()


NOT_COMPARED = [
    # QEMU aborts: 4000 stripes of 24 bytes are no whole sectors.
    *(("aes-192", mode) for mode in ("ecb", "cbc", "ctr")),
    # We count in blocks of 16 bytes only, and say so.
    ("cast5-128", "ctr"),
]
ALL_KINDS = [
    {"cipher-alg": alg, "cipher-mode": mode, "ivgen-alg": generator}
    for alg in ("aes-128", "aes-192", "aes-256", "cast5-128", "3des", "serpent-256", "twofish-256")
    for mode in ("ecb", "cbc", "xts", "ctr")
    for generator in ("plain", "plain64", "essiv")
    if (alg, mode) not in NOT_COMPARED
]
HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
REFUSED_BY_US_ALONE = ("3des", "serpent-256", "twofish-256")


@pytest.mark.parametrize("alg", sorted({kind["cipher-alg"] for kind in ALL_KINDS}))
def test_every_cipher_with_every_mode(tmp_path: Path, alg: str) -> None:
    """What we make QEMU opens, reads and writes; what we refuse it refuses too, but for ciphers that we have not."""
    content = random.Random(2).randbytes(64 << 10)
    raw = tmp_path / "raw"
    raw.write_bytes(content)

    async def attempt(number: int, kind: dict[str, str]) -> None:
        path = tmp_path / f"{number}"
        async with Host() as host:
            await with_secrets(host)
            try:
                await create(host, path, "luks", kind, size=len(content))
                is_made = True
            except UsageError:
                is_made = False
            if alg in REFUSED_BY_US_ALONE:
                assert not is_made, kind
                return
            assert is_made or not _qemu_makes(path, kind), kind
            if not is_made:
                return
            node = await host.blockdev_add(node_options(path, "luks"))
            async with host.access(node, write=True) as root:
                await root.node.write(0, content)
            await host.close_nodes(node)
            run("qemu-img", "convert", *SECRETS, *opts(path, "luks"), "-O", "raw", tmp_path / "seen")
            assert (tmp_path / "seen").read_bytes() == content, kind
            run("qemu-io", *SECRETS, *opts(path, "luks"), "-c", "write -P 9 1k 3k")
            node = await host.blockdev_add(node_options(path, "luks"))
            async with host.access(node) as root:
                assert await root.node.read(0, len(content)) == content[:1024] + b"\x09" * 3072 + content[4096:], kind
            await host.close_nodes(node)

    for number, kind in enumerate(each for each in ALL_KINDS if each["cipher-alg"] == alg):
        asyncio.run(attempt(number, {**kind, "hash-alg": HASHES[number % len(HASHES)]}))


def _qemu_makes(path: Path, kind: dict[str, str]) -> bool:
    text = ",".join(f"{name}={value}" for name, value in {"key-secret": "s", "iter-time": "10", **kind}.items())
    words = ["qemu-img", "create", "-q", "-f", "luks", *SECRETS, "-o", text, str(path), "64K"]
    return not subprocess.run(words, check=False, capture_output=True).returncode
