"""A qcow2 image is a byte array: random histories on images of every shape, each then judged by QEMU."""

import asyncio
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.testing.graphs import add_node, new_graph
from blockjobs.testing.toy_cipher import ToyCipher

KIB = 1 << 10
BASE = random.Random(7).randbytes(1 << 20)
SMALL_CACHES = {"l2_cache_size": 2 * KIB, "refcount_cache_size": 4 * KIB}


@dataclass(frozen=True)
class Shape:
    """An image to be made: `backing` is 0 or the length of a raw file below; `enciphered` by a toy cipher,
    with tweaks of the place in the file, or `on disk`.
    """

    image: NewImage
    backing: int = 0
    tuning: tuple[tuple[str, int], ...] = ()
    enciphered: str = ""


def shape(size=600 * KIB, *, backing=0, tuning=None, enciphered="", **options):
    return Shape(NewImage(size=size, **options), backing, tuple((tuning or {}).items()), enciphered)


SHAPES = {
    "64k": shape(),
    "512": shape(300 * KIB, cluster_size=512, tuning=SMALL_CACHES),
    "4k, ragged end": shape(257 * KIB + 512, cluster_size=4 * KIB, refcount_bits=1),
    "2M": shape(5 << 20, cluster_size=2 << 20, refcount_bits=32),
    "2 bits": shape(cluster_size=KIB, refcount_bits=2),
    "64 bits": shape(cluster_size=512, refcount_bits=64),
    "version 2": shape(cluster_size=8 * KIB, is_v2=True),
    "version 2 with backing": shape(cluster_size=8 * KIB, is_v2=True, backing=500 * KIB),
    "backing": shape(cluster_size=16 * KIB, backing=700 * KIB),
    "subclusters": shape(cluster_size=16 * KIB, extended_l2=True, zstd=True),
    "subclusters with backing": shape(cluster_size=32 * KIB, extended_l2=True, backing=200 * KIB),
    "data file": shape(cluster_size=4 * KIB, data_file_name="data.raw", backing=300 * KIB),
    "raw data file": shape(cluster_size=16 * KIB, data_file_name="data.raw", data_file_raw=True),
    "subclusters in a data file": shape(cluster_size=16 * KIB, extended_l2=True, data_file_name="data.raw"),
    "enciphered": shape(257 * KIB + 512, cluster_size=4 * KIB, enciphered="in file"),
    "enciphered on the disk": shape(257 * KIB + 512, cluster_size=4 * KIB, backing=100 * KIB, enciphered="on disk"),
    "subclusters enciphered on the disk": shape(cluster_size=16 * KIB, extended_l2=True, enciphered="on disk"),
    "enciphered, version 2 with backing": shape(
        cluster_size=8 * KIB, is_v2=True, backing=500 * KIB, enciphered="in file"
    ),
    "enciphered subclusters": shape(cluster_size=16 * KIB, extended_l2=True, backing=200 * KIB, enciphered="in file"),
    "enciphered data file": shape(
        cluster_size=4 * KIB, data_file_name="data.raw", backing=30 * KIB, enciphered="in file"
    ),
}

# A place in parts of the disk, a length in a unit, so that borders are hit often.
places = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(("byte", "sector", "cluster")))
lengths = st.tuples(st.integers(1, 20), st.sampled_from((1, 512, 4096, "cluster", "part")))
steps = st.lists(
    st.tuples(
        st.sampled_from(
            (
                "write",
                "write",
                "write",
                "pattern",
                "unmap",
                "keep",
                "discard",
                "compressed",
                "flush",
                "resize",
                "reopen",
            )
        ),
        places,
        lengths,
        st.integers(0, 255),
    ),
    min_size=3,
    max_size=25,
)


