"""NBD in TLS: clients of QEMU and libnbd, and those who must not come in."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys

import disks
import player
import pytest

from blockjobs.testing.certificates import Authority
from blockjobs.wire import nbd_options as codec
from blockjobs.wire.nbd import HandshakeFlag, Option, OptionReplyType

pytestmark = pytest.mark.qemu

MIB = 1 << 20
EXPORT = "tls"


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """Directories `server`, `client` (CN=laptop) and `stranger` (of another authority)."""
    directory = tmp_path_factory.mktemp("pki")
    authority, other = Authority("ours"), Authority("theirs")
    for name, issuer, identity in (
        ("server", authority, "localhost"),
        ("client", authority, "laptop"),
        ("stranger", other, "laptop"),
        ("guest", authority, "guest"),
    ):
        issuer.issue(directory / name, "server" if name == "server" else "client", name=identity)
    # The stranger trusts our server; only his own certificate is wrong.
    authority.introduce(directory / "stranger")
    return directory


@contextlib.contextmanager
def serving(program, directory, pki, *more, server=""):
    (directory / "raw.img").write_bytes(b"s" * MIB)
    words = [
        *("--object", f"tls-creds-x509,id=t,dir={pki}/server,endpoint=server"),
        *more,
        *("--blockdev", "driver=file,node-name=f,filename=raw.img"),
        *("--nbd-server", f"addr.type=unix,addr.path=n.sock,tls-creds=t{server}"),
        *("--export", f"nbd,id=e,node-name=f,name={EXPORT},writable=on"),
    ]
    with player.Daemon(program, directory, *words) as daemon:
        yield daemon


def qemu_img(directory, pki, who, *command):
    creds = f"tls-creds-x509,id=c,dir={pki}/{who},endpoint=client"
    image = f"driver=nbd,server.type=unix,server.path=n.sock,export={EXPORT},tls-creds=c,tls-hostname=localhost"
    return subprocess.run(
        ["qemu-img", command[0], "--object", creds, *command[1:], "--image-opts", image],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def nbdinfo(directory, pki, who):
    url = f"nbds+unix:///{EXPORT}?socket=n.sock&tls-certificates={pki}/{who}&tls-hostname=localhost"
    return subprocess.run(
        ["nbdinfo", "--size", url], cwd=directory, capture_output=True, text=True, check=False, timeout=30
    )


def test_clients_with_a_certificate_come_in(program, tmp_path, pki):
    with serving(program, tmp_path, pki) as daemon:
        done = qemu_img(tmp_path, pki, "client", "info")
        assert done.returncode == 0, done.stderr
        assert "1 MiB" in done.stdout
        for number in range(3):
            words = ["qemu-io", "--object", f"tls-creds-x509,id=c,dir={pki}/client,endpoint=client", "--image-opts"]
            words += ["-c", f"write -P {number + 1} 0 512k", "-c", f"read -P {number + 1} 0 512k", "-c", "flush"]
            words += ["driver=nbd,server.type=unix,server.path=n.sock,export=tls,tls-creds=c,tls-hostname=localhost"]
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
            assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
        assert (tmp_path / "raw.img").read_bytes() == b"\3" * (MIB // 2) + b"s" * (MIB // 2)
        assert daemon.process.poll() is None


def test_nbdinfo_comes_in_with_the_right_certificate_only(program, tmp_path, pki):
    with serving(program, tmp_path, pki):
        done = nbdinfo(tmp_path, pki, "client")
        assert (done.returncode, done.stdout.strip()) == (0, str(MIB)), done.stderr
        assert nbdinfo(tmp_path, pki, "stranger").returncode != 0
        done = nbdinfo(tmp_path, pki, "client")
        assert done.returncode == 0, done.stderr


def test_strangers_and_clients_in_clear_are_kept_out(program, tmp_path, pki):
    with serving(program, tmp_path, pki):
        assert qemu_img(tmp_path, pki, "stranger", "info").returncode != 0
        plain = subprocess.run(
            ["nbdinfo", f"nbd+unix:///{EXPORT}?socket=n.sock"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert plain.returncode != 0
        assert qemu_img(tmp_path, pki, "client", "info").returncode == 0


@pytest.mark.parametrize(("who", "allowed"), [("client", True), ("guest", False)])
def test_a_list_says_who_may_come_in(program, tmp_path, pki, who, allowed):
    rules = "authz-list,id=z,policy=deny,rules.0.match=*CN=laptop*,rules.0.policy=allow,rules.0.format=glob"
    with serving(program, tmp_path, pki, "--object", rules, server=",tls-authz=z"):
        done = qemu_img(tmp_path, pki, who, "info")
        assert (done.returncode == 0) is allowed, done.stderr


def test_a_list_that_does_not_exist_lets_nobody_in(program, tmp_path, pki):
    with serving(program, tmp_path, pki, server=",tls-authz=nope"):
        assert qemu_img(tmp_path, pki, "client", "info").returncode != 0


# --- byte by byte


class Peer:
    """A client that does what it should not."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.exactly(codec.GREETING_BYTES)
        self.socket.sendall(codec.encode_client_flags(HandshakeFlag.FIXED_NEWSTYLE))

    def exactly(self, count):
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def reply(self):
        header = codec.decode_option_reply_header(self.exactly(codec.OPTION_REPLY_HEADER_BYTES))
        return OptionReplyType(header.type), self.exactly(header.length)

    def secure(self, pki, who="client"):
        context = ssl.create_default_context(cafile=f"{pki}/{who}/ca-cert.pem")
        context.load_cert_chain(f"{pki}/{who}/client-cert.pem", f"{pki}/{who}/client-key.pem")
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost")


