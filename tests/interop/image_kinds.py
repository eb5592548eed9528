"""The kinds of qcow2 images there are, and a choice of them in which every two features meet."""

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class Kind:
    """One kind of image.

    Attributes:
        maker: which program creates it.
        data: where the guest's bytes are: in the image, in a file of their own, or in one that alone shows the disk.
        encrypted: how, if at all: with LUKS, or in the old way of qcow2.
        backing: format of the image below, if any.
        bitmaps, snapshots: whether it has some from the beginning.
        machine_state: whether the snapshots hold the state of a machine too, behind the disk.
    """

    maker: str = "ours"
    version: str = "v3"
    cluster_size: int = 64 * KIB
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    extended_l2: bool = False
    data: str = "inside"
    compression: str = "zlib"
    encrypted: str = ""
    backing: str = ""
    preallocation: str = "off"
    bitmaps: bool = False
    snapshots: bool = False
    machine_state: bool = False

    @property
    def size(self) -> int:
        """A length that ends in the middle of a cluster, where clusters are longer than sectors."""
        return max(300 * KIB, 2 * self.cluster_size) + 7 * 512

    @property
    def can_exist(self) -> bool:
        """Whether QEMU makes such images; of what it does not make, it says why."""
        is_new = (
            self.refcount_bits != 16
            or self.lazy_refcounts
            or self.extended_l2
            or self.data != "inside"
            or self.compression != "zlib"
            or self.bitmaps
        )
        if self.version == "v2" and is_new:
            return False  # "only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        if self.extended_l2 and self.cluster_size < 16 * KIB:
            return False  # "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
        if self.backing and self.data == "raw":
            return False  # "Backing file and data-file-raw cannot be used at the same time"
        if self.backing and self.preallocation != "off" and not self.extended_l2:
            return False  # "Backing file and preallocation can only be used at the same time if extended_l2 is enabled"
        if self.snapshots and self.data != "inside":
            return False  # "Could not create snapshot: Operation not supported"
        if self.snapshots and self.refcount_bits == 1:
            return False  # "Could not create snapshot: Invalid argument": nothing can be referred to twice
        return self.snapshots or not self.machine_state

    @property
    def has_unknown_content(self) -> bool:
        """Whether places are stored that nobody has written to yet: never enciphered, they are deciphered to anything.

        QEMU leaves that in what a longer disk shows of its last cluster too.
        """
        return bool(self.encrypted) and (self.preallocation != "off" or self.data == "raw")

    @property
    def is_quick(self) -> bool:
        """Whether it is made at once: QEMU measures for seconds how fast it derives keys."""
        return not (self.encrypted == "luks" and self.maker == "theirs")

    def __str__(self) -> str:
        plain = Kind()
        parts = [
            name if value is True else f"{name}={value}"
            for name, value in vars(self).items()
            if value != getattr(plain, name)
        ]
        return ",".join(parts) or "plain"


AXES: Mapping[str, tuple[object, ...]] = {
    "maker": ("ours", "theirs"),
    "version": ("v3", "v2"),
    "cluster_size": tuple(1 << bits for bits in range(9, 22)),
    "refcount_bits": (16, 1, 2, 4, 8, 32, 64),
    "lazy_refcounts": (False, True),
    "extended_l2": (False, True),
    "data": ("inside", "file", "raw"),
    "compression": ("zlib", "zstd"),
    "encrypted": ("", "luks", "aes"),
    "backing": ("", "raw", "qcow2"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "bitmaps": (False, True),
    "snapshots": (False, True),
    "machine_state": (False, True),
}
_TRIES = 12

Pair = tuple[tuple[str, object], tuple[str, object]]


def pairs_of(kind: Kind) -> set[Pair]:
    """Which two features meet in it."""
    return set(itertools.combinations(((name, getattr(kind, name)) for name in AXES), 2))


def all_pairs() -> dict[Pair, Kind]:
    """Every two features that can meet, with the plainest kind in which they do."""
    found: dict[Pair, Kind] = {}
    for (one, ones), (other, others) in itertools.combinations(AXES.items(), 2):
        for pair in itertools.product([(one, value) for value in ones], [(other, value) for value in others]):
            for kind in _plainest(dict(pair)):
                if kind.can_exist:
                    found[pair] = kind
                    break
    return found


def _plainest(wanted: dict[str, object]) -> Iterator[Kind]:
    yield replace(Kind(), **wanted)
    yield replace(Kind(), **{"extended_l2": True, **wanted})
    yield replace(Kind(), **{"snapshots": True, **wanted})


def random_kind(chance: random.Random, start: Kind, fixed: frozenset[str] = frozenset()) -> Kind:
    """Another kind that can exist, as quick to make as `start`; the features in `fixed` stay."""
    kind = start
    for name in chance.sample(list(AXES), len(AXES)):
        if name not in fixed:
            options = [replace(kind, **{name: value}) for value in AXES[name]]
            kind = chance.choice([each for each in options if each.can_exist and each.is_quick >= start.is_quick])
    return kind


def covering_kinds(seed: int = 5) -> list[Kind]:
    """Kinds in which every two features that can meet do meet; always the same ones."""
    chance = random.Random(seed)
    missing = all_pairs()
    chosen: list[Kind] = []
    while missing:
        pair, start = next(iter(missing.items()))
        fixed = frozenset(name for name, _ in pair)
        tries = [random_kind(chance, start, fixed) for _ in range(_TRIES)]
        best = max(tries, key=lambda kind: len(pairs_of(kind) & missing.keys()))
        chosen.append(best)
        for met in pairs_of(best):
            missing.pop(met, None)
    return chosen
