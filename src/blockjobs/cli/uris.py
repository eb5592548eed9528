"""NBD exports as people name them: `nbd://host[:port][/export]`, `nbd+unix:///export?socket=PATH` (the NBD URI format).

Such a name may stand wherever a command takes an existing image.
"""

from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from blockjobs.base.errors import UsageError
from blockjobs.wire.nbd import DEFAULT_PORT

_INET: Final = ("nbd", "nbd+tcp")
_UNIX: Final = "nbd+unix"
_ENCRYPTED: Final = ("nbds", "nbds+tcp", "nbds+unix")


def is_uri(name: str) -> bool:
    """Whether a name means an NBD export and not a file."""
    scheme, separator, _ = name.partition("://")
    return bool(separator) and scheme in (*_INET, _UNIX, *_ENCRYPTED)


def export_options(uri: str) -> dict[str, Any]:
    """Options of the node that an URI names.

    Raises:
        UsageError: it makes no sense.
    """
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"'{uri}': {error}") from error
    if parts.scheme in _ENCRYPTED:
        raise UsageError(f"'{uri}': connections with TLS need credentials, which an URI cannot hold: use a server")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.username is not None or parts.fragment or set(query) - {"socket"}:
        raise UsageError(f"'{uri}': only the server, an export and '?socket=' can be given")
    export = unquote(parts.path.removeprefix("/"))
    server: dict[str, Any]
    if parts.scheme == _UNIX:
        if host or not query.get("socket"):
            raise UsageError(f"'{uri}': write nbd+unix:///EXPORT?socket=PATH")
        server = {"type": "unix", "path": query["socket"]}
    else:
        if not host or query:
            raise UsageError(f"'{uri}': write nbd://HOST[:PORT]/EXPORT")
        server = {"type": "inet", "host": host, "port": str(DEFAULT_PORT if port is None else port)}
    return {"driver": "nbd", "server": server, "export": export}
