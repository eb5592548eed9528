"""What a guest gives up over NBD: with the same options of the nodes, our daemon keeps and frees what QEMU's does.

Nodes come from `blockdev-add`; qemu-io sends the requests. Afterwards the map of the disk must be the same, qemu-img
must find nothing wrong, and the file system must have got back as much.
"""

from __future__ import annotations

import json
from contextlib import ExitStack

import disks
import player
import pytest

pytestmark = pytest.mark.qemu
MIB = disks.MIB
SIZE = 4 * MIB
TABLES_BYTES_MAX = 192 << 10
"""What the programs may differ in: tables at other places, and free clusters that were used for a time."""
REQUESTS = ("discard 1M 1M", "write -z -u 2M 512k", "write -z 3M 256k", "discard 100k 100k", "write -P 5 0 4k")
NOT_GIVEN = None


@pytest.fixture(scope="module")
def daemons(tmp_path_factory):
    """QEMU's and ours, each with an NBD server, in a directory of its own."""
    with ExitStack() as stack:
        made = []
        for program in player.PROGRAMS:
            directory = tmp_path_factory.mktemp(program.name)
            words = ("--nbd-server", "addr.type=unix,addr.path=n.sock")
            made.append((stack.enter_context(player.Daemon(program, directory, *words)), directory))
        yield made


def make_full(directory, name, *, options="", snapshot=False, compressed=False):
    disks.make(directory, name, size=str(SIZE), options=options)
    (directory / "noise").write_bytes(bytes(each * 37 % 253 for each in range(1 << 10)) * 32 + bytes(32 << 10))
    flags = "-c " if compressed else ""
    disks.run("qemu-io", "-c", f"write {flags}-s noise 0 {SIZE}", name, cwd=directory)
    if snapshot:
        disks.run("qemu-img", "snapshot", "-c", "kept", name, cwd=directory)
        disks.run("qemu-io", "-c", f"write -P 1 0 {SIZE}", name, cwd=directory)


def ask(daemon, command, **arguments):
    reply, _ = daemon.qmp.ask({"execute": command, "arguments": arguments})
    assert "return" in reply, reply
    return reply["return"]


def after(daemon, directory, nodes, requests, commands=()):
    """Open the nodes, the last of which is the disk; do everything; return its map and the bytes given back."""
    path = directory / "disk.qcow2"
    before = path.stat().st_blocks * 512
    for node in nodes:
        ask(daemon, "blockdev-add", **node)
    ask(daemon, "block-export-add", type="nbd", id="e", **{"node-name": "disk"}, writable=True, name="disk")
    words = [word for each in requests for word in ("-c", each)]
    disks.run("qemu-io", "-f", "raw", *words, "-c", "flush", "nbd+unix:///disk?socket=n.sock", cwd=directory)
    ask(daemon, "block-export-del", id="e")
    while any(each["id"] == "e" for each in ask(daemon, "query-block-exports")):
        pass
    for command, arguments in commands:
        ask(daemon, command, **arguments)
    for node in reversed(nodes):
        ask(daemon, "blockdev-del", **{"node-name": node["node-name"]})
    assert disks.check_exit_code(path) == 0
    shown = []
    for run in json.loads(disks.run("qemu-img", "map", "-f", "qcow2", "--output=json", "disk.qcow2", cwd=directory)):
        what = run["present"], run["zero"], run["data"]
        if not shown or shown[-1][1] != what:
            shown.append((run["start"], what))
    return shown, before - path.stat().st_blocks * 512


def compare(daemons, nodes, requests, commands=(), **image):
    """Returns how many bytes our daemon gave back."""
    answers = []
    for daemon, directory in daemons:
        (directory / "disk.qcow2").unlink(missing_ok=True)
        make_full(directory, "disk.qcow2", **image)
        answers.append(after(daemon, directory, nodes, requests, commands))
        disks.run("qemu-img", "convert", "-O", "raw", "disk.qcow2", "content", cwd=directory)
    (theirs, their_bytes), (ours, our_bytes) = answers
    assert ours == theirs
    assert abs(our_bytes - their_bytes) <= TABLES_BYTES_MAX, (our_bytes, their_bytes)
    assert len({(directory / "content").read_bytes() for _, directory in daemons}) == 1
    return our_bytes


