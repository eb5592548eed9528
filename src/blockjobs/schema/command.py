"""A command is declared once, as a typed function; an event once, as a struct.

    @qmp.command(since="3.0")
    async def job_pause(host: Host, *, id: JobId) -> None:
        '''Pause a job at its next checkpoint. (And a line for each argument under "Args:".)'''

Keyword-only parameters are the arguments (`snake_case` becomes `kebab-case`), a default means optional, the return
annotation is the result. A second positional parameter instead takes the whole arguments object:
`async def blockdev_add(host, options: BlockdevOptions)`. A command that never waits, such as a query of what is in
memory, says `waits=False` and is a plain function: it is answered where its request arrives. Validation, dotted keys,
query-qmp-schema, help and reference pages are derived from this (design §1.4).
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import msgspec
from msgspec import Struct

from blockjobs.base.errors import CommandNotFound, ParameterError, UsageError
from blockjobs.base.homes import Homes
from blockjobs.schema.docstring import Doc, parse_doc
from blockjobs.schema.errors import fits_plainly, type_tree, visit
from blockjobs.schema.union import decode_open

CommandFunction = Callable[..., Any]
F = TypeVar("F", bound=CommandFunction)
E = TypeVar("E", bound=Struct)


class Event(Struct, kw_only=True, frozen=True, rename="kebab", omit_defaults=True):
    """Base of all events; the fields are the members of `data`, those with a default are optional."""

    event_name: ClassVar[str] = ""


V = TypeVar("V", bound=Event)


class Command(Struct, frozen=True):
    """A registered command.

    Attributes:
        name: on the wire.
        since: QEMU's version that has it, or ours for commands of our own.
        features: as in query-qmp-schema: `deprecated`, `unstable`.
        function: what runs it.
        waits: that is a coroutine function; else calling it is all.
        arguments: a struct type, or an open union's type, that describes the arguments object.
        whole: the function takes that object as one positional parameter instead of keywords.
        result: the return annotation, None for `{}`.
        takes_session: the first parameter is the monitor session instead of the host.
        doc: the docstring.
    """

    name: str
    since: str
    features: tuple[str, ...]
    function: CommandFunction
    waits: bool
    arguments: Any
    whole: bool
    result: Any
    takes_session: bool
    doc: Doc


class Call(Struct, frozen=True):
    """A command with arguments that passed all checks, ready to run.

    Attributes:
        command: what to run.
        arguments: the converted arguments object.
    """

    command: Command
    arguments: Any

    async def run(self, receiver: object) -> object:
        """Run it on `receiver`, the host (or the session, see `Command.takes_session`).

        Raises:
            BlockjobsError: whatever the command raises.
        """
        result = self.begin(receiver)
        return await result if self.command.waits else result

    def begin(self, receiver: object) -> Any:
        """Call the function: returns the result, or what to await for it if the command waits. For errors see `run`."""
        if self.command.whole:
            return self.command.function(receiver, self.arguments)
        keywords = {name: getattr(self.arguments, name) for name in self.arguments.__struct_fields__}
        return self.command.function(receiver, **keywords)


class EventType(Struct, frozen=True):
    """A registered event: its name on the wire and the struct of its data."""

    name: str
    since: str
    struct: type[Event]


class Registry:
    """All commands and events of a program; a declaration is loaded when it is first wanted, if its home is known."""

    def __init__(self) -> None:
        self._commands: Homes[Command] = Homes()
        self._events: Homes[EventType] = Homes()

    def know(self, commands: Mapping[str, str], events: Mapping[str, str]) -> None:
        """Say which modules declare commands and events, by wire name; see `Homes.know`."""
        self._commands.know(commands)
        self._events.know(events)

    def homes(self) -> tuple[str, ...]:
        """The modules that declare commands and events."""
        return (*self._commands.modules(), *self._events.modules())

    @property
    def commands(self) -> Mapping[str, Command]:
        """All commands by wire name; this loads them."""
        return self._commands.all()

    @property
    def events(self) -> Mapping[str, EventType]:
        """All events by wire name; this loads them."""
        return self._events.all()

    def command(
        self,
        *,
        since: str,
        name: str | None = None,
        features: Iterable[str] = (),
        takes_session: bool = False,
        waits: bool = True,
    ) -> Callable[[F], F]:
        """Register a function as a command; it stays callable as it is.

        Args:
            since: version of QEMU that introduced the command.
            name: the wire name where it is not the function's name in kebab case.
            features: `deprecated`, `unstable`, ... as QEMU lists them.
            takes_session: pass the monitor session instead of the host (negotiation, introspection).
            waits: it is a coroutine function; else a plain one.

        Raises:
            TypeError: the declaration breaks a rule of this module, for instance an argument without documentation.
        """

        def register(function: F) -> F:
            wire_name = name or function.__name__.replace("_", "-")
            if wire_name in self._commands.loaded:
                raise TypeError(f"command {wire_name} is declared twice")
            if inspect.iscoroutinefunction(function) is not waits:
                raise TypeError(f"{wire_name}: write async def, or def and waits=False")
            arguments, whole = _arguments_type(function, wire_name)
            doc = parse_doc(function.__doc__)
            _demand_documentation(function, doc)
            result = _unquoted(inspect.signature(function).return_annotation, function)
            self._commands.loaded[wire_name] = Command(
                name=wire_name,
                since=since,
                features=tuple(features),
                function=function,
                waits=waits,
                arguments=arguments,
                whole=whole,
                result=None if result in (inspect.Signature.empty, type(None)) else result,
                takes_session=takes_session,
                doc=doc,
            )
            return function

        return register

    def event(self, name: str, *, since: str) -> Callable[[type[V]], type[V]]:
        """Register a struct as the data of an event and set its `event_name`.

        Raises:
            TypeError: the name is taken, or the class has no docstring.
        """

        def register(struct: type[V]) -> type[V]:
            if name in self._events.loaded or not struct.__doc__:
                raise TypeError(f"event {name} is declared twice or has no docstring")
            struct.event_name = name
            self._events.loaded[name] = EventType(name, since, struct)
            return struct

        return register

    def find(self, name: str) -> Command:
        """The command of that wire name.

        Raises:
            CommandNotFound: there is none.
        """
        command = self._commands.find(name)
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        return command

    def bind(self, name: str, arguments: Mapping[str, object]) -> Call:
        """Check a request's arguments and convert them.

        Args:
            name: the command's wire name.
            arguments: plain JSON values: dict, list, str, int, float, bool, None.

        Raises:
            CommandNotFound: no such command.
            ParameterError: the arguments do not fit; the text is QEMU's.
        """
        command = self.find(name)
        return Call(command, convert(arguments, command.arguments))


def convert(value: object, kind: Any) -> Any:
    """Turn plain JSON values into `kind` (a struct, an open union's type, ...), strictly.

    Raises:
        ParameterError: `value` does not fit; the text is the one QEMU shows, with paths relative to `value`.
        UsageError: it is nested hundreds of levels deep.
    """
    if fits_plainly(value):
        try:
            return msgspec.convert(value, kind, dec_hook=decode_open)
        except (msgspec.ValidationError, RecursionError):
            pass  # say it in QEMU's words below
    try:
        normal = visit(value, type_tree(kind))
        return msgspec.convert(normal, kind, dec_hook=decode_open)
    except RecursionError as error:
        raise UsageError("The arguments are nested too deeply") from error
    except msgspec.ValidationError as error:
        # A constraint that QAPI does not have, such as a pattern: msgspec's own words are the best we have.
        raise ParameterError("", str(error)) from error


def _arguments_type(function: CommandFunction, wire_name: str) -> tuple[Any, bool]:
    """The type of the arguments object, and whether the function takes it whole."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    positional = [each for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    if positional and len(parameters) > 1:
        raise TypeError(f"{wire_name}: write def f(host, *, arguments...) or def f(host, options)")
    if positional:
        return _unquoted(positional[0].annotation, function), True
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for each in parameters:
        if each.annotation is inspect.Parameter.empty:
            raise TypeError(f"{wire_name}: argument {each.name} has no type")
        kind = _unquoted(each.annotation, function)
        fields.append((each.name, kind) if each.default is inspect.Parameter.empty else (each.name, kind, each.default))
    struct = msgspec.defstruct(
        f"{wire_name}-arguments", fields, kw_only=True, frozen=True, rename="kebab", forbid_unknown_fields=True
    )
    return struct, False


def _unquoted(annotation: Any, function: CommandFunction) -> Any:
    """An annotation as an object: only the first parameter's, which is never looked at, may be quoted."""
    if isinstance(annotation, str):
        raise TypeError(f"{function.__name__}: the type '{annotation}' must not be quoted")
    return annotation


def _demand_documentation(function: CommandFunction, doc: Doc) -> None:
    names = list(inspect.signature(function).parameters)[1:]
    undocumented = [name for name in names if name not in doc.arguments]
    if not doc.summary or undocumented:
        raise TypeError(f"{function.__name__}: no docstring, or no line in its Args: for {undocumented}")


qmp = Registry()
"""The registry of this program's commands and events."""

event = qmp.event
