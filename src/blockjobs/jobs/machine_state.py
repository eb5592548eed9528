"""The machine that a host's disks belong to, as snapshots need it: stopped, saved, loaded, and set going again.

A provider is an object of the host (`--object machine-state,id=...,type=...`); without one there is `NoMachine`, so
that a pure storage daemon can save and load too. States are streamed, never whole in memory (design §1.9).
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, Protocol, TypeAlias

from blockjobs.base.buffers import Buffer
from blockjobs.base.bus import Bus
from blockjobs.base.clock import Clock
from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.base.homes import Homes
from blockjobs.block.objects import ObjectOptions, object_options
from blockjobs.schema.command import Event, event

PIECE_BYTES: Final = 1 << 20
"""States travel in pieces of at most this size."""

NO_STATE: Final = b"blockjobs machine state: none\n"
"""What is saved where there is no machine: snapshots with a machine state of length 0 cannot be loaded."""


@event("STOP", since="0.12")
class Stop(Event, frozen=True, kw_only=True):
    """The machine stands still."""


@event("RESUME", since="0.12")
class Resume(Event, frozen=True, kw_only=True):
    """The machine runs again."""


class ByteSink(Protocol):
    """Where a state is written to, from the beginning to the end."""

    async def write(self, content: Buffer) -> None:
        """Append.

        Raises:
            IoFailure: it could not be stored.
        """
        ...


class ByteSource(Protocol):
    """Where a state is read from, from the beginning to the end."""

    @property
    def length(self) -> int:
        """Bytes of the whole state."""
        ...

    async def read(self, length_max: int = PIECE_BYTES) -> bytes:
        """The next bytes, at least one; nothing at the end.

        Raises:
            IoFailure: they could not be read.
        """
        ...


class MachineState(ABC):
    """A provider. All methods raise `UsageError` with a text for people where the machine does not do as it should."""

    @abstractmethod
    async def is_running(self) -> bool:
        """Whether the machine runs now."""

    async def has_state(self) -> bool:
        """Whether `save` would have anything to save: not so if the machine waits to be loaded."""
        return True

    @abstractmethod
    async def stop(self) -> None:
        """Let a running machine stand still; all that it has written is with its disks when this returns."""

    @abstractmethod
    async def cont(self) -> None:
        """Let a stopped machine run."""

    @abstractmethod
    async def save(self, into: ByteSink) -> None:
        """Write the state of the stopped machine, which is not empty. The machine stays stopped, and may go on."""

    @abstractmethod
    async def load(self, source: ByteSource) -> None:
        """Make the stopped machine what it was, now that its disks are; it stays stopped."""

    async def disks_change(self) -> None:
        """The disks of the stopped machine are about to be made what they were: it must forget what it knows of them.

        Nothing by default.
        """


class NoMachine(MachineState):
    """No machine at all; it can be told to run nevertheless, so that clients of machines find what they know."""

    def __init__(self) -> None:
        self._runs = False

    async def is_running(self) -> bool:
        """See `MachineState`."""
        return self._runs

    async def stop(self) -> None:
        """See `MachineState`."""
        self._runs = False

    async def cont(self) -> None:
        """See `MachineState`."""
        self._runs = True

    async def save(self, into: ByteSink) -> None:
        """See `MachineState`."""
        await into.write(NO_STATE)

    async def load(self, source: ByteSource) -> None:
        """See `MachineState`.

        Raises:
            UsageError: the state is some machine's.
        """
        if source.length != len(NO_STATE) or await source.read(len(NO_STATE)) != NO_STATE:
            raise UsageError("The snapshot has the state of a machine, and there is no machine here")


Save: TypeAlias = Callable[[], AsyncIterator[Buffer]]
Load: TypeAlias = Callable[[ByteSource], Awaitable[None]]


class CallbackMachine(MachineState):
    """A machine of the program that embeds the host.

    Args:
        save: an async generator of the state's pieces, not all empty.
        load: takes the state back.
        stop, cont: called around both, if the machine runs.
        is_running: whether it does.
    """

    def __init__(
        self,
        *,
        save: Save,
        load: Load,
        stop: "Callable[[], Awaitable[None]] | None" = None,
        cont: "Callable[[], Awaitable[None]] | None" = None,
        is_running: "Callable[[], bool]" = lambda: False,
    ) -> None:
        self._save, self._load = save, load
        self._stop, self._cont, self._is_running = stop, cont, is_running

    async def is_running(self) -> bool:
        """See `MachineState`."""
        return self._is_running()

    async def stop(self) -> None:
        """See `MachineState`."""
        if self._stop is not None:
            await self._stop()

    async def cont(self) -> None:
        """See `MachineState`."""
        if self._cont is not None:
            await self._cont()

    async def save(self, into: ByteSink) -> None:
        """See `MachineState`."""
        async for piece in self._save():
            await into.write(piece)

    async def load(self, source: ByteSource) -> None:
        """See `MachineState`."""
        await self._load(source)


Maker: TypeAlias = Callable[["MachineStateOptions", Clock], MachineState]
makers: Final[Homes[Maker]] = Homes()
"""How a provider of each type is made; whoever has another type enters it, or says where its home is."""
makers.loaded["none"] = lambda options, clock: NoMachine()


@object_options.add
class MachineStateOptions(ObjectOptions, frozen=True, kw_only=True, tag="machine-state"):
    """The machine whose state belongs to snapshots.

    Attributes:
        type: none, or qemu for a QEMU whose disks are exports of ours.
        qmp: path of that QEMU's QMP socket.
        restart: a command that starts that QEMU anew, waiting for its state.
    """

    type: str
    qmp: str | None = None
    restart: str | None = None

    def build(self, clock: Clock, objects: Mapping[str, object]) -> MachineState:
        """See `ObjectOptions.build`."""
        make = makers.find(self.type)
        if make is None:
            raise ParameterError.bad_value("type", self.type)
        if any(isinstance(each, MachineState) for each in objects.values()):
            raise UsageError("There can be only one machine-state object")
        return make(self, clock)


class Machine:
    """The machine of one host, whichever its provider is.

    Attributes:
        without: the provider if no object gives one; a program that embeds the host may put its own here.
        snapshots: held while snapshots of several images are made, loaded or deleted.
    """

    def __init__(self, objects: Mapping[str, object], bus: Bus) -> None:
        self._objects, self._bus = objects, bus
        self.without: MachineState = NoMachine()
        self.snapshots = asyncio.Lock()

    @property
    def provider(self) -> MachineState:
        """The one in use."""
        return next((each for each in self._objects.values() if isinstance(each, MachineState)), self.without)

    async def is_running(self) -> bool:
        """Whether it runs."""
        return await self.provider.is_running()

    async def stop(self) -> bool:
        """Stop it if it runs, with its event; returns whether it ran."""
        if not await self.provider.is_running():
            return False
        await self.provider.stop()
        self._bus.publish(Stop())
        return True

    async def cont(self) -> None:
        """Let it run if it does not, with its event."""
        if not await self.provider.is_running():
            await self.provider.cont()
            self._bus.publish(Resume())
