"""What was last said of nodes, kept as long as it holds: monitors list all nodes often, and few of them have changed.

No change has to be announced, so none can be forgotten: what a description was made from is compared.
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from blockjobs.block.drain import with_all_below
from blockjobs.block.driver import FormatDriver
from blockjobs.block.info import BlockDeviceInfo, describe, dirty_infos
from blockjobs.block.node import Node
from blockjobs.block.write_threshold import write_threshold
from blockjobs.wire.qmp_encode import Spelled, spell


class Described(NamedTuple):
    """What was last said of a node, its dirty bitmaps apart, and all that it was said from.

    Attributes:
        text: `info` as it goes into a line.
    """

    told: tuple[object, ...]
    info: BlockDeviceInfo
    text: bytes


async def node_info(node: Node, *, flat: bool = False) -> BlockDeviceInfo:
    """Describe a node; what was said last time is said again if nothing has changed that it was made from.

    Args:
        flat: leave the images of backing nodes out.

    Waits: nothing yet; files are asked for their sizes. Checkpoint: no.
    """
    return node_infos([node], flat=flat)[0]


def node_infos(nodes: Iterable[Node], *, flat: bool = False) -> Spelled[BlockDeviceInfo]:
    """As `node_info`, of several."""
    infos, texts = [], []
    for node in nodes:
        told = _told(node)
        known = node.described.get(flat)
        if known is None or known.told != told:
            info = describe(node, flat=flat)
            known = node.described[flat] = Described(told, info, spell(info))
        _, info, text = known
        if dirty := dirty_infos(node):
            info = msgspec.structs.replace(info, dirty_bitmaps=dirty)
            text = spell(info)
        infos.append(info)
        texts.append(text)
    return Spelled(infos, texts)


def _told(node: Node) -> tuple[object, ...]:
    """All that `describe` looks at, in the node and in all below it."""
    driver = node.driver
    own = (write_threshold(node), node, node.options, node.settings, node.implicit, driver.length, driver.info())
    if not node.children:
        return own
    told: list[object] = []
    for each in with_all_below(node):
        driver = each.driver
        if each is not node:
            told += (each, each.options, each.settings, each.implicit, driver.length, driver.info())
        if each.children:  # every format has some
            told.append(list(each.children.items()))
            if isinstance(driver, FormatDriver):
                told.append(driver.implied_children())
    return (*own, *told)