def test_what_was_said_before_tls_does_not_count(tmp_path, pki):
    with serving(player.OURS, tmp_path, pki):
        peer = Peer(tmp_path / "n.sock")
        peer.socket.sendall(codec.encode_option(Option.STRUCTURED_REPLY))
        assert peer.reply()[0] is OptionReplyType.ERR_TLS_REQD
        # An attacker on the way adds an option behind STARTTLS, to be answered inside.
        injected = codec.encode_option(Option.STARTTLS) + codec.encode_option(Option.STRUCTURED_REPLY)
        peer.socket.sendall(injected)
        assert peer.reply()[0] is OptionReplyType.ACK
        peer.secure(pki)
        peer.socket.sendall(codec.encode_option(Option.STRUCTURED_REPLY))
        assert peer.reply() == (OptionReplyType.ACK, b""), "asked for the first time, as far as the server knows"
        peer.socket.sendall(codec.encode_option(Option.ABORT))
        assert peer.reply()[0] is OptionReplyType.ACK
        peer.socket.close()


def hurry(peer, pki, data):
    """Do the handshake and send `data` together with its last flight."""
    context = ssl.create_default_context(cafile=f"{pki}/client/ca-cert.pem")
    context.load_cert_chain(f"{pki}/client/client-cert.pem", f"{pki}/client/client-key.pem")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            peer.socket.sendall(outgoing.read())
            incoming.write(peer.socket.recv(1 << 16))
    tls.write(data)
    peer.socket.sendall(outgoing.read())
    while True:
        try:
            return tls.read(1 << 16)
        except ssl.SSLWantReadError:
            part = peer.socket.recv(1 << 16)
            if not part:
                raise EOFError from None
            incoming.write(part)


@pytest.mark.parametrize("server", ["daemon", "command line"])
def test_an_option_that_comes_with_the_end_of_the_handshake_is_answered(tmp_path, pki, server):
    """Real clients do not wait: the first option may be there before the server knows that the handshake is over."""
    with serving(player.OURS, tmp_path, pki) if server == "daemon" else _command_line(tmp_path, pki):
        for _ in range(5):
            peer = Peer(tmp_path / "n.sock")
            peer.socket.sendall(codec.encode_option(Option.STARTTLS))
            assert peer.reply()[0] is OptionReplyType.ACK
            reply = hurry(peer, pki, codec.encode_option(Option.STRUCTURED_REPLY))
            header = codec.decode_option_reply_header(reply[: codec.OPTION_REPLY_HEADER_BYTES])
            assert header.type == OptionReplyType.ACK
            peer.socket.close()


@contextlib.contextmanager
def _command_line(tmp_path, pki):
    disks.run("qemu-img", "create", "-q", "-f", "raw", "disk.raw", "1M", cwd=tmp_path)
    command = [sys.executable, "-m", "blockjobs", "nbd", "serve", "disk.raw", "--socket", "n.sock"]
    with subprocess.Popen([*command, "--tls", f"{pki}/server"], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline()
            yield
        finally:
            process.terminate()


def test_a_client_that_never_ends_its_tls_handshake_is_dropped(tmp_path, pki):
    with serving(player.OURS, tmp_path, pki, server=",handshake-max-seconds=1"):
        peer = Peer(tmp_path / "n.sock")
        peer.socket.sendall(codec.encode_option(Option.STARTTLS))
        assert peer.reply()[0] is OptionReplyType.ACK
        peer.socket.sendall(b"\x16\x03\x01")
        with contextlib.suppress(ConnectionError):
            while peer.socket.recv(4096):
                pass
        peer.socket.close()
        assert qemu_img(tmp_path, pki, "client", "info").returncode == 0


def test_garbage_instead_of_a_tls_handshake_harms_nobody(tmp_path, pki):
    with serving(player.OURS, tmp_path, pki) as daemon:
        for garbage in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01\xff\xff" + bytes(100),
            codec.encode_option(Option.LIST),
        ):
            peer = Peer(tmp_path / "n.sock")
            peer.socket.sendall(codec.encode_option(Option.STARTTLS))
            assert peer.reply()[0] is OptionReplyType.ACK
            with contextlib.suppress(ConnectionError):
                peer.socket.sendall(garbage)
                peer.socket.shutdown(socket.SHUT_WR)
                while peer.socket.recv(4096):
                    pass
            peer.socket.close()
        assert qemu_img(tmp_path, pki, "client", "info").returncode == 0
        assert daemon.stderr == ""
