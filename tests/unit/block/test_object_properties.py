"""Properties of objects by path; paths, types and texts are those the installed QSD gave (probed)."""

import asyncio
from pathlib import Path

import pytest

from blockjobs.base.errors import DeviceNotFound, UsageError
from blockjobs.block.drivers.throttle_group import Direction, ThrottleGroup
from blockjobs.block.object_properties import get_property, list_properties, set_property
from blockjobs.block.objects import AnyObjectOptions, Objects, add_object, delete_object
from blockjobs.schema.command import convert
from blockjobs.testing.clock import VirtualClock, run


def objects_of(*described: dict[str, object]) -> Objects:
    objects = Objects()
    for members in described:
        add_object(objects, convert(members, AnyObjectOptions), VirtualClock())
    return objects


def group_and_secret() -> Objects:
    return objects_of(
        {"qom-type": "throttle-group", "id": "g", "limits": {"bps-total": 1000, "iops-total": 5, "iops-size": 512}},
        {"qom-type": "secret", "id": "s", "data": "abc"},
    )


@pytest.mark.parametrize("path", ["/objects/g", "g", "objects/g", "//objects//g", "/objects/g/"])
def test_paths_that_lead_to_an_object(path: str) -> None:
    assert get_property(group_and_secret(), path, "type") == "throttle-group"


@pytest.mark.parametrize("path", ["nope", "/objects/nope", "/g", "/objects/g/x", "/nope", "x/g"])
def test_paths_that_lead_nowhere(path: str) -> None:
    objects = group_and_secret()
    with pytest.raises(DeviceNotFound, match=f"^Device '{path}' not found$"):
        get_property(objects, path, "type")
    with pytest.raises(DeviceNotFound):
        set_property(objects, path, "limits", {})
    with pytest.raises(DeviceNotFound):
        list(list_properties(objects, path))


def test_an_empty_path_could_be_anything() -> None:
    with pytest.raises(UsageError, match=r"^Path '' is ambiguous$"):
        get_property(group_and_secret(), "", "type")


def test_lists() -> None:
    objects = group_and_secret()
    assert list(list_properties(objects, "/")) == [("type", "string"), ("objects", "child<container>")]
    listed = [("type", "string"), ("g", "child<throttle-group>"), ("s", "child<secret>")]
    assert list(list_properties(objects, "/objects")) == listed
    secret = {"type": "string", "data": "string", "file": "string", "keyid": "string", "iv": "string"}
    assert dict(list_properties(objects, "s")) == {**secret, "format": "QCryptoSecretFormat"}
    group = dict(list_properties(objects, "g"))
    assert group["limits"] == "ThrottleLimits"
    assert group["x-bps-total-max-length"] == "int"
    assert len(group) == 21


def test_values() -> None:
    objects = group_and_secret()
    assert get_property(objects, "/", "objects") == "/objects"
    assert get_property(objects, "/objects", "g") == "/objects/g"
    assert get_property(objects, "/objects", "type") == "container"
    assert (get_property(objects, "s", "data"), get_property(objects, "s", "file")) == ("abc", "")
    assert get_property(objects, "s", "format") == "raw"
    limits = get_property(objects, "g", "limits")
    assert isinstance(limits, dict)
    assert len(limits) == 19
    assert {name: value for name, value in limits.items() if value not in (0, 1)} == {
        "bps-total": 1000,
        "iops-total": 5,
        "iops-size": 512,
    }
    assert limits["bps-read-max-length"] == 1
    assert get_property(objects, "g", "x-bps-total") == 1000


def test_a_deleted_object_has_no_properties() -> None:
    objects = group_and_secret()
    delete_object(objects, "s")
    with pytest.raises(DeviceNotFound):
        get_property(objects, "s", "data")


@pytest.mark.parametrize(
    ("path", "name", "value", "text"),
    [
        ("g", "nope", 1, "Property 'throttle-group.nope' not found"),
        ("g", "type", "x", "Property 'throttle-group.type' is not writable"),
        ("g", "x-bps-total", 4, "Property cannot be set after initialization"),
        ("g", "limits", 5, "Invalid parameter type for 'limits', expected: object"),
        ("g", "limits", None, "Invalid parameter type for 'limits', expected: object"),
        ("g", "limits", {"bogus": 1}, "Parameter 'limits.bogus' is unexpected"),
        ("g", "limits", {"bps-total": "x"}, "Invalid parameter type for 'limits.bps-total', expected: integer"),
        ("g", "limits", {"bps-read": 1}, "bps/iops/max total values and read/write values cannot be used at the"),
        ("s", "nope", 1, "Property 'secret.nope' not found"),
        ("s", "data", "x", "Property cannot be set after initialization"),
        ("/objects", "g", "x", "Property 'container.g' is not writable"),
        ("/", "nope", 1, "Property 'container.nope' not found"),
    ],
)
def test_refused_changes_change_nothing(path: str, name: str, value: object, text: str) -> None:
    objects = group_and_secret()
    before = get_property(objects, "g", "limits")
    with pytest.raises(UsageError) as caught:
        set_property(objects, path, name, value)
    assert str(caught.value).startswith(text)
    assert get_property(objects, "g", "limits") == before


def test_requests_that_wait_follow_new_limits() -> None:
    objects = objects_of({"qom-type": "throttle-group", "id": "g", "limits": {"bps-write": 1000}})

    async def scenario() -> None:
        group = objects["g"]
        assert isinstance(group, ThrottleGroup)
        member = group.join()
        now = asyncio.get_running_loop().time
        started = now()
        await group.admit(member, Direction.WRITE, 100_000)
        waiting = asyncio.ensure_future(group.admit(member, Direction.WRITE, 1))
        await asyncio.sleep(10)
        assert not waiting.done()
        set_property(objects, "/objects/g", "limits", {"bps-write": 0, "bps-read": 7})
        await waiting
        assert now() - started == 10
        limits = get_property(objects, "g", "limits")
        assert isinstance(limits, dict)
        assert (limits["bps-write"], limits["bps-read"]) == (0, 7)

    run(scenario())


def test_properties_of_every_kind_of_object_have_types(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    objects = objects_of({"qom-type": "secret", "id": "s", "file": str(tmp_path / "key")})
    assert get_property(objects, "s", "file") == str(tmp_path / "key")
    assert get_property(objects, "s", "data") == ""


def test_an_iothread_remembers_what_it_is_told() -> None:
    objects = objects_of({"qom-type": "iothread", "id": "io", "poll-grow": 2})
    assert [get_property(objects, "io", name) for name in ("poll-max-ns", "poll-grow", "thread-pool-max")] == [
        32768,
        2,
        64,
    ]
    set_property(objects, "io", "poll-max-ns", 5)
    assert get_property(objects, "io", "poll-max-ns") == 5
    for name, value, text in (
        ("poll-max-ns", -1, "poll-max-ns value must be in range [0, 9223372036854775807]"),
        ("poll-max-ns", True, "Invalid parameter type for 'poll-max-ns', expected: integer"),
        ("thread-pool-min", 65, "bad thread-pool-min/thread-pool-max values"),
    ):
        with pytest.raises(UsageError) as caught:
            set_property(objects, "io", name, value)
        assert str(caught.value) == text
    assert get_property(objects, "io", "thread-pool-min") == 0
