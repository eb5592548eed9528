"""`blockjobs schema`: what our QMP server understands."""

import json

from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.monitor.qapi_text import job_schema
from blockjobs.schema.command import qmp
from blockjobs.schema.introspect import introspect


def schema(*, qapi: bool) -> int:
    """Print what query-qmp-schema answers, or the job schema as QAPI text; returns the exit code."""
    print(job_schema().rstrip() if qapi else json.dumps(introspect(qmp), indent=1))
    return 0
