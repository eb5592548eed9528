"""Programs that speak NBD work with our daemon's server as with QEMU's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import disks
import player
import pytest

pytestmark = pytest.mark.qemu

MIB = 1 << 20
PYTHON_WITH_LIBNBD = "/usr/bin/python3"


def has_libnbd_python():
    if not shutil.which(PYTHON_WITH_LIBNBD):
        return False
    return subprocess.run([PYTHON_WITH_LIBNBD, "-c", "import nbd"], capture_output=True, check=False).returncode == 0


def has_fio_with_nbd():
    if not shutil.which("fio"):
        return False
    return "nbd" in subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout


def run(words, directory, **more):
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, check=False, timeout=50, **more)
    assert done.returncode == 0, f"{words[0]}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def served(program, tmp_path_factory):
    """A daemon whose options export `disk` (qcow2 with backing, writable) and `ro`, over unix and as is."""
    directory = tmp_path_factory.mktemp("nbd")
    disks.make(directory, "base.img", size="16M")
    disks.run("qemu-io", "-c", "write -P 0x11 0 2M", "-c", "write -P 0x22 8M 1M", "base.img", cwd=directory)
    disks.make(directory, "disk.img", options="backing_file=base.img,backing_fmt=qcow2")
    disks.run("qemu-io", "-c", "write -P 0x33 1M 1M", "disk.img", cwd=directory)
    disks.make(directory, "target.img", size="16M")
    (directory / "raw.img").write_bytes(b"r" * MIB)
    os.truncate(directory / "raw.img", 2 * MIB)
    words = [
        *("--blockdev", "driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename=disk.img"),
        *("--blockdev", "driver=qcow2,node-name=target,discard=unmap,file.driver=file,file.filename=target.img"),
        *("--blockdev", "driver=raw,node-name=raw,read-only=on,file.driver=file,file.filename=raw.img"),
        *("--nbd-server", "addr.type=unix,addr.path=n.sock"),
        *("--export", "type=nbd,id=e0,node-name=disk,writable=on,allocation-depth=on,description=a guest's disk"),
        *("--export", "nbd,id=e1,node-name=raw,name=ro"),
        *("--export", "nbd,id=e2,node-name=target,writable=on"),
    ]
    with player.Daemon(program, directory, *words) as daemon:
        daemon.directory = directory
        yield daemon
        assert daemon.process.poll() is None
        if program is player.OURS:
            assert daemon.stderr == ""


def url(export):
    return f"nbd+unix:///{export}?socket=n.sock"


def test_nbdinfo_lists_describes_and_maps(served):
    listed = json.loads(run(["nbdinfo", "--list", "--json", url("")], served.directory))
    names = {each["export-name"]: each for each in listed["exports"]}
    assert set(names) == {"disk", "ro", "target"}
    assert names["disk"]["description"] == "a guest's disk"
    assert names["disk"]["export-size"] == 16 * MIB and not names["disk"]["is_read_only"]
    assert names["ro"]["is_read_only"] and names["ro"]["export-size"] == 2 * MIB
    assert names["disk"]["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    assert (names["disk"]["block_size_minimum"], names["disk"]["block_size_maximum"]) == (1, 32 * MIB)
    assert all(names["disk"][f"can_{what}"] for what in ("flush", "fua", "trim", "zero", "multi_conn", "cache", "df"))
    found = json.loads(run(["nbdinfo", "--map", "--json", url("ro")], served.directory))
    assert found == [
        {"offset": 0, "length": MIB, "type": 0, "description": "data"},
        {"offset": MIB, "length": MIB, "type": 3, "description": "hole,zero"},
    ]
    assert "protocol: newstyle-fixed" in run(["nbdinfo", url("disk")], served.directory)


def test_nbdinfo_shows_the_depth_of_each_layer(served):
    found = json.loads(run(["nbdinfo", "--map=qemu:allocation-depth", "--json", url("disk")], served.directory))
    assert [(each["offset"], each["length"], each["type"]) for each in found[:3]] == [
        (0, MIB, 2),
        (MIB, MIB, 1),
        (2 * MIB, 6 * MIB, 0),
    ]


def test_nbdcopy_both_ways_with_many_connections(served):
    directory = served.directory
    run(["nbdcopy", "--connections=4", "--requests=64", url("ro"), "copy.img"], directory)
    assert (directory / "copy.img").read_bytes() == (directory / "raw.img").read_bytes()
    content = bytes(range(256)) * 4096 * 6 + bytes(10 * MIB)
    (directory / "new.img").write_bytes(content)
    run(["nbdcopy", "--flush", "--connections=4", "new.img", url("target")], directory)
    run(["nbdcopy", url("target"), "back.img"], directory)
    assert (directory / "back.img").read_bytes() == content
    run(["nbdcopy", url("disk"), url("target")], directory)
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", url("disk"), url("target")], directory)


def test_qemu_img_and_qemu_io(served):
    directory = served.directory
    name = url("disk")
    info = json.loads(run(["qemu-img", "info", "--output=json", "-f", "raw", name], directory))
    assert info["virtual-size"] == 16 * MIB
    found = json.loads(run(["qemu-img", "map", "--output=json", "-f", "raw", name], directory))
    assert [(each["start"], each["length"], each["zero"]) for each in found[:2]] == [
        (0, 2 * MIB, False),
        (2 * MIB, 6 * MIB, True),
    ]
    run(["qemu-img", "convert", "-f", "raw", "-O", "raw", name, "converted.img"], directory)
    run(["qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", "converted.img", name], directory)
    commands = [
        *("-c", "write -P 0x5a 12M 100k"),
        *("-c", "write -f -P 0x5b 12582913 17"),
        *("-c", "write -z 12600000 1000"),
        *("-c", "write -zu 13M 1M"),
        *("-c", "discard 14M 1M"),
        *("-c", "flush"),
        *("-c", "read -P 0x5b 12582913 17"),
        *("-c", "read -P 0 12600000 1000"),
        *("-c", "aio_write -P 0x77 4M 1M", "-c", "aio_write -P 0x78 5M 1M", "-c", "aio_flush"),
        *("-c", "read -P 0x77 4M 1M", "-c", "read -P 0x78 5M 1M"),
    ]
    said = run(["qemu-io", "-f", "raw", *commands, name], directory)
    assert "error" not in said.lower() and "verification failed" not in said


def test_writes_to_a_read_only_export_are_refused(served):
    refused = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", url("ro")],
        cwd=served.directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert refused.returncode != 0 and "Permission denied" in refused.stderr


LIBNBD = """
import nbd, sys
for structured in (True, False):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_export_name("target")
    h.connect_unix("n.sock")
    size = h.get_size()
    h.pwrite(b"L" * 70000, 1234, nbd.CMD_FLAG_FUA)
    assert h.pread(70002, 1233)[1:-1] == b"L" * 70000
    h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
    h.zero(65536, 1 << 20, nbd.CMD_FLAG_FAST_ZERO)
    h.trim(65536, 2 << 20)
    h.cache(65536, 0)
    h.flush()
    assert h.pread(4096, 8192) == bytes(4096)
    if structured:
        assert h.can_df() and h.can_multi_conn() and h.can_cache()
        whole = []
        h.pread_structured(
            4096, 0, lambda content, at, status, error: whole.append((bytes(content), at)), nbd.CMD_FLAG_DF
        )
        assert whole == [(bytes(h.pread(4096, 0)), 0)]
        seen = []
        h.block_status(size, 0, lambda name, at, extents, error: seen.append((name, at, extents)))
        [(name, at, extents)] = seen
        assert name == "base:allocation" and at == 0 and sum(extents[::2]) == size, seen
        one = []
        h.block_status(1 << 20, 65536, lambda name, at, extents, error: one.append(extents), nbd.CMD_FLAG_REQ_ONE)
        assert len(one[0]) == 2
    h.set_strict_mode(0)
    for bad in (lambda: h.pread(1, size), lambda: h.pwrite(b"xx", size - 1), lambda: h.trim(1, size)):
        try:
            bad()
        except nbd.Error:
            pass
        else:
            sys.exit("a request past the end succeeded")
    h.pread(512, 0)
    h.shutdown()
