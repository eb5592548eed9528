"""Whoever copies an enciphered image gets what the disk shows, never ciphertext; the old key is the secret itself."""

import pytest

from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.drivers.qcow2.driver import Qcow2
from blockjobs.block.luks.cipher import DiskCipher
from blockjobs.block.node import Node
from blockjobs.block.objects import SecretOptions, add_object
from blockjobs.block.plan import RunKind, trace
from blockjobs.testing.clock import run
from blockjobs.testing.host import SimHost
from blockjobs.testing.toy_cipher import ToyCipher
from blockjobs.wire.qcow2 import CRYPT_AES

SIZE = 1 << 20


async def fill_backwards(host: SimHost, node: Node) -> bytes:
    """The clusters lie in another order in the file than on the disk; returns what it shows."""
    async with host.access(node, write=True) as user:
        for at in reversed(range(0, SIZE, 64 << 10)):
            await user.node.write(at, b"%7d " % at * (8 << 10))
        return await user.node.read(0, SIZE)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_traced_reads_as_the_disk(on_disk: bool) -> None:
    async def main() -> None:
        async with SimHost(1) as host:
            node = await host.image("disk", NewImage(size=SIZE), cipher=ToyCipher(1), tweaks_on_disk=on_disk)
            shown = await fill_backwards(host, node)
            for each in await trace(node, Span(0, SIZE), through_backing=True):
                assert each.kind is RunKind.DATA and each.medium is not None
                room = memoryview(bytearray(each.length))
                each.medium.read_into(each.medium_at, room)
                assert room == shown[each.at : each.at + each.length]

    run(main())


@pytest.mark.parametrize("secret", ["", "short", "sixteen bytes, and more than that"])
def test_the_old_key_is_the_secret_cut_off_or_filled_up(secret: str) -> None:
    async def main() -> None:
        async with SimHost(1) as host:
            add_object(host.objects, SecretOptions(id="key", data=secret), host.clock)
            made = await host.image("made", NewImage(size=SIZE))
            await host.close_nodes(made)
            raw = bytearray(host.disks["made-file"].pages.read(0, host.disks["made-file"].pages.size))
            raw[32:36] = CRYPT_AES.to_bytes(4)
            await host.disk("file", bytes(raw))
            encrypt = {"format": "aes", "key-secret": "key"}
            node = await host.blockdev_add({"driver": "qcow2", "node-name": "n", "file": "file", "encrypt": encrypt})
            assert isinstance(node.driver, Qcow2)
            shown = await fill_backwards(host, node)
            cipher = DiskCipher("aes", "cbc-plain64", secret.encode()[:16].ljust(16, b"\0"))
            for segment in await node.driver.resolve(Span(0, SIZE)):
                stored = host.disks["file"].pages.read(segment.child_at, segment.length)
                assert stored == cipher.encipher(segment.at, shown[segment.at : segment.at + segment.length])

    run(main())
