"""How a seed is spoiled: a list of bytes to overwrite, found by knowing where an image's structures are.

A recipe is plain data, so that those that once found something are kept in `corpus/found.json`.
"""

import json
import random
import struct
from dataclasses import asdict, dataclass, field

from seeds import CORPUS, NAMES, seed

OFFSET = 0x00FF_FFFF_FFFF_FE00
COPIED, COMPRESSED = 1 << 63, 1 << 62
HEADER_FIELDS = [
    *[(at, 4) for at in (4, 16, 20, 32, 36, 56, 60, 96, 100)],
    *[(at, 8) for at in (8, 24, 40, 48, 64, 72, 80, 88)],
    (104, 1),
]
NAMES_TO_TRY = [
    "../outside/secret", "/etc/passwd", "outside-link", "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
    "nbd://127.0.0.1:1/x", "file:/etc/passwd", "fat:rw:/", "image", "./image", "/dev/zero", "/proc/self/mem", ".",
    "fifo", "", "\x1b[2Jx", "a" * 1023, "a" * 1024, "base.raw\0.qcow2", "ssh://h/x", "../base.raw", "base.raw",
]  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A spoiled image: the seed, then `patches` as (offset, hexadecimal bytes), then cut or grown to `length`.

    The external data file that it may name has `data_bytes` bytes, all zeroes, or as many as the disk.
    """

    seed: str
    patches: list = field(default_factory=list)
    length: int | None = None
    why: str = ""
    data_bytes: int | None = None

    def build(self):
        """The image's bytes."""
        raw = bytearray(seed(self.seed))
        for at, content in self.patches:
            content = bytes.fromhex(content)
            if at + len(content) > len(raw):
                raw.extend(bytes(at + len(content) - len(raw)))
            raw[at : at + len(content)] = content
        if self.length is not None:
            raw = raw[: self.length].ljust(min(self.length, 8 << 20), b"\0")
        return bytes(raw)

    def to_json(self):
        """One line for the corpus."""
        return json.dumps(
            {
                name: value
                for name, value in asdict(self).items()
                if value or (name == "data_bytes" and value is not None)
            }
        )


def corpus():
    """The recipes that once found something."""
    lines = (CORPUS / "found.json").read_text().splitlines()
    return [Recipe(**json.loads(line)) for line in lines]


def _u(raw, at, size):
    return int.from_bytes(raw[at : at + size])


