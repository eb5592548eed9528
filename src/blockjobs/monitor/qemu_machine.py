"""A real QEMU as the machine whose state goes with snapshots: its disks are exports of ours (docs/adr/0016).

Its state is the stream of a migration that we receive, and send back to a QEMU that waits for one. QEMU takes a stream
only when it has just been started (`-incoming defer`), so a machine that runs is quit and started anew for a load.
"""

import asyncio
import os
import shlex
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeAlias, TypeVar

from blockjobs.base.clock import Clock
from blockjobs.base.errors import UsageError, WireError
from blockjobs.jobs.machine_state import (
    PIECE_BYTES,
    ByteSink,
    ByteSource,
    MachineState,
    MachineStateOptions,
    makers,
)
from blockjobs.monitor.client import QmpClient, QmpError

T = TypeVar("T")
Arrived: TypeAlias = "asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]"

CONNECT_S_MAX: Final = 10.0
START_S_MAX: Final = 30.0
"""How long a machine may take until its QMP socket answers."""
STALL_S_MAX: Final = 60.0
"""A machine that does not answer, or a stream in which nothing moves, for so long is given up."""
DEVICES_BYTES_MAX: Final = 1 << 30
"""What a state may have besides its memory: firmware, video memory, devices."""
_POLL_S: Final = 0.05
_FASTEST_BYTES_PER_S: Final = 1 << 40
_WAITS: Final = "inmigrate"
_STANDS: Final = "does not move its state any more"


