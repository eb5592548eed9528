"""Writes docs/reference and the picture of the life cycle from the code (`make docs`); a test keeps them current."""

import inspect
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from enum import EnumType
from pathlib import Path
from typing import Any

import msgspec.inspect as mi
from cyclopts import App
from rich.console import Console

from blockjobs.block.objects import object_options
from blockjobs.block.options import node_options
from blockjobs.cli.app import whole_app
from blockjobs.daemon import options as daemon_options
from blockjobs.daemon.chardevs import chardev_options
from blockjobs.export.options import export_options
from blockjobs.jobs.create_options import create_options
from blockjobs.jobs.transaction import actions
from blockjobs.lifecycle.status import ALLOWED, NEXT, JobStatus
from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.schema.command import qmp
from blockjobs.schema.docstring import parse_doc
from blockjobs.schema.errors import member_type, type_tree
from blockjobs.schema.refdoc import reference, type_text
from blockjobs.schema.union import OpenUnion

HERE = Path(__file__).parent
NOTE = "<!-- Made from the code by `make docs`; changes here are lost. -->\n"


def attributes(cls: type) -> dict[str, str]:
    """Texts of the section `Attributes` of a docstring."""
    text = inspect.getdoc(cls) or ""
    return parse_doc(text.replace("Attributes:", "Args:", 1)).arguments


def members(cls: type, skip: Iterable[str] = ()) -> Iterator[str]:
    """A line for each member of a struct."""
    tree = type_tree(cls)
    assert isinstance(tree, mi.StructType)
    texts: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        texts |= attributes(each) if each.__doc__ else {}
    for field in tree.fields:
        if field.encode_name not in skip:
            optional = "" if field.required else ", optional"
            about = texts.get(field.name, "")
            yield f"- `{field.encode_name}` ({type_text(member_type(field))}{optional}){': ' + about if about else ''}"


def summary(cls: type) -> str:
    doc = parse_doc((inspect.getdoc(cls) or "").replace("Attributes:", "Args:", 1))
    return doc.summary + (f"\n\n{doc.body}" if doc.body else "")


