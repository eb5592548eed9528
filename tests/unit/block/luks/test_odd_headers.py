"""LUKS headers that can be read, of ciphers and digests that nobody has: whoever only looks is told so in one line."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.host import ImageHost
from blockjobs.wire.luks import LuksHeader, empty_slots

SLOTS, PAYLOAD = empty_slots(64)
HEADER = LuksHeader(
    cipher="aes", mode="xts-plain64", hash="sha256", payload_sector=PAYLOAD, key_bytes=64, digest=bytes(20),
    digest_salt=bytes(32), digest_iterations=1000, uuid="b69df21d-6fd1-4adc-a215-46d273b549ec", slots=SLOTS,
)  # fmt: skip


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"key_bytes": 2}, "aes-8"),
        ({"hash": "aes"}, "aes"),
        ({"cipher": "rot13"}, "rot13-256"),
        ({"mode": "xts"}, ""),
        ({"mode": "cbc-essiv:md6", "key_bytes": 32}, "md6"),
    ],
)
def test_looking_at_it_is_one_error(tmp_path: Path, members: dict[str, object], text: str) -> None:
    path = tmp_path / "odd.luks"
    path.write_bytes(replace(HEADER, **members).encode().ljust(PAYLOAD * 512 + 4096, b"\0"))

    async def look() -> None:
        async with ImageHost() as host:
            await host.image_info({"driver": "file", "filename": str(path)}, format="luks")

    with pytest.raises(UsageError) as caught:
        asyncio.run(look())
    assert text in str(caught.value)
    assert str(caught.value).isprintable()
