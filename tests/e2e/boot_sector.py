"""A whole operating system in one sector: it writes sectors through the BIOS, reads each one back, and counts.

It says `B` on the serial port when it has booted, `.` after each 64 sectors that came back as written, and `F` when
something was wrong, and then stands still. Sector 64 + (n mod 4096) holds the number n of its last write, 128 times.

What it is made of, in the assembler's words:

    start:  cli; ax = ds = es = ss = 0; sp = 0x7c00; sti; cld       ; the BIOS has put us at 0:7c00
            drive = dl; say 'B'
    round:  counter += 1
            fill 512 bytes at 0:8000 with counter
            lba = 64 + (counter & 4095)
            int 13h, ah=43h (extended write) from 0:8000            ; carry: bad
            int 13h, ah=42h (extended read) to 0:8200               ; carry: bad
            compare both buffers                                    ; unequal: bad
            every 64 rounds say '.'
            again
    bad:    say 'F'; halt for ever
    say:    out 0x3f8, al
"""

import struct
from typing import Final

SECTOR: Final = 512
FIRST_LBA: Final = 64
SECTORS: Final = 4096

CODE: Final = bytes.fromhex(
    "fa31c08ed88ec08ed0bc007cfbfc88169c7cb042e86c0066ff06887c66a1887cbf0080b9800066f3ab66a1887c6625ff"
    "0f00006683c04066a3947cc706907c0080b443b000e82700c706907c0082b442e81c00be0080bf0082b90001f3a7751b"
    "66a1887ca83f75afb02ee81600eba8be8c7c8a169c7ccd137201c3b046e80300f4ebfdbaf803eec300000000100001"
)


def boot_sector() -> bytes:
    """The first 512 bytes of the disk."""
    return CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def numbers_on(disk: bytes) -> list[int | None]:
    """What each of the guest's sectors holds: the number of its last write, 0 if never written, None if garbage."""
    found: list[int | None] = []
    for index in range(SECTORS):
        at = (FIRST_LBA + index) * SECTOR
        words = set(struct.unpack("<128I", disk[at : at + SECTOR]))
        number = words.pop()
        found.append(None if words or (number and number % SECTORS != index) else number)
    return found
