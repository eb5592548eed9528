"""Google-style docstrings as data: they are the documentation of the wire, of `--help` and of the reference pages."""

import inspect
import re
from typing import Final

from msgspec import Struct, field

_SECTION: Final = re.compile(r"(Args|Errors|Returns|Raises|Checkpoint|Example|Since|Note)s?:(?:\s+(\S.*))?$")
_ENTRY: Final = re.compile(r"(\*{0,2}[\w-]+)(?:\s*\([^)]*\))?:\s+(\S.*)$")


class Doc(Struct, frozen=True):
    """One docstring.

    Attributes:
        summary: the first paragraph.
        body: what follows up to the first section.
        arguments: Python name of each argument → its text on one line.
        errors: error class → when.
    """

    summary: str
    body: str = ""
    arguments: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def parse_doc(text: str | None) -> Doc:
    """Split a docstring into its parts; unknown sections stay out."""
    lines = inspect.cleandoc(text or "").splitlines()
    prose: list[str] = []
    sections: dict[str, dict[str, str]] = {"Args": {}, "Errors": {}}
    current: dict[str, str] | None = None
    in_section, entry = False, ""
    for line in lines:
        header = _SECTION.match(line)
        if header:
            in_section, entry = True, ""
            current = sections.get(header[1] if header[1] != "Error" else "Errors")
        elif not in_section:
            prose.append(line)
        elif current is not None and line.strip():
            found = _ENTRY.match(line.strip())
            if found and _indent(line) <= 4:
                entry = found[1]
                current[entry] = found[2]
            elif entry:
                current[entry] += " " + line.strip()
    summary, _, body = "\n".join(prose).strip().partition("\n\n")
    return Doc(" ".join(summary.split()), body.strip(), sections["Args"], sections["Errors"])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
