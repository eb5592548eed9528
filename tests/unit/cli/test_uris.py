"""NBD URIs: what they mean, and what is refused with one line."""

from typing import Any

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.cli.formats import format_for_new, format_of
from blockjobs.cli.images import file_options, image_roots
from blockjobs.cli.uris import export_options, is_uri


@pytest.mark.parametrize(
    ("uri", "server", "export"),
    [
        ("nbd://host", {"type": "inet", "host": "host", "port": "10809"}, ""),
        ("nbd://host:10810/disk", {"type": "inet", "host": "host", "port": "10810"}, "disk"),
        ("nbd+tcp://[::1]:1/a%20b/c", {"type": "inet", "host": "::1", "port": "1"}, "a b/c"),
        ("nbd+unix:///disk?socket=/tmp/a.sock", {"type": "unix", "path": "/tmp/a.sock"}, "disk"),
        ("nbd+unix://?socket=a%3Fb", {"type": "unix", "path": "a?b"}, ""),
    ],
)
def test_meanings(uri: str, server: dict[str, Any], export: str) -> None:
    assert export_options(uri) == {"driver": "nbd", "server": server, "export": export}
    assert file_options(uri) == export_options(uri)
    assert format_of(uri, None) == format_for_new(uri, None) == "raw"
    assert format_of(uri, "qcow2") == "qcow2"


@pytest.mark.parametrize(
    "uri",
    [
        "nbd://",
        "nbd:///export",
        "nbd://host:port/x",
        "nbd://host:99999/x",
        "nbd://user@host/x",
        "nbd://host/x?socket=/a",
        "nbd://host/x?tls=on",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=",
        "nbd+unix://host/x?socket=/a",
        "nbds://host/x",
        "nbd://[::1/x",
    ],
)
def test_nonsense(uri: str) -> None:
    assert is_uri(uri)
    with pytest.raises(UsageError, match="nbd"):
        file_options(uri)


def test_files_are_no_uris() -> None:
    assert not any(map(is_uri, ("a.raw", "./nbd:/x", "http://x", "nbd:", "/nbd+unix/://")))
    assert image_roots(["/"], "nbd://h/x", "a/b.raw") == ("/", "a")
