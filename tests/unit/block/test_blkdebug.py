"""blkdebug: its rules against what QSD did with the same rules, and the limits that it refuses."""

import asyncio
import errno

import pytest

from blockjobs.base.clock import SystemClock
from blockjobs.base.entropy import SeededEntropy
from blockjobs.base.errors import IoFailure, UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, NONE, Perm
from blockjobs.block.driver import OpenContext
from blockjobs.block.drivers.blkdebug import Blkdebug, BlkdebugOptions
from blockjobs.block.drivers.blkdebug_rules import IoType
from blockjobs.block.options import BlockdevOptions
from blockjobs.block.vocabulary import Watch, ZeroMode
from blockjobs.schema.command import convert
from blockjobs.testing.child import MemoryChild

K = 1024
OK = 0


def options(**members: object) -> BlkdebugOptions:
    named = {name.replace("_", "-"): value for name, value in members.items()}
    made = convert({"driver": "blkdebug", "image": "disk", **named}, BlockdevOptions)
    assert isinstance(made, BlkdebugOptions)
    return made


async def opened(**members: object) -> Blkdebug:
    child = MemoryChild(bytes(64 * K), "disk")
    context = OpenContext(
        node_name="b",
        read_only=False,
        offload=InlineOffload(),
        clock=SystemClock(),
        entropy=SeededEntropy(1),
        objects={},
    )
    return await Blkdebug.open(options(**members), {"image": child}, context)


def outcomes(rules: list[dict[str, object]], script: str, moves: list[dict[str, object]] | None = None) -> list[int]:
    """The errno of each word of `script`: r(ead) w(rite) z(ero) d(iscard) f(lush) s(tatus), `r@sector`, or an event.

    A parent that is a raw node announces read_aio and write_aio; `R` and `W` stand for its requests.
    """

    async def play() -> list[int]:
        driver = await opened(inject_error=rules, **({"set_state": moves} if moves else {}))
        below = driver.children["image"]
        codes = []
        for word in script.split():
            kind, _, sector = word.partition("@")
            span = Span(int(sector or 0) * 512, 4 * K)
            if len(kind) > 1:
                driver.debug_event(kind)
                continue
            if kind.isupper():
                driver.debug_event({"R": "read_aio", "W": "write_aio"}[kind])
            try:
                match kind.lower():
                    case "r":
                        await driver.read_into(span.at, memoryview(bytearray(span.length)), below)
                    case "w":
                        await driver.write(span.at, bytes(span.length), below, fua=False)
                    case "z":
                        await driver.zero(span, ZeroMode.UNMAP, below)
                    case "d":
                        await driver.discard(span, below)
                    case "f":
                        await driver.flush(below)
                    case "s":
                        await driver.status(span)
                codes.append(OK)
            except IoFailure as failure:
                codes.append(failure.errno or 0)
        return codes

    return asyncio.run(play())


def rule(event: str = "none", **members: object) -> dict[str, object]:
    return {"event": event, **members}


def move(event: str, state: int, new_state: int) -> dict[str, object]:
    return {"event": event, "state": state, "new_state": new_state}


@pytest.mark.parametrize(
    ("rules", "script", "expected"),
    [
        ([rule()], "r w z d f s", [5, 5, 5, 5, 5, OK]),
        ([rule(once=True)], "r r w", [5, OK, OK]),
        ([rule(iotype="write-zeroes")], "w z d", [OK, 5, OK]),
        ([rule(iotype="write")], "z d f r w", [OK, OK, OK, OK, 5]),
        ([rule(iotype="discard")], "r d", [OK, 5]),
        ([rule(iotype="flush")], "w f w", [OK, 5, OK]),
        ([rule(iotype="block-status")], "r s", [OK, 5]),
        ([rule(sector=8)], "r r@8 r@1 r@9 f", [OK, 5, 5, OK, OK]),
        ([rule(sector=-1)], "r", [5]),
        ([rule(sector=-2)], "r", [OK]),
        ([rule(errno=0)], "r", [OK]),
        ([rule(errno=-5)], "r", [OK]),
        ([rule(errno=28)], "w", [28]),
        ([rule(state=1)], "r", [5]),
        ([rule(state=2)], "r", [OK]),
        ([rule(errno=28, once=True), rule(errno=5, once=True)], "r r r", [28, 5, OK]),
        ([rule(errno=28, once=True, sector=100), rule(errno=5, once=True)], "r@100 r@100 r", [28, 5, OK]),
        ([rule("pwritev")], "r w r w", [OK, 5, 5, 5]),
        ([rule("pwritev", once=True)], "w w", [5, OK]),
        ([rule("pwritev_zero")], "z r w", [5, 5, 5]),
        ([rule("pwritev_done")], "w w r", [OK, 5, 5]),
        ([rule("read_aio")], "R W R", [5, 5, 5]),
        ([rule("write_aio")], "R W R", [OK, 5, 5]),
        # An event that arms something disarms what other events had armed.
        ([rule("write_aio"), rule("read_aio", errno=28, iotype="discard")], "W R W d", [5, OK, 5, 5]),
        ([rule(iotype="read", errno=28), rule("write_aio", errno=12)], "R W R", [28, 12, 12]),
        ([rule(iotype="read", errno=28), rule("write_aio", errno=12, iotype="write")], "R W R", [28, 12, OK]),
        ([rule("write_aio", errno=12, once=True), rule("write_aio", errno=28, once=True)], "W R R W", [12, 28, OK, OK]),
        ([rule("write_aio", errno=12, once=True), rule("write_aio", errno=28)], "W R W", [12, 28, 28]),
        ([rule("l2_update", once=True)], "w l2_update w w", [OK, 5, OK]),
    ],
)
def test_rules_as_qsd_has_them(rules: list[dict[str, object]], script: str, expected: list[int]) -> None:
    assert outcomes(rules, script) == expected


