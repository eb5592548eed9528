import asyncio

from blockjobs.lifecycle.control import Control
from blockjobs.testing.clock import run


def test_the_holder_may_enter_again_and_others_wait() -> None:
    async def main() -> None:
        control, log = Control(), list[str]()

        async def other() -> None:
            async with control:
                log.append("other")

        async with asyncio.TaskGroup() as group, control:
            group.create_task(other())
            async with control:
                await asyncio.sleep(1)
            await asyncio.sleep(1)
            log.append("holder")
            assert control.locked()
        assert log == ["holder", "other"]
        assert not control.locked()

    run(main())


def test_it_is_fair() -> None:
    async def main() -> None:
        control, log = Control(), list[int]()

        async def queue(number: int) -> None:
            async with control:
                await asyncio.sleep(1)
                log.append(number)

        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(queue(number))
        assert log == [0, 1, 2, 3, 4]

    run(main())


def test_it_can_be_lent_to_a_task_the_holder_waits_for() -> None:
    async def main() -> None:
        control = Control()

        async def guest() -> str:
            async with control, control:
                return "inside"

        async with asyncio.TaskGroup() as group, control:
            task = group.create_task(guest())
            with control.lent_to(task):
                assert await task == "inside"
            assert control.locked()

    run(main())


def test_a_cancelled_waiter_leaves_it_usable() -> None:
    async def main() -> None:
        control = Control()

        async def enter() -> None:
            async with control:
                await asyncio.sleep(1)

        async with asyncio.TaskGroup() as group:
            group.create_task(enter())
            await asyncio.sleep(0)
            waiter = group.create_task(enter())
            await asyncio.sleep(0)
            waiter.cancel()
        async with control:
            pass

    run(main())