def union_page(title: str, intro: str, union: OpenUnion[Any], skip: Iterable[str] = ()) -> str:
    parts = [NOTE, f"# {title}\n", intro + "\n"]
    for name, cls in sorted(union.variants.items()):
        lines = list(members(cls, skip))
        if lines:
            parts.append(f"## `{name}`\n\n{summary(cls)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


COMMON = ("node-name", "discard", "cache", "read-only", "auto-read-only", "force-share", "detect-zeroes")
DRIVERS = """Options of `blockdev-add` and `--blockdev`, by `driver`. All of them have these too:

- `node-name`: the node's name; needed for those that no other node describes inside itself.
- `read-only`, `auto-read-only`: nobody may write; or not, if the file does not let us.
- `discard`: `unmap` passes discards down, `ignore` (the default) does not.
- `detect-zeroes`: `on` turns writes of zeroes into zero requests, `unmap` also gives their space back.
- `cache`: `direct` goes around the page cache, `no-flush` ignores flushes.
- `force-share`: read an image that others may be writing to."""


def commands_page() -> str:
    parts = [NOTE, "# QMP commands\n", "The shapes of structures are in [types](types.md).\n"]
    for name in sorted(qmp.commands):
        text = reference(qmp.commands[name])
        head, _, rest = text.partition("\n")
        since = head.partition(" ")[2]
        parts.append(f"## `{name}`\n\n*{since.strip('()')}*\n\n```text\n{rest.strip()}\n```\n")
        tree = type_tree(qmp.commands[name].arguments)
        if qmp.commands[name].whole and isinstance(tree, mi.StructType):
            parts.append(f"{summary(tree.cls)}\n\n" + "\n".join(members(tree.cls)) + "\n")
    return "\n".join(parts)


def events_page() -> str:
    parts = [NOTE, "# QMP events\n"]
    for name in sorted(qmp.events):
        cls = qmp.events[name].struct
        parts.append(f"## `{name}`\n\n{summary(cls)}\n\n" + "\n".join(members(cls)) + "\n")
    return "\n".join(parts)


def types_page() -> str:
    """Every structure and enumeration that commands and events reach, by name."""
    found: dict[str, type] = {}
    for command in qmp.commands.values():
        collect(type_tree(command.arguments), found)
        if command.result is not None:
            collect(type_tree(command.result), found)
    for event in qmp.events.values():
        collect(type_tree(event.struct), found)
    parts = [
        NOTE,
        "# Types\n",
        "What commands take and give. Unions over drivers, objects and exports have pages too.\n",
    ]
    for name, cls in sorted(found.items()):
        if isinstance(cls, EnumType):
            words = ", ".join(f"`{member.value}`" for member in cls)
            parts.append(f"## {name}\n\n{summary(cls)}\n\nOne of {words}.\n")
        elif not name.endswith("-arguments") and (lines := list(members(cls))):
            parts.append(f"## {name}\n\n{summary(cls)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def collect(kind: mi.Type, found: dict[str, type]) -> None:
    match kind:
        case mi.Metadata():
            collect(kind.type, found)
        case mi.EnumType():
            found[kind.cls.__name__] = kind.cls
        case mi.ListType() | mi.VarTupleType():
            collect(kind.item_type, found)
        case mi.UnionType():
            for each in kind.types:
                collect(each, found)
        case mi.StructType():
            if kind.cls.__name__ not in found:
                found[kind.cls.__name__] = kind.cls
                for field in kind.fields:
                    collect(member_type(field), found)


def jobs_page() -> str:
    statuses = [each for each in JobStatus if each not in (JobStatus.UNDEFINED, JobStatus.NULL)]
    parts = [
        NOTE,
        "# Job statuses and verbs\n",
        "What may be asked of a job depends on its status; anything else is refused with "
        "`Job 'ID' in state 'STATUS' cannot accept command verb 'VERB'`.\n",
        "| verb | " + " | ".join(statuses) + " |",
        "|---|" + "---|" * len(statuses),
    ]
    parts += [
        f"| {verb} | " + " | ".join("yes" if each in allowed else "" for each in statuses) + " |"
        for verb, allowed in ALLOWED.items()
    ]
    parts += ["\nWhat may follow a status:\n"]
    parts += [f"- `{each}`: {', '.join(f'`{after}`' for after in sorted(NEXT[each]))}" for each in statuses]
    return "\n".join(parts) + "\n"


def cli_page() -> str:
    parts = [NOTE, "# blockjobs, the command\n"]
    app = whole_app()
    for words in command_words(app, ()):
        console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
        app.help_print(list(words), console=console)
        assert isinstance(console.file, io.StringIO)
        text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip()
        parts.append(f"## blockjobs {' '.join(words)}".rstrip() + f"\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def command_words(of: App, before: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield before
    for name in sorted(of):
        if not name.startswith("-"):
            yield from command_words(of[name], (*before, name))


def daemon_page() -> str:
    help_text = daemon_options.HELP
    intro = "# blockjobs-storage-daemon\n\nOptions are carried out in order."
    return f"{NOTE}\n{intro}\n\n```text\n{help_text.strip()}\n```\n"


PLACES: Mapping[JobStatus, tuple[int, int]] = {
    JobStatus.CREATED: (0, 1),
    JobStatus.RUNNING: (1, 1),
    JobStatus.PAUSED: (1, 0),
    JobStatus.READY: (2, 1),
    JobStatus.STANDBY: (2, 0),
    JobStatus.WAITING: (3, 1),
    JobStatus.PENDING: (4, 1),
    JobStatus.ABORTING: (3, 2),
    JobStatus.CONCLUDED: (5, 1),
    JobStatus.NULL: (6, 1),
}


def picture() -> str:
    """The statuses and what may follow each, as SVG."""
    wide, high, box_wide, box_high = 130, 90, 96, 34

    def middle(status: JobStatus) -> tuple[int, int]:
        column, row = PLACES[status]
        return 70 + column * wide, 40 + row * high

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="930" height="270" font-family="sans-serif" font-size="14">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>',
        '<rect width="930" height="270" fill="white"/>',
    ]
    for status in PLACES:
        for after in sorted(NEXT[status] - {status}):
            (x, y), (to_x, to_y) = middle(status), middle(after)
            across = abs(to_x - x) > wide and y == to_y
            aside = 8 if status in NEXT[after] else 0
            start_x = x + (box_wide // 2 if to_x > x and y == to_y else 0) + aside
            end_x = to_x - (box_wide // 2 if to_x > x and y == to_y else 0) + aside
            start_y = y + (box_high // 2 if to_y > y else -box_high // 2 if to_y < y else 0)
            end_y = to_y - (box_high // 2 if to_y > y else -box_high // 2 if to_y < y else 0)
            if across:
                start_x, end_x, start_y, end_y = x + 20, to_x - 20, y - box_high // 2, to_y - box_high // 2
                path = f"M{start_x} {start_y} Q{(x + to_x) // 2} {y - 62} {end_x} {end_y}"
            else:
                path = f"M{start_x} {start_y} L{end_x} {end_y}"
            lines.append(f'<path d="{path}" fill="none" stroke="black" marker-end="url(#a)"/>')
    for status in PLACES:
        x, y = middle(status)
        lines.append(
            f'<rect x="{x - box_wide // 2}" y="{y - box_high // 2}" width="{box_wide}" height="{box_high}" rx="8" '
            f'fill="#eef" stroke="black"/><text x="{x}" y="{y + 5}" text-anchor="middle">{status}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def pages() -> dict[str, str]:
    """All that is made: path below docs/ to content."""
    made = {
        "reference/commands.md": commands_page(),
        "reference/events.md": events_page(),
        "reference/types.md": types_page(),
        "reference/jobs.md": jobs_page(),
        "reference/cli.md": cli_page(),
        "reference/daemon.md": daemon_page(),
        "reference/drivers.md": union_page("Drivers of nodes", DRIVERS, node_options, COMMON),
        "reference/images.md": union_page("New images", "Options of `blockdev-create`, by `driver`.", create_options),
        "reference/objects.md": union_page("Objects", "Options of `object-add` and `--object`.", object_options),
        "reference/exports.md": union_page("Exports", "Options of `block-export-add` and `--export`.", export_options),
        "reference/chardevs.md": union_page("Character devices", "Options of `--chardev`.", chardev_options),
        "reference/transactions.md": union_page("Actions of transactions", "By `type`.", actions),
        "explanation/life-cycle.svg": picture(),
    }
    return {name: re.sub(r"\n{3,}", "\n\n", text) for name, text in made.items()}


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text)
        sys.stdout.write(f"docs/{name}\n")