@pytest.mark.parametrize(
    ("rules", "moves", "script", "expected"),
    [
        ([rule("write_aio", state=2)], [move("write_aio", 1, 2)], "W W W", [OK, 5, 5]),
        ([rule("write_aio", state=2)], [move("write_aio", 0, 2)], "W W W", [OK, 5, 5]),
        ([rule("write_aio", state=3)], [move("write_aio", 1, 2), move("write_aio", 2, 3)], "W W W", [OK, OK, 5]),
        ([rule("write_aio", state=3)], [move("write_aio", 2, 3), move("write_aio", 1, 2)], "W W W", [OK, OK, 5]),
        # `none` happens when the node is opened, and never again.
        ([rule(state=2)], [move("none", 1, 2)], "r", [OK]),
        ([rule()], [move("none", 1, 2)], "r", [5]),
        ([rule("write_aio", state=2)], [move("none", 1, 2)], "W", [5]),
        ([rule(state=2, iotype="read")], [move("write_aio", 1, 2)], "R W R", [OK, OK, OK]),
        ([rule("write_aio", state=1)], [move("write_aio", 1, 2)], "W W R", [5, 5, 5]),
    ],
)
def test_states(
    rules: list[dict[str, object]], moves: list[dict[str, object]], script: str, expected: list[int]
) -> None:
    current = [outcome == expected_one for outcome, expected_one in zip(outcomes(rules, script, moves), expected)]
    assert all(current), (outcomes(rules, script, moves), expected)


@pytest.mark.parametrize("name", ["align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard"])
def test_limits_out_of_range(name: str) -> None:
    refused = {-1: f"Parameter '{name}' expects a non-negative number below 2^64"}
    refused[2**31 - 1] = f"Cannot meet constraints with {name} {2**31 - 1}"
    refused[2**31] = f"Parameter '{name}' expects int32_t"
    if name == "align":
        refused |= {size: f"Cannot meet constraints with align {size}" for size in (100, 196608, 2**31, 2**31 - 512)}
    for size, text in refused.items():
        with pytest.raises(UsageError) as caught:
            asyncio.run(opened(**{name: size}))
        assert str(caught.value) == text
    for size in (0, 1, 4096):
        asyncio.run(opened(**{name: size}))


@pytest.mark.parametrize(
    ("members", "culprit"),
    [
        ({"align": 4096, "max_transfer": 512}, "max-transfer 512"),
        ({"align": 4096, "max_transfer": 6144}, "max-transfer 6144"),
        ({"align": 4096, "opt_write_zero": 512}, "opt-write-zero 512"),
        ({"align": 4096, "opt_write_zero": 6144}, "opt-write-zero 6144"),
        ({"opt_write_zero": 65536, "max_write_zero": 4096}, "max-write-zero 4096"),
        ({"opt_write_zero": 65536, "max_write_zero": 69632}, "max-write-zero 69632"),
        ({"align": 4096, "max_discard": 512}, "max-discard 512"),
        ({"opt_discard": 65536, "max_discard": 4096}, "max-discard 4096"),
    ],
)
def test_limits_that_do_not_fit_each_other(members: dict[str, int], culprit: str) -> None:
    with pytest.raises(UsageError, match=f"^Cannot meet constraints with {culprit}$"):
        asyncio.run(opened(**members))


def test_limits_reach_the_node() -> None:
    driver = asyncio.run(opened(align=512, max_transfer=4096, opt_write_zero=65536, max_discard=1024))
    assert driver.limits.request_align == 512
    assert driver.limits.transfer_bytes_max == 4096
    assert (driver.limits.zero_align, driver.limits.zero_bytes_max) == (65536, 1 << 62)
    assert (driver.limits.discard_align, driver.limits.discard_bytes_max) == (512, 1024)


def test_watches_only_what_its_rules_need() -> None:
    assert asyncio.run(opened()).watches == Watch.NONE
    assert asyncio.run(opened(inject_error=[rule(iotype="flush")])).watches == Watch.FLUSH
    assert asyncio.run(opened(inject_error=[rule("pwritev", iotype="read")])).watches == (
        Watch.READ | Watch.WRITE | Watch.ZERO
    )
    assert asyncio.run(opened(inject_error=[rule()])).watches == Watch.ALL & ~Watch.STATUS
    assert asyncio.run(opened(inject_error=[rule(iotype="block-status")])).watches == Watch.STATUS


def test_permissions() -> None:
    driver = asyncio.run(opened(take_child_perms=["write"], unshare_child_perms=["write", "resize"]))
    assert driver.child_perms("image", NONE, ALL) == (Perm.WRITE, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)
    assert asyncio.run(opened()).child_perms("image", Perm.RESIZE, Perm.WRITE) == (Perm.RESIZE, Perm.WRITE)


def test_words_that_are_none() -> None:
    for member, text in (
        ({"inject_error": [{"event": "bogus"}]}, "does not accept value 'bogus'"),
        ({"inject_error": [{"errno": 3}]}, r"Parameter 'inject-error\[0\]\.event' is missing"),
        ({"set_state": [{"event": "none", "new-state": 0}]}, r"Parameter 'set-state\[0\]\.new_state' is missing"),
    ):
        with pytest.raises(UsageError, match=text):
            options(**member)


def test_the_failure_says_where() -> None:
    async def check() -> None:
        driver = await opened(inject_error=[rule(errno=errno.ENOSPC)])
        with pytest.raises(IoFailure, match="No space left on device") as caught:
            await driver.write(512, b"x" * 512, driver.children["image"], fua=False)
        assert caught.value.where == f"node 'b', {IoType.WRITE} at 512+512, injected"

    asyncio.run(check())
