"""Authorisation lists: first match decides; globs behave as the installed qemu-nbd's did (probed)."""

import json
from pathlib import Path

import pytest

from blockjobs.base.clock import SystemClock
from blockjobs.base.errors import UsageError
from blockjobs.block.authz import Authorizer, authorizer
from blockjobs.block.objects import AnyObjectOptions, Secret, add_object
from blockjobs.schema.command import convert

ALICE = "C=GB,O=Example\\, Home \\+ Co,CN=client é 1"


def build(kind: str, **members: object) -> Authorizer:
    objects: dict[str, object] = {}
    add_object(objects, convert({"qom-type": kind, "id": "a", **members}, AnyObjectOptions), SystemClock())
    found = authorizer(objects, "a")
    assert found is not None
    return found


def test_nobody_is_allowed_unless_said_otherwise() -> None:
    assert not build("authz-list").is_allowed(ALICE)
    assert build("authz-list", policy="allow").is_allowed(ALICE)
    assert authorizer({"a": Secret(b"")}, "a") is None
    assert authorizer({}, "a") is None


def test_the_first_match_decides() -> None:
    rules = [
        {"match": "CN=eve", "policy": "deny"},
        {"match": "CN=*", "policy": "allow", "format": "glob"},
        {"match": "CN=*", "policy": "deny", "format": "glob"},
    ]
    gate = build("authz-list", rules=rules)
    assert [gate.is_allowed(name) for name in ("CN=eve", "CN=bob", "O=x", "CN=", "cn=bob")] == [
        False,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("*CN=client ? 1", True),
        ("*CN=client ?? 1", False),
        ("[C]=GB*", False),
        ("*Example\\, Home*", True),
        ("*Example\\\\, Home*", False),
        ("C=GB?O=*", True),
        ("*", True),
        ("", False),
        ("C=GB", False),
        ("*1", True),
        ("*1*1", False),
        ("**C=*GB*1*", True),
    ],
)
def test_globs(pattern: str, matches: bool) -> None:
    rules = [{"match": pattern, "policy": "allow", "format": "glob"}]
    assert build("authz-list", rules=rules).is_allowed(ALICE) is matches


def test_a_glob_of_many_stars_takes_no_time() -> None:
    rules = [{"match": "*a" * 200 + "b", "policy": "allow", "format": "glob"}]
    assert not build("authz-list", rules=rules).is_allowed("a" * 5000)


def test_a_file_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text(json.dumps({"rules": [{"match": ALICE, "policy": "allow"}]}))
    gate = build("authz-list-file", filename=str(path))
    once = build("authz-list-file", filename=str(path), refresh=False)
    assert gate.is_allowed(ALICE)
    path.write_text('{"policy": "deny"}')
    assert not gate.is_allowed(ALICE)
    assert once.is_allowed(ALICE)
    path.write_text("oops")
    assert not gate.is_allowed(ALICE)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "not JSON"),
        ('{"policy":"deny"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"policy":"maybe"}', "Parameter 'policy' does not accept value 'maybe'"),
        ('{"foo":1}', "Parameter 'foo' is unexpected"),
        ('{"rules":[{"match":"x"}]}', "Parameter 'rules[0].policy' is missing"),
    ],
)
def test_a_file_that_holds_no_rules(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "rules"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        build("authz-list-file", filename=str(path))
    assert str(caught.value).startswith(f"Unable to read {path}: {complaint}")
    path.unlink()
    with pytest.raises(UsageError, match=f"Unable to read {path}: No such file or directory"):
        build("authz-list-file", filename=str(path))
