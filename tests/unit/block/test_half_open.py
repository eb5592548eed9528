"""Nodes that are on their way to be opened, while others go on."""

import asyncio
from collections.abc import Callable
from typing import Any

from blockjobs.base.errors import UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.testing.clock import run
from blockjobs.testing.little_host import LittleHost


class Slow(InlineOffload):
    """Workers that take a second."""

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(1)
        return work(*args)


def test_an_image_that_is_being_opened_uses_its_backing_image_already() -> None:
    async def main() -> None:
        async with LittleHost(offload=Slow()) as host:
            base = await host.disk("base", 1 << 20)
            opening = asyncio.ensure_future(host.qcow2("top", NewImage(size=1 << 20), backing="base"))
            refused: list[tuple[str, list[bool]]] = []
            while not opening.done():
                try:
                    base.check_op("external-snapshot")
                except UsageError as error:
                    refused.append((str(error), [edge.parent.is_open for edge in base.parents]))  # type: ignore[union-attr]
                await asyncio.sleep(0.1)
            assert ("Node 'base' is busy: node is used as backing hd of 'top'", [False]) in refused

    run(main())
