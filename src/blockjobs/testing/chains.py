"""Random chains of images in virtual time, and what they show."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass

from blockjobs.base.span import Span
from blockjobs.block.chain import named_backing
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.block.node import Node
from blockjobs.block.users import Root
from blockjobs.host import Host
from blockjobs.testing.disk import Pages
from blockjobs.testing.host import SimHost

KIB = 1 << 10
SECTOR = 512


@dataclass
class Layer:
    """How an image of a chain is made."""

    size: int
    cluster_size: int = 4 * KIB
    is_v2: bool = False
    is_raw: bool = False
    extended_l2: bool = False


def random_layers(chance: random.Random, count: int) -> list[Layer]:
    """From the base up; sizes differ."""
    layers = []
    for index in range(count):
        layer = Layer(
            size=chance.choice([64, 96, 128, 160, 200]) * KIB + chance.choice([0, 0, 512, 2560]),
            cluster_size=chance.choice([512, 4 * KIB, 16 * KIB]),
            is_raw=index == 0 and chance.random() < 0.4,
            extended_l2=chance.random() < 0.15,
        )
        layer.is_v2 = not layer.extended_l2 and chance.random() < 0.3
        if layer.extended_l2:
            layer.cluster_size = 16 * KIB
        layers.append(layer)
    return layers


async def make_chain(host: SimHost, layers: list[Layer], chance: random.Random, *, writes: int = 6) -> list[Node]:
    """Nodes `l0` (the base), `l1`, ... with random content: data, zeroes, compressed clusters."""
    nodes: list[Node] = []
    for index, layer in enumerate(layers):
        name = f"l{index}"
        if layer.is_raw:
            await host.disk(f"{name}-file", Pages(bytes(layer.size)))
            node = await host.blockdev_add({"driver": "raw", "node-name": name, "file": f"{name}-file"})
        else:
            image = NewImage(
                size=layer.size,
                cluster_size=layer.cluster_size,
                is_v2=layer.is_v2,
                extended_l2=layer.extended_l2,
                backing_file=f"l{index - 1}-file" if nodes else None,
                backing_format=nodes[-1].driver_name if nodes else None,
            )
            node = await host.image(name, image, backing=nodes[-1].name if nodes else None)
        async with host.access(node, write=True) as user:
            for _ in range(writes):
                await change(user.node, chance)
            await user.node.flush()
        nodes.append(node)
    return nodes


async def change(node: Node, chance: random.Random) -> tuple[int, bytes]:
    """One random write or zero request; what is there now."""
    length = min(chance.choice([1, 3, 8, 20, 40]) * SECTOR, node.length)
    at = chance.randrange((node.length - length) // SECTOR + 1) * SECTOR
    if chance.random() < 0.25:
        await node.zero(Span(at, length))
        return at, bytes(length)
    if chance.random() < 0.2 and node.cluster_size and at % node.cluster_size == 0:
        content = bytes([chance.randrange(1, 256)]) * length
        await node.write(at, content, compressed=True)
        return at, content
    content = chance.randbytes(length)
    await node.write(at, content)
    return at, content


async def read_all(host: Host, node: Node) -> bytes:
    """Everything a reader of `node` sees."""
    async with host.access(node) as user:
        return await user.node.read(0, user.node.length)


async def run_guest(root: Root, model: bytearray, chance: random.Random, *, writes: int, pause_s: float) -> None:
    """A guest that writes, reads and compares."""
    for _ in range(writes):
        await asyncio.sleep(chance.random() * pause_s)
        at, content = await change(root.node, chance)
        model[at : at + len(content)] = content
        length = min(8 * SECTOR, root.node.length)
        at = chance.randrange((root.node.length - length) // SECTOR + 1) * SECTOR
        assert await root.node.read(at, length) == model[at : at + length]
        if chance.random() < 0.1:
            await root.node.flush()


async def guest_of(host: Host, node: Node) -> Root:
    """A reader and writer that follows filters, as an export is."""
    needs = Perm.CONSISTENT_READ | Perm.WRITE
    return await host.graph.claim("a guest", node, needs=needs, shares=ALL)


async def shown_by_headers(disks: Mapping[str, Pages], name: str) -> bytes:
    """What the image on disk `name` shows to a program that starts anew, with the chain that the headers name."""
    async with SimHost() as host:
        top = await _open_chain(host, disks, name, 0)
        return await read_all(host, top)


async def _open_chain(host: SimHost, disks: Mapping[str, Pages], name: str, depth: int) -> Node:
    assert depth < 8, "a loop of headers"
    await host.disk(name, disks[name])
    if disks[name].read(0, 4) != b"QFI\xfb":
        return await host.blockdev_add({"driver": "raw", "node-name": f"raw{depth}", "file": name})
    # The header's own words, before anything is opened behind them.
    options = {"driver": "qcow2", "node-name": f"q{depth}", "file": name, "backing": None}
    bare = await host.blockdev_add({**options, "read-only": True})
    filename, backing_format = named_backing(bare)
    await host.close_nodes(bare)
    if filename is not None:
        below = await _open_chain(host, disks, filename, depth + 1)
        assert backing_format == below.driver_name, (name, filename, backing_format)
        options["backing"] = below.name
    return await host.blockdev_add(options)
