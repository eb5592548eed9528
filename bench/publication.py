"""What has been measured, each row with its suite, day and machine: kept as JSON, shown as a table in the README.

A suite can be measured again by itself: its rows take the places of those of before, and all others stay.
"""

import json
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from growth import Curve, Point
from rows import Row

BEGIN, END = "<!-- figures of make bench -->\n", "<!-- end of figures -->\n"
HEAD = (
    "| operation | peer | ours | peer's | ratio as they are (least to most) | neither waits | both durable | pairs "
    "| at least / aim | the machine's limit |\n|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Occasion:
    """When and where: the day in ISO 8601, and `machine.described`."""

    date: str
    machine: str

    def beside(self, other: "Occasion") -> str:
        """This one, without what the other has said: processors and versions, up to the load."""
        same, _, load = self.machine.rpartition("; ")
        told = load if same and other.machine.startswith(f"{same}; ") else self.machine
        return f"{self.date} ({told})"


@dataclass(frozen=True)
class Figure:
    """A row, the suite that it comes from, and the occasion."""

    suite: str
    occasion: Occasion
    row: Row

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two figures two measurements of the same."""
        return self.row.operation, self.row.peer, self.row.folder


@dataclass
class Results:
    """All figures in the order of the table, and how the time grows, if that was measured, with its occasion."""

    figures: list[Figure] = field(default_factory=list)
    growth: list[Curve] = field(default_factory=list)
    grown: Occasion | None = None

    def merged(self, newer: "Results", *, anew: bool = False) -> "Results":
        """These results with newer ones in their places; where there are none, behind the last of the suite.

        Args:
            anew: rows of before go, if their suite was measured again and has no such rows any more.
        """
        again = {each.key: each for each in newer.figures}
        suites = {each.suite for each in newer.figures} if anew else set()
        found = [again.pop(each.key, each) for each in self.figures if each.key in again or each.suite not in suites]
        for figure in again.values():
            places = [at for at, each in enumerate(found, 1) if each.suite == figure.suite]
            found.insert(places[-1] if places else len(found), figure)
        grown = newer if newer.growth else self
        return Results(found, grown.growth, grown.grown)

    @property
    def occasion(self) -> Occasion:
        """That of most figures."""
        return Counter(each.occasion for each in self.figures).most_common(1)[0][0]


def save(path: Path, results: Results) -> None:
    """Write the JSON; figures of one occasion name it by its number."""
    occasions = list(dict.fromkeys([*(each.occasion for each in results.figures), *filter(None, [results.grown])]))
    content = {
        "occasions": [asdict(each) for each in occasions],
        "rows": [
            {"suite": each.suite, "occasion": occasions.index(each.occasion), **asdict(each.row)}
            for each in results.figures
        ],
        "growth": [asdict(each) for each in results.growth],
        "grown": occasions.index(results.grown) if results.grown else None,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> Results:
    """Read what `save` wrote; nothing if there is no such file."""
    if not path.exists():
        return Results()
    content = json.loads(path.read_text())
    occasions = [Occasion(**each) for each in content["occasions"]]
    figures = []
    for each in content["rows"]:
        suite, occasion = each.pop("suite"), occasions[each.pop("occasion")]
        for name in ("ratios", "lazy", "durable"):
            each[name] = tuple(each[name])
        figures.append(Figure(suite, occasion, Row(**each)))
    growth = [
        Curve(each["title"], each["axis"], [Point(*point) for point in each["points"]]) for each in content["growth"]
    ]
    return Results(figures, growth, occasions[content["grown"]] if content["grown"] is not None else None)


def line(row: Row) -> str:
    """One line of the table in Markdown."""
    ratio = f"**{row.median:.2f}** ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
    lazy, durable = (f"{statistics.median(each):.2f}" if each else "" for each in (row.lazy, row.durable))
    pairs = str(len(row.ratios))
    promised = " / ".join(f"{each:g}" if each is not None else "" for each in (row.at_least, row.aim)).strip(" /")
    cells = (row.described, row.peer, row.ours, row.theirs, ratio, lazy, durable, pairs, promised, row.limit)
    return "| " + " | ".join(cells) + " |"


def occasions(results: Results) -> str:
    """A sentence: when and where most was measured, and which suites on another occasion."""
    usual = results.occasion
    others: dict[Occasion, dict[str, int]] = {}
    of_suite = Counter(each.suite for each in results.figures)
    for each in results.figures:
        if each.occasion != usual:
            suites = others.setdefault(each.occasion, {})
            suites[each.suite] = suites.get(each.suite, 0) + 1
    parts = [
        ", ".join(
            suite if count == of_suite[suite] else f"{count} of {of_suite[suite]} rows of {suite}"
            for suite, count in suites.items()
        )
        + f" on {occasion.beside(usual)}"
        for occasion, suites in others.items()
    ]
    if results.grown and results.grown != usual:
        parts.append(f"how time grows on {results.grown.beside(usual)}")
    more = "".join(f"; {part}" for part in parts)
    return f"Measured on {usual.date}: {usual.machine}{more}."


def table(results: Results) -> str:
    """What stands in the README."""
    return "\n".join([f"{occasions(results)}\n", HEAD, *(line(each.row) for each in results.figures)]) + "\n"


def publish(readme: Path, results: Results) -> None:
    """Put the table between the marks in the README."""
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + table(results) + END + rest.split(END)[1])
