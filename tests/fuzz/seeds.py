"""Sound images that the fuzzer spoils: small, one for each feature. `python tests/fuzz/seeds.py` makes them anew.

They are kept in files, because the recipes of the corpus name places in them.
"""

import asyncio
import gzip
import random
import sys
import tempfile
from functools import cache
from pathlib import Path

from blockjobs.base.clock import SystemClock
from blockjobs.base.span import Span
from blockjobs.block.objects import SecretOptions, add_object
from blockjobs.host import Host
from blockjobs.jobs.create_options import QCryptoBlockCreateOptionsLuks

CORPUS = Path(__file__).parent / "corpus"
KIB = 1 << 10
MIB = 1 << 20
PASSPHRASE = "open sesame"
BACKING, DATA_FILE = "base.raw", "data.raw"
OPTIONS = {
    "plain": {"cluster_size": 4096},
    "v2": {"cluster_size": 4096, "version": "v2"},
    "tiny": {"cluster_size": 512},
    "wide": {"cluster_size": 4096, "refcount_bits": 64},
    "narrow": {"cluster_size": 4096, "refcount_bits": 1},
    "lazy": {"cluster_size": 4096, "lazy_refcounts": True},
    "extended": {"cluster_size": 16384, "extended_l2": True},
    "zlib": {"cluster_size": 4096, "compression_type": "zlib"},
    "zstd": {"cluster_size": 4096, "compression_type": "zstd"},
    "snapshots": {"cluster_size": 4096},
    "snapshots-extended": {"cluster_size": 16384, "extended_l2": True},
    "bitmaps": {"cluster_size": 4096},
    "backed": {"cluster_size": 4096, "backing_file": BACKING, "backing_fmt": "raw"},
    "data-file": {"cluster_size": 4096},
    "data-file-raw": {"cluster_size": 4096, "data_file_raw": True},
    "luks-inside": {"cluster_size": 4096},
    "luks": {},
}
COMPRESSED = ("zlib", "zstd", "snapshots", "backed")
ENCIPHERED = ("luks-inside", "luks")


def add_key(host):
    """The secret `key` of the enciphered seeds."""
    add_object(host.objects, SecretOptions(id="key", data=PASSPHRASE), SystemClock())


async def make(name, directory):
    """Make one image in `directory`, with the files that it names; returns its path."""
    path = directory / name
    (directory / BACKING).write_bytes(b"backing." * (64 * KIB // 8))
    chance = random.Random(name)
    size = 256 * KIB if name == "tiny" else MIB
    async with Host() as host:
        add_key(host)
        more = dict(OPTIONS[name])
        cipher = {"key_secret": "key", "cipher_alg": "aes-128", "cipher_mode": "cbc", "iter_time": 10}
        if name == "luks-inside":
            more["encrypt"] = QCryptoBlockCreateOptionsLuks(**cipher)
        elif name == "luks":
            more |= cipher
        if name.startswith("data-file"):
            await host.create_image(str(directory / DATA_FILE), "raw", size)
            more["data_file"] = {"driver": "file", "filename": str(directory / DATA_FILE)}
        kind = "luks" if name == "luks" else "qcow2"
        await host.create_image(str(path), kind, size, **more)
        await _fill(host, name, path, chance, size)
    if name.startswith("data-file"):  # relative, so that the image can be moved
        raw = path.read_bytes()
        given = str(directory / DATA_FILE).encode()
        at = raw.index(given)
        new = raw[at - 4 : at].replace(len(given).to_bytes(4), len(DATA_FILE).to_bytes(4))
        padded = DATA_FILE.encode().ljust(-(-len(DATA_FILE) // 8) * 8, b"\0")
        rest = raw[at + -(-len(given) // 8) * 8 : 4096]
        path.write_bytes((raw[: at - 4] + new + padded + rest).ljust(4096, b"\0") + raw[4096:])
    return path


def open_options(name, path, **more):
    """Options of the node `image`."""
    kind = "luks" if name == "luks" else "qcow2"
    options = {"driver": kind, "node-name": "image", "file": {"driver": "file", "filename": str(path)}, **more}
    if name == "luks":
        options["key-secret"] = "key"
    elif name == "luks-inside":
        options["encrypt"] = {"format": "luks", "key-secret": "key"}
    return options


async def _fill(host, name, path, chance, size):
    node = await host.blockdev_add(open_options(name, path, discard="unmap"))
    store = node.driver.internal_snapshots if name.startswith("snapshots") else None
    if name == "bitmaps":
        for bitmap in ("one", "two"):
            await host.add_bitmap(node, bitmap, granularity=4096, persistent=True)
    async with host.access(node, write=True) as root:
        for step in range(3):
            for _ in range(4):
                at = chance.randrange(size // 512 - 24) * 512
                await root.node.write(at, bytes([65 + step]) * chance.choice([512, 4096, 12288]))
            if name != "luks":
                await root.node.zero(Span(chance.randrange(size // 4096 - 2) * 4096, 8192))
            if name in COMPRESSED:
                clusters = [(at, b"text %05d " % at * 400) for at in range((size // 2) + step * 4096, size, 40 * 4096)]
                if compress := node.driver.compressor("default"):
                    await node.driver.write_compressed([(at, compress(text[:4096])) for at, text in clusters])
            if store is not None:
                await store.create(f"snapshot {step}", date_ns=step)
        await root.node.flush()
    await host.close_nodes(node)


@cache
def seed(name):
    """The bytes of a kept image."""
    return gzip.decompress((CORPUS / "seeds" / f"{name}.gz").read_bytes())


NAMES = sorted(OPTIONS)


def main():
    """Make all of them, or those named."""
    (CORPUS / "seeds").mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as directory:
            raw = asyncio.run(make(name, Path(directory))).read_bytes()
        (CORPUS / "seeds" / f"{name}.gz").write_bytes(gzip.compress(raw, 9, mtime=0))


if __name__ == "__main__":
    main()
