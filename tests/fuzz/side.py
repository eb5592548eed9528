"""The bitmap file beside a raw image, spoiled like the images: recipes, and what is done with each.

Its bytes are guarded by a checksum, so most of them are spoiled before it is made. A file that is believed must be
about the image as it is, so its state is asked for in each trial (docs/adr/0010-side-file.md).
"""

import json
import random
import traceback
from dataclasses import asdict, dataclass, field, replace

import msgspec
from bench import Hung
from changes import Changes
from seeds import CORPUS

from blockjobs.base.errors import BlockjobsError
from blockjobs.block.drivers.side_file import HostSideFile
from blockjobs.wire import side_bitmaps

DISK = 1 << 20
GRANULARITY = 4096
BITS = bytes(range(DISK // GRANULARITY // 8))
ODD = [0, 1, -1, 511, 512, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, 1 << 70, "", "x" * 2000, None, [], {}, True, 1.5]
NAMES = ["b", "", "a/../../b", "\0", "\x1b[2J", "n" * 1024, "ö", "\ud800"]


@dataclass(frozen=True)
class SideRecipe:
    """A spoiled file beside a sound image.

    Attributes:
        members: of the directory, besides those of a sound one; "state" among them replaces that of the image.
        bitmaps: members of each bitmap, besides those of a sound one.
        text: the whole directory instead, if it is not None.
        bits: bytes of bits behind it.
        patches: (offset, hexadecimal bytes) of the file, once its checksum is made.
        length: to which it is cut then.
    """

    members: dict = field(default_factory=dict)
    bitmaps: list = field(default_factory=lambda: [{}])
    text: str | None = None
    bits: int = len(BITS)
    patches: list = field(default_factory=list)
    length: int | None = None
    why: str = ""

    def build(self, state):
        """The file's bytes, beside an image in that state."""
        sound = {"name": "b", "granularity": GRANULARITY, "length": DISK, "enabled": True, "stored": len(BITS)}
        directory = {
            "image": state,
            "in-use": False,
            "bitmaps": [sound | each for each in self.bitmaps],
            **self.members,
        }
        text = json.dumps(directory) if self.text is None else self.text
        raw = bytearray(
            _packed(text.encode("utf-8", "surrogatepass"), (BITS * (self.bits // len(BITS) + 1))[: self.bits])
        )
        for at, content in self.patches:
            raw[at : at + len(content) // 2] = bytes.fromhex(content)
        return bytes(raw[: self.length])

    def to_json(self):
        """One line for the corpus."""
        return json.dumps(asdict(self))


def _packed(text, bits):
    """As `side_bitmaps.encode` does it, with a directory that it would never make."""
    with_any = side_bitmaps.encode(side_bitmaps.Directory(image=[], in_use=False, bitmaps=[]), [])
    header = bytearray(with_any[:56])
    header[12:16], header[16:24] = len(text).to_bytes(4), len(bits).to_bytes(8)
    header[24:56] = side_bitmaps.hashlib.sha256(text + bits).digest()
    return bytes(header) + text + bits


def side_corpus():
    """The recipes that once found something."""
    return [SideRecipe(**json.loads(line)) for line in (CORPUS / "found_side.json").read_text().splitlines()]


def side_recipe(number):
    """The recipe of that number."""
    chance = random.Random(number)
    bitmaps = [{"name": f"b{index}"} for index in range(chance.choice([1, 1, 2, 3]))]
    bits = len(BITS) * len(bitmaps)
    spoiled = SideRecipe(bitmaps=bitmaps, bits=bits)
    members, patches, text, length = {}, [], None, None
    for _ in range(chance.choice([1, 1, 2])):
        each = chance.choice(bitmaps)
        match chance.randrange(9):
            case 0:
                each["name"] = chance.choice(NAMES)
            case 1 | 2:
                name = chance.choice(["granularity", "length", "stored", "enabled", "inconsistent", "unknown"])
                each[name] = chance.choice([*ODD, 1 << chance.randrange(64), chance.randrange(DISK * 2)])
            case 3:
                members[chance.choice(["image", "in-use", "bitmaps", "more"])] = chance.choice([*ODD, [1], [[]]])
            case 4:
                bits = max(0, chance.choice([0, 1, bits - 1, bits + 1, 1 << 16]))
            case 5:
                patches.append((chance.randrange(200), chance.randbytes(chance.choice([1, 4, 8])).hex()))
            case 6:
                length = chance.choice([0, 7, 8, 40, 55, 56, 57, chance.randrange(300)])
            case 7:
                text = chance.choice(["", "{", "[" * 100_000, "null", "[]", '{"a":' * 50_000, '"', "\ud800"])
            case 8:
                bitmaps += [dict(each) for _ in range(chance.choice([1, 70_000 if chance.random() < 0.02 else 9]))]
    return SideRecipe(members, spoiled.bitmaps, text, bits, patches, length)


class SideTrial:
    """One such file in a directory, on a bench."""

    def __init__(self, recipe, directory, bench):
        self.recipe, self.directory, self.bench = recipe, directory, bench
        self.complaints = []
        self.outcomes = {}
        self.image, self.side = directory / "raw", directory / "raw.bitmaps"

    def run(self):
        """Look, then write; returns complaints."""
        with self.bench.measuring(lambda text: self.complaints.append(f"all: {text}")):
            for action in (self.look, self.change):
                self.image.write_bytes(b"content." * (DISK // 8))
                self.side.write_bytes(self.recipe.build(self._state()))
                before = self.side.read_bytes()
                self._one(action)
                if action == self.look and self.side.read_bytes() != before:
                    self.complaints.append("look: changed the file")
        return self.complaints

    def _state(self):
        with open(self.image, "r+b") as image:
            return [*HostSideFile("", image.fileno).image_state(), 0, DISK]

    def _one(self, action):
        def complain(text):
            self.complaints.append(f"{action.__name__}: {text}")

        try:
            self.outcomes[action.__name__] = self.bench.do(action, complain)
        except BlockjobsError as error:
            self.outcomes[action.__name__] = f"{type(error).__name__}: {error}"
            if "\n" in str(error) or not str(error).isprintable():
                complain(f"error text {str(error)!r}")
        except (Exception, Hung):
            complain(traceback.format_exc())

    async def _open(self, host, **more):
        file = {"driver": "file", "filename": str(self.image)}
        options = {"driver": "raw", "node-name": "raw", "bitmap-file": str(self.side), "file": file, **more}
        return await host.blockdev_add(options)

    async def look(self, host):
        """What a reader sees of the bitmaps."""
        node = await self._open(host, **{"read-only": True})
        return [msgspec.to_builtins(each) for each in host.bitmaps(node)]

    async def change(self, host):
        """Requests by chance; then the file is one that can be read, and the disk as long as it was made."""
        node = await self._open(host)
        changes = Changes(replace(self.recipe, why="").to_json())
        async with host.access(node, write=True, resize=True) as root:
            await changes.by_chance(host, root.node)
        with changes.noting():
            await host.close_nodes(node)
        for error in changes.errors:
            if "\n" in str(error) or not str(error).isprintable():
                self.complaints.append(f"change: error text {str(error)!r}")
        if self.side.exists():
            side_bitmaps.decode(self.side.read_bytes())
        return changes.errors
