"""The job schema as QAPI text, for those who generate code from such: `blockjobs schema --qapi`."""

from collections.abc import Iterable
from typing import Final

from blockjobs.lifecycle.status import JobStatus, JobVerb
from blockjobs.schema.command import qmp

JOB_TYPES: Final = (
    *("commit", "stream", "mirror", "backup", "create", "amend"),
    *("snapshot-load", "snapshot-save", "snapshot-delete"),
)
"""In QAPI's order. Programs that embed a host add types of their own, which begin with `x-`."""
COMMANDS: Final = ("job-pause", "job-resume", "job-cancel", "job-complete", "job-dismiss", "job-finalize")
_SINCE: Final = {"amend": "5.1", "snapshot-load": "6.0", "snapshot-save": "6.0", "snapshot-delete": "6.0"}


def job_schema() -> str:
    """Enumerations, event, commands and structure of jobs, as QAPI has them."""
    parts = [
        _enum("JobType", "The type of a job.", ((name, _SINCE.get(name)) for name in JOB_TYPES), "1.7"),
        _enum("JobStatus", "Where a job is in its life.", ((each.value, None) for each in JobStatus), "2.12"),
        _enum(
            "JobVerb",
            "What may be asked of a job.",
            ((each.value, "8.2" if each is JobVerb.CHANGE else None) for each in JobVerb),
            "2.12",
        ),
        _block(
            "JOB_STATUS_CHANGE",
            "A job has another status.",
            {"id": "the job's identifier", "status": "its status now"},
            "3.0",
            "{ 'event': 'JOB_STATUS_CHANGE',\n  'data': { 'id': 'str',\n            'status': 'JobStatus' } }",
        ),
        *(_command(name) for name in COMMANDS),
        _block(
            "JobInfo",
            "A job.",
            {
                "id": "its identifier",
                "type": "what it does",
                "status": "where it is in its life",
                "current-progress": "how much is done, in units of its own",
                "total-progress": "how much there is to do, as far as is known",
                "error": "why it failed, if it did",
            },
            "3.0",
            "{ 'struct': 'JobInfo',\n  'data': { 'id': 'str', 'type': 'JobType', 'status': 'JobStatus',\n"
            "            'current-progress': 'int', 'total-progress': 'int',\n            '*error': 'str' } }",
        ),
        _block(
            "query-jobs",
            qmp.commands["query-jobs"].doc.summary,
            {},
            "3.0",
            "{ 'command': 'query-jobs', 'returns': ['JobInfo'] }",
        ),
    ]
    return "\n".join(parts)


def _block(name: str, about: str, members: dict[str, str], since: str, definition: str) -> str:
    lines = ["##", f"# @{name}:", "#", f"# {about}", "#"]
    for member, text in members.items():
        lines += [f"# @{member}: {text}", "#"]
    return "\n".join([*lines, f"# Since: {since}", "##", definition, ""])


def _enum(name: str, about: str, values: Iterable[tuple[str, str | None]], since: str) -> str:
    known = list(values)
    words = ", ".join(f"'{value}'" for value, _ in known)
    members = {value: "" if at is None else f"(since {at})" for value, at in known}
    return _block(name, about, members, since, f"{{ 'enum': '{name}',\n  'data': [ {words} ] }}").replace(": \n", ":\n")


def _command(name: str) -> str:
    definition = f"{{ 'command': '{name}', 'data': {{ 'id': 'str' }} }}"
    return _block(name, qmp.commands[name].doc.summary, {"id": "the job's identifier"}, "3.0", definition)
