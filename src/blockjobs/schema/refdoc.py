"""Reference text of a command, made from its declaration: what `--help` and the reference pages show."""

import textwrap
from collections.abc import Iterator
from typing import Final

import msgspec.inspect as mi

from blockjobs.schema.command import Command
from blockjobs.schema.errors import member_type, type_tree
from blockjobs.schema.union import OpenType

_WIDTH: Final = 100


def reference(command: Command) -> str:
    """The page of one command: summary, prose, arguments with types, result, errors."""
    features = f", {', '.join(command.features)}" if command.features else ""
    parts = [f"{command.name} (since {command.since}{features})", _wrap(command.doc.summary)]
    if command.doc.body:
        parts.append(command.doc.body)
    arguments = list(_arguments(command))
    if arguments:
        parts.append("Arguments:\n" + "\n".join(arguments))
    if command.result is not None:
        parts.append(f"Returns: {type_text(type_tree(command.result))}")
    if command.doc.errors:
        lines = (_wrap(f"{name}: {text}", "  ") for name, text in command.doc.errors.items())
        parts.append("Errors:\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _arguments(command: Command) -> Iterator[str]:
    tree = type_tree(command.arguments)
    if command.whole or not isinstance(tree, mi.StructType):
        name, text = next(iter(command.doc.arguments.items()))
        del name  # the object itself is the arguments, its Python name is not on the wire
        yield _wrap(f"{type_text(tree)}: {text}", "  ")
        return
    for field in tree.fields:
        optional = "" if field.required else ", optional"
        kind = type_text(member_type(field))
        yield _wrap(f"{field.encode_name} ({kind}{optional}): {command.doc.arguments[field.name]}", "  ")


def type_text(kind: mi.Type) -> str:
    """A type in words: `integer`, `array of string`, `one of on, off`, `object by 'driver'`."""
    match kind:
        case mi.Metadata():
            return type_text(kind.type)
        case mi.StrType():
            return "string"
        case mi.IntType():
            return "integer"
        case mi.BoolType():
            return "boolean"
        case mi.FloatType():
            return "number"
        case mi.NoneType():
            return "null"
        case mi.EnumType():
            return f"one of {', '.join(member.value for member in kind.cls)}"
        case mi.ListType() | mi.VarTupleType():
            return f"array of {type_text(kind.item_type)}"
        case mi.StructType():
            return f"{kind.cls.__name__} object"
        case mi.UnionType():
            return " or ".join(type_text(each) for each in kind.types)
        case mi.CustomType() if isinstance(kind.cls, OpenType):
            scalars = ["null" if scalar is None else "string" for scalar in kind.cls.scalars]
            return " or ".join([*scalars, f"{kind.cls.union.name} object by '{kind.cls.union.tag_field}'"])
    return "any value"


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + indent)
