"""The rules in a configuration file of blkdebug, which `blkdebug:RULES:IMAGE` names, as options of the node.

    [inject-error]
    event = "read_aio"
    errno = "5"

    [set-state]
    event = "l2_load"
    state = "1"
    new_state = "2"

Empty lines and those that begin with # say nothing; what follows a value is not looked at.
"""

import re
from typing import Any, Final

from blockjobs.base.errors import UsageError

FILE_BYTES_MAX: Final = 1 << 20
_GROUP: Final = re.compile(r'\[([^\]\s"]+)(?:\s+"[^"]*")?\]')
_MEMBER: Final = re.compile(r'([\w-]+)\s*=\s*"([^"]*)"')
_GROUPS: Final = ("inject-error", "set-state")


def read_rules(path: str) -> dict[str, list[dict[str, str]]]:
    """Members of a blkdebug node, with all values as text.

    Args:
        path: of the file; empty for no rules.

    Raises:
        UsageError: it cannot be read, or makes no sense; the text names it, and the line.
    """
    if not path:
        return {}
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"Could not read blkdebug config file '{path}': {error.strerror}") from error
    if len(content) > FILE_BYTES_MAX:
        raise UsageError(f"Could not read blkdebug config file '{path}': it is longer than {FILE_BYTES_MAX} bytes")
    rules: dict[str, list[dict[str, str]]] = {}
    rule: dict[str, str] | None = None
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        where, said = f"blkdebug config file '{path}', line {number}", line.strip()
        if not said or said.startswith("#"):
            continue
        if group := _GROUP.match(said):
            if group[1] not in _GROUPS:
                raise UsageError(f"{where}: There is no option group '{group[1]}'")
            rule = {}
            rules.setdefault(group[1], []).append(rule)
        elif rule is None:
            raise UsageError(f"{where}: no group defined")
        elif member := _MEMBER.match(said):
            rule.setdefault(member[1], member[2])
        else:
            raise UsageError(f'{where}: neither [GROUP] nor NAME = "VALUE"')
    for moved in rules.get("set-state", ()):
        moved.setdefault("new_state", "0")
    if any("event" not in each for each in (*rules.get("inject-error", ()), *rules.get("set-state", ()))):
        raise UsageError(f"blkdebug config file '{path}': Missing event name for rule")
    return rules


def blkdebug_members(path: str, image: dict[str, Any]) -> dict[str, Any]:
    """Options of the node that has the rules of a file, above the node with the options `image`. Raises UsageError."""
    return {"driver": "blkdebug", **read_rules(path), "image": image}