h = nbd.NBD()
h.set_export_name("nope")
try:
    h.connect_unix("n.sock")
except nbd.Error as error:
    assert "nope" in str(error) or "export" in str(error), error
else:
    sys.exit("an export that does not exist was found")
"""


@pytest.mark.skipif(not has_libnbd_python(), reason="libnbd's Python binding (python3-libnbd) is not installed")
def test_libnbds_python_binding(served):
    run([PYTHON_WITH_LIBNBD, "-c", LIBNBD], served.directory)


@pytest.mark.skipif(not has_fio_with_nbd(), reason="fio with its nbd engine is not installed")
def test_fio_writes_and_verifies(served):
    words = ["fio", "--name=v", "--ioengine=nbd", f"--uri={url('target')}", "--rw=randrw", "--size=16M"]
    words += ["--bsrange=512-64k", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]
    words += ["--io_size=24M", "--number_ios=1500", "--randrepeat=1", "--output-format=json", "--output=fio.json"]
    run(words, served.directory)
    report = json.loads((served.directory / "fio.json").read_text())
    assert report["jobs"][0]["error"] == 0


def test_over_tcp_with_several_clients(program, tmp_path):
    (tmp_path / "raw.img").write_bytes(b"t" * MIB)
    words = [
        *("--blockdev", "driver=file,node-name=f,filename=raw.img"),
        *("--nbd-server", "addr.type=inet,addr.host=127.0.0.1,addr.port=42310,addr.to=42399,max-connections=2"),
        *("--export", "nbd,id=e,node-name=f,name=x,writable=on"),
    ]
    with player.Daemon(program, tmp_path, *words):
        ports = [port for port in range(42310, 42400) if _answers(port)]
        run(["nbdcopy", "--connections=2", f"nbd://127.0.0.1:{ports[0]}/x", "copy.img"], tmp_path)
        assert (tmp_path / "copy.img").read_bytes() == b"t" * MIB


def _answers(port):
    return (
        subprocess.run(
            ["nbdinfo", "--size", f"nbd://127.0.0.1:{port}/x"], capture_output=True, check=False, timeout=20
        ).returncode
        == 0
    )


def test_clusters_that_were_only_preallocated_show_as_zeroes(program, tmp_path):
    """Else a client that copies such an image reads and writes all of it."""
    disks.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "p.img", "64M", cwd=tmp_path)
    disks.run("qemu-io", "-c", "write -P 3 20M 1M", "p.img", cwd=tmp_path)
    words = [
        *("--blockdev", "driver=qcow2,node-name=p,file.driver=file,file.filename=p.img"),
        *("--nbd-server", "addr.type=unix,addr.path=n.sock"),
        *("--export", "nbd,id=e,node-name=p"),
    ]
    with player.Daemon(program, tmp_path, *words):
        mapped = disks.run("nbdinfo", "--map", f"nbd+unix:///p?socket={tmp_path}/n.sock", cwd=tmp_path)
    runs = [line.split()[:3] for line in mapped.splitlines()]
    data = [(int(at), int(length)) for at, length, kind in runs if kind == "0"]
    assert data == [(20 * MIB, MIB)], mapped


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--export", "nbd,id=e,node-name=n"], "Cannot find device='' nor node-name='n'"),
        (["--blockdev", "null-co,node-name=n", "--export", "nbd,id=e,node-name=n"], "NBD server not running"),
        (["--nbd-server", "addr.type=unix,addr.path=/nonexistent/n.sock"], "Failed to bind socket to"),
        (["--nbd-server", "addr.type=unix,addr.path=n.sock,tls-creds=t"], "No TLS credentials with id 't'"),
        (["--nbd-server", "addr.type=unix"], "Parameter 'addr.path' is missing"),
        (
            ["--nbd-server", "addr.type=inet,addr.host=localhost,addr.port=-1"],
            "address resolution failed for localhost:-1: Servname not supported for ai_socktype",
        ),
        (
            [
                *("--nbd-server", "addr.type=unix,addr.path=a.sock"),
                *("--nbd-server", "addr.type=unix,addr.path=b.sock"),
            ],
            "NBD server already running",
        ),
    ],
)
def test_bad_options_are_refused_at_start(program, tmp_path, words, said):
    done = subprocess.run(
        [*program.words, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
