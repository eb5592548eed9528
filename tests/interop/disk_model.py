"""What an image must show after whatever a program has done to it, as plain bytes, and what may be done next."""

import random
from dataclasses import dataclass, field

from image_kinds import KIB, Kind

GRANULARITY = 4 * KIB
NOISE = random.Random(11).randbytes(64 * KIB)
STREAM = b"what compresses well " * 3000
SNAPSHOTS_MAX = 2
BASE_NAMES = ("base", "./base", "././/base")


@dataclass(frozen=True)
class Step:
    """One request. `at` and `length` are bytes, `number` chooses the content, `name` and `other` are what is meant."""

    kind: str
    at: int = 0
    length: int = 0
    number: int = 0
    name: str = ""
    other: str = ""

    @property
    def content(self) -> bytes:
        """What a write or compressed write stores: bytes that say where they belong, from a file that is repeated."""
        source = content_file(self.number, compressible=self.kind == "compressed")
        return (source * (self.length // len(source) + 1))[: self.length]

    @property
    def state(self) -> bytes:
        """What a snapshot with machine state holds of the machine: one byte, over and over, as qemu-io can name it."""
        return bytes([self.number % 255 + 1]) * self.length


def content_file(number: int, *, compressible: bool) -> bytes:
    """The bytes that writes of this number repeat."""
    return number.to_bytes(4, "big") + (STREAM if compressible else NOISE[number % 1000 :])


@dataclass
class Disk:
    """An image as both programs must see it.

    Attributes:
        content: what a guest reads.
        kept: content by name of snapshot.
        states: machine state by name of snapshot.
        bitmaps: granules that are dirty, by name.
        recording: names of the bitmaps that are not disabled.
        version, refcount_bits, lazy_refcounts: what an amend may have changed.
    """

    kind: Kind
    content: bytearray
    kept: dict[str, bytes] = field(default_factory=dict)
    states: dict[str, bytes] = field(default_factory=dict)
    bitmaps: dict[str, set[int]] = field(default_factory=dict)
    recording: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.version, self.refcount_bits = self.kind.version, self.kind.refcount_bits
        self.lazy_refcounts = self.kind.lazy_refcounts
        self._names = 0

    # --- what may be done

    def random_step(self, chance: random.Random) -> Step:
        """Something that this image allows."""
        kinds = ["write", "write", "write", "zero", "unmap", "discard"]
        if self.takes_streams:
            kinds.append("compressed")
        # "Can't resize a v2 image which has snapshots"
        if not (self.kept and self.version == "v2") and not self.kind.has_unknown_content:
            kinds.append("resize")
        kinds += self._snapshot_steps() + self._bitmap_steps() + self._amend_steps()
        if self.kind.backing:
            kinds.append("rebase")
        return self.step(chance.choice(kinds), chance)

    @property
    def takes_streams(self) -> bool:
        """Whether QEMU writes compressed clusters.

        It puts none into other files, stores them in clear in images that are enciphered, and cannot give up what is
        there in version 2 over a backing file, as it must first. With counts of 4 bits it packs so many streams into a
        cluster that no snapshot can count them once more.
        """
        kind = self.kind
        if kind.version == "v2" and kind.backing:
            return False
        return kind.data == "inside" and not kind.encrypted and not (kind.snapshots and self.refcount_bits < 8)

    def _snapshot_steps(self) -> list[str]:
        kinds = []
        if self.kind.snapshots and len(self.kept) < SNAPSHOTS_MAX:
            kinds.append("snapshot")
        if self.kept:
            kinds.append("delete")
        if self.kept and self.qemu_applies:
            kinds.append("apply")
        return kinds

    @property
    def qemu_applies(self) -> bool:
        """Whether QEMU applies the snapshots.

        With bitmaps it does not ("Device has active dirty bitmaps"), and it counts clusters once more before it counts
        them down: 2 bits are too few for two snapshots and the disk ("Failed to load snapshot: Invalid argument").
        """
        return not self.bitmaps and (self.refcount_bits > 2 or len(self.kept) < 2)

    def _bitmap_steps(self) -> list[str]:
        if not self.kind.bitmaps:
            return []
        return ["add bitmap"] if not self.bitmaps else ["add bitmap", "merge", "disable", "remove bitmap"]

    def _amend_steps(self) -> list[str]:
        if self.version == "v2":
            return ["to v3"]
        # QEMU takes minutes to walk the places of large blocks.
        may_widen = self.refcount_bits < 64 and self.kind.cluster_size <= 64 * KIB
        return ["lazy refcounts"] + ["wider counts"] * may_widen

    def step(self, kind: str, chance: random.Random) -> Step:
        """A step of that kind, at a place and of a length that hit borders often."""
        size, cluster = len(self.content), self.kind.cluster_size
        align = cluster if kind == "compressed" else 512
        if chance.random() < 0.5 and size > 2 * cluster:
            align = cluster
        align = min(align, size)
        at = chance.randrange(size // align) * align
        length = chance.choice([align, 3 * align, 40 * KIB, 130 * KIB]) // align * align or align
        length = min(length, (size - at) // align * align)
        self._names += 1
        name, other, number = f"{kind} {self._names}", "", chance.randrange(1, 1 << 20)
        if kind in ("delete", "apply"):
            name = chance.choice(list(self.kept))
        if kind in ("merge", "disable", "remove bitmap"):
            name, other = chance.choice(list(self.bitmaps)), chance.choice(list(self.bitmaps))
        if kind == "rebase":
            name = chance.choice(BASE_NAMES)
        if kind == "resize":
            length = chance.choice([size + 512 * 99, size + cluster, max(4 * KIB, size - 512 * 70), self.kind.size])
        if kind == "wider counts":
            number = self.refcount_bits * 2
        return Step(kind, at, length, number, name, other)

    # --- what it comes to

    def apply(self, step: Step) -> None:
        """Become what the step makes of the image. What a discard leaves is not known here: see `settle`."""
        match step.kind:
            case "write" | "compressed":
                self._put(step, step.content)
            case "zero" | "unmap":
                self._put(step, bytes(step.length))
            case "discard":
                self._put(step, self.content[step.at : step.at + step.length])
            case "snapshot":
                self.kept[step.name] = bytes(self.content)
                if self.kind.machine_state:
                    self.states[step.name] = step.state
            case "apply":
                self.content[:] = self.kept[step.name]
            case "delete":
                del self.kept[step.name]
                self.states.pop(step.name, None)
            case "resize":
                self._resize(step.length)
            case "add bitmap":
                self.bitmaps[step.name] = set()
                self.recording.add(step.name)
            case "merge":
                self.bitmaps[step.name] |= self.bitmaps[step.other]
            case "disable":
                self.recording.discard(step.name)
            case "remove bitmap":
                del self.bitmaps[step.name]
                self.recording.discard(step.name)
            case "to v3":
                self.version = "v3"
            case "wider counts":
                self.refcount_bits = step.number
            case "lazy refcounts":
                self.lazy_refcounts = not self.lazy_refcounts

    def settle(self, step: Step, shown: bytes, below: bytes) -> None:
        """Take what the image shows after a discard, if it may: zeroes, what was there, or the backing file's bytes."""
        assert len(shown) == len(self.content)
        for at in range(0, len(shown), 512):
            now = shown[at : at + 512]
            if now == self.content[at : at + 512]:
                continue
            assert step.at <= at < step.at + step.length, f"a discard changed byte {at}"
            assert now in (bytes(len(now)), below[at : at + 512].ljust(len(now), b"\0")), at
        self.content[:] = shown

    def settle_growth(self, end: int, shown: bytes) -> None:
        """Take what an enciphered disk that QEMU has made longer shows of the cluster that it ended in, at `end`.

        QEMU leaves bytes there that were never enciphered.
        """
        cluster = self.kind.cluster_size
        stop = -(-end // cluster) * cluster
        assert len(shown) == len(self.content)
        assert shown[:end] == self.content[:end] and shown[stop:] == self.content[stop:]
        self.content[:] = shown

    def _put(self, step: Step, content: bytes | bytearray) -> None:
        self.content[step.at : step.at + step.length] = content
        first, last = step.at // GRANULARITY, (step.at + step.length - 1) // GRANULARITY
        for name in self.recording:
            self.bitmaps[name].update(range(first, last + 1))

    def _resize(self, length: int) -> None:
        del self.content[length:]
        self.content.extend(bytes(length - len(self.content)))
        granules = -(-length // GRANULARITY)
        for name, dirty in self.bitmaps.items():
            self.bitmaps[name] = {granule for granule in dirty if granule < granules}
