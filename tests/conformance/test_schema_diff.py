"""Our query-qmp-schema against that of qemu-storage-daemon 7.2.22: each difference has a reason, each reason a use."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from schema_diff import differences

from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.schema.command import qmp
from blockjobs.schema.introspect import introspect

DATA = Path(__file__).parent / "data"


def theirs() -> list[dict[str, Any]]:
    return json.loads((DATA / "qsd-7.2-schema.json").read_text())


def ours() -> list[dict[str, Any]]:
    return introspect(qmp)


def test_every_difference_is_listed_with_a_reason_and_none_is_stale() -> None:
    listed = tomllib.loads((DATA / "schema_differences.toml").read_text())["difference"]
    assert all(len(entry["reason"]) > 10 for entry in listed)
    patterns = {entry["where"]: re.compile(re.escape(entry["where"]).replace(r"\*", ".*")) for entry in listed}
    lines = differences(ours(), theirs())
    unlisted = [line for line in lines if not any(pattern.fullmatch(line) for pattern in patterns.values())]
    assert unlisted == []
    soon = {entry["where"] for entry in listed if entry.get("soon")}
    stale = {where for where, pattern in patterns.items() if not any(map(pattern.fullmatch, lines))}
    assert stale <= soon


def test_the_list_is_complete_in_itself() -> None:
    infos = ours()
    names = [info["name"] for info in infos]
    assert len(names) == len(set(names))
    used = {"0"}
    for info in infos:
        used |= {info[key] for key in ("arg-type", "ret-type", "element-type") if key in info}
        used |= {member["type"] for member in info.get("members", ()) if "type" in member}
        used |= {variant["type"] for variant in info.get("variants", ())}
    assert used <= set(names)
    masked = [info["name"] for info in infos if info["meta-type"] in ("object", "enum", "alternate")]
    assert all(name.isdigit() for name in masked)
    assert {info["name"]: info for info in infos}["0"] == {"name": "0", "meta-type": "object", "members": []}


def test_the_differ_finds_what_differs() -> None:
    def schema(**changes: Any) -> list[dict[str, Any]]:
        member = {"name": "a", "type": "1", **changes.get("member", {})}
        return [
            {"name": "f", "meta-type": "command", "arg-type": "2", "ret-type": "[1]"},
            {"name": "E", "meta-type": "event", "arg-type": "3"},
            {"name": "1", "meta-type": "enum", "members": [{"name": value} for value in changes.get("values", "xy")]},
            {"name": "[1]", "meta-type": "array", "element-type": "1"},
            {
                "name": "2",
                "meta-type": "object",
                "members": [member],
                "tag": "a",
                "variants": [{"case": "x", "type": "3"}],
            },
            {"name": "3", "meta-type": "object", "members": [{"name": "up", "type": "4"}]},
            {"name": "4", "meta-type": "alternate", "members": [{"type": each} for each in changes.get("alt", ["2"])]},
            {"name": "str", "meta-type": "builtin", "json-type": "string"},
            {"name": "int", "meta-type": "builtin", "json-type": "int"},
        ]

    base = schema()
    assert differences(base, base) == []
    assert differences(schema(values="xyz"), base) == [
        "E.up.a adds value z",
        "f->[] adds value z",
        "f.a adds value z",
    ]
    assert differences(schema(values="x"), base)[-1] == "f.a lacks value y"
    assert "f.a is optional" in differences(schema(member={"default": None}), base)
    assert "f.a has other features" in differences(schema(member={"features": ["unstable"]}), base)
    assert "f.a is str, not enum" in differences(schema(member={"type": "str"}), base)
    assert "f[x].up adds branch str" in differences(schema(alt=["2", "str"]), base)
    assert differences([*base, {"name": "g", "meta-type": "event", "arg-type": "3"}], base) == ["g is not QEMU's"]
    assert differences(base[1:], base) == ["f is missing"]
