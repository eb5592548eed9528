"""Objects by id: the texts are those the installed QSD gave (probed), the values what users mean."""

import asyncio
import base64
from pathlib import Path

import pytest

from blockjobs.base.clock import SystemClock
from blockjobs.base.errors import UsageError
from blockjobs.block.drivers.throttle_group import ThrottleGroup, ThrottleLimits
from blockjobs.block.objects import AnyObjectOptions, Secret, add_object, delete_object
from blockjobs.schema.command import convert

CONFLICT = "bps/iops/max total values and read/write values cannot be used at the same time"
RANGE = "bps/iops/max values must be within [0, 1000000000000000]"


def add(objects: dict[str, object], **members: object) -> None:
    named = {name.replace("_", "-"): value for name, value in members.items()}
    add_object(objects, convert(named, AnyObjectOptions), SystemClock())


def group_error(limits: dict[str, object], **members: object) -> str:
    objects: dict[str, object] = {}
    with pytest.raises(UsageError) as caught:
        add(objects, qom_type="throttle-group", id="x", limits=limits, **members)
    assert not objects
    return str(caught.value)


def test_life_of_an_object() -> None:
    objects: dict[str, object] = {}
    add(objects, qom_type="throttle-group", id="g", limits={"bps-total": 100})
    with pytest.raises(UsageError, match=r"attempt to add duplicate property 'g' to object \(type 'container'\)"):
        add(objects, qom_type="secret", id="g", data="x")
    group = objects["g"]
    assert isinstance(group, ThrottleGroup)
    member = group.join()
    with pytest.raises(UsageError, match="object 'g' is in use, can not be deleted"):
        delete_object(objects, "g")
    group.leave(member)
    delete_object(objects, "g")
    with pytest.raises(UsageError, match="object 'g' not found"):
        delete_object(objects, "g")


@pytest.mark.parametrize("name", ["1g", "a b", ""])
def test_malformed_id(name: str) -> None:
    with pytest.raises(UsageError, match="Parameter 'id' expects an identifier"):
        add({}, qom_type="throttle-group", id=name)


def test_unknown_type_and_member() -> None:
    with pytest.raises(UsageError, match="Parameter 'qom-type' does not accept value 'bogus'"):
        add({}, qom_type="bogus", id="x")
    with pytest.raises(UsageError, match=r"Parameter 'limits\.foo' is unexpected"):
        add({}, qom_type="throttle-group", id="x", limits={"foo": 1})


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"bps-total": 100, "bps-read": 10}, CONFLICT),
        ({"bps-total": 5, "bps-read": 3, "iops-total": -1}, CONFLICT),
        ({"iops-total": 1, "iops-write": 1}, CONFLICT),
        ({"bps-total-max": 10}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"bps-total-max": 2, "bps-total-max-length": 2}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"bps-total": 5, "bps-read-max": 3}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"bps-total": 100, "bps-total-max": 50}, "bps_max/iops_max cannot be lower than bps/iops"),
        ({"bps-total": 100, "bps-total-max-length": 0}, "the burst length cannot be 0"),
        ({"bps-total": 100, "bps-total-max": 50, "bps-total-max-length": 0}, "the burst length cannot be 0"),
        ({"bps-total": 100, "bps-total-max-length": 5}, "burst length set without burst rate"),
        ({"bps-total-max-length": -1}, "burst length set without burst rate"),
        ({"bps-total": -1}, RANGE),
        ({"bps-total": 10**15 + 1}, RANGE),
        ({"bps-total": 100, "bps-total-max": 2 * 10**15, "bps-total-max-length": 0}, RANGE),
        ({"iops-size": 4096}, "iops size requires an iops value to be set"),
        ({"iops-size": 4, "bps-total": -1}, "iops size requires an iops value to be set"),
        (
            {"bps-total": 100, "bps-total-max": 10**15, "bps-total-max-length": 10},
            "burst length too high for this burst rate",
        ),
        (
            {"bps-total": 100, "bps-total-max-length": 2**32},
            "bps-total-max-length value must be in the range [0, 4294967295]",
        ),
    ],
)
def test_limits_that_make_no_sense(limits: dict[str, object], text: str) -> None:
    assert group_error(limits) == text


def test_limits_that_do() -> None:
    for limits in (
        {},
        {"bps-total": 10**15},
        {"bps-total": 5, "iops-read": 3, "iops-write": 1},
        {"bps-total": 100, "bps-total-max": 200, "bps-total-max-length": 5},
        {"bps-total-max-length": 1},
        {"iops-size": 4096, "iops-total": 3},
    ):
        add({}, qom_type="throttle-group", id="x", limits=limits)


