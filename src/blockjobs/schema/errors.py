"""QEMU's words for arguments that do not fit, here and nowhere else.

msgspec decides in C whether arguments fit. Only when it refuses, or when it would be more lenient than QEMU, `visit`
walks the value in QEMU's order and raises QEMU's first error (spec/qmp.md, Commands): members in schema order, base
members first, depth first, unexpected members last.

Which name an error shows was found by running QEMU 7.2: most show the dotted path from the arguments object, but a bad
enum value, an alternate's type error and a range error show the last member only, or `null` for a list element.
"""

from collections.abc import Container, Hashable
from functools import cache
from typing import Any, Final

import msgspec.inspect as mi

from blockjobs.base.errors import ParameterError
from blockjobs.schema.types import INT64_MAX, INT64_MIN, UINT64_MAX, qapi_name
from blockjobs.schema.union import OpenType

_UNSIGNED: Final = {"uint8_t": 8, "uint16_t": 16, "uint32_t": 32, "uint64": 64, "size": 64}


class Place:
    """Where a value stands: the dotted path, and the last member's name that some texts show instead."""

    __slots__ = ("leaf", "path")

    def __init__(self, path: str = "", leaf: str = "null") -> None:
        self.path = path
        self.leaf = leaf

    def member(self, name: str) -> "Place":
        """The place of a member of the object here."""
        return Place(f"{self.path}.{name}" if self.path else name, name)

    def element(self, index: int) -> "Place":
        """The place of an element of the list here."""
        return Place(f"{self.path}[{index}]")


@cache
def _type_tree(kind: Hashable) -> mi.Type:
    return mi.type_info(kind)


def type_tree(kind: Any) -> mi.Type:
    """The inspected form of a type, computed once."""
    return _type_tree(kind)


def fits_plainly(value: object) -> bool:
    """Whether nothing in `value` is a thing that msgspec judges more leniently than QEMU.

    Those are null (optional members are `| None` in Python) and integers outside int64 or, as QEMU wraps them around
    for unsigned members, negative ones.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif item is None or (isinstance(item, int) and not 0 <= item <= INT64_MAX):
            return False
    return True


def visit(value: object, kind: mi.Type, place: Place | None = None) -> object:
    """Check `value` as QEMU does.

    Returns:
        The value, with negative numbers for uint64 members wrapped around as QEMU wraps them.

    Raises:
        ParameterError: with QEMU's text, for the first thing wrong.
    """
    return _visit(value, kind, place or Place(), None)


def _visit(value: object, kind: mi.Type, place: Place, name: str | None) -> object:
    match kind:
        case mi.Metadata():
            return _visit(value, kind.type, place, qapi_name(kind.extra) or name)
        case mi.IntType():
            return _integer(value, kind, place, name)
        case mi.EnumType():
            if _expect(value, str, place, "string") not in [item.value for item in kind.cls]:
                raise ParameterError.bad_value(place.leaf, str(value))
        case mi.ListType() | mi.VarTupleType():
            items = _expect(value, list, place, "array")
            return [_visit(item, kind.item_type, place.element(index), None) for index, item in enumerate(items)]
        case mi.StructType():
            members = _expect(value, dict, place, "object")
            return _members(members, kind, place)
        case mi.UnionType():
            return _union(value, kind, place, name)
        case mi.CustomType() if isinstance(kind.cls, OpenType):
            return _open(value, kind.cls, place)
        case _:
            _scalar(value, kind, place)
    return value


def _scalar(value: object, kind: mi.Type, place: Place) -> None:
    match kind:
        case mi.StrType():
            _expect(value, str, place, "string")
        case mi.BoolType():
            _expect(value, bool, place, "boolean")
        case mi.FloatType():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ParameterError.wrong_type(place.path, "number")
        case mi.NoneType():
            if value is not None:
                raise ParameterError.wrong_type(place.path, "null")
        case mi.DictType():
            _expect(value, dict, place, "object")
        case mi.AnyType():
            pass
        case _:
            raise AssertionError(f"no QAPI type: {kind}")


def _expect(value: object, wanted: type, place: Place, word: str) -> Any:
    if not isinstance(value, wanted):
        raise ParameterError.wrong_type(place.path, word)
    return value


def _integer(value: object, kind: mi.IntType, place: Place, name: str | None) -> int:
    bits = _UNSIGNED.get(name or "")
    if isinstance(value, bool) or not isinstance(value, int):
        raise _no_integer(place, bits)
    if bits == 64:
        if not INT64_MIN <= value <= UINT64_MAX:
            raise _no_integer(place, bits)
        return value & UINT64_MAX
    if bits is None:
        if not INT64_MIN <= value <= INT64_MAX:
            raise _no_integer(place, bits)
    elif not 0 <= value < 1 << bits:
        raise ParameterError.expects(place.leaf, str(name))
    if kind.ge is not None and value < kind.ge:
        raise ParameterError.expects(place.leaf, f"a number that is at least {kind.ge}")
    if kind.le is not None and value > kind.le:
        raise ParameterError.expects(place.leaf, f"a number that is at most {kind.le}")
    return value


def _no_integer(place: Place, bits: int | None) -> ParameterError:
    if bits is None:
        return ParameterError.wrong_type(place.path, "integer")
    return ParameterError.expects(place.path, "uint64")


def _members(members: dict[str, object], kind: mi.StructType, place: Place) -> dict[str, object]:
    checked: dict[str, object] = {}
    known = {field.encode_name for field in kind.fields}
    if kind.tag_field is not None:
        known.add(kind.tag_field)
        if kind.tag_field in members:
            checked[kind.tag_field] = members[kind.tag_field]
    for field in kind.fields:
        here = place.member(field.encode_name)
        if field.encode_name in members:
            checked[field.encode_name] = _visit(members[field.encode_name], member_type(field), here, None)
        elif field.required:
            raise ParameterError.missing(here.path)
    for member in members:
        if member not in known:
            raise ParameterError.unexpected(place.member(member).path)
    return checked


def member_type(field: mi.Field) -> mi.Type:
    """The type of a struct's member on the wire: `T | None = None` means an optional T, not a nullable one."""
    if field.default is None:
        return without_none(field.type)
    return field.type


