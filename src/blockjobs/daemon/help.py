"""What `help` as an option's value prints: the kinds of objects and devices, and what each can be told."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from blockjobs.base.errors import UsageError
from blockjobs.block.object_properties import property_types
from blockjobs.block.objects import object_options
from blockjobs.daemon.chardevs import chardev_options

_DEPRECATED: Final = frozenset({"loaded"})  # accepted, and without effect


def help_text(option: str, value: str) -> str:
    """The help that an option's value asks for.

    Args:
        option: its name.
        value: one that asks for help.

    Raises:
        UsageError: there is none for this option.
    """
    kind = value.split(",")[0].rpartition("=")[2]
    match option:
        case "object" if kind in object_options.homes:
            return _members(kind, property_types(object_options.variants[kind]))
        case "object":
            return "List of user creatable objects:\n" + _list(object_options.variants)
        case "chardev" if kind in chardev_options.variants:
            return _members(kind, property_types(chardev_options.variants[kind]))
        case "chardev":
            return "Available chardev backend types: \n" + _list(chardev_options.variants)
    raise UsageError("Help is not available for this option")


def _list(variants: Mapping[str, type[msgspec.Struct]]) -> str:
    return "".join(f"  {name}\n" for name in sorted(variants))


def _members(kind: str, types: Mapping[str, Any]) -> str:
    return f"{kind} options:\n" + "".join(
        f"  {name}=<{types[name]}>\n" for name in sorted(types) if name not in _DEPRECATED
    )
