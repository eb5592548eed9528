import errno

import pytest
from tiny_images import in_loop, new_disk, reopen

from blockjobs.base.errors import IoFailure

WIDTHS = (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("width", WIDTHS)
def test_counts_survive_in_the_file(width):
    async def body():
        file, driver = await new_disk(refcount_bits=width, cluster_size=512)
        most = min((1 << width) - 1, 5)
        runs = await driver.image.allocator.take(700)
        first = runs[0].cluster
        if most > 1:
            await driver.image.refcounts.add(first, most - 1)
        await driver.flush()
        again = await reopen(file, read_only=True)
        assert await again.image.refcounts.count(first) == most
        for run_ in runs:
            for cluster in range(max(run_.cluster, first + 1), run_.end, 50):
                assert await again.image.refcounts.count(cluster) == 1
        assert await again.image.refcounts.count(1 << 40) == 0

    in_loop(body)


def test_dropping_tells_what_became_unused():
    async def body():
        _, driver = await new_disk()
        refcounts = driver.image.refcounts
        [taken] = await driver.image.allocator.take(10)
        first = taken.cluster
        await refcounts.add(first + 4, 1)
        assert await refcounts.last_uses(first, 10) == [(first, 4), (first + 5, 5)]
        assert await refcounts.drop(first, 10) == [(first, 4), (first + 5, 5)]
        assert await refcounts.drop(first, 10) == [(first + 4, 1)], "counts of 0 stay as they are"
        assert await refcounts.drop(first, 10) == []
        assert await refcounts.drop(10**9, 3) == [], "there is no block at all"

    in_loop(body)


def test_a_count_that_does_not_fit_changes_nothing():
    async def body():
        _, driver = await new_disk(refcount_bits=2)
        [taken] = await driver.image.allocator.take(1)
        await driver.image.refcounts.add(taken.cluster, 2)
        with pytest.raises(IoFailure) as caught:
            await driver.image.refcounts.add(taken.cluster, 1)
        assert caught.value.errno == errno.ERANGE
        assert await driver.image.refcounts.count(taken.cluster) == 3

    in_loop(body)


@pytest.mark.parametrize("width", [2, 8, 16, 32, 64])
def test_runs_of_mixed_counts_go_up_and_down_one_by_one(width):
    async def body():
        _, driver = await new_disk(refcount_bits=width, cluster_size=512)
        refcounts = driver.image.refcounts
        [taken] = await driver.image.allocator.take(40, in_one=True)
        first, most = taken.cluster, (1 << width) - 1
        wanted = [1 + number % min(most, 3) for number in range(40)]
        for cluster, count in enumerate(wanted, first):
            if count > 1:
                await refcounts.add(cluster, count - 1)
        assert [sum(run_) for run_ in await refcounts.last_uses(first, 40)] == [
            first + number + 1 for number, count in enumerate(wanted) if count == 1
        ]
        gone = await refcounts.drop(first, 40)
        assert [cluster for cluster, _ in gone] == [first + n for n, count in enumerate(wanted) if count == 1]
        assert [await refcounts.count(first + n) for n in range(40)] == [count - 1 for count in wanted]
        await refcounts.add_run(first, 40)
        assert [await refcounts.count(first + n) for n in range(40)] == wanted
        if width < 64:
            await refcounts.add(first, most - wanted[0])
            with pytest.raises(IoFailure):
                await refcounts.add_run(first, 40)
            assert [await refcounts.count(first + n) for n in range(1, 40)] == wanted[1:]

    in_loop(body)
