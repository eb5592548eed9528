"""The two programs: each makes images, plays steps on them, and says what it sees."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disk_model import GRANULARITY, Step, content_file
from image_kinds import Kind

from blockjobs.base.span import Span
from blockjobs.block.backing_file import name_backing_file
from blockjobs.block.node import Node
from blockjobs.block.objects import SecretOptions, add_object
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.host import Host

SECRET = ("--object", "secret,id=key,data=sesame")
IO_KINDS = frozenset({"write", "zero", "unmap", "discard", "compressed", "zero bytes"})
UNMAP = {"discard": "unmap"}


class Theirs:
    """QEMU's tools, on the image `disk.qcow2` in a folder; `options` are those of its node."""

    def __init__(self, folder: Path, kind: Kind, options: Mapping[str, str] = UNMAP) -> None:
        self.folder, self.kind = folder, kind
        given = "".join(f",{name}={value}" for name, value in options.items())
        key = ",encrypt.key-secret=key" if kind.encrypted else ""
        self.image = f"driver=qcow2{given},file.driver=file,file.filename=disk.qcow2{key}"

    def run(self, *words: str, feed: str | None = None) -> str:
        """Run one; returns what it prints."""
        done = subprocess.run(
            words, cwd=self.folder, input=feed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}"
        return done.stdout

    def img(self, command: str, *words: str) -> str:
        """Run `qemu-img COMMAND` with the image as its first operand."""
        return self.run("qemu-img", command, *SECRET, "--image-opts", self.image, *words)

    def create(self, backing: str) -> None:
        """Make the image of this kind; `backing` is the name of the file below."""
        kind = self.kind
        options = {
            "compat": "0.10" if kind.version == "v2" else "1.1",
            "cluster_size": str(kind.cluster_size),
            "refcount_bits": str(kind.refcount_bits),
            "preallocation": kind.preallocation,
        }
        if kind.version == "v3":
            options["lazy_refcounts"] = "on" if kind.lazy_refcounts else "off"
            options["compression_type"] = kind.compression
        if kind.extended_l2:
            options["extended_l2"] = "on"
        if kind.data != "inside":
            options |= {"data_file": "data.raw", "data_file_raw": "on" if kind.data == "raw" else "off"}
        if kind.encrypted:
            options |= {"encrypt.format": kind.encrypted, "encrypt.key-secret": "key"}
        if kind.encrypted == "luks":
            options["encrypt.iter-time"] = "10"
        below = ("-b", backing, "-F", kind.backing) if kind.backing else ()
        joined = ",".join(f"{name}={value}" for name, value in options.items())
        self.run(
            *("qemu-img", "create", "-q", *SECRET, "-f", "qcow2", "-o", joined, *below, "disk.qcow2", str(kind.size))
        )

    def play(self, steps: Sequence[Step]) -> None:
        """Play the steps; requests that follow each other go to one process."""
        pending: list[Step] = []
        for step in steps:
            if step.kind in IO_KINDS:
                pending.append(step)
                continue
            self._io(pending)
            pending = []
            self._other(step)
        self._io(pending)

    def _io(self, steps: Sequence[Step]) -> None:
        if not steps:
            return
        lines = []
        for step in steps:
            place = f"{step.at} {step.length}"
            match step.kind:
                case "write" | "compressed":
                    name = f"{step.kind}-{step.number}"
                    (self.folder / name).write_bytes(content_file(step.number, compressible=step.kind == "compressed"))
                    if step.kind == "compressed":  # QEMU stores streams only where nothing is
                        lines.append(f"discard {place}")
                    flag = "-c " if step.kind == "compressed" else ""
                    lines.append(f"write {flag}-s {name} {place}")
                case "zero" | "unmap":
                    lines.append(f"write -z {'-u ' if step.kind == 'unmap' else ''}{place}")
                case "discard":
                    lines.append(f"discard {place}")
                case "zero bytes":
                    lines.append(f"write -P 0 {place}")
        self.io(lines)

    def io(self, lines: Sequence[str]) -> None:
        """Give commands to `qemu-io`, all of which must succeed."""
        told = self.run("qemu-io", *SECRET, "--image-opts", self.image, feed="\n".join(lines) + "\n")
        assert "failed" not in told, told
        done = sum(told.count(word) for word in ("wrote ", "read ", "discard "))
        assert done >= len(lines), told

    def _other(self, step: Step) -> None:
        match step.kind:
            case "snapshot":
                if self.kind.machine_state:
                    self.io([f"write -b -P {step.state[0]} 0 {len(step.state)}"])
                self.img("snapshot", "-c", step.name)
            case "apply":
                self.img("snapshot", "-a", step.name)
            case "delete":
                self.img("snapshot", "-d", step.name)
            case "resize":
                self.img("resize", "-q", "--shrink", str(step.length))
            case "add bitmap":
                self.bitmap("--add", "-g", str(GRANULARITY), name=step.name)
            case "merge":
                self.bitmap("--merge", step.other, name=step.name)
            case "disable":
                self.bitmap("--disable", name=step.name)
            case "remove bitmap":
                self.bitmap("--remove", name=step.name)
            case "to v3":
                self.amend("compat=1.1")
            case "lazy refcounts":
                self.amend(f"lazy_refcounts={'on' if step.number % 2 else 'off'}")
            case "wider counts":
                self.amend(f"refcount_bits={step.number}")
            case "rebase":
                self.img("rebase", "-u", "-b", step.name, "-F", self.kind.backing)
            case _:
                raise AssertionError(step)

    def bitmap(self, *words: str, name: str) -> None:
        self.run("qemu-img", "bitmap", *words, *SECRET, "--image-opts", self.image, name)

    def amend(self, options: str) -> None:
        self.run("qemu-img", "amend", "-q", *SECRET, "-o", options, "--image-opts", self.image)

    def check(self) -> None:
        """Its check finds neither damage nor leaks."""
        self.img("check", "-q")

    def shown(self, snapshot: str | None = None) -> bytes:
        """What a guest reads now, or read when a snapshot was made."""
        chosen = ("-l", f"snapshot.name={snapshot}") if snapshot else ()
        self.run(
            *("qemu-img", "convert", *SECRET, *chosen, "--image-opts", self.image, "-O", "raw", "shown.raw"),
        )
        return (self.folder / "shown.raw").read_bytes()

    def check_state(self, snapshot: str, state: bytes) -> None:
        """Applying a snapshot brings that machine state back; tried on a copy."""
        image, kept = self.folder / "disk.qcow2", self.folder / "disk.kept"
        shutil.copyfile(image, kept)
        self.img("snapshot", "-a", snapshot)
        self.io([f"read -b -P {state[0]} 0 {len(state)}"])
        kept.rename(image)


