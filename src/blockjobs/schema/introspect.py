"""`query-qmp-schema`: the registry as a list of SchemaInfo with masked type names (spec/qmp.md, last sections).

Clients probe this list before they use a command, so it is computed from the very types that validate: it cannot
promise what does not exist.
"""

from collections.abc import Hashable, Iterable
from typing import Any, Final

import msgspec.inspect as mi

from blockjobs.schema.command import Registry
from blockjobs.schema.errors import member_type, type_tree
from blockjobs.schema.union import OpenType, OpenUnion

SchemaInfo = dict[str, Any]

_BUILTINS: Final = {
    "str": "string",
    "int": "int",
    "bool": "boolean",
    "number": "number",
    "null": "null",
    "any": "value",
}
_EMPTY: Final = "0"


def introspect(registry: Registry) -> list[SchemaInfo]:
    """Describe every command, event and the types they reach."""
    return _Table().describe(registry)


def _features(name: str, declared: Iterable[str]) -> SchemaInfo:
    """The `features` entry, if there is anything to say; whatever is named `x-` is unstable."""
    features = [*declared, *(["unstable"] if name.startswith("x-") and "unstable" not in declared else [])]
    return {"features": features} if features else {}


class _Table:
    """The list under construction: hands out opaque names and describes each type once."""

    def __init__(self) -> None:
        self._names: dict[Hashable, str] = {}
        self._infos: list[SchemaInfo] = []
        self._last = 0

    def describe(self, registry: Registry) -> list[SchemaInfo]:
        for command in registry.commands.values():
            self._infos.append(
                {
                    "name": command.name,
                    "meta-type": "command",
                    "arg-type": self._type(type_tree(command.arguments)),
                    "ret-type": _EMPTY if command.result is None else self._type(type_tree(command.result)),
                    **_features(command.name, command.features),
                }
            )
        for event in registry.events.values():
            arguments = self._type(type_tree(event.struct))
            self._infos.append({"name": event.name, "meta-type": "event", "arg-type": arguments})
        self._object(_EMPTY, [])
        for name, json_type in _BUILTINS.items():
            self._infos.append({"name": name, "meta-type": "builtin", "json-type": json_type})
        return self._infos

    def _type(self, kind: mi.Type) -> str:
        """The name of a type, which is described on the way if it is new."""
        match kind:
            case mi.Metadata():
                return self._type(kind.type)
            case mi.StrType():
                return "str"
            case mi.IntType():
                return "int"
            case mi.BoolType():
                return "bool"
            case mi.FloatType():
                return "number"
            case mi.NoneType():
                return "null"
            case mi.ListType() | mi.VarTupleType():
                return self._array(kind.item_type)
            case mi.EnumType():
                return self._enum(kind.cls, [member.value for member in kind.cls])
            case mi.StructType():
                return self._struct(kind)
            case mi.UnionType():
                return self._union(kind)
            case mi.CustomType() if isinstance(kind.cls, OpenType):
                return self._open(kind.cls)
        return "any"

    def _name(self, key: Hashable) -> tuple[str, bool]:
        """An opaque name for `key`, and whether it is new."""
        known = self._names.get(key)
        if known is not None:
            return known, False
        self._last += 1
        self._names[key] = str(self._last)
        return self._names[key], True

    def _object(self, name: str, members: list[SchemaInfo], **more: Any) -> None:
        self._infos.append({"name": name, "meta-type": "object", "members": members, **more})

    def _array(self, item: mi.Type) -> str:
        element = self._type(item)
        name = f"[{element}]"
        if name not in self._names:
            self._names[name] = name
            self._infos.append({"name": name, "meta-type": "array", "element-type": element})
        return name

    def _enum(self, key: Hashable, values: list[str]) -> str:
        name, new = self._name(key)
        if new:
            members = [{"name": value} for value in values]
            self._infos.append({"name": name, "meta-type": "enum", "members": members, "values": values})
        return name

    def _struct(self, kind: mi.StructType) -> str:
        if not kind.fields and not kind.tag_field:
            return _EMPTY
        name, new = self._name(kind.cls)
        if new:
            self._object(name, self._members(kind.fields))
        return name

    def _members(self, fields: Iterable[mi.Field]) -> list[SchemaInfo]:
        return [self._member(field) for field in fields]

    def _member(self, field: mi.Field) -> SchemaInfo:
        kind = member_type(field)
        member: SchemaInfo = {"name": field.encode_name, "type": self._type(kind)}
        if not field.required:
            member["default"] = None
        declared = (kind.extra or {}).get("features", ()) if isinstance(kind, mi.Metadata) else ()
        return member | _features(field.encode_name, declared)

    def _union(self, kind: mi.UnionType) -> str:
        structs = [each for each in kind.types if isinstance(each, mi.StructType) and each.tag_field]
        if len(structs) == len(kind.types):
            variants = {str(struct.tag): struct for struct in structs}
            return self._flat(tuple(struct.cls for struct in structs), str(structs[0].tag_field), (), variants)
        types = [self._type(each) for each in kind.types]
        return self._alternate(("alternate", *types), types)

    def _alternate(self, key: Hashable, types: list[str]) -> str:
        name, new = self._name(key)
        if new:
            members = [{"type": each} for each in types]
            self._infos.append({"name": name, "meta-type": "alternate", "members": members})
        return name

    def _open(self, kind: OpenType) -> str:
        if not kind.scalars:
            return self._open_union(kind.union)
        scalars = ["null" if scalar is None else "str" for scalar in kind.scalars]
        return self._alternate(kind, [self._open_union(kind.union), *scalars])

    def _open_union(self, union: OpenUnion[Any]) -> str:
        base = type_tree(union.base)
        assert isinstance(base, mi.StructType)
        variants: dict[str, mi.StructType] = {}
        for tag, struct in union.variants.items():
            tree = type_tree(struct)
            assert isinstance(tree, mi.StructType)
            variants[tag] = tree
        return self._flat(union.type, union.tag_field, base.fields, variants)

    def _flat(self, key: Hashable, tag: str, common: tuple[mi.Field, ...], variants: dict[str, mi.StructType]) -> str:
        name, new = self._name(key)
        if not new:
            return name
        tags = {"name": tag, "type": self._enum((key, tag), list(variants))}
        members = [tags, *self._members(field for field in common if field.encode_name != tag)]
        known = {member["name"] for member in members}
        cases = [{"case": case, "type": self._variant(struct, known)} for case, struct in variants.items()]
        self._object(name, members, tag=tag, variants=cases)
        return name

    def _variant(self, struct: mi.StructType, common: set[str]) -> str:
        own = [field for field in struct.fields if field.encode_name not in common]
        if not own:
            return _EMPTY
        name, new = self._name(("variant", struct.cls))
        if new:
            self._object(name, self._members(own))
        return name
