"""The job schema as QAPI text says what QEMU's own schema says."""

from __future__ import annotations

import ast
import re
from typing import Any

from test_schema_diff import theirs

from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.monitor.qapi_text import job_schema


def parse(text: str) -> dict[str, dict[str, Any]]:
    """Definitions by name; QAPI's expressions are Python literals once comments are gone."""
    plain = re.sub(r"#.*", "", text)
    found = {}
    for piece in re.split(r"\n(?=\{)", plain):
        if piece.strip():
            definition = ast.literal_eval(piece.strip())
            kind = next(iter(definition))
            found[definition[kind]] = {"kind": kind, **{k: v for k, v in definition.items() if k != kind}}
    return found


def test_every_definition_is_documented() -> None:
    text = job_schema()
    for name, definition in parse(text).items():
        comment = text.partition(f"# @{name}:\n")[2].partition("##")[0]
        assert re.search(r"# Since: \d", comment), name
        members = definition.get("data", {})
        for member in members:
            assert f"# @{member.lstrip('*')}:" in comment, (name, member)


def test_it_is_what_qemu_has() -> None:
    ours = parse(job_schema())
    schema = {each["name"]: each for each in theirs()}
    names = ["job-pause", "job-resume", "job-cancel", "job-complete", "job-dismiss", "job-finalize", "query-jobs"]
    assert set(ours) == {"JobType", "JobStatus", "JobVerb", "JOB_STATUS_CHANGE", "JobInfo", *names}
    info = schema[schema[schema["query-jobs"]["ret-type"]]["element-type"]]
    members = {each["name"]: each for each in info["members"]}
    assert {f"*{name}" if "default" in each else name for name, each in members.items()} == set(ours["JobInfo"]["data"])
    enums = {name: {each["name"] for each in schema[members[key]["type"]]["members"]}
             for name, key in (("JobType", "type"), ("JobStatus", "status"))}  # fmt: skip
    for name, words in enums.items():
        assert set(ours[name]["data"]) == words
    assert set(ours["JobVerb"]["data"]) == {
        "cancel", "pause", "resume", "set-speed", "complete", "dismiss", "finalize", "change"
    }  # fmt: skip
    event = schema[schema["JOB_STATUS_CHANGE"]["arg-type"]]
    assert {each["name"] for each in event["members"]} == set(ours["JOB_STATUS_CHANGE"]["data"])
    for name in names[:-1]:
        arguments = schema[schema[name]["arg-type"]]["members"]
        assert {each["name"]: "str" for each in arguments} == ours[name]["data"]
    assert ours["query-jobs"]["returns"] == ["JobInfo"]
