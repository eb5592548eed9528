"""The pictures of a run as one SVG: the ratios with their spread, suite by suite, and how a backup's time grows."""

import statistics
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
from growth import Curve
from publication import Results, occasions
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

OURS, PEER, PROMISE, ELSEWHERE = "#1f6f8b", "#b0b0b0", "#c0392b", "#e69f00"
ROW_INCHES, GAP = 0.17, 0.8
"""Of the paper for a row, and of rows between one suite and the next."""
MARKS = (1 / 64, 1 / 16, 0.25, 0.5, 1, 2, 4, 8, 16, 64, 256)


def draw(path: Path, results: Results) -> None:
    """Write the picture; above it stands when and where it was measured."""
    from matplotlib import pyplot

    groups = grouped(results)
    height = 1.4 + ROW_INCHES * (sum(map(len, groups.values())) + GAP * len(groups))
    curves = results.growth
    figure = pyplot.figure(figsize=(10, height + (3 if curves else 0)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(height, 3)) if curves else (figure, None)
    _ratios(upper.subplots(), groups)
    if lower is not None:
        for axes, curve in zip(lower.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            _growth(axes, curve)
    figure.suptitle(f"blockjobs. {occasions(results)}", fontsize=8, wrap=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def grouped(results: Results) -> dict[str, list[list[Row]]]:
    """For each suite its lines: the row of the usual place, if there is one, and those of the same from elsewhere."""
    found: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for suite, figures in groupby(results.figures, lambda each: each.suite.partition(" on ")[0]):
        lines = found.setdefault(suite, {})
        for figure in figures:
            lines.setdefault((figure.row.operation, figure.row.peer), []).append(figure.row)
    return {suite: list(lines.values()) for suite, lines in found.items()}


def _ratios(axes: "mpl.axes.Axes", groups: dict[str, list[list[Row]]]) -> None:
    """A bar from 1 for each line, on a logarithmic axis: right of 1 we are faster; a tick where the promise is."""
    at, places, names = 0.0, [], []
    for lines in groups.values():
        for line in lines:
            for row in line:
                _one(axes, at, row)
            places.append(at)
            names.append(f"{line[0].operation}  ({line[0].peer})")
            at -= 1
        at -= GAP
    ratios = [row.median for lines in groups.values() for line in lines for row in line] or [1.0]
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.6)
    marks = [mark for mark in MARKS if min(ratios) / 2 <= mark <= 2 * max(ratios)]
    axes.set_xticks(marks, [f"{mark:g}x" if mark >= 1 else f"1/{1 / mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_yticks(places, names)
    axes.set_ylim(at + GAP + 0.3, 0.7)
    for top in (False, True):
        axes.tick_params(axis="x", top=top, labeltop=top)
    folders = sorted({row.folder for lines in groups.values() for line in lines for row in line if row.folder})
    more = f"\norange: the same on {', '.join(folders)}" if folders else ""
    axes.set_xlabel(
        f"speed against the peer's: median (bar), least to most (line), promised (red); "
        f"circle: neither waits for the disk, square: both do{more}"
    )


def _one(axes: "mpl.axes.Axes", at: float, row: Row) -> None:
    """A bar; of another folder a mark, with its spread a little below."""
    if row.folder:
        axes.plot((min(row.ratios), max(row.ratios)), (at - 0.25, at - 0.25), color=ELSEWHERE, linewidth=0.8)
        axes.plot((row.median,), (at - 0.25,), "D", color=ELSEWHERE, markersize=3)
        return
    axes.barh(at, row.median - 1, left=1, height=0.7, color=OURS if row.median >= 1 else PEER)
    axes.plot((min(row.ratios), max(row.ratios)), (at, at), color="black", linewidth=0.8)
    if row.at_least is not None:
        axes.plot((row.at_least, row.at_least), (at - 0.45, at + 0.45), color=PROMISE, linewidth=1.4)
    for ratios, marker in ((row.lazy, "o"), (row.durable, "s")):
        if ratios and (row.lazy or statistics.median(ratios) != row.median):
            axes.plot((statistics.median(ratios),), (at,), marker, color="black", fillstyle="none", markersize=3.5)


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
