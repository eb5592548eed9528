"""Sizes as people and QEMU write them: `10G`, `1.5 GiB`, `65536`."""

import re
from typing import Final

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB
TiB: Final = 1024 * GiB

_SUFFIXES: Final = {suffix: 1024**power for power, suffix in enumerate("bkmgtpe")}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([bkmgtpe])?(?:i?b)?\s*", re.IGNORECASE | re.ASCII)
_SIZE_MAX: Final = 2**64


def parse_size(text: str) -> int:
    """Read a size in bytes, so that people may write `10G` or `1.5 GiB`; every suffix is a power of 1024.

    Raises:
        ValueError: `text` is no size, is negative, is 2**64 or more, or is not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a size: write bytes, or a number with K, M, G, T, P or E (10G, 1.5 GiB)")
    number, suffix = match.groups()
    factor = _SUFFIXES[(suffix or "b").lower()]
    whole, _, fraction = number.partition(".")
    denominator: int = 10 ** len(fraction)
    scaled, remainder = divmod(int(whole + fraction) * factor, denominator)
    if remainder and factor == 1:
        raise ValueError(f"'{text}' is not a whole number of bytes")
    if scaled >= _SIZE_MAX:
        raise ValueError(f"'{text}' is too large: sizes are below 2^64 bytes")
    return int(scaled)


def format_bytes(count: int) -> str:
    """Show `count` bytes for people: `512 B`, `1.5 GiB`; three significant digits at most."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    text = f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    return f"{text} {unit}"
