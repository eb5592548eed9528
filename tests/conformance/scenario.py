"""Recorded dialogues with QEMU's storage daemon, read from `data/transcripts/*.jsonl`.

The format: one header line, then requests (`>`), what the daemon sent (`<`) and notes about the disks. Everything up
to the next request or note belongs to the step that caused it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRANSCRIPTS = Path(__file__).parent / "data" / "transcripts"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A message the daemon sent; `line` counts the lines after the header, as the header's `volatile` paths do."""

    line: int
    message: dict[str, Any]


@dataclass(slots=True)
class Step:
    """A request or a note, the reply to it (requests only) and the events seen until the next step."""

    line: int
    request: dict[str, Any] | None = None
    note: dict[str, Any] | None = None
    reply: Recorded | None = None
    events: list[Recorded] = field(default_factory=list)

    @property
    def at(self) -> int:
        """The step's line in the transcript's file, from 1."""
        return self.line + 2

    @property
    def is_query(self) -> bool:
        """Queries start nothing, so nothing has to settle after them."""
        return self.request is not None and self.request["execute"].startswith("query-")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One transcript: the images it starts from and its steps."""

    name: str
    program: str
    images: list[dict[str, Any]]
    volatile: frozenset[str]
    steps: list[Step]

    @property
    def is_grouped(self) -> bool:
        """Whether jobs settle as a group, which makes the order between jobs part of the contract."""
        return any(step.request and "grouped" in json.dumps(step.request) for step in self.steps)


def load(name: str) -> Scenario:
    """Read the transcript `name`.

    Raises:
        FileNotFoundError: there is no such transcript.
    """
    lines = [json.loads(line) for line in (TRANSCRIPTS / f"{name}.jsonl").read_text().splitlines()]
    header, steps = lines[0], []
    for number, line in enumerate(lines[1:]):
        if ">" in line:
            steps.append(Step(number, request=line[">"]))
        elif "note" in line:
            steps.append(Step(number, note=line["note"]))
        elif "event" in line["<"]:
            steps[-1].events.append(Recorded(number, line["<"]))
        else:
            assert steps[-1].reply is None, f"{name}: two replies to one request at line {number}"
            steps[-1].reply = Recorded(number, line["<"])
    return Scenario(header["scenario"], header["program"], header["images"], frozenset(header["volatile"]), steps)


def names() -> list[str]:
    """All transcripts, sorted."""
    return sorted(path.stem for path in TRANSCRIPTS.glob("*.jsonl"))
