"""What a command of the command line can be told, read off its function.

    @command(IMAGES)
    def create(file: str, size: Size | None = None, /, *, force: Switch = False) -> int:
        '''Make an empty image. (And a line for each parameter under "Args:".)'''

Positional parameters are words, keyword parameters are options (`image_root` is `--image-root`), a `bool` is a flag,
a list may be given several times, a `Literal` is a choice. A parameter whose type is a NamedTuple is a group of
options that several commands have: its fields are options too. `Annotated[..., Parameter(...)]` says what these rules
cannot.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from blockjobs.schema.docstring import parse_doc

_NONE: Final = object()
"""In place of a default where there is none."""


class Parameter(NamedTuple):
    """What else is to be known of a parameter.

    Attributes:
        name: of the option, with its dashes; several if it has a short one too.
        read: makes a value of a word; raises ValueError with a text for people.
        variable: of the environment, with the value if none is given.
        may_be_negative: a word that begins with a dash is a value too.
    """

    name: str | tuple[str, ...] = ()
    read: Callable[[str], Any] | None = None
    variable: str = ""
    may_be_negative: bool = False


class Slot(NamedTuple):
    """One word or option that a command takes.

    Attributes:
        owner: the parameter of the function that it is for.
        member: the field of `owner` where that is a group, else empty.
        names: how it is spelled, or for a positional one how it is called: FILE.
        is_option: it has a name; else its place says what it is.
        is_flag: it has no value.
        is_many: it may be given any number of times, and makes a list.
        is_rest: the function takes each of them as an argument of its own (`*files`).
        is_required: it must be given.
        choices: the values that there are; any if empty.
        kind: what `read` makes, for people: STR, INT, SIZE, ...
        default: of an option, None if there is nothing to tell.
        about: what its docstring says.
        read: see `Parameter`.
        variable: see `Parameter`.
        may_be_negative: see `Parameter`.
    """

    owner: str
    member: str
    names: tuple[str, ...]
    is_option: bool
    is_flag: bool
    is_many: bool
    is_rest: bool
    is_required: bool
    choices: tuple[str, ...]
    kind: str
    default: Any
    about: str
    read: Callable[[str], Any]
    variable: str
    may_be_negative: bool


def slots_of(function: Callable[..., int]) -> list[Slot]:
    """What a command takes, in the order of its declaration."""
    hints = get_type_hints(function, include_extras=True)
    about = parse_doc(function.__doc__).arguments
    return [slot for each in inspect.signature(function).parameters.values() for slot in _slots(each, hints, about)]


def _slots(parameter: inspect.Parameter, hints: dict[str, Any], about: dict[str, str]) -> Iterator[Slot]:
    hint, name = hints[parameter.name], parameter.name
    if _is_group(hint):
        inner = get_type_hints(hint, include_extras=True)
        texts = parse_doc((hint.__doc__ or "").replace("Attributes:", "Args:", 1)).arguments
        for member in hint._fields:
            default = hint._field_defaults.get(member, _NONE)
            yield _slot(name, member, inner[member], default, texts.get(member, ""))
        return
    default = _NONE if parameter.default is parameter.empty else parameter.default
    is_rest = parameter.kind is parameter.VAR_POSITIONAL
    slot = _slot(name, "", list[hint] if is_rest else hint, default, about.get(name, ""))  # type: ignore[valid-type]
    if is_rest:
        slot = slot._replace(is_rest=True, is_required=False)
    if parameter.kind is not parameter.KEYWORD_ONLY:
        slot = slot._replace(names=(name.strip("_").upper(),), is_option=False)
    yield slot


def _slot(owner: str, member: str, hint: Any, default: Any, about: str) -> Slot:
    hint, told = _unwrapped(hint)
    is_many = get_origin(hint) is list
    if is_many:
        hint, inner = _unwrapped(get_args(hint)[0])
        told = _merged(inner, told)
    names = (told.name,) if isinstance(told.name, str) else told.name
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return Slot(
        owner=owner,
        member=member,
        names=names or ("--" + (member or owner).strip("_").replace("_", "-"),),
        is_option=True,
        is_flag=hint is bool,
        is_many=is_many,
        is_rest=False,
        is_required=default is _NONE,
        choices=choices,
        kind="" if hint is bool else "SIZE" if told.read is not None else "INT" if hint is int else "STR",
        default=None if default is _NONE or hint is bool or is_many else default,
        about=about,
        read=told.read or (_whole_number if hint is int else str),
        variable=told.variable,
        may_be_negative=told.may_be_negative,
    )


def _unwrapped(hint: Any) -> tuple[Any, Parameter]:
    """A type without `Annotated` and `| None`, and what the annotations say: the outer ones have the last word."""
    if get_origin(hint) is Annotated:
        inner, *told = get_args(hint)
        hint, known = _unwrapped(inner)
        for each in told:
            known = _merged(known, each) if isinstance(each, Parameter) else known
        return hint, known
    if get_origin(hint) in (Union, types.UnionType):
        return _unwrapped(next(each for each in get_args(hint) if each is not types.NoneType))
    return hint, Parameter()


def _merged(inner: Parameter, outer: Parameter) -> Parameter:
    return Parameter(
        outer.name or inner.name,
        outer.read or inner.read,
        outer.variable or inner.variable,
        outer.may_be_negative or inner.may_be_negative,
    )


def _whole_number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"'{word}' is not a whole number") from None


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple)


def groups_of(function: Callable[..., int]) -> dict[str, type]:
    """The types of those parameters of a command that are groups of options."""
    hints = get_type_hints(function)
    return {name: hint for name, hint in hints.items() if _is_group(hint)}
