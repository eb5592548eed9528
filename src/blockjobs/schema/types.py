"""Words of QAPI that plain Python types cannot say: the widths of integers and the names of alternates.

A plain `int` is QAPI's `int` (int64). `qapi` attaches the name that QEMU's error texts show.
"""

from typing import Annotated, Final, TypeAlias

from msgspec import Meta, Struct

INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1
UINT64_MAX: Final = 2**64 - 1

_NAME: Final = "qapi"


def qapi(name: str) -> Meta:
    """Give an annotated type the name that QAPI has for it.

    Alternates need it because their type error names the type (`Annotated[str | BitmapRef,
    qapi("BlockDirtyBitmapOrStr")]`), integers because their range error does.
    """
    return Meta(extra={_NAME: name})


def features(*names: str) -> Meta:
    """Mark an argument as `deprecated` or `unstable` for introspection."""
    return Meta(extra={"features": list(names)})


def qapi_name(extra: dict[str, object] | None) -> str | None:
    """What `qapi` attached, if it did."""
    name = (extra or {}).get(_NAME)
    return name if isinstance(name, str) else None


UInt8: TypeAlias = Annotated[int, Meta(ge=0, le=2**8 - 1, extra={_NAME: "uint8_t"})]
UInt16: TypeAlias = Annotated[int, Meta(ge=0, le=2**16 - 1, extra={_NAME: "uint16_t"})]
UInt32: TypeAlias = Annotated[int, Meta(ge=0, le=2**32 - 1, extra={_NAME: "uint32_t"})]
# The upper bound of a uint64 is that of the JSON parser itself.
UInt64: TypeAlias = Annotated[int, Meta(ge=0, extra={_NAME: "uint64"})]
Size: TypeAlias = Annotated[int, Meta(ge=0, extra={_NAME: "size"})]


class Record(Struct, kw_only=True, frozen=True, rename="kebab", omit_defaults=True):
    """Base of what goes out: results and events.

    A member with a default is optional on the wire and absent while it has that default, so only truly optional
    members get one (normally None). Derived classes repeat `frozen=True, kw_only=True`: msgspec does
    not inherit the second and mypy not the first.
    """


class Options(Struct, kw_only=True, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """Base of what comes in: nested argument objects.

    A member with a default is optional. `x: int | None = None` is an optional int, not a nullable one; a JSON null
    is accepted only where None is in the type and is not the default. Derived classes repeat
    `frozen=True, kw_only=True`: msgspec does not inherit the second and mypy not the first.
    """
