"""NBD URIs: what they mean, and what is refused with one line."""

from typing import Any

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.block.nbd_uri import export_options, is_export
from blockjobs.cli.formats import format_for_new, format_of
from blockjobs.cli.images import file_options, image_roots


@pytest.mark.parametrize(
    ("uri", "server", "export"),
    [
        ("nbd://host", {"type": "inet", "host": "host", "port": "10809"}, None),
        ("nbd://host/", {"type": "inet", "host": "host", "port": "10809"}, ""),
        ("nbd://host:10810/disk", {"type": "inet", "host": "host", "port": "10810"}, "disk"),
        ("nbd+tcp://[::1]:1/a%20b/c", {"type": "inet", "host": "::1", "port": "1"}, "a b/c"),
        ("nbd+unix:///disk?socket=/tmp/a.sock", {"type": "unix", "path": "/tmp/a.sock"}, "disk"),
        ("nbd+unix://?socket=a%3Fb", {"type": "unix", "path": "a?b"}, None),
        ("nbd:unix:/tmp/a.sock", {"type": "unix", "path": "/tmp/a.sock"}, None),
        ("nbd:unix:/tmp/a:b:exportname=c:d", {"type": "unix", "path": "/tmp/a:b"}, "c:d"),
        ("nbd:host:10810", {"type": "inet", "host": "host", "port": "10810"}, None),
        ("nbd:[::1]:10810:exportname=disk", {"type": "inet", "host": "::1", "port": "10810"}, "disk"),
    ],
)
def test_meanings(uri: str, server: dict[str, Any], export: str | None) -> None:
    named = {} if export is None else {"export": export}
    assert export_options(uri) == {"driver": "nbd", "server": server, **named}
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
        "nbd:",
        "nbd:host",
        "nbd:/path",
        "nbd://[::1/x",
    ],
)
def test_nonsense(uri: str) -> None:
    assert is_export(uri)
    with pytest.raises(UsageError, match=r"^No valid URL specified$"):
        export_options(uri)
    with pytest.raises(UsageError, match=r"No valid URL specified: write nbd://HOST"):
        file_options(uri)
    with pytest.raises(UsageError, match="need credentials"):
        file_options("nbds://host/x")


def test_files_are_no_uris() -> None:
    assert not any(map(is_export, ("a.raw", "./nbd:/x", "http://x", "./nbd:x", "/nbd+unix/://")))
    assert image_roots(["/"], "nbd://h/x", "a/b.raw") == ("/", "a")
