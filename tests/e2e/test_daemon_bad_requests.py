"""What a client can get wrong in QMP costs it an error message and nobody else anything."""

from __future__ import annotations

import json
import os
import stat
import time

import player
import pytest

pytestmark = pytest.mark.qemu

PARSE = "JSON parse error, "
BAD_BYTES = [
    # what is sent, the error's text
    (b'{"execute": }', PARSE + "expecting value"),
    (b'{"execute" "x"}', PARSE + "missing : in object pair"),
    (b'{"execute": "query-jobs",}', PARSE + "expecting value"),
    (b'{"execute": "a", "execute": "b"}', PARSE + "duplicate key"),
    (b'{"execute": bogus}', PARSE + "invalid keyword 'bogus'"),
    (b'{"execute": "\\ud83d"}', PARSE + "\\ud83d is not a valid Unicode character"),
    (b'{"execute": "\\q"}', PARSE + "invalid escape sequence in string"),
    (b"]", PARSE + "expecting value"),
    (b"[]", "QMP input must be a JSON object"),
    (b"17", "QMP input must be a JSON object"),
    (b'{"execute": 1}', "QMP input member 'execute' must be a string"),
    (b'{"arguments": {}}', "QMP input lacks member 'execute'"),
    (b'{"execute": "query-jobs", "arguments": []}', "QMP input member 'arguments' must be an object"),
    (b'{"execute": "query-jobs", "extra": 1}', "QMP input member 'extra' is unexpected"),
    (b'{"execute": "no-such-command"}', "The command no-such-command has not been found"),
    (b'{"execute": "job-pause"}', "Parameter 'id' is missing"),
    (b'{"execute": "job-pause", "arguments": {"id": 1}}', "Invalid parameter type for 'id', expected: string"),
    (b'{"execute": "job-pause", "arguments": {"id": "a", "x": 1}}', "Parameter 'x' is unexpected"),
    (b'{"execute": "job-pause", "arguments": {"id": "nobody"}}', "Job not found"),
    (b'{"execute": "block-job-pause", "arguments": {"device": "nobody"}}', "Block job 'nobody' not found"),
    (b"[" * 1025 + b"]" * 1024, "JSON nesting depth limit exceeded"),
]


only_ours = pytest.mark.parametrize(
    "program", [one for one in player.PROGRAMS if one is player.OURS], ids=lambda program: program.name, indirect=True
)
"""QEMU needs seconds for a long string, talks to anybody, and leaves the socket's mode to the umask."""


@pytest.fixture(scope="module")
def daemon(program, tmp_path_factory):
    with player.Daemon(program, tmp_path_factory.mktemp("requests")) as daemon:
        yield daemon


@pytest.mark.parametrize(("sent", "complaint"), BAD_BYTES, ids=lambda value: str(value)[:30])
def test_a_bad_request_is_one_clear_error(daemon, sent, complaint):
    daemon.qmp.send_bytes(sent + b"\n" + json.dumps({"execute": "query-jobs", "id": "sound"}).encode() + b"\n")
    replies = []
    while (reply := daemon.qmp.hear(wait_s=5)) is not None and reply.get("id") != "sound":
        replies.append(reply["error"]["desc"])
    assert reply == {"return": [], "id": "sound"}, "the next request suffered"
    assert replies[0] == complaint


def test_single_quotes_and_split_requests_are_understood(daemon):
    for piece in (b"{'exe", b"cute': 'query-", b"jobs', 'id': ", b"null}{'execute': 'query-block-jobs'}"):
        daemon.qmp.send_bytes(piece)
        time.sleep(0.01)
    assert daemon.qmp.hear(wait_s=5) == {"return": [], "id": None}
    assert daemon.qmp.hear(wait_s=5) == {"return": []}


@pytest.mark.serial
@only_ours
def test_a_mebibyte_is_answered_at_once(daemon):
    request = {"execute": "job-pause", "arguments": {"id": "j" * (1 << 20)}}
    started = time.monotonic()
    reply, _ = daemon.qmp.ask(request)
    assert reply["error"]["desc"] == "Job not found"
    assert time.monotonic() - started < 0.2


def test_every_command_survives_arguments_of_every_type(daemon):
    commands = [entry["name"] for entry in daemon.qmp.ask({"execute": "query-commands"})[0]["return"]]
    assert "blockdev-backup" in commands
    for command in sorted(set(commands) - {"quit"}):
        for arguments in ({"no-such-argument": 1}, {"id": None, "job-id": [], "node-name": {}, "device": 1.5}):
            reply, _ = daemon.qmp.ask({"execute": command, "arguments": arguments})
            assert reply["error"]["class"] in ("GenericError", "CommandNotFound"), command
    assert "Traceback" not in daemon.stderr


@only_ours
def test_a_stranger_to_qmp_is_hung_up_on(program, tmp_path):
    with player.Daemon(program, tmp_path) as daemon:
        daemon.qmp.close()
        for greeting in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01"):
            stranger = player.QmpSocket(tmp_path / "qmp.sock")
            stranger.send_bytes(greeting)
            assert "QMP" in (stranger.hear(wait_s=5) or {})
            with pytest.raises(player.Silence, match="hung up"):
                stranger.hear(wait_s=5)
            stranger.close()
        client = player.QmpSocket(tmp_path / "qmp.sock")
        client.negotiate()
        client.close()


@only_ours
def test_the_socket_is_for_its_owner_only(program, tmp_path):
    with player.Daemon(program, tmp_path):
        assert stat.S_IMODE(os.stat(tmp_path / "qmp.sock").st_mode) == 0o600
