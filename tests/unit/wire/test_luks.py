"""The LUKS header: round trips, and what no writer would have made."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockjobs.wire.luks import HEADER_BYTES, KeySlot, LuksHeader, empty_slots, slot_at

SLOTS, PAYLOAD = empty_slots(64)
HEADER = LuksHeader(
    cipher="aes", mode="xts-plain64", hash="sha256", payload_sector=PAYLOAD, key_bytes=64, digest=bytes(20),
    digest_salt=bytes(32), digest_iterations=1000, uuid="b69df21d-6fd1-4adc-a215-46d273b549ec", slots=SLOTS,
)  # fmt: skip


def test_places_are_qemus() -> None:
    assert PAYLOAD == 4040
    assert [slot.material_sector for slot in SLOTS[:3]] == [8, 512, 1016]
    assert {length: empty_slots(length)[1] for length in (16, 32, 48)} == {16: 1032, 32: 2056, 48: 3016}


def test_round_trip() -> None:
    header = HEADER.with_slot(3, KeySlot(True, 12345, b"s" * 32, SLOTS[3].material_sector))
    raw = header.encode()
    assert len(raw) == HEADER_BYTES
    assert LuksHeader.decode(raw) == header


def changed(at: int, content: bytes) -> bytes:
    raw = bytearray(HEADER.with_slot(0, KeySlot(True, 1000, bytes(32), 8)).encode())
    raw[at : at + len(content)] = content
    return bytes(raw)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"LUKS", "not in LUKS format"),
        (changed(0, b"X"), "not in LUKS format"),
        (changed(6, b"\0\2"), "version 2 is not supported"),
        (changed(8, b"a" * 32), "cipher name is not NUL terminated"),
        (changed(40, b"a" * 32), "cipher mode is not NUL terminated"),
        (changed(108, struct.pack(">I", 1 << 20)), "key of 1048576 bytes"),
        (changed(108, bytes(4)), "key of 0 bytes"),
        (changed(164, bytes(4)), "without iterations"),
        (changed(slot_at(0), b"abcd"), "state"),
        (changed(slot_at(0) + 4, bytes(4)), "iteration count is zero"),
        (changed(slot_at(0) + 40, struct.pack(">I", 0)), "overlapping with the LUKS header"),
        (changed(slot_at(0) + 40, struct.pack(">I", 4000)), "overlapping with the encrypted payload"),
        (changed(slot_at(0) + 40, struct.pack(">I", 500)), "Keyslots 0 and 1 are overlapping"),
        (changed(slot_at(0) + 44, struct.pack(">I", 4001)), "stripes 4001"),
    ],
)
def test_refusals(raw: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LuksHeader.decode(raw)


@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 20))
def test_noise_is_refused_or_understood(seed: int, count: int) -> None:
    chance = random.Random(seed)
    raw = bytearray(HEADER.encode())
    for _ in range(count):
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    try:
        header = LuksHeader.decode(bytes(raw))
    except ValueError:
        return
    assert header.material_bytes <= 512 * 4000
