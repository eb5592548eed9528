"""Sizes in and out."""

import pytest

from blockjobs.base.units import GiB, KiB, MiB, TiB, format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("512b", 512),
        ("4k", 4 * KiB),
        ("10G", 10 * GiB),
        ("1.5 GiB", 3 * GiB // 2),
        ("0.5M", MiB // 2),
        (" 2 TB ", 2 * TiB),
        ("15E", 15 << 60),
        ("18446744073709551615", 2**64 - 1),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5", "1.5.0G", "10X", "16E", "0x10", "1 2", "1e3", "٣"])
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^'.*' is ") as caught:
        parse_size(text)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1536, "1.5 KiB"),
        (10 * GiB, "10 GiB"),
        (1023 * MiB, "1023 MiB"),
        (123456789, "118 MiB"),
    ],
)
def test_sizes_are_shown(count: int, text: str) -> None:
    assert format_bytes(count) == text
