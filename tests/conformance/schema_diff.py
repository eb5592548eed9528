"""Two query-qmp-schema replies compared by structure: opaque type names are followed, never compared."""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, dict[str, Any]]


def differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """What differs, one line each, sorted.

    A line is a place and what is different there. A place is the command or event, `->` for its result, `.` and a
    member, `[case]` for a variant, `[]` for an element.
    """
    return sorted(set(_Diff(ours, theirs).lines()))


class _Diff:
    def __init__(self, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
        self.ours: Schema = {info["name"]: info for info in ours}
        self.theirs: Schema = {info["name"]: info for info in theirs}

    def lines(self) -> Iterator[str]:
        theirs = {name for name, info in self.theirs.items() if info["meta-type"] in ("command", "event")}
        yield from (f"{name} is missing" for name in theirs - self.ours.keys())
        for name, mine in self.ours.items():
            if mine["meta-type"] not in ("command", "event"):
                continue
            yours = self.theirs.get(name)
            if yours is None:
                yield f"{name} is not QEMU's"
                continue
            yield from self._features(name, mine, yours)
            yield from self._types(name, mine["arg-type"], yours["arg-type"], ())
            if mine["meta-type"] == "command":
                yield from self._types(f"{name}->", mine["ret-type"], yours["ret-type"], ())

    def _features(self, place: str, mine: dict[str, Any], yours: dict[str, Any]) -> Iterator[str]:
        if sorted(mine.get("features", ())) != sorted(yours.get("features", ())):
            yield f"{place} has other features"

    def _types(self, place: str, mine: str, yours: str, above: tuple[tuple[str, str], ...]) -> Iterator[str]:
        if (mine, yours) in above:
            return
        above = (*above, (mine, yours))
        a, b = self.ours[mine], self.theirs[yours]
        kind = a["meta-type"]
        if kind != b["meta-type"]:
            yield f"{place} is {_says(a)}, not {_says(b)}"
        elif kind == "builtin":
            if mine != yours:
                yield f"{place} is {mine}, not {yours}"
        elif kind == "array":
            yield from self._types(f"{place}[]", a["element-type"], b["element-type"], above)
        elif kind == "enum":
            yield from _sets(place, "value", _names(a["members"]), _names(b["members"]))
        elif kind == "alternate":
            yield from self._alternate(place, a, b, above)
        else:
            yield from self._object(place, a, b, above)

    def _alternate(
        self, place: str, a: dict[str, Any], b: dict[str, Any], above: tuple[tuple[str, str], ...]
    ) -> Iterator[str]:
        mine = {_says(self.ours[each["type"]]): each["type"] for each in a["members"]}
        yours = {_says(self.theirs[each["type"]]): each["type"] for each in b["members"]}
        yield from _sets(place, "branch", set(mine), set(yours))
        for branch in mine.keys() & yours.keys():
            yield from self._types(place, mine[branch], yours[branch], above)

    def _object(
        self, place: str, a: dict[str, Any], b: dict[str, Any], above: tuple[tuple[str, str], ...]
    ) -> Iterator[str]:
        if a.get("tag") != b.get("tag"):
            yield f"{place} has another tag"
        mine = {member["name"]: member for member in a["members"]}
        yours = {member["name"]: member for member in b["members"]}
        yield from _sets(place, "member", set(mine), set(yours))
        for name in mine.keys() & yours.keys():
            here = f"{place}.{name}"
            if ("default" in mine[name]) != ("default" in yours[name]):
                yield f"{here} is {'optional' if 'default' in mine[name] else 'mandatory'}"
            yield from self._features(here, mine[name], yours[name])
            yield from self._types(here, mine[name]["type"], yours[name]["type"], above)
        my_cases = {variant["case"]: variant["type"] for variant in a.get("variants", ())}
        your_cases = {variant["case"]: variant["type"] for variant in b.get("variants", ())}
        for case in my_cases.keys() & your_cases.keys():
            yield from self._types(f"{place}[{case}]", my_cases[case], your_cases[case], above)


def _names(members: list[dict[str, Any]]) -> set[str]:
    return {member["name"] for member in members}


def _says(info: dict[str, Any]) -> str:
    return str(info["name"] if info["meta-type"] == "builtin" else info["meta-type"])


def _sets(place: str, what: str, mine: set[str], yours: set[str]) -> Iterator[str]:
    yield from (f"{place} lacks {what} {name}" for name in yours - mine)
    yield from (f"{place} adds {what} {name}" for name in mine - yours)
