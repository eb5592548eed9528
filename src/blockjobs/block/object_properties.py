"""Looking at objects, and changing them, by path and property: what `qom-list`, `qom-get` and `qom-set` do.

The tree is small: `/objects` holds everything that `object-add` made. Properties are the members of the object's
options. They say what was given, but for those that the object itself keeps current (`LiveProperties`). Paths, types
and texts were probed on QEMU's storage daemon.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin

import msgspec

from blockjobs.base.errors import DeviceNotFound, UsageError
from blockjobs.block.objects import ObjectOptions, Objects

CONTAINER: Final = "objects"
_TYPE: Final = "type"
_WIRE_TYPES: Final[dict[Any, str]] = {str: "string", int: "int", bool: "bool"}
_QAPI_ENUMS: Final = {"SecretFormat": "QCryptoSecretFormat", "TlsEndpoint": "QCryptoTLSCredsEndpoint"}


class LiveProperties(ABC):
    """An object some of whose properties change while it lives."""

    @abstractmethod
    def current(self, name: str) -> object:
        """The value of a property as plain JSON; `msgspec.UNSET` if what was given still holds."""

    @abstractmethod
    def change(self, name: str, value: object) -> None:
        """Set a property that exists to a plain JSON value.

        Raises:
            UsageError: not that one, or not to that value; the object is as before.
        """


def list_properties(objects: Objects, path: str) -> Iterator[tuple[str, str]]:
    """Name and type of each property of what is at `path`.

    Raises:
        DeviceNotFound: nothing is there.
        UsageError: the path could mean several things.
    """
    place = _find(objects, path)
    yield _TYPE, "string"
    match place:
        case []:
            yield CONTAINER, "child<container>"
        case [_]:
            yield from ((name, f"child<{_tag(options)}>") for name, options in objects.options.items())
        case [_, name]:
            yield from property_types(type(objects.options[name])).items()


def get_property(objects: Objects, path: str, name: str) -> object:
    """The value of a property, as plain JSON.

    Raises:
        DeviceNotFound: nothing is at `path`.
        UsageError: it has no such property.
    """
    match _find(objects, path):
        case [_, ident]:
            return _value(objects, ident, name)
        case place:
            children = objects.options if place else (CONTAINER,)
            if name in children:
                return "/" + "/".join([*place, name])
            if name == _TYPE:
                return "container"
            raise UsageError(f"Property 'container.{name}' not found")


def set_property(objects: Objects, path: str, name: str, value: object) -> None:
    """Change a property of a living object.

    Raises:
        DeviceNotFound: nothing is at `path`.
        UsageError: it has no such property, or it cannot be set, or not to that value; nothing changed.
    """
    match _find(objects, path):
        case [_, ident]:
            tag, known = _tag(objects.options[ident]), property_types(type(objects.options[ident]))
            live = objects[ident]
        case place:
            tag, known, live = "container", dict.fromkeys(objects.options if place else (CONTAINER,), ""), None
    if name == _TYPE or (name in known and tag == "container"):
        raise UsageError(f"Property '{tag}.{name}' is not writable")
    if name not in known:
        raise UsageError(f"Property '{tag}.{name}' not found")
    if not isinstance(live, LiveProperties):
        raise UsageError("Property cannot be set after initialization")
    live.change(name, value)


def _find(objects: Objects, path: str) -> list[str]:
    """The place of `path`: [], ["objects"] or ["objects", id]. A path without a leading slash may be the end of one."""
    parts = [part for part in path.split("/") if part]
    places = [[], [CONTAINER], *([CONTAINER, name] for name in objects.options)]
    if path.startswith("/"):
        found = [place for place in places if place == parts]
    else:
        found = [place for place in places if place[len(place) - len(parts) :] == parts and len(parts) <= len(place)]
    if not found:
        raise DeviceNotFound(path)
    if len(found) > 1:
        raise UsageError(f"Path '{path}' is ambiguous")
    return found[0]


def _tag(options: ObjectOptions) -> str:
    tag = options.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


def property_types(options: type[msgspec.Struct]) -> dict[str, str]:
    """Types of an option struct's members by wire name."""
    return {
        field.encode_name: _wire_type(field.type)
        for field in msgspec.structs.fields(options)
        if field.name not in ("id", _TYPE)
    }


def _wire_type(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is not None:
        annotation = get_args(annotation)[0]  # Annotated, or a list, which goes by what is in it
    name = str(getattr(annotation, "__name__", annotation))
    return _WIRE_TYPES.get(annotation) or _QAPI_ENUMS.get(name, name)


def _value(objects: Objects, ident: str, name: str) -> object:
    options = objects.options[ident]
    if name == _TYPE:
        return _tag(options)
    field = next((field for field in msgspec.structs.fields(options) if field.encode_name == name), None)
    if field is None or field.name == "id":
        raise UsageError(f"Property '{_tag(options)}.{name}' not found")
    live = objects[ident]
    current = live.current(name) if isinstance(live, LiveProperties) else msgspec.UNSET
    if current is not msgspec.UNSET:
        return current
    given = getattr(options, field.name)
    if given is None:
        return {"string": "", "int": 0, "bool": False}.get(_wire_type(field.type), "")
    return str(given) if isinstance(given, StrEnum) else msgspec.to_builtins(given)
