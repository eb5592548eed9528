"""Flat unions and alternates that grow: each driver file adds its own option struct.

msgspec fixes a type when it first meets it, so a union over registered structs cannot be written as `A | B | ...`. Here
the union is a *custom type* to msgspec: it hands the dict to `decode_open`, which picks the struct by the tag at that
moment. A driver registered later, or by a user, is therefore known everywhere at once, also inside other options.

    class NodeOptions(Options, frozen=True, kw_only=True, tag_field="driver"): ...
    node_options = OpenUnion("BlockdevOptions", base=NodeOptions)
    if TYPE_CHECKING:
        BlockRef: TypeAlias = str | NodeOptions
    else:
        BlockRef = node_options.alternate("BlockdevRef", str)

    class RawOptions(NodeOptions, frozen=True, kw_only=True, tag="raw"):
        file: BlockRef

    node_options.add(RawOptions)
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from blockjobs.base.homes import NO_HOMES, Homes

T = TypeVar("T", bound=Struct)


class OpenType(type):
    """Metaclass of the placeholder classes that stand in annotations for an open union or an alternate with one.

    Attributes:
        qapi_name: QEMU's name of the type, for error texts.
        union: where objects are looked up.
        scalars: what is accepted besides an object: `str`, `None`, or nothing.
    """

    qapi_name: str
    union: "OpenUnion[Any]"
    scalars: tuple[type[str] | None, ...]

    def __instancecheck__(cls, instance: object) -> bool:
        # msgspec asks this about what `decode_open` returned, which is right by construction.
        return True


class OpenUnion(Generic[T]):
    """The registry behind one flat union, for instance `BlockdevOptions`: tag value → option struct.

    Args:
        name: QEMU's name of the union.
        base: the struct all variants derive from; its `tag_field` is the discriminator, its fields are the common
            members.
        homes: modules that add variants, by tag: they are imported when a tag is first met.
    """

    def __init__(self, name: str, base: type[T], homes: Mapping[str, str] = NO_HOMES) -> None:
        tag_field = base.__struct_config__.tag_field
        assert tag_field is not None, f"{base.__name__} needs tag_field="
        self.name = name
        self.base = base
        self.tag_field = tag_field
        self.homes: Homes[type[T]] = Homes(homes)
        self.type = self._placeholder(name, ())

    @property
    def variants(self) -> Mapping[str, type[T]]:
        """All structs by tag; this loads them. To look up one use `variant`."""
        return self.homes.all()

    def variant(self, tag: object) -> type[T] | None:
        """The struct of a tag; None if there is none."""
        return self.homes.find(tag) if isinstance(tag, str) else None

    def add(self, variant: type[T]) -> type[T]:
        """Make `variant` a member of the union; usable as a class decorator."""
        tag = variant.__struct_config__.tag
        assert issubclass(variant, self.base) and isinstance(tag, str)
        assert tag not in self.homes.loaded, f"{self.name} has a variant '{tag}' already"
        self.homes.loaded[tag] = variant
        return variant

    def alternate(self, name: str, *scalars: type[str] | None) -> OpenType:
        """A type for annotations that also accepts the given scalars: `alternate("BlockdevRef", str)`."""
        return self._placeholder(name, scalars)

    def convert(self, members: Mapping[str, object]) -> T:
        """Turn plain JSON members into the struct of their tag.

        Raises:
            msgspec.ValidationError: they do not fit. `schema.errors.visit` finds out what QEMU would say.
        """
        variant = self.variant(members.get(self.tag_field))
        if variant is None:
            raise msgspec.ValidationError(f"no variant of {self.name}")
        return msgspec.convert(members, variant, dec_hook=decode_open)

    def _placeholder(self, name: str, scalars: tuple[type[str] | None, ...]) -> OpenType:
        return OpenType(name, (), {"qapi_name": name, "union": self, "scalars": scalars})


def decode_open(kind: type, value: object) -> object:
    """`dec_hook` for every msgspec call on types that may contain open unions."""
    if not isinstance(kind, OpenType):
        raise TypeError(f"{kind} is no schema type")
    if isinstance(value, dict):
        return kind.union.convert(value)
    if (isinstance(value, str) and str in kind.scalars) or (value is None and None in kind.scalars):
        return value
    raise msgspec.ValidationError(f"no {kind.qapi_name}")


DecodeHook = Callable[[type, object], object]
