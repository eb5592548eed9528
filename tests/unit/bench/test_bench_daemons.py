import sys
from pathlib import Path

import daemons
import pytest

FORGETFUL = """
import socket, sys

[word] = [word for word in sys.argv if "path=" in word]
listening = socket.socket(socket.AF_UNIX)
listening.bind(word.split("path=")[1].split(",")[0])
listening.listen()
first, _ = listening.accept()
first.sendall(b'{"QMP": {}}\\n')
first.recv(1 << 16)
first.sendall(b'{"QMP": {}}\\n')
second, _ = listening.accept()
second.sendall(b'{"QMP": {}}\\n')
while (asked := second.recv(1 << 16)) and b"quit" not in asked:
    second.sendall(b'{"return": {}}\\n')
second.sendall(b'{"return": {}}\\n')
"""
"""A daemon that greets its first client twice, and forgets what that one asked between the two."""
HASTY = """
import socket, sys

[word] = [word for word in sys.argv if "path=" in word]
listening = socket.socket(socket.AF_UNIX)
listening.bind(word.split("path=")[1].split(",")[0])
listening.listen()
listening.accept()[0].close()
second, _ = listening.accept()
second.sendall(b'{"QMP": {}}\\n')
while (asked := second.recv(1 << 16)) and b"quit" not in asked:
    second.sendall(b'{"return": {}}\\n')
second.sendall(b'{"return": {}}\\n')
"""
"""One that hangs up on its first client."""


@pytest.mark.parametrize("program", [FORGETFUL, HASTY], ids=["forgotten", "hung up on"])
def test_a_client_that_was_forgotten_connects_again(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemons, "GREETING_S_MAX", 0.3)
    with daemons.Daemon((sys.executable, "-c", program), tmp_path) as daemon:
        assert daemon.ask("query-jobs") == {}


def test_a_peer_is_one_under_a_tracer_too() -> None:
    assert daemons.is_peer(daemons.PEER)
    assert daemons.is_peer(("strace", "-f", *daemons.PEER))
    assert not daemons.is_peer(daemons.OURS)
