"""Edits that hang children in and out: all or nothing, and never against a frozen link."""

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.units import MiB
from blockjobs.block.drivers.qcow2.create import NewImage
from blockjobs.testing.clock import run
from blockjobs.testing.little_host import LittleHost


def test_a_backing_is_hung_in_replaced_and_taken_out() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            image = await host.qcow2("image", NewImage(size=1 * MiB))
            one, other = await host.disk("one", b"1" * 512), await host.disk("other", b"2" * 512)
            guest = await host.guest(image)
            for backing, expected in ((one, b"1"), (other, b"2"), (None, b"\0")):
                async with host.graph.edit() as edit:
                    await edit.set_child(image, "backing", backing)
                assert await image.read(0, 1) == expected
                assert image.backing is backing
            assert not one.parents and not other.parents
            await host.graph.release(guest)

    run(scenario())


def test_a_failed_edit_brings_the_old_child_back() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            one = await host.disk("one", b"1" * 512)
            image = await host.qcow2("image", NewImage(size=1 * MiB), backing="one")
            other = await host.disk("other", b"2" * 512)

            async def two_steps() -> None:
                async with host.graph.edit() as edit:
                    await edit.set_child(image, "backing", other)
                    await edit.set_child(image, "file", image)

            with pytest.raises(UsageError, match="would create a cycle"):
                await two_steps()
            assert image.backing is one and not other.parents
            with pytest.raises(UsageError, match="would create a cycle"):
                async with host.graph.edit() as edit:
                    await edit.set_child(image, "backing", image)
            assert image.backing is one

    run(scenario())


def test_a_frozen_link_cannot_be_changed() -> None:
    async def scenario() -> None:
        async with LittleHost() as host:
            one = await host.disk("one", b"1" * 512)
            image = await host.qcow2("image", NewImage(size=1 * MiB), backing="one")
            image.edges["backing"].freeze(host)
            with pytest.raises(UsageError, match="Cannot change frozen 'backing' link from 'image' to 'one'"):
                async with host.graph.edit() as edit:
                    await edit.set_child(image, "backing", None)
            assert image.backing is one
            image.edges["backing"].thaw(host)
            async with host.graph.edit() as edit:
                await edit.set_child(image, "backing", None)
            assert image.backing is None

    run(scenario())
