"""Reading a command line: words and options become the arguments of a command's function."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from blockjobs.base.errors import UsageError
from blockjobs.cli.parameters import Slot

Values = dict[Slot, Any]


def read_words(slots: Sequence[Slot], words: Sequence[str], environment: Mapping[str, str] = os.environ) -> Values:
    """Find out what each word of a command line is for.

    Options may stand anywhere before `--`: `--name value`, `--name=value`, `-n value`, `-nvalue`, and short flags in
    one word (`-pq`). A value that begins with a dash needs one of the forms without a space.

    Args:
        slots: what the command takes.
        words: what follows the command's name.
        environment: for parameters that have a variable.

    Returns:
        The values of what was given, of the last one where it is given again; those that may come several times as
        lists.

    Raises:
        UsageError: they do not fit; in one line that says what to do.
    """
    reading = _Reading(slots, words)
    reading.run()
    values = reading.values
    for slot in slots:
        if slot not in values and slot.variable and environment.get(slot.variable):
            reading.put(slot, slot.names[0], environment[slot.variable])
        if slot not in values and slot.is_required:
            raise _missing(slot)
    return values


def arguments(slots: Sequence[Slot], values: Values, groups: Mapping[str, type]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of the function.

    Args:
        slots: what the command takes.
        values: what was given.
        groups: the types of the parameters that are groups of options, by name.
    """
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    members: dict[str, dict[str, Any]] = {}
    for slot in slots:
        if slot not in values:
            continue
        if slot.member:
            members.setdefault(slot.owner, {})[slot.member] = values[slot]
        elif slot.is_rest:
            positional += values[slot]
        elif slot.is_option:
            keywords[slot.owner] = values[slot]
        else:
            positional.append(values[slot])
    return positional, keywords | {name: groups[name](**given) for name, given in members.items()}


class _Reading:
    def __init__(self, slots: Sequence[Slot], words: Sequence[str]) -> None:
        self.values: Values = {}
        self._options = {name: slot for slot in slots if slot.is_option for name in slot.names}
        self._places = [slot for slot in slots if not slot.is_option]
        self._rest = list(words)

    def run(self) -> None:
        plain: list[str] = []
        negative = any(slot.may_be_negative for slot in self._places)
        while self._rest:
            word = self._rest.pop(0)
            if word == "--":
                plain += self._rest
                break
            if word.startswith("--"):
                self._long(word)
            elif _is_option(word) and not (negative and word[1:2].isdigit()):
                self._short(word)
            else:
                plain.append(word)
        self._place(plain)

    def put(self, slot: Slot, name: str, word: str) -> None:
        """Note one value of a slot."""
        if slot.choices and word not in slot.choices:
            known = ", ".join(f'"{each}"' for each in slot.choices)
            raise UsageError(f"'{word}' is no value of {name}. Choose from: {known}")
        try:
            value = slot.read(word)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
        if slot.is_many:
            self.values.setdefault(slot, []).append(value)
        else:
            # Scripts add options to those of others: the last one counts.
            self.values[slot] = value

    def _long(self, word: str) -> None:
        name, has_value, value = word.partition("=")
        slot = self._options.get(name)
        if slot is None:
            raise UsageError(f"unknown option '{name}'")
        if slot.is_flag and has_value:
            raise UsageError(f"{name} takes no value")
        self._take(slot, name, value if has_value else None)

    def _short(self, word: str) -> None:
        for at in range(1, len(word)):
            name = "-" + word[at]
            slot = self._options.get(name)
            if slot is None:
                raise UsageError(f"unknown option '{name if at > 1 else word}'")
            if not slot.is_flag:
                self._take(slot, name, word[at + 1 :].removeprefix("=") or None)
                return
            self._take(slot, name, None)

    def _take(self, slot: Slot, name: str, value: str | None) -> None:
        if slot.is_flag:
            self.values[slot] = True
            return
        if value is None:
            if not self._rest or _is_option(self._rest[0]):
                raise UsageError(f"{name} needs a value")
            value = self._rest.pop(0)
        self.put(slot, name, value)

    def _place(self, plain: list[str]) -> None:
        for slot in self._places:
            if not plain:
                return
            taken = len(plain) if slot.is_many else 1
            for word in plain[:taken]:
                self.put(slot, slot.names[0], word)
            del plain[:taken]
        if plain:
            raise UsageError(f"'{plain[0]}' is one argument too many")


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _missing(slot: Slot) -> UsageError:
    name = slot.names[-1]
    if slot.variable:
        return UsageError(f"{name} is missing: name a QMP socket (a path, or host:port), or set {slot.variable}")
    return UsageError(f"{name} is missing")
