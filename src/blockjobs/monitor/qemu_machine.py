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
from typing import Any, Final, TypeVar

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

CONNECT_S_MAX: Final = 10.0
START_S_MAX: Final = 30.0
"""How long a machine may take until its QMP socket answers."""
STALL_S_MAX: Final = 60.0
"""A stream in which nothing moves for so long is given up."""
_POLL_S: Final = 0.05
_FASTEST_BYTES_PER_S: Final = 1 << 40
_WAITS: Final = "inmigrate"


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
            return str((await qmp.execute("query-status"))["status"])

    async def is_running(self) -> bool:
        """See `MachineState`; a machine that waits for its state is to run once it has it."""
        return await self._status() in ("running", _WAITS)

    async def has_state(self) -> bool:
        """See `MachineState`: not while it waits for one."""
        return await self._status() != _WAITS

    async def stop(self) -> None:
        """See `MachineState`."""
        async with self._connected() as qmp:
            if (await qmp.execute("query-status"))["status"] != _WAITS:
                await qmp.execute("stop")

    async def cont(self) -> None:
        """See `MachineState`."""
        async with self._connected() as qmp:
            await qmp.execute("cont")

    async def save(self, into: ByteSink) -> None:
        """See `MachineState`. The stream of a migration to us."""
        arrived: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        arrived = asyncio.get_running_loop().create_future()

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
                    await qmp.command("migrate-set-parameters", {"max-bandwidth": _FASTEST_BYTES_PER_S})
                    await qmp.execute("migrate", uri=f"unix:{path}")
                    try:
                        await self._receive(qmp, arrived, into)
                    except BaseException:
                        with suppress(QmpError, WireError):
                            await qmp.execute("migrate_cancel")
                        raise
            finally:
                server.close()
                if arrived.done():
                    arrived.result()[1].close()

    async def _receive(
        self,
        qmp: QmpClient,
        arrived: "asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]",
        into: ByteSink,
    ) -> None:
        reader, _ = await self._in_time(lambda: arrived, qmp)
        while piece := await self._in_time(lambda: reader.read(PIECE_BYTES), qmp):
            await into.write(piece)
        await self._until_complete(qmp)

    async def load(self, source: ByteSource) -> None:
        """See `MachineState`. The stream of a migration from us."""
        if await self._is_gone() or await self._status() != _WAITS:
            await self._start_anew()
        with tempfile.TemporaryDirectory(prefix="blockjobs-") as folder:
            path = os.path.join(folder, "state")
            async with self._connected() as qmp:
                await qmp.execute("migrate-incoming", uri=f"unix:{path}")
                try:
                    _, writer = await asyncio.open_unix_connection(path)
                except OSError as error:
                    raise UsageError(f"The machine at '{self._qmp}' takes no state: {error}") from error
                try:
                    with suppress(ConnectionError):  # what was wrong, the machine says itself
                        while piece := await source.read():
                            writer.write(piece)
                            await self._in_time(writer.drain, qmp)
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
                await qmp.execute("quit")
            async with asyncio.timeout(START_S_MAX):
                await qmp.closed()
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
        deadline_ns = self._clock.now_ns() + int(START_S_MAX * 1e9)
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

    async def _in_time(self, step: Callable[[], Awaitable[T]], qmp: QmpClient) -> T:
        """One step of a stream; the machine may be gone, or the stream may stand still.

        Raises:
            UsageError: it is so.
        """
        try:
            return await asyncio.wait_for(step(), STALL_S_MAX)
        except TimeoutError as error:
            raise UsageError(f"The state of the machine at '{self._qmp}' does not move any more") from error

    async def _until_complete(self, qmp: QmpClient) -> None:
        """Wait until the machine says that the migration has succeeded.

        Raises:
            UsageError: it has not.
        """
        while True:
            known: dict[str, Any] = await qmp.execute("query-migrate")
            match known.get("status"):
                case "completed":
                    return
                case "failed" | "cancelled":
                    why = known.get("error-desc") or "the migration failed"
                    raise UsageError(f"The machine at '{self._qmp}' did not move its state: {why}")
            await asyncio.sleep(_POLL_S)


def _make(options: MachineStateOptions, clock: Clock) -> MachineState:
    if options.qmp is None:
        raise UsageError("machine-state of type qemu needs qmp=PATH")
    return QemuMachine(options.qmp, options.restart, clock)


makers["qemu"] = _make