class QemuMachine(MachineState):
    """See the module.

    Args:
        qmp: path of its QMP socket, at which nobody else is being served.
        restart: a command, split as a shell would, that starts the machine anew with `-incoming defer` and the same QMP
            socket, and returns at once or stays as long as the machine.
        clock: of the host.
    """

    def __init__(self, qmp: str, restart: str | None, clock: Clock) -> None:
        self._qmp, self._restart, self._clock = qmp, restart, clock
        self._children: list[asyncio.subprocess.Process] = []

    @asynccontextmanager
    async def _connected(self, timeout_s: float = CONNECT_S_MAX) -> AsyncIterator[QmpClient]:
        """A connection for one step.

        Raises:
            UsageError: nobody answers, or the machine goes away or refuses in the middle.
        """
        try:
            client = await QmpClient.connect(self._qmp, timeout_s=timeout_s)
        except TimeoutError as error:
            raise UsageError(f"The machine at '{self._qmp}' does not answer: is another client connected?") from error
        except (OSError, WireError) as error:
            raise UsageError(f"There is no machine at '{self._qmp}': {error}") from error
        try:
            yield client
        except WireError as error:
            raise UsageError(f"The machine at '{self._qmp}' has gone away") from error
        except QmpError as error:
            raise UsageError(f"The machine at '{self._qmp}' refuses: {error.desc}") from error
        finally:
            await client.close()

    async def _status(self) -> str:
        async with self._connected() as qmp:
            return str((await self._ask(qmp, "query-status"))["status"])

    async def _ask(self, qmp: QmpClient, name: str, **arguments: Any) -> Any:
        """Run a command in the machine, which may have frozen.

        Raises:
            UsageError: it does not answer.
            QmpError, WireError: see `QmpClient.execute`.
        """
        return await self._in_time(lambda: qmp.execute(name, **arguments), "does not answer any more")

    async def is_running(self) -> bool:
        """See `MachineState`; a machine that waits for its state is to run once it has it."""
        return await self._status() in ("running", _WAITS)

    async def has_state(self) -> bool:
        """See `MachineState`: not while it waits for one."""
        return await self._status() != _WAITS

    async def stop(self) -> None:
        """See `MachineState`."""
        async with self._connected() as qmp:
            if (await self._ask(qmp, "query-status"))["status"] != _WAITS:
                await self._ask(qmp, "stop")

    async def cont(self) -> None:
        """See `MachineState`."""
        async with self._connected() as qmp:
            await self._ask(qmp, "cont")

    async def save(self, into: ByteSink) -> None:
        """See `MachineState`. The stream of a migration to us."""
        arrived: Arrived = asyncio.get_running_loop().create_future()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not arrived.done():
                arrived.set_result((reader, writer))
            else:
                writer.close()

        with tempfile.TemporaryDirectory(prefix="blockjobs-") as folder:
            path = os.path.join(folder, "state")
            server = await asyncio.start_unix_server(accept, path, limit=PIECE_BYTES)
            try:
                async with self._connected() as qmp:
                    length_max = await self._length_max(qmp)
                    await self._ask(qmp, "migrate-set-parameters", max_bandwidth=_FASTEST_BYTES_PER_S)
                    await self._ask(qmp, "migrate", uri=f"unix:{path}")
                    try:
                        await self._receive(qmp, arrived, into, length_max)
                    except BaseException:
                        with suppress(QmpError, WireError, TimeoutError):
                            await asyncio.wait_for(qmp.execute("migrate_cancel"), CONNECT_S_MAX)
                        raise
            finally:
                server.close()
                if arrived.done():
                    arrived.result()[1].close()

    async def _length_max(self, qmp: QmpClient) -> int:
        """The most that its state can have, in bytes: a machine that stands still sends each page once."""
        memory = await self._ask(qmp, "query-memory-size-summary")
        return 2 * (int(memory["base-memory"]) + int(memory.get("plugged-memory", 0))) + DEVICES_BYTES_MAX

    async def _receive(self, qmp: QmpClient, arrived: Arrived, into: ByteSink, length_max: int) -> None:
        """Take the stream; the machine sends no faster than `into` takes it.

        Raises:
            UsageError: the machine cannot come to our socket, stops sending, fails, or sends without end.
        """
        deadline_ns = self._deadline_ns(STALL_S_MAX)
        while not arrived.done():
            await asyncio.wait([arrived], timeout=_POLL_S)
            if not arrived.done() and (await self._has_moved(qmp) or self._clock.now_ns() > deadline_ns):
                raise UsageError(f"The machine at '{self._qmp}' sends no state")
        reader, _ = arrived.result()
        length = 0
        while piece := await self._in_time(lambda: reader.read(PIECE_BYTES), _STANDS):
            length += len(piece)
            if length > length_max:
                raise UsageError(f"The state of the machine at '{self._qmp}' is longer than {length_max} bytes")
            await into.write(piece)
        await self._until_complete(qmp)

    async def load(self, source: ByteSource) -> None:
        """See `MachineState`. The stream of a migration from us."""
        if await self._is_gone() or await self._status() != _WAITS:
            await self._start_anew()
        with tempfile.TemporaryDirectory(prefix="blockjobs-") as folder:
            path = os.path.join(folder, "state")
            async with self._connected() as qmp:
                await self._ask(qmp, "migrate-incoming", uri=f"unix:{path}")
                try:
                    _, writer = await asyncio.open_unix_connection(path)
                except OSError as error:
                    raise UsageError(f"The machine at '{self._qmp}' takes no state: {error}") from error
                try:
                    with suppress(ConnectionError):  # what was wrong, the machine says itself
                        while piece := await source.read():
                            writer.write(piece)
                            await self._in_time(writer.drain, _STANDS)
                finally:
                    writer.close()
                await self._until_complete(qmp)

    async def disks_change(self) -> None:
        """See `MachineState`: a machine that does not wait for a state is quit; `load` starts it anew."""
        if await self._status() == _WAITS:
            return
        if self._restart is None:
            raise UsageError(
                f"The machine at '{self._qmp}' does not wait for a state: start it anew with -incoming defer, "
                "or give the machine-state object restart=COMMAND"
            )
        async with self._connected() as qmp:
            with suppress(WireError):
                await self._ask(qmp, "quit")
            await self._in_time(qmp.closed, "does not end")
        await self._reap()

    async def _is_gone(self) -> bool:
        try:
            await self._status()
        except UsageError:
            return True
        return False

    async def _start_anew(self) -> None:
        if self._restart is None:
            raise UsageError(f"The machine at '{self._qmp}' does not wait for a state")
        words = shlex.split(self._restart)
        try:
            process = await asyncio.create_subprocess_exec(*words, stdin=asyncio.subprocess.DEVNULL)
        except (OSError, ValueError, IndexError) as error:
            raise UsageError(f"The machine could not be started with '{self._restart}': {error}") from error
        self._children.append(process)
        deadline_ns = self._deadline_ns(START_S_MAX)
        while await self._is_gone():
            if process.returncode:
                raise UsageError(f"'{self._restart}' ended with {process.returncode} and started no machine")
            if self._clock.now_ns() > deadline_ns:
                raise UsageError(f"'{self._restart}' started no machine at '{self._qmp}'")
            await asyncio.sleep(_POLL_S)
        if await self._status() != _WAITS:
            raise UsageError(f"'{self._restart}' started a machine that does not wait for a state (-incoming defer)")

    async def _reap(self) -> None:
        """The processes that we started and that were quit."""
        for process in self._children:
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5.0)
        self._children = [process for process in self._children if process.returncode is None]

    def _deadline_ns(self, seconds: float) -> int:
        return self._clock.now_ns() + int(seconds * 1e9)

    async def _in_time(self, step: Callable[[], Awaitable[T]], fault: str) -> T:
        """One step with a machine that may have frozen.

        Args:
            step: what to wait for.
            fault: what is wrong with the machine if that does not come, for people.

        Raises:
            UsageError: it does not.
        """
        try:
            return await asyncio.wait_for(step(), STALL_S_MAX)
        except TimeoutError as error:
            raise UsageError(f"The machine at '{self._qmp}' {fault}") from error

    async def _until_complete(self, qmp: QmpClient) -> None:
        """Wait until the machine says that the migration has succeeded; the stream is at its end.

        Raises:
            UsageError: it has not.
        """
        deadline_ns = self._deadline_ns(STALL_S_MAX)
        while not await self._has_moved(qmp):
            if self._clock.now_ns() > deadline_ns:
                raise UsageError(f"The machine at '{self._qmp}' {_STANDS}")
            await asyncio.sleep(_POLL_S)

    async def _has_moved(self, qmp: QmpClient) -> bool:
        """Whether the migration is over.

        Raises:
            UsageError: it failed.
        """
        known: dict[str, Any] = await self._ask(qmp, "query-migrate")
        if known.get("status") in ("failed", "cancelled"):
            why = known.get("error-desc") or "the migration failed"
            raise UsageError(f"The machine at '{self._qmp}' did not move its state: {why}")
        return known.get("status") == "completed"


def _make(options: MachineStateOptions, clock: Clock) -> MachineState:
    if options.qmp is None:
        raise UsageError("machine-state of type qemu needs qmp=PATH")
    return QemuMachine(options.qmp, options.restart, clock)


makers.loaded["qemu"] = _make
