"""Commands on character devices, through which monitors meet their clients."""

from blockjobs.base.errors import UsageError
from blockjobs.monitor.chardevs import AnyChardevBackend, ChardevInfo, Chardevs, chardev_backends
from blockjobs.monitor.session import Session
from blockjobs.schema.command import qmp
from blockjobs.schema.types import Record


class ChardevReturn(Record, frozen=True, kw_only=True):
    """What `chardev-add` tells: nothing, of the kinds that exist here."""

    pty: str | None = None


class ChardevBackendInfo(Record, frozen=True, kw_only=True):
    """A kind of character device."""

    name: str


@qmp.command(since="1.4", takes_session=True)
async def chardev_add(session: Session, *, id: str, backend: AnyChardevBackend) -> ChardevReturn:
    """Make a character device.

    Args:
        id: how it is called.
        backend: its kind, and what that asks for.
    """
    chardevs = _chardevs(session)
    chardevs.check_free(id)
    try:
        await chardevs.add(id, backend)
    except UsageError as error:
        raise UsageError(f"Failed to add chardev '{id}': {error}") from error
    return ChardevReturn()


@qmp.command(since="1.4", takes_session=True)
async def chardev_remove(session: Session, *, id: str) -> None:
    """Close a character device that no monitor uses.

    Args:
        id: the device.
    """
    await _chardevs(session).remove(id)


@qmp.command(since="2.0", waits=False)
def query_chardev_backends(host: object) -> list[ChardevBackendInfo]:
    """List the kinds of character devices that exist here."""
    del host
    return [ChardevBackendInfo(name=name) for name in chardev_backends.variants]


@qmp.command(since="0.14", takes_session=True, waits=False)
def query_chardev(session: Session) -> list[ChardevInfo]:
    """List the character devices, the oldest first."""
    return _chardevs(session).infos()


def _chardevs(session: Session) -> Chardevs:
    if session.service.chardevs is None:
        raise UsageError("This program has no character devices")
    return session.service.chardevs
