"""The pictures of a run as one SVG: the ratios with their spread, and how a backup's time grows."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from growth import Curve
from rows import Row

mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "blockjobs",
        "svg.fonttype": "none",
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)

OURS, PEER, PROMISE = "#1f6f8b", "#b0b0b0", "#c0392b"


def draw(path: Path, rows: Sequence[Row], curves: Sequence[Curve], caption: str) -> None:
    """Write the picture; `caption` says when and where it was measured."""
    from matplotlib import pyplot

    height = 1.2 + 0.17 * len(rows)
    figure = pyplot.figure(figsize=(10, height + (3 if curves else 0)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(height, 3)) if curves else (figure, None)
    _ratios(upper.subplots(), rows)
    if lower is not None:
        for axes, curve in zip(lower.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            _growth(axes, curve)
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _ratios(axes: "mpl.axes.Axes", rows: Sequence[Row]) -> None:
    """A bar from 1 for each row, on a logarithmic axis: right of 1 we are faster; a tick where the promise is."""
    places = range(len(rows), 0, -1)
    for at, row in zip(places, rows, strict=True):
        axes.barh(at, row.median - 1, left=1, height=0.7, color=OURS if row.median >= 1 else PEER)
        axes.plot((min(row.ratios), max(row.ratios)), (at, at), color="black", linewidth=0.8)
        if row.at_least is not None:
            axes.plot((row.at_least, row.at_least), (at - 0.45, at + 0.45), color=PROMISE, linewidth=1.4)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_yticks(list(places), [f"{row.operation}  ({row.peer})" for row in rows])
    axes.set_ylim(0.3, len(rows) + 0.7)
    marks = [mark for mark in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if mark <= 2 * max(row.median for row in rows)]
    axes.set_xticks(marks, [f"{mark:g}x" for mark in marks])
    axes.minorticks_off()
    axes.set_xlabel("speed against the peer's: median, least to most (black), promised (red)")


def _growth(axes: "mpl.axes.Axes", curve: Curve) -> None:
    places = [point.at for point in curve.points]
    axes.plot(places, [point.ours_s for point in curve.points], "o-", color=OURS, markersize=3, label="blockjobs")
    axes.plot(
        places, [point.peer_s for point in curve.points], "s-", color=PEER, markersize=3, label="qemu-storage-daemon"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(f"backup: {curve.title}", fontsize=8)
    axes.set_xlabel(curve.axis)
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, fontsize=7)
