"""Commands about the protocol itself: negotiation, introspection, the end."""

from enum import StrEnum
from typing import Any, Protocol

from blockjobs.base.errors import UsageError
from blockjobs.monitor.session import Session, Version
from blockjobs.schema.command import qmp
from blockjobs.schema.introspect import introspect
from blockjobs.schema.types import Record


class QMPCapability(StrEnum):
    """What a client may ask for when it negotiates."""

    OOB = "oob"


class CommandInfo(Record, frozen=True, kw_only=True):
    """One element of `query-commands`."""

    name: str


class Stoppable(Protocol):
    """A host that can be told to end."""

    async def shutdown(self) -> None:
        """End all jobs with their usual events; what embeds the host closes monitors and exits after that."""
        ...


@qmp.command(since="0.13", name="qmp_capabilities", takes_session=True)
async def qmp_capabilities(session: Session, *, enable: list[QMPCapability] | None = None) -> None:
    """Enable capabilities and enter command mode.

    Args:
        enable: capabilities to enable, from those the greeting offers.

    Errors:
        CommandNotFound: it was done before.
    """
    session.negotiate(frozenset(enable or ()))


@qmp.command(since="0.14", takes_session=True)
async def query_version(session: Session) -> Version:
    """The version of QEMU whose behaviour this program has, and the program's own name and version."""
    return session.service.version


@qmp.command(since="0.14", takes_session=True)
async def query_commands(session: Session) -> list[CommandInfo]:
    """The names of all commands."""
    return [CommandInfo(name=name) for name in session.service.registry.commands]


@qmp.command(since="2.5", takes_session=True)
async def query_qmp_schema(session: Session) -> list[dict[str, Any]]:
    """The types of all commands and events, for clients that want to know what exists before they use it."""
    return introspect(session.service.registry)


@qmp.command(since="0.14")
async def quit(host: Stoppable) -> None:
    """End all jobs, then the program; the reply comes after the jobs' events.

    Errors:
        GenericError: the host is not one that a client may end.
    """
    shutdown = getattr(host, "shutdown", None)
    if shutdown is None:
        raise UsageError("This host does not support being stopped")
    await shutdown()
