"""NBD exports as people and management programs name them.

    nbd://HOST[:PORT][/EXPORT]            nbd+unix:///EXPORT?socket=PATH        the NBD URI format
    nbd:HOST:PORT[:exportname=EXPORT]     nbd:unix:PATH[:exportname=EXPORT]     how QEMU spelled it before

Such a name may stand where an existing image is asked for. Names in images' headers are never read like this.
"""

import re
from typing import Any, Final

from blockjobs.base.errors import UsageError

_SCHEMES: Final = ("nbd", "nbd+tcp", "nbd+unix")
_OLD_UNIX: Final = re.compile(r"nbd:unix:(?P<path>.+?)(?::exportname=(?P<export>.*))?", re.DOTALL)
_OLD_INET: Final = re.compile(
    r"nbd:(?P<host>\[[^]]+\]|[^:/]+):(?P<port>[^:/]+)(?::exportname=(?P<export>.*))?", re.DOTALL
)


def is_export(name: str) -> bool:
    """Whether a name means an NBD export and not a file."""
    scheme, separator, _ = name.partition("://")
    if separator and "/" not in scheme:
        return scheme in _SCHEMES
    return name.startswith("nbd:")


def export_options(name: str) -> dict[str, Any]:
    """Options of the node that a name means.

    Raises:
        UsageError: it makes no sense.
    """
    if "://" not in name.partition("?")[0]:
        return _old_style(name)
    # Not earlier: most images are files, whose names go through `is_export` only.
    from urllib.parse import parse_qsl, unquote, urlsplit

    from blockjobs.wire.nbd import DEFAULT_PORT

    try:
        parts = urlsplit(name)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _nonsense() from error
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    path = query.pop("socket", "")
    if parts.username is not None or parts.fragment or query:
        raise _nonsense()
    server: dict[str, Any]
    if parts.scheme == "nbd+unix":
        if host or not path:
            raise _nonsense()
        server = {"type": "unix", "path": path}
    else:
        if not host or path:
            raise _nonsense()
        server = {"type": "inet", "host": host, "port": str(DEFAULT_PORT if port is None else port)}
    export = unquote(parts.path.removeprefix("/"))
    return {"driver": "nbd", "server": server, **({"export": export} if parts.path else {})}


def _old_style(name: str) -> dict[str, Any]:
    match = _OLD_UNIX.fullmatch(name) or _OLD_INET.fullmatch(name)
    if match is None:
        raise _nonsense()
    found = match.groupdict()
    server: dict[str, Any] = {"type": "unix", "path": found["path"]} if "path" in found else {"type": "inet"}
    if "host" in found:
        server |= {"host": found["host"].strip("[]"), "port": found["port"]}
    return {"driver": "nbd", "server": server, **({"export": found["export"]} if found["export"] else {})}


def _nonsense() -> UsageError:
    return UsageError("No valid URL specified")
