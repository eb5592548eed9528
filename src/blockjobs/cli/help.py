"""The pages that `--help` shows."""

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Final

from blockjobs.base.errors import UsageError
from blockjobs.cli.app import ABOUT, COMMANDS, GROUPS, Command, below
from blockjobs.cli.parameters import Slot, slots_of
from blockjobs.schema.docstring import parse_doc

_WIDTH_MAX: Final = 100
_LEFT_MAX: Final = 30


def help_page(name: str, *, width: int | None = None) -> str:
    """The help of a command, or of all of them.

    Args:
        name: of the command, empty for the program.
        width: of the page, in columns; by default the terminal's.
    """
    width = width or min(shutil.get_terminal_size().columns, _WIDTH_MAX)
    if not name:
        parts = ["Usage: blockjobs COMMAND [OPTIONS]", _prose(ABOUT, width)]
        others = [("-h, --help", "Show this, or with a command what it takes."), ("--version", "Show the version.")]
        parts += [
            _listing(group, _summaries(each for each in below("") if each.group == group), width) for group in GROUPS
        ]
        return "\n\n".join([*parts, _listing("Options", others, width)]) + "\n"
    command = COMMANDS.find(name)
    if command is None:
        raise UsageError(f"there is no command '{name}'")
    parts = []
    if command.function is None:
        parts += [f"Usage: blockjobs {name} COMMAND", _prose(command.about, width)]
    else:
        slots = slots_of(command.function)
        doc = parse_doc(command.function.__doc__)
        parts += [
            _usage(name, slots),
            *(_prose(text, width) for text in (command.about, doc.summary, doc.body) if text),
        ]
        places = [(slot.names[0], slot.about) for slot in slots if not slot.is_option]
        options = [(_spelling(slot), _explanation(slot)) for slot in slots if slot.is_option]
        parts += [_listing(title, rows, width) for title, rows in (("Arguments", places), ("Options", options)) if rows]
    if more := list(below(name)):
        parts.append(_listing("Commands", _summaries(more), width))
    return "\n\n".join(parts) + "\n"


def _summaries(commands: Iterable[Command]) -> list[tuple[str, str]]:
    """Names, and the first paragraph of what is said about each."""
    rows = []
    for each in sorted(commands, key=lambda each: each.name):
        about = each.about or parse_doc(each.function.__doc__ if each.function else "").summary
        rows.append((each.name, " ".join(about.partition("\n\n")[0].split())))
    return rows


def _usage(name: str, slots: Sequence[Slot]) -> str:
    words = [f"Usage: blockjobs {name}"]
    if any(slot.is_option for slot in slots):
        words.append("[OPTIONS]")
    for slot in slots:
        if not slot.is_option:
            word = slot.names[0] + ("..." if slot.is_many else "")
            words.append(word if slot.is_required else f"[{word}]")
    return " ".join(words)


def _spelling(slot: Slot) -> str:
    names = ", ".join(slot.names)
    return names if slot.is_flag else f"{names} {'|'.join(slot.choices) if 0 < len(slot.choices) <= 3 else slot.kind}"


def _explanation(slot: Slot) -> str:
    notes = []
    if len(slot.choices) > 3:
        notes.append("one of " + ", ".join(slot.choices))
    if slot.default is not None:
        notes.append(f"default: {slot.default}")
    if slot.variable:
        notes.append(f"environment: {slot.variable}")
    if slot.is_required:
        notes.append("required")
    return slot.about + (f" [{'; '.join(notes)}]" if notes else "")


def _prose(text: str, width: int) -> str:
    return "\n\n".join(textwrap.fill(" ".join(part.split()), width) for part in text.split("\n\n"))


def _listing(title: str, rows: Sequence[tuple[str, str]], width: int) -> str:
    left = min(max(len(name) for name, _ in rows), _LEFT_MAX)
    lines = [f"{title}:"]
    for name, about in rows:
        text = textwrap.wrap(about, max(width - left - 4, 20)) or [""]
        if len(name) > left:
            lines.append(f"  {name}")
            name = ""
        lines.append(f"  {name:{left}}  {text[0]}".rstrip())
        lines += [" " * (left + 4) + line for line in text[1:]]
    return "\n".join(lines)
