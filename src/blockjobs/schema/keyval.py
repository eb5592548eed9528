"""The command line's way to write arguments: `driver=qcow2,file.driver=file,file.filename=a.qcow2`, or JSON.

Keys have dots for members of members and numbers for list elements, `,,` is a comma in a value, the first value may
stand without its key. Every value is a string; the declared type says what it means. Texts are those of
qemu-storage-daemon 7.2.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Final

import msgspec.inspect as mi

from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.base.units import parse_size
from blockjobs.schema.command import convert
from blockjobs.schema.errors import Place, member_type, type_tree
from blockjobs.schema.types import INT64_MAX, INT64_MIN, UINT64_MAX, qapi_name
from blockjobs.schema.union import OpenType

_KEY: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(?:\.(?:[A-Za-z][A-Za-z0-9_-]*|[0-9]+))*")
_PAIR: Final = re.compile(r"(?P<key>[^=,]*)(?P<equals>=?)(?P<value>(?:[^,]|,,)*)(?:,|$)", re.DOTALL)
_IMPLIED: Final = re.compile(r"(?P<value>(?:[^,=]|,,)+)(?:,|$)", re.DOTALL)
_INTEGER: Final = re.compile(r"\s*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_ON: Final = frozenset({"on", "yes", "true", "y"})
_OFF: Final = frozenset({"off", "no", "false", "n"})

Members = dict[str, Any]


def parse(
    text: str,
    kind: Any,
    *,
    implied: str | None = None,
    short_booleans: bool = False,
    read_json: Callable[[str], object] | None = None,
) -> Any:
    """Read an option's argument as a declared type.

    Args:
        text: `key=value` pairs, or JSON if it begins with `{`.
        kind: a struct or an open union's type, as for command arguments.
        implied: the key of a first value that has none.
        short_booleans: `server` means `server=on` and `nowait` means `wait=off`, as old options have it.
        read_json: reads JSON; the default knows strict JSON only, the monitor's dialect is in `wire`.

    Raises:
        UsageError: the text has no such form, or the values do not fit; QSD's text without its prefix.
    """
    if text.startswith("{"):
        return convert((read_json or _strict_json)(text), kind)
    members = parse_members(text, implied=implied, short_booleans=short_booleans)
    return convert(typed(members, kind), kind)


def typed(members: Members, kind: Any) -> Any:
    """Members as `parse_members` reads them, with the values' types: what JSON would have said.

    Args:
        kind: as for `parse`; members that it does not have are left as they are.

    Raises:
        UsageError: a value does not fit.
    """
    return _coerce(members, type_tree(kind), Place(), None)


def parse_members(text: str, *, implied: str | None = None, short_booleans: bool = False) -> Members:
    """The form only: nested dicts and lists of strings.

    Raises:
        UsageError: a bad key, a missing `=`, or keys that contradict each other.
    """
    members: Members = {}
    at = 0
    first = _IMPLIED.match(text) if implied else None
    if first is not None:
        members[str(implied)] = first["value"].replace(",,", ",")
        at = first.end()
    while at < len(text):
        pair = _PAIR.match(text, at)
        assert pair is not None
        key, value = pair["key"], pair["value"].replace(",,", ",")
        if not _KEY.fullmatch(key):
            raise UsageError(f"Invalid parameter '{key}'")
        if not pair["equals"]:
            if not short_booleans:
                raise UsageError(f"Expected '=' after parameter '{key}'")
            key, value = (key[2:], "off") if key.startswith("no") else (key, "on")
        _put(members, key, value)
        at = pair.end()
    return {name: _listify(value, name) for name, value in members.items()}


def _put(members: Members, key: str, value: str) -> None:
    *path, last = key.split(".")
    here = members
    for depth, fragment in enumerate(path, 1):
        inner = here.setdefault(fragment, {})
        if not isinstance(inner, dict):
            raise UsageError(f"Parameters '{'.'.join(path[:depth])}.*' used inconsistently")
        here = inner
    if isinstance(here.get(last), dict):
        raise UsageError(f"Parameters '{key}.*' used inconsistently")
    here[last] = value


def _listify(value: Any, path: str) -> Any:
    """Turn objects whose keys are all numbers into lists."""
    if not isinstance(value, dict):
        return value
    items = {key: _listify(item, f"{path}.{key}") for key, item in value.items()}
    numbers = {int(key): item for key, item in items.items() if key.isdigit()}
    if not numbers:
        return items
    if len(numbers) < len(items):
        raise UsageError(f"Parameters '{path}.*' used inconsistently")
    for index in range(max(numbers) + 1):
        if index not in numbers:
            raise UsageError(f"Parameter '{path}.{index}' missing")
    return [numbers[index] for index in sorted(numbers)]


def _strict_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"JSON parse error, {error}") from error


def _coerce(value: Any, kind: mi.Type, place: Place, name: str | None) -> Any:
    """Give strings the type that is declared; what has the wrong shape stays for the real check to refuse."""
    match kind:
        case mi.Metadata():
            return _coerce(value, kind.type, place, qapi_name(kind.extra) or name)
        case mi.StructType() if isinstance(value, dict):
            return _coerce_members(value, kind, place)
        case mi.ListType() | mi.VarTupleType() if isinstance(value, list):
            return [_coerce(item, kind.item_type, place.member(str(index)), None) for index, item in enumerate(value)]
        case mi.CustomType() if isinstance(kind.cls, OpenType):
            return _coerce_open(value, kind.cls, place)
        case mi.UnionType():
            return _coerce_union(value, kind, place)
        case _ if isinstance(value, str):
            return _scalar(value, kind, place, name)
        case mi.StrType() | mi.EnumType() | mi.IntType() | mi.BoolType() | mi.FloatType():
            raise ParameterError(place.path, f"Parameters '{place.path}.*' are unexpected")
    return value


def _coerce_members(members: Members, kind: mi.StructType, place: Place) -> Members:
    types = {field.encode_name: member_type(field) for field in kind.fields}
    return {
        member: _coerce(value, types[member], place.member(member), None) if member in types else value
        for member, value in members.items()
    }


def _coerce_open(value: Any, kind: OpenType, place: Place) -> Any:
    if isinstance(value, dict):
        variant = kind.union.variant(value.get(kind.union.tag_field))
        return _coerce(value, type_tree(variant), place, None) if variant is not None else value
    # An empty string is how the command line says null.
    return None if value == "" and None in kind.scalars else value


def _coerce_union(value: Any, kind: mi.UnionType, place: Place) -> Any:
    structs = [each for each in kind.types if isinstance(each, mi.StructType)]
    if isinstance(value, dict):
        tagged = [each for each in structs if each.tag_field and value.get(each.tag_field) == each.tag]
        chosen = tagged or [each for each in structs if not each.tag_field]
        return _coerce_members(value, chosen[0], place) if chosen else value
    if not isinstance(value, str) or any(isinstance(each, (mi.StrType, mi.EnumType)) for each in kind.types):
        return value
    scalars = [each for each in kind.types if not isinstance(each, mi.StructType)]
    return _coerce(value, scalars[0], place, None) if scalars else value


def _scalar(text: str, kind: mi.Type, place: Place, name: str | None) -> Any:
    match kind:
        case mi.BoolType():
            if text not in _ON and text not in _OFF:
                raise ParameterError.expects(place.path, "'on' or 'off'")
            return text in _ON
        case mi.IntType():
            return _size(text, place) if name == "size" else _integer(text, place)
        case mi.FloatType():
            try:
                return float(text)
            except ValueError:
                raise ParameterError.expects(place.path, "number") from None
        case mi.NoneType():
            return None if text == "" else text
    return text


def _integer(text: str, place: Place) -> int:
    found = _INTEGER.fullmatch(text)
    if found is None:
        raise ParameterError.expects(place.path, "integer")
    sign, digits = found.groups()
    octal = len(digits) > 1 and digits.isdigit() and digits.startswith("0")
    number = int(digits, 8) if octal else int(digits, 0)
    number = -number if sign == "-" else number
    if not INT64_MIN <= number <= (UINT64_MAX if sign != "-" else INT64_MAX):
        raise ParameterError.expects(place.path, "integer")
    return number


def _size(text: str, place: Place) -> int:
    try:
        return parse_size(text)
    except ValueError:
        raise ParameterError.expects(place.path, "a non-negative number below 2^64") from None
