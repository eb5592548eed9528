"""Hostile NBD clients: bounded memory and time, and an honest client that is served after each of them."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import subprocess
import threading
import time

import disks
import player
import pytest

from blockjobs.wire import nbd_options as codec
from blockjobs.wire import nbd_requests as requests
from blockjobs.wire.nbd import Command, HandshakeFlag, Option
from blockjobs.wire.nbd_options import InfoQuery, MetaQuery
from blockjobs.wire.nbd_requests import Request

pytestmark = [pytest.mark.qemu, pytest.mark.serial]

MIB = 1 << 20
RSS_BYTES_MAX = 128 * MIB
GO = codec.encode_option(Option.GO, codec.encode_info_query(InfoQuery("disk", ())))
FLAGS = codec.encode_client_flags(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    directory = tmp_path_factory.mktemp("abuse")
    disks.make(directory, "disk.img", size="64M")
    disks.run("qemu-io", "-c", "write -P 0x5a 0 48M", "disk.img", cwd=directory)
    words = [
        *("--blockdev", "driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename=disk.img"),
        *("--nbd-server", "addr.type=unix,addr.path=n.sock"),
        *("--export", "nbd,id=e,node-name=disk,writable=on"),
    ]
    with player.Daemon(player.OURS, directory, *words) as daemon:
        daemon.directory = directory
        yield daemon
        assert "Traceback" not in daemon.stderr


@pytest.fixture(autouse=True)
def health(daemon):
    """After every attack: memory is bounded, QMP answers, and an honest client reads and writes at once."""
    yield
    begun = time.monotonic()
    with Client(daemon) as honest:
        honest.work()
        honest.write(60 * MIB, b"honest" * 700)
        assert honest.read(60 * MIB, 4200) == b"honest" * 700
        assert honest.read(0, 4 * MIB) == b"\x5a" * (4 * MIB)
    assert time.monotonic() - begun < 5
    assert daemon.qmp.ask({"execute": "query-block-exports"})[0]["return"][0]["id"] == "e"
    assert daemon.process.poll() is None
    assert peak_bytes(daemon) < RSS_BYTES_MAX


def peak_bytes(daemon):
    with open(f"/proc/{daemon.process.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


class Client:
    """A client, honest as far as it is told to be."""

    def __init__(self, daemon, *, timeout_s=10.0):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(daemon.directory / "n.sock"))  # waits while the kernel's queue is full
        self.socket.settimeout(timeout_s)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def exactly(self, count):
        data = bytearray()
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def send(self, data):
        self.socket.sendall(data)

    def work(self):
        """Negotiate simple replies."""
        self.exactly(codec.GREETING_BYTES)
        self.send(FLAGS + GO)
        while True:
            header = codec.decode_option_reply_header(self.exactly(codec.OPTION_REPLY_HEADER_BYTES))
            self.exactly(header.length)
            if header.type == 1:
                return self

    def ask(self, command, at, length, payload=b"", *, flags=0):
        self.send(requests.encode_request(Request(flags, command, 9, at, length)) + payload)
        return requests.decode_reply(self.exactly(16))

    def read(self, at, length):
        assert self.ask(Command.READ, at, length).error == 0
        return self.exactly(length)

    def write(self, at, content):
        assert self.ask(Command.WRITE, at, len(content), content).error == 0

    def ended(self):
        """Whether the server hangs up, whatever it says before."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True


def test_disconnects_at_every_byte_of_a_handshake(daemon):
    said = (
        FLAGS
        + codec.encode_option(Option.STRUCTURED_REPLY)
        + codec.encode_option(Option.SET_META_CONTEXT, codec.encode_meta_query(MetaQuery("disk", ("base:allocation",))))
        + GO
        + requests.encode_request(Request(0, Command.WRITE, 1, 0, 512))
        + b"x" * 8
    )
    for length in range(len(said)):
        with Client(daemon) as client:
            client.send(said[:length])


@pytest.mark.parametrize(
    "said",
    [
        b"IHAVEOPT\0\0\0\x06\xff\xff\xff\xff",
        b"IHAVEOPT\0\0\0\x01\x7f\xff\xff\xff",
        b"IHAVEOPX\0\0\0\x03\0\0\0\0",
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        codec.encode_option(Option.EXPORT_NAME, b"n" * 4097),
        codec.encode_option(Option.EXPORT_NAME, b"nope"),
        codec.encode_option(99, bytes(MIB)) * 5,
    ],
    ids=["giant info", "giant name", "magic", "http", "long name", "unknown name", "long options"],
)
def test_nonsense_ends_the_conversation(daemon, said):
    with Client(daemon) as client:
        client.exactly(codec.GREETING_BYTES)
        with contextlib.suppress(ConnectionError):
            client.send(FLAGS + said)
        assert client.ended()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\x05abc",
        struct.pack(">I", 4097) + b"n" * 4097 + b"\0\0",
        b"\xff\xff\xff\xff",
        codec.encode_info_query(InfoQuery("disk", ()))[:-2] + b"\xff\xff",
        b"\0\0\0\x02\xff\xfe\0\0",
    ],
)
def test_malformed_options_are_refused_and_the_client_may_go_on(daemon, data):
    with Client(daemon) as client:
        client.exactly(codec.GREETING_BYTES)
        client.send(FLAGS)
        for option in (Option.INFO, Option.GO, Option.LIST_META_CONTEXT):
            client.send(codec.encode_option(option, data))
            header = codec.decode_option_reply_header(client.exactly(codec.OPTION_REPLY_HEADER_BYTES))
            client.exactly(header.length)
            assert header.type >= 1 << 31
        client.send(GO)
        assert codec.decode_option_reply_header(client.exactly(codec.OPTION_REPLY_HEADER_BYTES)).type == 3