def without_none(kind: mi.Type) -> mi.Type:
    """`kind` without the None that stands for "not given"."""
    if isinstance(kind, mi.Metadata):
        return mi.Metadata(without_none(kind.type), kind.extra_json_schema, kind.extra)
    if not isinstance(kind, mi.UnionType):
        return kind
    rest = tuple(each for each in kind.types if not isinstance(each, mi.NoneType))
    return rest[0] if len(rest) == 1 else mi.UnionType(rest)


def _union(value: object, kind: mi.UnionType, place: Place, name: str | None) -> object:
    tagged = {each.tag: each for each in kind.types if isinstance(each, mi.StructType) and each.tag_field}
    if len(tagged) == len(kind.types):
        tag_field = next(iter(tagged.values())).tag_field
        members = _expect(value, dict, place, "object")
        tag = _tag(members, str(tag_field), tagged, place)
        return _members(members, tagged[tag], place)
    branch = next((each for each in kind.types if _takes(each, value)), None)
    if branch is None:
        raise ParameterError.wrong_type(place.leaf, name or " or ".join(type(each).__name__ for each in kind.types))
    return _visit(value, branch, place, None)


def _tag(members: dict[str, object], tag_field: str, tags: Container[Any], place: Place) -> str:
    here = place.member(tag_field)
    if tag_field not in members:
        raise ParameterError.missing(here.path)
    tag = str(_expect(members[tag_field], str, here, "string"))
    if tag not in tags:
        raise ParameterError.bad_value(here.leaf, tag)
    return tag


def _takes(kind: mi.Type, value: object) -> bool:
    """Whether an alternate's branch is the one for this JSON type; a branch is chosen by type alone."""
    match kind:
        case mi.Metadata():
            return _takes(kind.type, value)
        case mi.StrType() | mi.EnumType():
            return isinstance(value, str)
        case mi.BoolType():
            return isinstance(value, bool)
        case mi.IntType():
            return isinstance(value, int) and not isinstance(value, bool)
        case mi.FloatType():
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case mi.NoneType():
            return value is None
        case mi.StructType() | mi.DictType():
            return isinstance(value, dict)
        case mi.ListType() | mi.VarTupleType():
            return isinstance(value, list)
        case mi.CustomType() if isinstance(kind.cls, OpenType):
            return isinstance(value, dict) or (isinstance(value, str) and str in kind.cls.scalars)
    return False


def _open(value: object, kind: OpenType, place: Place) -> object:
    if (isinstance(value, str) and str in kind.scalars) or (value is None and None in kind.scalars):
        return value
    if not isinstance(value, dict):
        if kind.scalars:
            raise ParameterError.wrong_type(place.leaf, kind.qapi_name)
        raise ParameterError.wrong_type(place.path, "object")
    union = kind.union
    tag = _tag(value, union.tag_field, union.homes, place)
    tree = type_tree(union.variant(tag))
    assert isinstance(tree, mi.StructType)
    return _members(value, tree, place)
