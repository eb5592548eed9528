"""Enciphered images on the command line."""

from __future__ import annotations

import disks
import pytest
import tool

pytestmark = pytest.mark.qemu
KEY = ("--object", "secret,id=key,file=pw")
QUICK = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pw").write_text("hunter2")
    return tmp_path


def theirs(name: str) -> list[str]:
    options = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename={name}"
    return ["--object", "secret,id=s,file=pw", "--image-opts", options]


def test_made_filled_copied_and_compared(folder):
    tool.blockjobs("create", *KEY, "a.qcow2", "8M", "-o", QUICK, cwd=folder)
    disks.run("qemu-io", *theirs("a.qcow2"), "-c", "write -P 7 1M 1M", cwd=folder)
    assert "encrypted: yes" in tool.blockjobs("info", "a.qcow2", cwd=folder).out
    tool.blockjobs("check", "a.qcow2", cwd=folder)
    assert "enciphered" in tool.blockjobs("map", *KEY, "a.qcow2", cwd=folder).out
    tool.blockjobs("convert", *KEY, "a.qcow2", "plain.raw", cwd=folder)
    content = (folder / "plain.raw").read_bytes()
    assert content == bytes(1 << 20) + b"\x07" * (1 << 20) + bytes(6 << 20)
    tool.blockjobs("backup", *KEY, "a.qcow2", "b.qcow2", "-o", QUICK, cwd=folder)
    tool.blockjobs("backup", *KEY, "a.qcow2", "c.luks", "-o", "key_secret=key,iter_time=10", cwd=folder)
    for name in ("b.qcow2", "c.luks", "plain.raw"):
        assert "identical" in tool.blockjobs("compare", *KEY, "a.qcow2", name, cwd=folder).out
    assert b"\x07" * 512 not in (folder / "b.qcow2").read_bytes()
    tool.blockjobs("snapshot", *KEY, "-c", "s", "a.qcow2", cwd=folder)
    disks.run("qemu-io", *theirs("a.qcow2"), "-c", "write -P 8 1M 1M", cwd=folder)
    tool.blockjobs("amend", *KEY, "-o", "refcount_bits=32", "a.qcow2", cwd=folder)
    tool.blockjobs("snapshot", *KEY, "-a", "s", "a.qcow2", cwd=folder)
    assert "read 1048576" in disks.run("qemu-io", *theirs("a.qcow2"), "-c", "read -P 7 1M 1M", cwd=folder)
    assert "No errors" in disks.run("qemu-img", "check", *theirs("a.qcow2"), cwd=folder)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["map", "a.qcow2"], "'a.qcow2' is enciphered: give its passphrase with --object secret,id=key,file="),
        (["map", "--object", "secret,id=key,data=wrong", "a.qcow2"], "Invalid password, cannot unlock any keyslot"),
        (["map", "--object", "secret,id=a,data=x", "--object", "secret,id=b,data=y", "a.qcow2"], "'key'"),
        (["map", "--object", "nonsense,id=a", "a.qcow2"], "--object nonsense"),
        (["create", "b.qcow2", "1M", "-o", "encrypt.format=luks"], "'encrypt.key-secret' is required"),
    ],
)
def test_refusals(folder, words, text):
    tool.blockjobs("create", *KEY, "a.qcow2", "1M", "-o", QUICK, cwd=folder)
    assert text in tool.refused(*words, cwd=folder)


def test_passphrases_are_added_and_erased(folder):
    (folder / "new").write_text("swordfish")
    tool.blockjobs("create", *KEY, "a.luks", "1M", "-o", "key_secret=key,iter_time=10", cwd=folder)
    both = (*KEY, "--object", "secret,id=other,file=new")
    tool.blockjobs("amend", *both, "a.luks", "-o", "state=active,new_secret=other,iter_time=10", cwd=folder)
    for secret in ("pw", "new"):
        options = "driver=luks,key-secret=s,file.filename=a.luks"
        words = ["--object", f"secret,id=s,file={secret}", "--image-opts", options, "-c", "read 0 1k"]
        assert "read 1024" in disks.run("qemu-io", *words, cwd=folder)
    refused = tool.refused("amend", *both, "a.luks", "-o", "state=inactive,keyslot=5", cwd=folder)
    assert "keyslot 5 is already erased" in refused
    tool.blockjobs("amend", *both, "a.luks", "-o", "state=inactive,old_secret=key", cwd=folder)
    assert "Invalid password" in tool.refused("map", *KEY, "a.luks", cwd=folder)
    last = ("--object", "secret,id=key,file=new", "a.luks", "-o", "state=inactive,keyslot=1")
    assert "only active keyslot" in tool.refused("amend", *last, cwd=folder)
    tool.blockjobs("amend", "--force", *last, cwd=folder)
    assert "Invalid password" in tool.refused("map", "--object", "secret,id=key,file=new", "a.luks", cwd=folder)
