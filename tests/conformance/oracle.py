"""Plays a recorded scenario against any storage daemon and says where it differs from QEMU."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare import Comparison, by_stream, event_differences, status_of, stream_of
from notes import note_differences
from player import OURS, Daemon, Silence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from images import ImageStore
    from player import Program
    from scenario import Scenario, Step

QUIET_S = 0.04
"""How long a step with a live job is listened to after the last expected message; the recording did the same."""

UNTOLD_QUIET_S = 0.15
"""As QUIET_S, where work that no event tells of must be over before the next request, as it was in the recording.

That is so after a write from outside, as a ready mirror looks for new dirty areas every 100 ms.
"""

ENDED_AFTER_A_CHUNK = frozenset({"quit_with_jobs"})
"""Scenarios that end a very slow job behind its start, and see how far it came: its first chunk is untold work."""

STILL_STATUSES = frozenset({"waiting", "pending", "concluded", "null"})
"""Statuses a job leaves only because of a command or another job, so that nothing need be awaited."""


CHANCE: dict[str, frozenset[str]] = {
    # The recording asked before the first chunk was done; a faster disk answers after it.
    "set_speed": frozenset({"15.<.return[0].offset"}),
}
"""Values that depend on the speed of the machine, by scenario; as `volatile` in the headers."""

_READS = ("rd_bytes", "rd_operations", "rd_total_time_ns")

ON_PURPOSE: dict[str, frozenset[str]] = {
    # QEMU counts the requests of guest devices only, which a storage daemon has none of. We count those of nodes.
    "nodes": frozenset(f"87.<.return[{place}.stats.{name}" for place in ("0]", "1].parent") for name in _READS),
    # QEMU 7.2 lets a chunk of a throttled stream through at each drain, and the file has grown by it. Since 8.1 a job
    # waits until its next chunk is due, and so do we (spec/since-7.2.md).
    "validate_stream": frozenset({"49.<.return[2].image.virtual-size", "event BLOCK_JOB_CANCELLED.data.offset"}),
}
"""Values in which we do better, by scenario."""

NOTES_ON_PURPOSE: dict[str, tuple[str, str]] = {
    # QEMU leaves a base writable after a soft cancel that was read-only before; we put it back (spec/jobs.md §2).
    "graph_commit_active_cancel": ("-> base[qcow2/rw]", "-> base[qcow2/ro]"),
}
"""What a note says in the recording, and what it says of us, by scenario."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run went: up to the first step that differed, as what follows would only be a consequence."""

    scenario: Scenario
    comparison: Comparison
    heard: list[list[dict[str, Any]]]
    """The events of each step that was played."""
    stopped_at: int | None
    """The line (in the transcript's file) of the first step whose reply differed or that fell silent."""
    found: list[str]
    """What was wrong there."""
    ending: list[str]
    """What was wrong with the daemon's own end."""

    def differences(self, *, before: int | None = None) -> list[str]:
        """Where the daemon behaved unlike QEMU; empty if nowhere.

        Args:
            before: leave out the steps from this line on.
        """
        steps = [step for step in self.scenario.steps[: len(self.heard)] if before is None or step.at < before]
        told = list(self.ending)
        if self.stopped_at is not None and (before is None or self.stopped_at < before):
            told += self.found
        told += event_differences(steps, self.heard[: len(steps)], self.comparison, grouped=self.scenario.is_grouped)
        return told


def play(scenario: Scenario, program: Program, store: ImageStore, *, step_s_max: float = 10.0) -> Outcome:
    """Run one scenario in a fresh directory.

    Args:
        scenario: the recording.
        program: the daemon to start.
        store: where the images come from.
        step_s_max: how many seconds a step's messages may take to arrive.

    Raises:
        Silence: the daemon did not start.
        subprocess.TimeoutExpired: it did not stop when told to.
    """
    with tempfile.TemporaryDirectory(prefix="bj-") as name, ExitStack() as stack:
        directory = Path(name)
        store.place(scenario, directory)
        holder = stack.enter_context(ImageHolder("a.img", directory)) if scenario.name == "locks" else None
        with Daemon(program, directory) as daemon:
            run = Run(scenario, daemon, directory, step_s_max, holder, is_ours=program is OURS)
            stopped_at, found = run.play()
        ending = []
        if daemon.process.returncode != 0:
            ending.append(f"exit code {daemon.process.returncode}")
        if "Traceback" in daemon.stderr:
            ending.append(f"stderr: {daemon.stderr}")
        return Outcome(scenario, run.comparison, run.heard, stopped_at, found, ending)