def test_older_members_win() -> None:
    objects: dict[str, object] = {}
    add(objects, qom_type="throttle-group", id="x", limits={"bps-total": 9}, x_bps_total=5)
    group = objects["x"]
    assert isinstance(group, ThrottleGroup)
    assert group.limits.bps_total == 5
    assert group_error({}, x_bps_total=-5) == "Property values cannot be negative"


def test_changing_limits_keeps_the_others_or_changes_nothing() -> None:
    async def check() -> None:
        group = ThrottleGroup(SystemClock())
        group.set_limits(ThrottleLimits(bps_total=77))
        with pytest.raises(UsageError, match="same time"):
            group.set_limits(ThrottleLimits(bps_read=4))
        group.set_limits(ThrottleLimits(iops_total=7))
        assert group.limits == ThrottleLimits(bps_total=77, iops_total=7)

    asyncio.run(check())


def secret(**members: object) -> bytes:
    objects: dict[str, object] = {}
    add(objects, qom_type="secret", id="s", **members)
    made = objects["s"]
    assert isinstance(made, Secret)
    assert "abc" not in repr(made)
    return made.content


def test_secrets(tmp_path: Path) -> None:
    stored = tmp_path / "key"
    stored.write_bytes(b"\xff\xfeabc\n")
    assert secret(data="abc") == b"abc"
    assert secret(data="") == b""
    assert secret(file=str(stored)) == b"\xff\xfeabc\n"
    assert secret(data="YWJj", format="base64") == b"abc"
    assert secret(data="YWJj\n", format="base64") == b"abc"
    assert secret(data="YWJ", format="base64") == b"ab"
    assert secret(data="YWJjZ", format="base64") == b"abc"
    assert secret(data="YWJj", iv="unused") == b"YWJj"


def test_secrets_that_make_no_sense(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes((1 << 20) + 1))
    missing = tmp_path / "missing"
    for members, text in (
        ({}, "Either 'file' or 'data' must be provided"),
        ({"data": "a", "file": "b"}, "'file' and 'data' are mutually exclusive"),
        (
            {"file": str(missing)},
            f"Unable to read {missing}: Failed to open file “{missing}”: No such file or directory",
        ),
        ({"file": str(tmp_path)}, f"Unable to read {tmp_path}: Error reading file “{tmp_path}”: Is a directory"),
        ({"file": str(big)}, f"Unable to read {big}: a secret has at most 1048576 bytes"),
        ({"data": "ab!c", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": "a", "format": "hex"}, "Parameter 'format' does not accept value 'hex'"),
        ({"data": "a", "keyid": "nope"}, "No secret with id 'nope'"),
    ):
        with pytest.raises(UsageError) as caught:
            secret(**members)
        assert str(caught.value) == text


def test_secrets_under_another_secret() -> None:
    """AES-256-CBC, as `openssl enc` makes it; what is refused, and the texts, are QEMU's (probed)."""
    objects: dict[str, object] = {}
    key, iv = base64.b64encode(b"K" * 32).decode(), base64.b64encode(b"I" * 16).decode()
    add(objects, qom_type="secret", id="master", data=key, format="base64")
    add(objects, qom_type="secret", id="short", data="m")
    add(objects, qom_type="throttle-group", id="g")
    sealed = {"qom_type": "secret", "id": "s", "data": "IUKN5xbLTVLuOw0Yd+LoAg==", "format": "base64", "iv": iv}
    add(objects, **sealed, keyid="master")
    assert isinstance(objects["s"], Secret)
    assert objects["s"].content == b"hello secret"
    del objects["s"]
    for members, text in (
        ({"keyid": "g"}, "Object with id 'g' is not a secret"),
        ({"keyid": "short"}, "Key should be 32 bytes in length"),
        ({"keyid": "master", "iv": "QUJD"}, "IV should be 16 bytes in length not 3"),
        ({"keyid": "master", "data": "QUJD"}, "Length 3 must be a multiple of block size 16"),
    ):
        with pytest.raises(UsageError) as caught:
            add(objects, **{**sealed, **members})
        assert str(caught.value) == text
    with pytest.raises(UsageError, match="IV is required to decrypt secret"):
        add(objects, qom_type="secret", id="s", data="QUJD", keyid="master")
    with pytest.raises(UsageError, match="Incorrect number of padding bytes"):
        add(objects, **{**sealed, "keyid": "master", "data": base64.b64encode(bytes(16)).decode()})
