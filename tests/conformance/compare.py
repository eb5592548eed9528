"""Compares what a daemon said with what QEMU said, leaving out what no two runs share.

Replies are compared member by member; events as one ordered list per job. Where an event stands relative to a reply,
or to another job's events, is chance, except that a group of jobs settles in one promised order.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from scenario import Step

MASKED_MEMBERS = frozenset(
    {"actual-size", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec", "timestamp", "vm-state-size"}
)
"""Clocks, and the space a file takes, which is the file system's affair."""

ADDED_MEMBERS = frozenset({"active", "children", "actively-synced"})
"""Members later versions of QEMU added to replies (BlockDeviceInfo in 10.0 and 10.1, BlockJobInfo in 8.2)."""

AUTO_NAME = re.compile(r"#block\d+")
SETTLING_EVENTS = frozenset({"BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"})
SETTLING_STATUSES = frozenset({"pending", "aborting", "concluded", "null"})
DRAIN_PAIRS = frozenset({("paused", "running"), ("standby", "ready")})


class Comparison:
    """Compares values and learns how the run at hand calls the nodes that got automatic names."""

    def __init__(self, volatile: frozenset[str] = frozenset()) -> None:
        self._volatile = volatile
        self._heard_name: dict[str, str] = {}

    def translate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Replace automatic node names of the recording by those of this run."""
        text = AUTO_NAME.sub(lambda match: self._heard_name.get(match[0], match[0]), json.dumps(request))
        translated: dict[str, Any] = json.loads(text)
        return translated

    def differences(self, recorded: Any, heard: Any, path: str) -> Iterator[str]:
        """Say where two values differ, one line each, `path` first."""
        if path in self._volatile and not isinstance(recorded, str):
            return
        match recorded, heard:
            case dict(), dict():
                yield from self._members(recorded, heard, path)
            case list(), list() if len(recorded) == len(heard):
                for index, (left, right) in enumerate(zip(recorded, heard, strict=True)):
                    yield from self.differences(left, right, f"{path}[{index}]")
            case str(), str():
                yield from self._text(recorded, heard, path)
            case _:
                if type(recorded) is not type(heard) or recorded != heard:
                    yield f"{path}: recorded {json.dumps(recorded)}, heard {json.dumps(heard)}"

    def _members(self, recorded: dict[str, Any], heard: dict[str, Any], path: str) -> Iterator[str]:
        for name in recorded.keys() - heard.keys():
            yield f"{path}.{name}: recorded {json.dumps(recorded[name])}, not heard"
        for name in heard.keys() - recorded.keys() - ADDED_MEMBERS:
            yield f"{path}.{name}: not recorded, heard {json.dumps(heard[name])}"
        for name in recorded.keys() & heard.keys():
            if name not in MASKED_MEMBERS:
                yield from self.differences(recorded[name], heard[name], f"{path}.{name}")

    def _text(self, recorded: str, heard: str, path: str) -> Iterator[str]:
        if AUTO_NAME.fullmatch(recorded) and AUTO_NAME.fullmatch(heard):
            self._heard_name[recorded] = heard
            return
        recorded, heard = AUTO_NAME.sub("#auto", recorded), AUTO_NAME.sub("#auto", heard)
        if recorded.startswith("json:") and heard.startswith("json:"):
            yield from self.differences(json.loads(recorded[5:]), json.loads(heard[5:]), f"{path}(json)")
        elif recorded != heard:
            yield f"{path}: recorded {recorded!r}, heard {heard!r}"


def stream_of(event: dict[str, Any]) -> str:
    """The job an event tells of; the event's name where it tells of none."""
    name, facts = event["event"], event.get("data", {})
    if name == "JOB_STATUS_CHANGE" or name.startswith("BLOCK_JOB_"):
        return f"job {facts.get('id', facts.get('device'))}"
    return str(name)


def without_repeated_pairs(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep one of several paused/running (standby/ready) pairs in a row within one step.

    A drained section that begins while a job works may or may not show as a pair, and nested ones multiply them; how
    many there are is chance, that there was one is not. That holds too if the job became ready between two of them.
    """
    kept: list[dict[str, Any]] = []
    for event in events:
        kept.append(event)
        statuses = tuple(status_of(item) for item in kept[-6:])
        is_repeated = len(statuses) >= 4 and statuses[-4:-2] == statuses[-2:] and statuses[-2:] in DRAIN_PAIRS
        if is_repeated or statuses == ("paused", "running", "ready", None, "standby", "ready"):
            del kept[-2:]
    return kept


def status_of(event: dict[str, Any]) -> str | None:
    """The new status in a JOB_STATUS_CHANGE; None for other events."""
    return str(event["data"]["status"]) if event["event"] == "JOB_STATUS_CHANGE" else None


def by_stream(events: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Split one step's events into streams, repeated drain pairs folded."""
    streams: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        streams[stream_of(event)].append(event)
    return {stream: without_repeated_pairs(members) for stream, members in streams.items()}


def event_differences(
    steps: list[Step], heard_by_step: list[list[dict[str, Any]]], comparison: Comparison, *, grouped: bool
) -> Iterator[str]:
    """Compare the events of a run, stream by stream.

    Args:
        steps: the steps that were played.
        heard_by_step: the events that arrived during each of them.
        comparison: the one used for the replies of this run.
        grouped: jobs settle as a group, so compare their common order too.
    """
    recorded_by_step = [[item.message for item in step.events] for step in steps]
    recorded, heard = _joined(recorded_by_step), _joined(heard_by_step)
    for stream in sorted(recorded.keys() | heard.keys()):
        yield from _ordered(recorded.get(stream, []), heard.get(stream, []), stream, comparison)
    if grouped:
        order = [_settling(events) for events in (recorded_by_step, heard_by_step)]
        if order[0] != order[1]:
            yield f"order of settling: recorded {order[0]}, heard {order[1]}"


def _joined(events_by_step: list[list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    joined: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for events in events_by_step:
        for stream, members in by_stream(events).items():
            joined[stream] += members
    return joined


def _ordered(
    recorded: list[dict[str, Any]], heard: list[dict[str, Any]], stream: str, comparison: Comparison
) -> Iterator[str]:
    if [_headline(event) for event in recorded] != [_headline(event) for event in heard]:
        left, right = (" ".join(_headline(event) for event in events) for events in (recorded, heard))
        yield f"events of {stream}:\n    recorded {left}\n    heard    {right}"
        return
    for left, right in zip(recorded, heard, strict=True):
        yield from comparison.differences(left, right, f"event {_headline(left)}")


def _headline(event: dict[str, Any]) -> str:
    return status_of(event) or str(event["event"])


def _settling(events_by_step: list[list[dict[str, Any]]]) -> list[str]:
    return [
        f"{stream_of(event)} {_headline(event)}"
        for events in events_by_step
        for event in events
        if event["event"] in SETTLING_EVENTS or status_of(event) in SETTLING_STATUSES
    ]