def described(**options):
    """The disk with its file described in place; options that are None are left out."""
    given = {name.replace("_", "-"): value for name, value in options.items() if value is not NOT_GIVEN}
    return [{"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": "disk.qcow2"}, **given}]


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on,cluster_size=128k"])
@pytest.mark.parametrize("passed", [NOT_GIVEN, True, False])
@pytest.mark.parametrize("discard", [NOT_GIVEN, "unmap", "ignore"])
def test_requests(daemons, discard, passed, options):
    requests = REQUESTS
    if discard != "unmap" and passed:
        # QEMU frees clusters for zeroes that may be unmapped; our node keeps the space of who ignores discards.
        requests = tuple(each for each in REQUESTS if "-u" not in each)
    freed = compare(daemons, described(discard=discard, pass_discard_request=passed), requests, options=options)
    if discard == "unmap":
        assert (freed >= MIB) is (passed is not False)
    elif not (passed and options == "compat=0.10"):  # which has no other zeroes than missing clusters
        assert freed <= TABLES_BYTES_MAX


@pytest.mark.parametrize("below", [NOT_GIVEN, "unmap", "ignore"])
@pytest.mark.parametrize("in_place", [True, False])
def test_what_the_file_node_says(daemons, in_place, below):
    """A file that is a node of its own ignores discards if nothing is said; one that is described in place does not."""
    file = {"driver": "file", "filename": "disk.qcow2"} | ({} if below is NOT_GIVEN else {"discard": below})
    disk = {"driver": "qcow2", "node-name": "disk", "discard": "unmap"}
    nodes = [{**disk, "file": file}] if in_place else [{**file, "node-name": "file"}, {**disk, "file": "file"}]
    freed = compare(daemons, nodes, REQUESTS)
    assert (freed >= MIB) is (below == "unmap" or (below is NOT_GIVEN and in_place))


@pytest.mark.parametrize("passed", [NOT_GIVEN, True, False])
@pytest.mark.parametrize("discard", [NOT_GIVEN, "unmap"])
def test_a_deleted_snapshot(daemons, discard, passed):
    deletion = ("blockdev-snapshot-delete-internal-sync", {"device": "disk", "name": "kept"})
    options = {"discard": discard, "pass_discard_snapshot": passed}
    freed = compare(daemons, described(**options), ("read 0 4k",), [deletion], snapshot=True)
    assert (freed >= 3 * MIB) is (passed is not False)


@pytest.mark.parametrize("passed", [NOT_GIVEN, False])
@pytest.mark.parametrize("discard", [NOT_GIVEN, "unmap"])
def test_overwritten_compressed_clusters(daemons, discard, passed):
    """That is `pass-discard-other`; with `true` QEMU 7.2 gives nothing back either."""
    nodes = described(discard=discard, pass_discard_other=passed)
    compare(daemons, nodes, (f"write -P 9 0 {SIZE // 2}",), compressed=True)


@pytest.mark.parametrize("keeps", [True, False])
def test_discards_that_keep_the_clusters(daemons, keeps):
    """An option that QEMU 7.2 has not: without it, it is the same as before."""
    (daemon, directory) = daemons[1]
    (directory / "disk.qcow2").unlink(missing_ok=True)
    make_full(directory, "disk.qcow2")
    nodes = described(discard="unmap", discard_no_unref=keeps)
    _, freed = after(daemon, directory, nodes, ("discard 1M 1M",))
    assert freed >= MIB - TABLES_BYTES_MAX
    told = json.loads(disks.run("qemu-img", "check", "--output=json", "disk.qcow2", cwd=directory))
    assert told["allocated-clusters"] == (64 if keeps else 48)


@pytest.fixture(autouse=True)
def nothing_left(daemons):
    """A case that failed in the middle must not spoil those that follow."""
    yield
    for daemon, _ in daemons:
        for command, arguments in (
            ("block-export-del", {"id": "e", "mode": "hard"}),
            ("blockdev-del", {"node-name": "disk"}),
            ("blockdev-del", {"node-name": "file"}),
        ):
            daemon.qmp.ask({"execute": command, "arguments": arguments})