def test_a_flood_of_options_whose_answers_nobody_reads(daemon):
    with Client(daemon, timeout_s=1.0) as client:
        flood = codec.encode_option(Option.LIST) * 1000
        client.send(FLAGS)
        with contextlib.suppress(OSError):
            for _ in range(200):
                client.send(flood)


def test_many_half_open_connections(daemon):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(Client(daemon))
        honest = stack.enter_context(Client(daemon))
        honest.work()
        assert honest.read(0, 512) == b"\x5a" * 512


def test_half_sent_giant_writes(daemon):
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            client = stack.enter_context(Client(daemon, timeout_s=0.5)).work()
            client.send(requests.encode_request(Request(0, Command.WRITE, 1, 0, 31 * MIB)))
            with contextlib.suppress(TimeoutError):
                client.send(bytes(30 * MIB))
        begun = time.monotonic()
        honest = stack.enter_context(Client(daemon)).work()
        honest.write(60 * MIB, b"h" * 4096)
        honest.write(60 * MIB, b"h" * 2 * MIB)
        assert honest.read(60 * MIB, 2 * MIB) == b"h" * 2 * MIB
        assert time.monotonic() - begun < 3
        assert peak_bytes(daemon) < RSS_BYTES_MAX


def test_a_thousand_clients_that_leave_in_the_middle_of_a_write(daemon):
    """Nothing of them stays: no memory, no budget, and nothing of what they did not finish."""
    chance = random.Random(8)
    for _ in range(1000):
        length = chance.choice([64 << 10, MIB, 4 * MIB, 31 * MIB])
        with Client(daemon).work() as client:
            client.send(requests.encode_request(Request(0, Command.WRITE, 1, 0, length)))
            client.send(b"cut!" * chance.randrange(min(length, 2 * MIB) // 4))
    with Client(daemon).work() as honest:
        assert honest.read(0, 32 * MIB) == b"\x5a" * (32 * MIB)
        honest.write(0, b"\x5a" * (32 * MIB))


def test_giant_reads_that_nobody_takes(daemon):
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            client = stack.enter_context(Client(daemon)).work()
            for number in range(8):
                client.send(requests.encode_request(Request(0, Command.READ, number, 0, 16 * MIB)))
        time.sleep(0.5)
        honest = stack.enter_context(Client(daemon)).work()
        begun = time.monotonic()
        assert honest.read(60 * MIB, 4096)
        assert honest.read(MIB, 2 * MIB) == b"\x5a" * 2 * MIB
        assert time.monotonic() - begun < 3
        assert peak_bytes(daemon) < RSS_BYTES_MAX


def test_a_flood_of_small_reads_that_nobody_takes(daemon):
    flood = requests.encode_request(Request(0, Command.READ, 1, 0, 65536)) * 2000
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(Client(daemon, timeout_s=0.3)).work()
            with contextlib.suppress(TimeoutError):
                client.send(flood)
        honest = stack.enter_context(Client(daemon, timeout_s=20)).work()
        assert honest.read(60 * MIB, 4096)
        assert peak_bytes(daemon) < RSS_BYTES_MAX


def test_a_flood_of_flushes_whose_answers_nobody_reads(daemon):
    """Each takes hardly any memory, so their number must be bounded: 16 bytes an answer once made 100 MiB of RSS."""
    flood = requests.encode_request(Request(0, Command.FLUSH, 1, 0, 0)) * 1000
    with contextlib.ExitStack() as stack:
        sent = 0
        for _ in range(3):
            client = stack.enter_context(Client(daemon, timeout_s=0.5)).work()
            with contextlib.suppress(TimeoutError):
                for _ in range(100):
                    client.send(flood)
                    sent += 1
        # Not more than what the kernel keeps of requests and answers.
        assert sent < 3 * 60, sent


def test_drops_of_writes_do_not_keep_an_honest_client_out(daemon):
    """Forty clients that each send a mebibyte a byte at a time, and come again when they are dropped."""
    stop = threading.Event()
    with Client(daemon).work() as honest:
        for _ in range(8):
            honest.write(0, b"\x5a" * MIB)
        threads = [threading.Thread(target=_drop_until, args=(daemon, stop)) for _ in range(40)]
        try:
            for thread in threads:
                thread.start()
            time.sleep(1)
            begun = time.monotonic()
            for _ in range(100):
                honest.write(0, b"\x5a" * MIB)
            assert time.monotonic() - begun < 5
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def _drop_until(daemon, stop):
    while not stop.is_set():
        with contextlib.suppress(OSError, EOFError), Client(daemon).work() as client:
            client.send(requests.encode_request(Request(0, Command.WRITE, 1, 0, MIB)))
            while not stop.wait(0.2):
                client.send(b"\x5a")


@pytest.mark.parametrize(("command", "length"), [(Command.READ, 4096), (Command.CACHE, 32 * MIB), (Command.FLUSH, 0)])
def test_floods_leave_others_their_share(daemon, command, length):
    """Clients that ask for as much as they can, whether they take the answers or not."""
    flood = requests.encode_request(Request(0, command, 1, 0, length)) * 2000
    stop = threading.Event()

    def attack():
        while not stop.is_set():
            with contextlib.suppress(OSError, EOFError), Client(daemon, timeout_s=1).work() as client:
                while not stop.is_set():
                    client.send(flood)

    with Client(daemon).work() as honest:
        threads = [threading.Thread(target=attack) for _ in range(4)]
        try:
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            begun = time.monotonic()
            for _ in range(100):
                honest.read(0, 4096)
                honest.write(0, b"\x5a" * 4096)
            assert time.monotonic() - begun < 3
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize("length", [33 * MIB, (1 << 32) - 1])
def test_writes_that_are_too_long_are_refused(daemon, length):
    with Client(daemon).work() as client:
        reply = client.ask(Command.WRITE, 0, length)
        assert reply.error == 22
        assert client.ended()


def test_requests_of_random_bytes(daemon):
    chance = random.Random(5)
    for _ in range(200):
        with Client(daemon).work() as client:
            header = struct.pack(
                ">IHHQQI",
                0x25609513 if chance.random() < 0.9 else chance.getrandbits(32),
                chance.getrandbits(16) if chance.random() < 0.3 else 0,
                # Nothing that would change what the probe reads.
                chance.choice([0, 2, 3, 5, 7, 8, 9, 77, 65535]),
                chance.getrandbits(64),
                chance.choice([0, 1, 64 * MIB - 1, 64 * MIB, (1 << 64) - 1, chance.getrandbits(64)]),
                chance.choice([0, 1, 512, MIB, 32 * MIB, 32 * MIB + 1, (1 << 32) - 1]),
            )
            client.send(header + chance.randbytes(chance.randrange(40)))


def test_stopping_the_server_takes_less_than_a_second_whatever_clients_do(daemon):
    directory = daemon.directory
    disks.make(directory, "other.img", size="64M")
    with (
        player.Daemon(
            player.OURS,
            _own(directory),
            *("--blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={directory}/other.img"),
            *("--nbd-server", "addr.type=unix,addr.path=n.sock"),
            *("--export", "nbd,id=e,node-name=disk,writable=on"),
        ) as other,
        contextlib.ExitStack() as stack,
    ):
        other.directory = _own(directory)
        stop = threading.Event()
        busy = [threading.Thread(target=_write_until, args=(other, stop)) for _ in range(3)]
        for thread in busy:
            thread.start()
        for _ in range(20):
            stack.enter_context(Client(other))
        half = stack.enter_context(Client(other)).work()
        half.send(requests.encode_request(Request(0, Command.WRITE, 1, 0, 4 * MIB)) + bytes(MIB))
        time.sleep(0.3)
        begun = time.monotonic()
        reply, events = other.qmp.ask({"execute": "nbd-server-stop"})
        assert time.monotonic() - begun < 1
        assert reply == {"return": {}} and [event["event"] for event in events] == ["BLOCK_EXPORT_DELETED"]
        stop.set()
        for thread in busy:
            thread.join()
        assert half.ended()
        assert other.qmp.ask({"execute": "blockdev-del", "arguments": {"node-name": "disk"}})[0] == {"return": {}}
    check = subprocess.run(["qemu-img", "check", "-q", "other.img"], cwd=directory, check=False)
    assert check.returncode in (0, disks.CHECK_LEAKS_ONLY)


def _own(directory):
    own = directory / "own"
    own.mkdir(exist_ok=True)
    return own


def _write_until(daemon, stop):
    with contextlib.suppress(OSError, EOFError), Client(daemon).work() as client:
        at = 0
        while not stop.is_set():
            client.write(at % (60 * MIB), b"w" * 65536)
            at += 3 * 65536
            select.select([], [], [], 0)