class ImageHolder:
    """Another process, qemu-io, with an image open; for writing unless `options` say otherwise."""

    RELEASED_BEFORE = '"node-name": "g"'
    """The request of `locks` before which the recording let go of the image."""

    def __init__(self, image: str, directory: Path, *options: str) -> None:
        self._process = subprocess.Popen(
            ["qemu-io", "-f", "qcow2", *options, image], cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> ImageHolder:
        assert self._process.stdout is not None
        assert self._process.stdout.read(8) == b"qemu-io>"  # the prompt: the image is open now
        return self

    def release(self) -> None:
        """Close the image and wait until the process is gone."""
        self._process.communicate(b"quit\n")

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self.release()


class Run:
    """One scenario under way against one daemon."""

    def __init__(
        self,
        scenario: Scenario,
        daemon: Daemon,
        directory: Path,
        step_s_max: float,
        holder: ImageHolder | None,
        *,
        is_ours: bool,
    ) -> None:
        self._scenario, self._daemon, self._directory, self._is_ours = scenario, daemon, directory, is_ours
        self._step_s_max, self._holder = step_s_max, holder
        self._status: dict[str, str] = {}
        self.comparison = Comparison(
            scenario.volatile | CHANCE.get(scenario.name, frozenset()) | ON_PURPOSE.get(scenario.name, frozenset())
        )
        self.heard: list[list[dict[str, Any]]] = []

    def play(self) -> tuple[int | None, list[str]]:
        """Play the steps up to the first that differs; return its line and what was wrong."""
        for step in self._scenario.steps:
            self.heard.append([])
            try:
                found = list(self._play(step))
            except Silence as silence:
                found = [str(silence)]
            if found:
                return step.at, [f"at line {step.at}, {json.dumps(step.request or step.note)[:200]}", *found]
        return None, []

    def _play(self, step: Step) -> Iterator[str]:
        if step.note is not None:
            note = step.note
            if self._is_ours and self._scenario.name in NOTES_ON_PURPOSE:
                note = json.loads(json.dumps(note).replace(*NOTES_ON_PURPOSE[self._scenario.name]))
            yield from note_differences(note, self._daemon.qmp, self._directory, self.heard[-1])
        else:
            assert step.request is not None
            if self._holder and ImageHolder.RELEASED_BEFORE in json.dumps(step.request):
                self._holder.release()
            self._daemon.qmp.send(self.comparison.translate(step.request))
        reply = self._listen(step)
        if step.reply is not None:
            assert reply is not None
            yield from self.comparison.differences(step.reply.message, reply, f"{step.reply.line}.<")

    def _listen(self, step: Step) -> dict[str, Any] | None:
        """Hear a step out: its reply, the events the recording has, then quiet where a job is at work."""
        events, reply = self.heard[-1], None
        missing = Missing(step)
        deadline = time.monotonic() + self._step_s_max
        while (reply is None and step.reply is not None) or missing.after(events):
            message = self._daemon.qmp.hear(wait_s=max(0.0, deadline - time.monotonic()))
            if message is None:
                what = "no reply" if reply is None and step.reply else f"still missing: {missing.after(events)}"
                raise Silence(f"after {self._step_s_max} s {what}")
            if "event" in message:
                events.append(message)
            else:
                assert reply is None, f"a second reply: {message}"
                reply = message
                assert step.reply is not None
                if "error" in reply and "error" not in step.reply.message:
                    return reply  # what was refused brings no events to wait for
        self._status.update(
            (stream_of(item.message), status) for item in step.events if (status := status_of(item.message))
        )
        if not step.is_query and set(self._status.values()) - STILL_STATUSES:
            is_untold = step.note is not None or self._scenario.name in ENDED_AFTER_A_CHUNK
            quiet_s = UNTOLD_QUIET_S if is_untold else QUIET_S
            while (message := self._daemon.qmp.hear(wait_s=quiet_s)) is not None:
                events.append(message)
        return reply


class Missing:
    """Which streams of a step have not yet brought as many events as the recording has."""

    def __init__(self, step: Step) -> None:
        self._recorded = by_stream(item.message for item in step.events)

    def after(self, heard: list[dict[str, Any]]) -> list[str]:
        """Name the streams that are short after `heard`."""
        if not self._recorded:
            return []
        streams = by_stream(heard)
        return [stream for stream, events in self._recorded.items() if len(streams.get(stream, [])) < len(events)]