class Ours:
    """Our host, on the same image."""

    def __init__(self, folder: Path, kind: Kind, host: Host, options: Mapping[str, str] = UNMAP) -> None:
        self.folder, self.kind, self.host = folder, kind, host
        self.options = {name: {"on": True, "off": False}.get(value, value) for name, value in options.items()}
        if options.get("detect-zeroes") in ("on", "off"):
            self.options["detect-zeroes"] = options["detect-zeroes"]
        self.path = str(folder / "disk.qcow2")
        self._jobs = 0
        add_object(host.objects, SecretOptions(id="key", data="sesame"), host.clock)

    async def create(self, backing: str) -> None:
        """Make the image of this kind; `backing` is the name of the file below."""
        kind = self.kind
        options: dict[str, Any] = {
            "version": kind.version,
            "cluster_size": kind.cluster_size,
            "refcount_bits": kind.refcount_bits,
            "preallocation": kind.preallocation,
            "lazy_refcounts": kind.lazy_refcounts,
            "compression_type": kind.compression,
            "extended_l2": kind.extended_l2,
        }
        if kind.data != "inside":
            data = str(self.folder / "data.raw")
            await self.host.create_image(data, "raw", 0)
            options |= {"data_file": {"driver": "file", "filename": data}, "data_file_raw": kind.data == "raw"}
        if kind.backing:
            options |= {"backing_file": backing, "backing_fmt": kind.backing}
        if kind.encrypted == "luks":
            options["encrypt"] = {"format": "luks", "key-secret": "key", "iter-time": 10}
        elif kind.encrypted:
            options["encrypt"] = {"format": "qcow", "key-secret": "key"}
        await self.host.create_image(self.path, "qcow2", kind.size, **options)

    async def open(self, **more: Any) -> Node:
        """Its node, named disk."""
        options: dict[str, Any] = {
            "driver": "qcow2",
            "node-name": "disk",
            "file": {"driver": "file", "filename": self.path},
            **self.options,
            **more,
        }
        if self.kind.encrypted:
            options["encrypt"] = {"format": self.kind.encrypted, "key-secret": "key"}
        return await self.host.blockdev_add(options)

    async def play(self, steps: Sequence[Step]) -> None:
        """Play the steps in one opening of the image."""
        if not steps:
            return
        node = await self.open()
        async with self.host.access(node, write=True, resize=True) as root:
            for step in steps:
                if step.kind in IO_KINDS:
                    await self._io(root.node, step)
                else:
                    await self._other(root.node, step)
        await self.host.close_nodes(node)

    async def _io(self, node: Node, step: Step) -> None:
        span = Span(step.at, step.length)
        match step.kind:
            case "write":
                await node.write(step.at, step.content)
            case "compressed":
                await node.write(step.at, step.content, compressed=True)
            case "zero" | "unmap":
                await node.zero(span, mode=ZeroMode.UNMAP if step.kind == "unmap" else ZeroMode.KEEP)
            case "discard":
                await node.discard(span)
            case "zero bytes":
                await node.write(step.at, bytes(step.length))

    async def _other(self, node: Node, step: Step) -> None:
        host, snapshots = self.host, node.driver.internal_snapshots
        assert snapshots is not None
        match step.kind:
            case "snapshot":
                state = step.state if self.kind.machine_state else b""
                await snapshots.write_vm_state(0, state)
                await snapshots.create(step.name, date_ns=host.clock.wall_ns(), vm_state_bytes=len(state))
            case "apply" | "delete":
                [id] = [each.id for each in snapshots.entries if each.name == step.name]
                await (snapshots.apply(id) if step.kind == "apply" else snapshots.delete(id))
            case "resize":
                await node.resize(step.length)
            case "add bitmap":
                await host.add_bitmap(node, step.name, granularity=GRANULARITY, persistent=True)
            case "merge":
                await host.merge_bitmaps(node, step.name, [(node, step.other)])
            case "disable":
                await host.enable_bitmap(node, step.name, False)
            case "remove bitmap":
                await host.remove_bitmap(node, step.name)
            case "to v3":
                await self._amend(node, version="v3")
            case "lazy refcounts":
                await self._amend(node, lazy_refcounts=bool(step.number % 2))
            case "wider counts":
                await self._amend(node, refcount_bits=step.number)
            case "rebase":
                await name_backing_file(host.graph, node, step.name, self.kind.backing)
            case _:
                raise AssertionError(step)

    async def _amend(self, node: Node, **options: object) -> None:
        self._jobs += 1
        job = await self.host.amend(node, id=f"amend{self._jobs}", **options)
        outcome = await job.outcome()
        assert outcome.error is None, outcome.error

    async def check(self) -> None:
        """Our check finds neither damage nor leaks."""
        found = await self.host.check_image({"driver": "file", "filename": self.path})
        assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0), found.problems

    async def shown(self) -> bytes:
        """What a guest reads now."""
        node = await self.open(**{"read-only": True})
        async with self.host.access(node) as root:
            content = await root.node.read(0, root.node.length)
        await self.host.close_nodes(node)
        return bytes(content)

    async def check_state(self, snapshot: str, state: bytes) -> None:
        """A snapshot holds that machine state, if its record says that it has one."""
        node = await self.open(**{"read-only": True})
        snapshots = node.driver.internal_snapshots
        assert snapshots is not None
        [kept] = [each for each in snapshots.entries if each.name == snapshot]
        assert await snapshots.read_vm_state(kept.id, 0, kept.vm_state_bytes) == state[: kept.vm_state_bytes]
        await self.host.close_nodes(node)

    async def dirty(self) -> dict[str, int]:
        """Dirty bytes of each bitmap."""
        node = await self.open(**{"read-only": True})
        found = {each.name or "": each.count for each in self.host.bitmaps(node)}
        await self.host.close_nodes(node)
        return found