class Run:
    """One history: the image in a folder, and what it must show."""

    def __init__(self, folder, wanted):
        self.folder, self.shape = Path(folder), wanted
        self.size = wanted.image.size
        self.shown = bytearray(BASE[: min(wanted.backing, self.size)].ljust(self.size, b"\0"))

    @property
    def path(self):
        return str(self.folder / "disk.qcow2")

    async def create(self):
        image, graph = self.shape.image, new_graph()
        (self.folder / "base.raw").write_bytes(BASE[: self.shape.backing])
        files = {}
        for name, wanted in (("disk.qcow2", True), ("data.raw", image.data_file_name)):
            if wanted:
                (self.folder / name).touch()
                where = str(self.folder / name)
                files[name] = await add_node(graph, driver="file", node_name=name[:4], filename=where)
        users = [await graph.claim("a test", node, Perm.WRITE | Perm.RESIZE, ALL) for node in files.values()]
        if self.shape.backing:
            named = {"backing_file": str(self.folder / "base.raw"), "backing_format": "raw"}
            image = replace(image, **named)
        await create_image(files["disk.qcow2"], files.get("data.raw"), image)
        for user in users:
            await graph.release(user)
        await graph.close()

    async def play(self, history):
        await self.create()
        sessions = [[]]
        for step in history:
            sessions.append([]) if step[0] == "reopen" else sessions[-1].append(step)
        for session in sessions:
            graph = new_graph()
            given = (
                {}
                if self.shape.image.data_file_name is None
                else {"data_file": {"driver": "file", "filename": str(self.folder / "data.raw")}}
            )
            if self.shape.backing:
                base = {"driver": "file", "filename": str(self.folder / "base.raw")}
                given["backing"] = {"driver": "raw", "file": base}
            file = {"driver": "file", "filename": self.path}
            tuning = dict(self.shape.tuning)
            node = await add_node(
                graph, driver="qcow2", node_name="disk", discard="unmap", file=file, **given, **tuning
            )
            if self.shape.enciphered:
                node.driver.image.encipherment = Encipherment(
                    ToyCipher(7), None if self.shape.enciphered == "on disk" else 0
                )
            user = await graph.claim("a test", node, Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, ALL)
            for step in session:
                await self.step(node, *step)
            assert await node.read(0, self.size) == self.shown
            await graph.release(user)
            await graph.close()

    def span(self, place, length):
        unit = {"byte": 1, "sector": 512, "cluster": self.shape.image.cluster_size}[place[1]]
        at = int(place[0] * self.size) // unit * unit
        factor = {"cluster": self.shape.image.cluster_size, "part": self.shape.image.cluster_size // 3}
        wanted = length[0] * factor.get(length[1], length[1] if isinstance(length[1], int) else 1)
        return Span(at, min(wanted, self.size - at))

    async def step(self, node, kind, place, length, number):
        span = self.span(place, length)
        if kind in ("write", "pattern"):
            content = random.Random(number).randbytes(span.length) if kind == "write" else bytes([number]) * span.length
            await node.write(span.at, content)
        elif kind in ("unmap", "keep"):
            content = bytes(span.length)
            await node.zero(span, mode=ZeroMode.UNMAP if kind == "unmap" else ZeroMode.KEEP)
        elif kind == "discard":
            await node.discard(span)
            content = await node.read(span.at, span.length)
            before = self.shown[span.at : span.end]
            assert all(now in (0, then) for now, then in zip(content[::61], before[::61], strict=True))
        elif kind == "compressed":
            await self.write_compressed(node, span, number)
            return
        elif kind == "resize":
            await self.resize(node, length, number)
            return
        else:
            await node.flush()
            return
        self.shown[span.at : span.end] = content
        assert await node.read(span.at, span.length) == content

    async def write_compressed(self, node, span, number):
        size = self.shape.image.cluster_size
        whole = span.widen(size).intersect(Span(0, self.size // size * size))
        compress = node.driver.compressor(("fast", "default", "best")[number % 3])
        if compress is None or not whole:
            return
        noise = random.Random(number).randbytes(size // 3)
        batch = []
        for at in range(whole.at, whole.end, size)[:6]:
            content = (at.to_bytes(8, "big") + noise).ljust(size, b"\1")
            batch.append((at, compress(content)))
            self.shown[at : at + size] = content
        async with node.tracker.exclusive(whole):
            await node.driver.write_compressed(batch)

    async def resize(self, node, length, number):
        change = length[0] * 512 * (7 if number % 2 else -3)
        size = max(16 * KIB, self.size // 512 * 512 + change)
        await node.resize(size)
        del self.shown[size:]
        self.shown.extend(bytes(size - len(self.shown)))
        self.size = size

    def judge(self):
        """QEMU finds no error and no leak, and shows the same bytes if it can."""
        words = ("qemu-img", "check", "-f", "qcow2", self.path)
        check = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, check=False)
        assert check.returncode == 0, check.stdout + check.stderr
        if self.shape.enciphered:
            return  # QEMU knows no toy ciphers
        raw = str(self.folder / "shown.raw")
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.path, raw], cwd=self.folder, check=True)
        assert Path(raw).read_bytes() == self.shown
        self.ask_qemu_io()
        if self.shape.image.data_file_raw:
            assert (self.folder / "data.raw").read_bytes()[: self.size] == self.shown

    def ask_qemu_io(self):
        """The same, by random access: a few sectors that hold one byte value each."""
        sectors = [at for at in range(0, self.size, 512) if len(set(self.shown[at : at + 512])) == 1]
        reads = "".join(f"read -P {self.shown[at]} {at} 512\n" for at in sectors[:: max(1, len(sectors) // 20)])
        words = ("qemu-io", "-r", "-f", "qcow2", self.path)
        told = subprocess.run(words, cwd=self.folder, input=reads, capture_output=True, text=True, check=True).stdout
        assert "failed" not in told, told
        assert told.count("read 512/512 bytes") == reads.count("\n")


@pytest.mark.parametrize("name", SHAPES)
@given(history=steps)
@settings(max_examples=5)
@example(history=[("resize", (0.0, "byte"), (20, 1), 1), ("write", (0.9, "sector"), (3, "cluster"), 9)])
def test_histories(name, history):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, SHAPES[name])
        asyncio.run(run.play(history))
        if shutil.which("qemu-img"):
            run.judge()
