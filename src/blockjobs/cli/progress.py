"""How running work is shown: a bar on a terminal, plain lines elsewhere, JSON lines for programs."""

import json
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol, TextIO

from blockjobs.base.units import format_bytes

PLAIN_LINE_S: Final = 2.0
"""A log file wants few lines; a person who pipes to `cat` still sees movement."""
JSON_LINE_S: Final = 0.5
NOTHING_MORE: Final[Mapping[str, Any]] = MappingProxyType({})
RATE_WINDOW_S: Final = 5.0
"""Rates and ETAs come from the last seconds, so that a pause or a new limit shows soon."""


class Meter:
    """Rate and time left, from samples of progress."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []
        self.current = self.total = 0

    def take(self, current: int, total: int, now_s: float) -> None:
        """Note that `current` of `total` bytes were done at `now_s`."""
        self.current, self.total = current, total
        self._samples.append((now_s, current))
        while len(self._samples) > 2 and self._samples[0][0] < now_s - RATE_WINDOW_S:
            self._samples.pop(0)

    @property
    def percent(self) -> float:
        """0 to 100; 0 as long as nothing is known."""
        return 100.0 * self.current / self.total if self.total else 0.0

    @property
    def rate_bytes_per_s(self) -> float:
        """Over the last seconds."""
        if len(self._samples) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate; None if nothing moves."""
        rate = self.rate_bytes_per_s
        return (self.total - self.current) / rate if rate > 0 else None


def format_seconds(seconds: float | None) -> str:
    """`1:02:03`, `2:03`; `-:--` if unknown."""
    if seconds is None or seconds > 360_000:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class View(Protocol):
    """Shows one job; used as a context manager."""

    def __enter__(self) -> "View": ...
    def __exit__(self, *exc: object) -> None: ...

    def show(self, status: str, current: int, total: int, more: Mapping[str, Any] = NOTHING_MORE) -> None:
        """The job is in `status`, with `current` of `total` bytes done. Call it as often as you like.

        Args:
            more: what a mirror knows besides: `remaining` bytes, completed `passes`, seconds until `ready-in` (None:
                never at this rate).
        """
        ...

    def done(self, outcome: dict[str, Any]) -> None:
        """The job has ended; `outcome` has id, type, status, error (or None), current, total and seconds."""
        ...


class PlainView:
    """A line at each change of status and every two seconds."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self._label, self._stream = label, stream
        self._meter = Meter()
        self._last_s = 0.0
        self._status = ""

    def __enter__(self) -> "PlainView":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.flush()

    def show(self, status: str, current: int, total: int, more: Mapping[str, Any] = NOTHING_MORE) -> None:
        """See `View`."""
        now_s = time.monotonic()
        self._meter.take(current, total, now_s)
        if status == self._status and now_s - self._last_s < PLAIN_LINE_S:
            return
        self._status, self._last_s = status, now_s
        rate = f"{format_bytes(int(self._meter.rate_bytes_per_s))}/s"
        line = f"{self._label}: {self._meter.percent:.0f}% of {format_bytes(total)}, {rate}, "
        eta = "" if more else f"ETA {format_seconds(self._meter.eta_s)}, "
        print(f"{line}{eta}{status}{mirror_words(more)}", file=self._stream, flush=True)

    def done(self, outcome: dict[str, Any]) -> None:
        """See `View`."""
        print(f"{self._label}: {summary(outcome)}", file=self._stream, flush=True)


class JsonView:
    """A JSON object a line: `{"event": "progress", ...}` and at the end `{"event": "outcome", ...}`."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self._label, self._stream = label, stream
        self._last_s = 0.0
        self._status = ""

    def __enter__(self) -> "JsonView":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.flush()

    def show(self, status: str, current: int, total: int, more: Mapping[str, Any] = NOTHING_MORE) -> None:
        """See `View`."""
        now_s = time.monotonic()
        if status == self._status and now_s - self._last_s < JSON_LINE_S:
            return
        self._status, self._last_s = status, now_s
        line = {"event": "progress", "id": self._label, "status": status, "current": current, "total": total}
        self._write({**line, **more})

    def done(self, outcome: dict[str, Any]) -> None:
        """See `View`."""
        self._write({"event": "outcome", **outcome})

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._stream, flush=True)


class BarView:
    """A progress bar with percent, rate and time left."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}  ETA {task.fields[eta]}  {task.fields[status]}"),
        )
        self._label = label
        self._meter = Meter()
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(label, total=None, rate="", eta="-:--", status="")

    def __enter__(self) -> "BarView":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def show(self, status: str, current: int, total: int, more: Mapping[str, Any] = NOTHING_MORE) -> None:
        """See `View`."""
        self._meter.take(current, total, time.monotonic())
        self._progress.update(
            self._task,
            completed=current,
            total=total or None,
            rate=f"{format_bytes(int(self._meter.rate_bytes_per_s))}/s",
            eta=format_seconds(more["ready-in"] if more else self._meter.eta_s),
            status=f"{status}{mirror_words(more)}",
        )

    def done(self, outcome: dict[str, Any]) -> None:
        """See `View`."""
        self._progress.stop()
        print(f"{self._label}: {summary(outcome)}", file=sys.stderr)


def mirror_words(more: Mapping[str, Any]) -> str:
    """What a mirror that is not ready knows, for people: how much is left, and whether it catches up."""
    if not more.get("remaining"):
        return ""
    left = f", {format_bytes(more['remaining'])} left"
    if more["passes"]:
        left += f" after {more['passes']} pass{'es' if more['passes'] > 1 else ''}"
    if more["ready-in"] is None:
        return f"{left}, not catching up"
    return f"{left}, ready in {format_seconds(more['ready-in'])}"


def summary(outcome: dict[str, Any]) -> str:
    """One line on how a job ended."""
    if outcome.get("error"):
        return "cancelled" if outcome.get("fate") == "cancelled" else f"failed: {outcome['error']}"
    amount = format_bytes(outcome["current"])
    seconds = outcome.get("seconds")
    if not seconds:  # somebody else's job, seen from the middle on
        return f"done, {amount}"
    return f"done, {amount} in {seconds:.1f} s, {format_bytes(int(outcome['current'] / seconds))}/s"


class NoView:
    """Shows nothing."""

    def __enter__(self) -> "NoView":
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to take down."""

    def show(self, status: str, current: int, total: int, more: Mapping[str, Any] = NOTHING_MORE) -> None:
        """See `View`."""

    def done(self, outcome: dict[str, Any]) -> None:
        """See `View`."""


def choose_view(label: str, *, as_json: bool, quiet: bool = False) -> View:
    """The view that fits where the output goes: JSON on request, a bar on a terminal, else plain lines."""
    if as_json:
        return JsonView(label, sys.stdout)
    if sys.stderr.isatty() and not quiet:
        return BarView(label)
    return PlainView(label, sys.stderr)
