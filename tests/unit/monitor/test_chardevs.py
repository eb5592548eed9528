"""Character devices: made and removed while the program runs, over TLS, and closed to strangers."""

import asyncio
import json
import os
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from blockjobs.base.bus import Bus
from blockjobs.base.clock import SystemClock
from blockjobs.base.errors import UsageError
from blockjobs.block.objects import AnyObjectOptions, Objects, add_object
from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.monitor.chardev import Door
from blockjobs.monitor.chardevs import AnyChardevBackend, Chardevs
from blockjobs.monitor.server import Monitor
from blockjobs.monitor.session import Service
from blockjobs.schema.command import convert
from blockjobs.testing.certificates import Authority

GREETING = b'{"QMP":'


def backend(kind: str, **members: Any) -> Any:
    return convert({"type": kind, "data": members}, AnyChardevBackend)


def unix(path: Path, **members: Any) -> Any:
    return backend("socket", addr={"type": "unix", "data": {"path": str(path)}}, **members)


def inet(host: str, **members: Any) -> Any:
    return backend("socket", addr={"type": "inet", "data": {"host": host, "port": "0"}}, **members)


def serving(chardevs: Chardevs, name: str, test: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """Run `test` while a monitor uses the device of that name."""

    async def main() -> None:
        bus = Bus()
        service = Service(host=None, bus=bus, clock=SystemClock(), control=asyncio.Lock(), chardevs=chardevs)
        monitor = Monitor(chardevs.use(name), service)
        await monitor.start()
        try:
            await asyncio.wait_for(test(), 20)
        finally:
            await monitor.close()
            await chardevs.close()

    return main


async def asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str, **arguments: Any) -> Any:
    writer.write(json.dumps({"execute": command, "arguments": arguments}).encode())
    return json.loads(await reader.readline())


def test_added_listed_and_removed_by_a_client(tmp_path: Path) -> None:
    chardevs = Chardevs(SystemClock(), {})
    one, two = tmp_path / "one", tmp_path / "two"

    async def test() -> None:
        reader, writer = await asyncio.open_unix_connection(str(one))
        assert (await reader.readline()).startswith(GREETING)
        await asked(reader, writer, "qmp_capabilities")
        addr = {"type": "unix", "data": {"path": str(two)}}
        added = {"id": "b", "backend": {"type": "socket", "data": {"addr": addr}}}
        assert await asked(reader, writer, "chardev-add", **added) == {"return": {}}
        assert two.is_socket()
        error = {"class": "GenericError", "desc": "Chardev with id 'b' already exists"}
        assert await asked(reader, writer, "chardev-add", **added) == {"error": error}
        listed = await asked(reader, writer, "query-chardev")
        assert listed["return"] == [
            {"label": "a", "filename": f"unix:{one},server=on", "frontend-open": True},
            {"label": "b", "filename": f"disconnected:unix:{two},server=on", "frontend-open": False},
        ]
        busy = await asked(reader, writer, "chardev-remove", id="a")
        assert busy["error"]["desc"] == "Chardev 'a' is busy"
        assert await asked(reader, writer, "chardev-remove", id="b") == {"return": {}}
        assert not two.exists()
        kinds = await asked(reader, writer, "query-chardev-backends")
        assert {each["name"] for each in kinds["return"]} == {"socket", "null", "stdio"}
        writer.close()

    async def main() -> None:
        await chardevs.add("a", unix(one))
        await serving(chardevs, "a", test)()

    asyncio.run(main())


def tls_objects(authority: Authority, directory: Path, **authz: Any) -> Objects:
    objects = Objects()
    server = authority.issue(directory / "server", "server")
    add = {"qom-type": "tls-creds-x509", "id": "t", "dir": str(server), "endpoint": "server"}
    for options in (add, {"qom-type": "authz-list", "id": "z", "policy": "deny", **authz}):
        add_object(objects, convert(options, AnyObjectOptions), SystemClock())
    return objects


def client_context(authority: Authority, directory: Path, name: str) -> ssl.SSLContext:
    issued = authority.issue(directory / name, "client", name=name)
    context = ssl.create_default_context(cafile=str(issued / "ca-cert.pem"))
    context.load_cert_chain(issued / "client-cert.pem", issued / "client-key.pem")
    return context


async def greeting(port: int, context: ssl.SSLContext | None) -> bytes:
    """The first line; empty if the server hangs up."""
    try:
        reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
        line = await reader.readline()
    except (ConnectionError, ssl.SSLError):
        return b""
    writer.close()
    return line


def test_tls_lets_in_whom_the_list_names_and_goes_on_after_others(tmp_path: Path) -> None:
    authority = Authority()
    friend = client_context(authority, tmp_path, "friend")
    foe = client_context(authority, tmp_path, "foe")
    stranger = client_context(Authority("another"), tmp_path, "stranger")
    nameless = ssl.create_default_context(cafile=str(tmp_path / "friend" / "ca-cert.pem"))
    objects = tls_objects(authority, tmp_path, rules=[{"match": "CN=friend", "policy": "allow"}])
    chardevs = Chardevs(SystemClock(), objects)

    async def main() -> None:
        await chardevs.add("a", inet("localhost", **{"tls-creds": "t", "tls-authz": "z"}))
        port = int(chardevs.infos()[0].filename.removesuffix(",server=on").rpartition(":")[2])

        async def test() -> None:
            for context in (foe, stranger, nameless):
                assert await greeting(port, context) == b""
            assert (await greeting(port, friend)).startswith(GREETING)
            assert await greeting(port, foe) == b""
            assert (await greeting(port, friend)).startswith(GREETING)

        await serving(chardevs, "a", test)()

    asyncio.run(main())


def test_other_machines_need_a_certificate_or_the_users_word(tmp_path: Path) -> None:
    objects = tls_objects(Authority(), tmp_path)
    refused = Chardevs(SystemClock(), objects)

    async def main() -> None:
        for host in ("", "0.0.0.0", "::"):
            with pytest.raises(UsageError, match="Other machines could reach"):
                await refused.add("a", inet(host))
        assert refused.infos() == []
        await refused.add("a", inet("0.0.0.0", **{"tls-creds": "t"}))
        told = Chardevs(SystemClock(), objects, door=Door(remote=True))
        await told.add("b", inet("0.0.0.0"))
        for each in (refused, told):
            await each.close()

    asyncio.run(main())


@pytest.mark.parametrize(("users", "comes_in"), [({os.getuid()}, True), ({os.getuid() + 1}, False)])
def test_users_are_told_apart_at_a_unix_socket(tmp_path: Path, users: set[int], comes_in: bool) -> None:
    path = tmp_path / "q"
    chardevs = Chardevs(SystemClock(), {}, door=Door(users=frozenset(users)))

    async def test() -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        assert (await reader.readline()).startswith(GREETING) is comes_in
        writer.close()

    async def main() -> None:
        await chardevs.add("a", unix(path))
        assert path.stat().st_mode & 0o777 == 0o666
        await serving(chardevs, "a", test)()

    asyncio.run(main())


def test_a_name_in_the_abstract_space_is_no_file(tmp_path: Path) -> None:
    name = str(tmp_path / "abstract")
    chardevs = Chardevs(SystemClock(), {})
    addr = {"type": "unix", "data": {"path": name, "abstract": True}}

    async def test() -> None:
        reader, writer = await asyncio.open_unix_connection("\0" + name)
        assert (await reader.readline()).startswith(GREETING)
        assert not Path(name).exists()
        writer.close()

    async def main() -> None:
        await chardevs.add("a", backend("socket", addr=addr))
        await serving(chardevs, "a", test)()

    asyncio.run(main())
