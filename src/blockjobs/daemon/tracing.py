"""`--trace`: which trace points tell, and where to."""

import importlib
import logging
import time
from typing import Final

from blockjobs.base.errors import UsageError, error_text
from blockjobs.base.trace import PREFIX, switch_points, trace_points
from blockjobs.schema.keyval import parse_members

_LATE_HOMES: Final = ("blockjobs.export.connection", "blockjobs.lifecycle.engine", "blockjobs.monitor.session")
"""Modules with trace points that may not be loaded when `--trace` is read."""


def start_tracing(value: str) -> list[str]:
    """Do what an option `[[enable=]<pattern>][,events=<file>][,file=<file>]` says.

    Args:
        value: events holds a pattern a line, with comments after `#`; what is told goes to `file`, or to stderr.

    Returns:
        Warnings.

    Raises:
        UsageError: a file cannot be read or written, or there is no such member.
    """
    members = parse_members(value, implied="enable")
    for name in members:
        if name not in ("enable", "events", "file"):
            raise UsageError(f"Invalid parameter '{name}'")
    patterns = [members["enable"]] if "enable" in members else []
    if "events" in members:
        patterns += _patterns_in(members["events"])
    _send_to(members.get("file"))
    _load_points()
    return [f"warning: trace event '{pattern}' does not exist" for pattern in patterns if not switch_points(pattern)]


def trace_help() -> str:
    """A line for each trace point."""
    _load_points()
    points = list(trace_points())
    width = max(len(point.name) for point in points)
    return "".join(f"{point.name:{width}}  {point.about}\n" for point in points)


def _load_points() -> None:
    for home in _LATE_HOMES:
        importlib.import_module(home)


def _patterns_in(path: str) -> list[str]:
    try:
        with open(path) as file:
            lines = [line.partition("#")[0].strip() for line in file]
    except OSError as error:
        raise UsageError(f"{path}: {error_text(error.errno or 0)}") from error
    return [line for line in lines if line]


def _send_to(path: str | None) -> None:
    logger = logging.getLogger(PREFIX.rstrip("."))
    handler: logging.Handler = logging.StreamHandler()
    if path is not None:
        try:
            handler = logging.FileHandler(path)
        except OSError as error:
            raise UsageError(f"Error opening logfile {path}: {error_text(error.errno or 0)}") from error
    elif logger.handlers:
        return  # an earlier option said where to
    formatter = logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    for earlier in logger.handlers[:]:
        logger.removeHandler(earlier)
        earlier.close()
    logger.addHandler(handler)
    logger.propagate = False