class Places:
    """Where a seed's structures are."""

    def __init__(self, raw):
        self.raw = raw
        self.bits = _u(raw, 20, 4)
        self.size = 1 << self.bits
        self.l1_at, self.l1 = _u(raw, 40, 8), _u(raw, 36, 4)
        self.reftable_at = _u(raw, 48, 8)
        self.l2 = self._targets(self.l1_at, self.l1)
        self.blocks = self._targets(self.reftable_at, _u(raw, 56, 4) * self.size // 8)
        self.streams = []
        step = 2 if raw[79] & 16 and _u(raw, 4, 4) > 2 else 1
        for table in self.l2:
            for entry in self.words(table)[::step]:
                if entry & COMPRESSED:
                    self.streams.append(entry & (1 << 62 - (self.bits - 8)) - 1)
        self.snapshots_at = _u(raw, 64, 8)
        self.header_bytes = _u(raw, 100, 4) if _u(raw, 4, 4) > 2 else 72
        self.extensions = self._extensions()

    def words(self, at):
        """Entries of the table in the cluster there."""
        return struct.unpack_from(f">{self.size // 8}Q", self.raw.ljust(at + self.size, b"\0"), at)

    def _targets(self, at, count):
        words = [_u(self.raw, at + 8 * index, 8) & OFFSET for index in range(count)]
        return [word for word in words if word and word < len(self.raw)]

    def _extensions(self):
        at, found = self.header_bytes, []
        while at + 8 <= self.size:
            kind, length = struct.unpack_from(">II", self.raw, at)
            if not kind:
                return [*found, (at, 0, 0)]
            found.append((at, kind, length))
            at += 8 + -(-length // 8) * 8
        return found

    def snapshots(self):
        """Places of the entries of the snapshot table."""
        at = self.snapshots_at
        for _ in range(_u(self.raw, 60, 4)):
            yield at
            id_bytes, name_bytes = struct.unpack_from(">HH", self.raw, at + 12)
            extra = _u(self.raw, at + 36, 4)
            at += -(-(40 + extra + id_bytes + name_bytes) // 8) * 8

    def metadata(self):
        """Places that nobody should find data in."""
        return [0, self.l1_at, self.reftable_at, *self.l2, *self.blocks, self.snapshots_at]


class Mutator:
    """Makes recipes from a number: the same number, the same recipe."""

    def __init__(self, number):
        self.chance = random.Random(number)
        self.number = number

    def recipe(self):
        """The recipe of that number."""
        chance = self.chance
        name = NAMES[self.number % len(NAMES)]
        raw = seed(name)
        if name == "luks":
            return self._luks(name, raw, 0)
        places = Places(raw)
        spoilers = [self._header, self._extension, self._l1, self._l2, self._l2, self._counts, self._names, self._flip]
        if places.streams:
            spoilers += [self._stream] * 3
        if name.startswith("snapshots"):
            spoilers += [self._snapshot] * 5
        if name == "bitmaps":
            spoilers += [self._bitmaps] * 6
        if name == "luks-inside":
            luks_at = next(_u(raw, at + 8, 8) for at, kind, _ in places.extensions if kind == 0x0537BE77)
            spoilers += [lambda places: self._luks(name, raw, luks_at).patches] * 8
        patches = []
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            patches += chance.choice(spoilers)(places)
        length = None
        if chance.random() < 0.08:
            length = chance.choice([0, 40, 72, 103, 512, chance.randrange(len(raw)), len(raw) - 1, len(raw) + 65536])
        data_bytes = None
        if name.startswith("data-file") and chance.random() < 0.4:
            data_bytes = chance.choice([0, 512, 4096 * 9, (1 << 20) - 512, (1 << 20) + 512, 1 << 21])
        return Recipe(name, patches, length, data_bytes=data_bytes)

    def _put(self, at, value, size):
        return [(at, (value % (1 << 8 * size)).to_bytes(size).hex())]

    def _number(self, old, size):
        """Something like `old`, or far from it."""
        chance, top = self.chance, (1 << 8 * size) - 1
        return chance.choice([
            0, 1, 2, top, top >> 1, top // 2 + 1, old + 1, old - 1, old * 2, old ^ 1 << chance.randrange(8 * size),
            1 << chance.randrange(8 * size), chance.randrange(top + 1), chance.randrange(64),
        ])  # fmt: skip

    def _place(self, places, old):
        """An entry of a table."""
        chance = self.chance
        flags = chance.choice([COPIED, COPIED, 0, old & ~OFFSET, COMPRESSED, COPIED | COMPRESSED, 1, COPIED | 1])
        at = chance.choice([
            chance.choice(places.metadata()), chance.choice(places.metadata()), old & OFFSET,
            len(places.raw) // places.size * places.size, (len(places.raw) // places.size + 1) * places.size,
            1 << chance.randrange(9, 56), (old & OFFSET) + 512, (old & OFFSET) + places.size,
            OFFSET & ~(places.size - 1),
            chance.randrange(len(places.raw) // places.size) * places.size, 0,
        ])  # fmt: skip
        return chance.choice([flags | at, flags | at, flags | at, self._number(old, 8)])

    def _header(self, places):
        at, size = self.chance.choice(HEADER_FIELDS)
        old = _u(places.raw, at, size)
        if size == 8 and at in (40, 48, 64, 8) and self.chance.random() < 0.5:
            return self._put(at, self.chance.choice(places.metadata()), 8)
        return self._put(at, self._number(old, size), size)

    def _extension(self, places):
        at, _, length = self.chance.choice(places.extensions)
        kinds = [0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x12345678, 0]
        match self.chance.randrange(3):
            case 0:
                return self._put(at, self.chance.choice(kinds), 4)
            case 1:
                return self._put(at + 4, self._number(length, 4), 4)
        inside = at + 8 + self.chance.randrange(max(1, length))
        return self._put(inside, self.chance.randrange(256), 1)

    def _entry_of(self, places, at, count):
        used = [index for index in range(count) if _u(places.raw, at + 8 * index, 8)] or [0]
        index = self.chance.choice([self.chance.choice(used), self.chance.randrange(count)])
        return at + 8 * index

    def _table(self, places, at, count):
        place = self._entry_of(places, at, count)
        return self._put(place, self._place(places, _u(places.raw, place, 8)), 8)

    def _l1(self, places):
        return self._table(places, places.l1_at, places.l1)

    def _l2(self, places):
        return self._table(places, self.chance.choice(places.l2), places.size // 8)

    def _counts(self, places):
        if self.chance.random() < 0.5:
            return self._table(places, places.reftable_at, places.size // 8)
        at = self.chance.choice(places.blocks) + self.chance.randrange(64)
        return [(at, self.chance.choice(["00", "00" * 64, "ff" * 16, "01" * 8, self.chance.randbytes(8).hex()]))]

    def _names(self, places):
        name = self.chance.choice(NAMES_TO_TRY).encode()
        room = places.size - len(name) - 8
        kind = self.chance.choice(["backing", "backing", "format", "data"])
        if kind == "backing" and room > 200:
            named = [(room, name.hex()), *self._put(8, room, 8), *self._put(16, len(name), 4)]
            end, _, _ = places.extensions[-1]
            if self.chance.random() < 0.7 and end + 24 < room:
                word = self.chance.choice([b"raw", b"qcow2", b"nbd", b"luks", b"file"])
                named.append((end, struct.pack(">II", 0xE2792ACA, len(word)).hex() + word.ljust(16, b"\0").hex()))
            return named
        for at, which, _ in places.extensions:
            if which == (0x44415441 if kind == "data" else 0xE2792ACA):
                return [(at + 4, struct.pack(">I", len(name)).hex() + name[:64].hex())]
        return self._header(places)

    def _flip(self, places):
        where = self.chance.choice([0, places.size, len(places.raw)]) or 512
        at = self.chance.randrange(min(where, len(places.raw)))
        return self._put(at, places.raw[at] ^ 1 << self.chance.randrange(8), 1)

    def _stream(self, places):
        at = self.chance.choice(places.streams)
        match self.chance.randrange(4):
            case 0:
                return [(at, self.chance.randbytes(self.chance.choice([1, 8, 64])).hex())]
            case 1:
                return self._put(at + self.chance.randrange(40), self.chance.randrange(256), 1)
            case 2:
                return [(at, self.chance.choice(BOMBS).hex())]
        entry_at = next(
            table + 8 * index
            for table in places.l2
            for index, entry in enumerate(places.words(table))
            if entry & COMPRESSED and entry & (1 << 62 - (places.bits - 8)) - 1 == at
        )
        return self._put(entry_at, _u(places.raw, entry_at, 8) ^ 1 << self.chance.randrange(64), 8)

    def _snapshot(self, places):
        at = self.chance.choice(list(places.snapshots()))
        field_at, size = self.chance.choice([(0, 8), (8, 4), (12, 2), (14, 2), (32, 4), (36, 4), (48, 8), (40, 8)])
        if field_at == 0 and self.chance.random() < 0.6:
            return self._put(at, self.chance.choice(places.metadata()), 8)
        if self.chance.random() < 0.5:
            l1_at, l1 = _u(places.raw, at, 8), _u(places.raw, at + 8, 4)
            tables = places._targets(l1_at, l1)
            if tables and self.chance.random() < 0.6:
                return self._table(places, self.chance.choice(tables), places.size // 8)
            return self._table(places, l1_at, l1)
        return self._put(at + field_at, self._number(_u(places.raw, at + field_at, size), size), size)

    def _bitmaps(self, places):
        extension = next(at + 8 for at, kind, _ in places.extensions if kind == 0x23852875)
        directory, count = _u(places.raw, extension + 16, 8), _u(places.raw, extension, 4)
        match self.chance.randrange(3):
            case 0:
                at, size = self.chance.choice([(0, 4), (4, 4), (8, 8), (16, 8)])
                return self._put(extension + at, self._number(_u(places.raw, extension + at, size), size), size)
            case 1:
                at, size = self.chance.choice([(0, 8), (8, 4), (12, 4), (16, 1), (17, 1), (18, 2), (20, 4), (24, 3)])
                entry = directory + (self.chance.randrange(count) * 32)
                if at == 0 and self.chance.random() < 0.6:
                    return self._put(entry, self.chance.choice(places.metadata()), 8)
                return self._put(entry + at, self._number(_u(places.raw, entry + at, size), size), size)
        table = _u(places.raw, directory, 8)
        return self._put(table, self._place(places, _u(places.raw, table, 8)), 8)

    def _luks(self, name, raw, base):
        chance = self.chance
        patches = []
        for _ in range(chance.choice([1, 1, 2])):
            if chance.random() < 0.5:
                at, size = chance.choice([(0, 6), (6, 2), (104, 4), (108, 4), (112, 20), (164, 4)])
            else:
                slot = 208 + 48 * chance.choice([0, 0, 0, *range(8)])
                at, size = chance.choice([(0, 4), (4, 4), (40, 4), (44, 4), (8, 32)])
                at += slot
            value = self._number(_u(raw, base + at, size), size)
            if 1 << 20 < value < 1 << 29:
                value >>= 16  # as a count of iterations it would be a minute of honest work
            patches += self._put(base + at, value, size)
            if chance.random() < 0.3:
                word = chance.choice(
                    [b"aes\0", b"serpent\0", b"a" * 32, b"\xff" * 32, b"", b"cbc-essiv:md5\0", b"ecb\0"]
                )
                patches.append((base + chance.choice([8, 40, 72, 168]), word.hex()))
        length = None
        if chance.random() < 0.1:
            length = chance.choice([0, 6, 100, 591, 592, 4096, chance.randrange(len(raw))])
        return Recipe(name, patches, length)


def _bombs():
    import zlib

    deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
    many = deflate.compress(bytes(8 << 20)) + deflate.flush()
    frame = bytes.fromhex("28b52ffd") + bytes([0x04, 0xB8])  # 2 GiB window and no content size
    return [many[:3500], frame + bytes([0x02, 0xFF, 0x0F, 0x00]) * 32, bytes(64)]


BOMBS = _bombs()
