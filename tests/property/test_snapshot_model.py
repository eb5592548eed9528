"""Internal snapshots against byte arrays: random histories, read by us and by QEMU, who also takes turns."""

import asyncio
import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockjobs.base.span import Span
from blockjobs.host import Host

SIZE = 900 << 10
SHAPES: Mapping[str, dict[str, object]] = {
    "64k": {},
    "512": {"cluster_size": 512, "refcount_bits": 64},
    "subclusters": {"extended_l2": True, "cluster_size": 16384, "compression_type": "zstd"},
    "version 2": {"version": "v2", "cluster_size": 4096},
    "4k": {"cluster_size": 4096},
    "lazy refcounts": {"lazy_refcounts": True, "cluster_size": 8192, "refcount_bits": 8},
}
STATE_BYTES = 70_001


def qemu(*words: str | Path) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


class Model:
    def __init__(self, chance: random.Random, path: Path, *, is_v2: bool) -> None:
        self.chance, self.path, self.is_v2 = chance, path, is_v2
        self.content = bytearray(SIZE)
        self.kept: dict[str, tuple[bytes, bytes]] = {}

    async def turn(self, host: Host) -> None:
        """Some requests through our node, which then everything is compared with."""
        node = await host.open(str(self.path))
        snapshots = node.driver.internal_snapshots
        assert snapshots is not None
        async with host.access(node, write=True, resize=True) as root:
            for _ in range(self.chance.randrange(1, 8)):
                await self.step(root.node, snapshots)
                assert await root.node.read(0, node.length) == bytes(self.content)
            for id, (_, state) in self.kept.items():
                assert await snapshots.read_vm_state(id, 0, len(state)) == state
        await host.close_nodes(node)

    async def step(self, node, snapshots) -> None:
        at = self.chance.randrange(0, len(self.content))
        length = min(self.chance.choice([512, 5000, 65536, 200_000]), len(self.content) - at)
        match self.chance.choice(["write", "write", "zero", "compressed", "create", "apply", "delete", "resize"]):
            case "write":
                content = self.chance.randbytes(length)
                await node.write(at, content)
                self.content[at : at + length] = content
            case "zero":
                await node.zero(Span(at, length))
                self.content[at : at + length] = bytes(length)
            case "compressed":
                at, content = at // 65536 * 65536, b"again and " * 6554
                content = content[: min(65536, len(self.content) - at)]
                await node.write(at, content, compressed=True)
                self.content[at : at + len(content)] = content
            case "create" if len(self.kept) < 6:
                state = self.chance.randbytes(self.chance.choice([0, STATE_BYTES]))
                for start in range(0, len(state), 9000):
                    await snapshots.write_vm_state(start, state[start : start + 9000])
                made = await snapshots.create(
                    f"ours {len(self.kept)} {self.chance.random()}", date_ns=3 * 10**18 + 7, vm_state_bytes=len(state)
                )
                self.kept[made.id] = bytes(self.content), state
            case "apply" if self.kept:
                id = self.chance.choice(list(self.kept))
                await snapshots.apply(id)
                self.content[:] = self.kept[id][0]
            case "delete" if self.kept:
                id = self.chance.choice(list(self.kept))
                await snapshots.delete(id)
                del self.kept[id]
            case "resize" if not (self.kept and self.is_v2):
                length = self.chance.choice([SIZE, SIZE + 512 * 99, SIZE - 512 * 99])
                await node.resize(length)
                self.content[:] = bytes(self.content[:length]).ljust(length, b"\0")

    def turn_of_qemu(self) -> None:
        """The same by QEMU's tools."""
        content = bytes([self.chance.randrange(1, 255)]) * 30_000
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -P {content[0]} 100000 30000", self.path)
        self.content[100_000:130_000] = content
        match self.chance.choice(["create", "apply", "delete"]):
            case "create" if len(self.kept) < 6:
                qemu("qemu-img", "snapshot", "-c", f"theirs {self.chance.random()}", self.path)
                id = str(1 + max(map(int, self.kept), default=0))
                self.kept[id] = bytes(self.content), b""
            case "apply" if self.kept:
                id = self.chance.choice(list(self.kept))
                qemu("qemu-img", "snapshot", "-a", id, self.path)
                if len(self.content) > len(self.kept[id][0]):
                    # It leaks the machine state that was past the end of a disk that it makes shorter.
                    qemu("qemu-img", "check", "-r", "leaks", self.path)
                self.content[:] = self.kept[id][0]
            case "delete" if self.kept:
                id = self.chance.choice(list(self.kept))
                # It deletes by name only.
                [name] = [each["name"] for each in json.loads(self.info())["snapshots"] if each["id"] == id]
                qemu("qemu-img", "snapshot", "-d", name, self.path)
                del self.kept[id]

    def info(self) -> str:
        return qemu("qemu-img", "info", "--output=json", self.path)

    def judge(self) -> None:
        """What QEMU sees."""
        assert "No errors" in qemu("qemu-img", "check", self.path)
        raw = self.path.with_suffix(".raw")
        for id, (content, _) in [("", (bytes(self.content), b"")), *self.kept.items()]:
            chosen: tuple[str, ...] = ("-l", f"snapshot.id={id}") if id else ()
            image = self.path
            if len(content) != len(self.content):
                # QEMU reads a snapshot at the length that the disk has now; one that it applies has its own.
                chosen, image = (), self.path.with_suffix(".applied")
                shutil.copy(self.path, image)
                qemu("qemu-img", "snapshot", "-a", id, image)
            qemu("qemu-img", "convert", *chosen, "-f", "qcow2", "-O", "raw", image, raw)
            assert raw.read_bytes() == content, id


@pytest.mark.qemu
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_histories(shape: str, seed: int) -> None:
    async def run(folder: Path) -> None:
        model = Model(random.Random(seed), folder / "image.qcow2", is_v2=shape == "version 2")
        async with Host() as host:
            await host.create_image(str(model.path), "qcow2", SIZE, **SHAPES[shape])
            for _ in range(3):
                await model.turn(host)
                model.judge()
                model.turn_of_qemu()
            await model.turn(host)
            model.judge()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))
