"""Everything that a program does with an image, done to a spoiled one; what must never happen becomes a complaint.

A spoiled image may cost an error of one line, and nothing else: no other exception, no long wait, no memory, no look at
a file that the image has no business with, and no write over metadata.
"""

import asyncio
import contextlib
import os
import re
import signal
import struct
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from recipes import Places
from seeds import BACKING, DATA_FILE, add_key, open_options

from blockjobs.base.errors import BlockjobsError, ImageCorrupt
from blockjobs.base.offload import InlineOffload
from blockjobs.block.events import BlockImageCorrupted
from blockjobs.host import Host

CPU_S_MAX = 2.0
WALL_S_MAX = 20.0
"""A busy machine makes everything slow; only what waits for ever gets here."""
GROWTH_BYTES_MAX = 128 << 20
MARK = b"\xa5" * 4096
FORBIDDEN = ("/etc/passwd", "/outside/", "/dev/zero", "/proc/self/mem", "/fifo")
_opened = []


def _note_open(event, args):
    if event == "open" and isinstance(args[0], str | bytes):
        _opened.append(os.fsdecode(args[0]))


sys.addaudithook(_note_open)


class Hung(BaseException):
    """An action took far too long."""


def _hung(number, frame):
    raise Hung(f"hangs in {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")


def peak_bytes():
    """The most memory that this process has had since `forget_peak`."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def forget_peak():
    """Begin to measure anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Trial:
    """One spoiled image in a directory of its own."""

    def __init__(self, recipe, directory):
        self.recipe, self.directory = recipe, directory
        self.complaints = []
        self.outcomes = {}
        self.raw = recipe.build()
        self.image = directory / "in" / "image"
        prepare(directory)

    def run(self):
        """Do everything; returns complaints."""
        for action in (self.info, self.check, self.repair, self.convert, self.write):
            self.image.write_bytes(self.raw)
            os.truncate(self.directory / "in" / DATA_FILE, 1 << 20)
            self._one(action)
            if action not in (self.repair, self.write) and self.image.read_bytes() != self.raw:
                self.complain(action, "changed the image")
        return self.complaints

    def complain(self, action, text):
        """Note what must not be."""
        self.complaints.append(f"{action.__name__}: {text}")

    def _one(self, action):
        forget_peak()
        before, cpu = peak_bytes(), time.process_time()
        _opened.clear()
        signal.signal(signal.SIGALRM, _hung)
        signal.setitimer(signal.ITIMER_REAL, WALL_S_MAX)
        try:
            self.outcomes[action.__name__] = asyncio.run(self._in_host(action))
        except BlockjobsError as error:
            text = str(error)
            self.outcomes[action.__name__] = f"{type(error).__name__}: {text}"
            if not text or "\n" in text or not text.isprintable():
                self.complain(action, f"error text {text!r}")
        except (Exception, Hung):
            self.complain(action, traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if (took := time.process_time() - cpu) > CPU_S_MAX:
            self.complain(action, f"took {took:.1f} s of processor time")
        if (growth := peak_bytes() - before) > GROWTH_BYTES_MAX:
            self.complain(action, f"took {growth >> 20} MiB of memory")
        for path in _opened:
            if any(word in path for word in FORBIDDEN):
                self.complain(action, f"opened {path}")

    async def _in_host(self, action):
        # One worker is enough, and a tenth of the price of threads, which the daemon and the command have.
        async with Host(offload=InlineOffload()) as host:
            add_key(host)
            events = []
            with host.bus.listening(events.append):
                try:
                    return await action(host)
                except ImageCorrupt:
                    if not any(isinstance(event, BlockImageCorrupted) for event in events):
                        self.complain(action, "found the image corrupt without an event")
                    raise

    @property
    def file(self):
        """Options of the file's node."""
        return {"driver": "file", "filename": str(self.image)}

    async def info(self, host):
        """What `blockjobs info` does."""
        kind = "luks" if self.recipe.seed == "luks" else "qcow2"
        described = await host.image_info(self.file, format=kind)
        return str(described)

    async def check(self, host):
        """What `blockjobs check` does."""
        if self.recipe.seed == "luks":
            return None
        return await host.check_image(self.file)

    async def repair(self, host):
        """What `blockjobs check -r all` does; nothing may be worse than before."""
        if self.recipe.seed == "luks":
            return None
        before = await host.check_image(self.file)
        after = await host.repair_image(self.file)
        if after.corruptions > before.corruptions or after.leaks > before.leaks + before.corruptions:
            self.complain(self.repair, f"made it worse: {before.problems} then {after.problems}")
        again = await host.check_image(self.file)
        if again.members() != after.members():
            self.complain(self.repair, f"reported {after.members()}, but it is {again.members()}")
        return after

    async def convert(self, host):
        """What `blockjobs convert` does."""
        node = await host.blockdev_add(open_options(self.recipe.seed, self.image, **{"read-only": True}))
        null = {"driver": "null-co", "node-name": "target", "size": node.length}
        target = await host.blockdev_add(null)
        job = await host.backup(node, target, id="convert")
        outcome = await job.outcome()
        return str(outcome)

    async def write(self, host):
        """A guest writes everywhere, somebody makes and deletes snapshots; metadata must keep its place."""
        before = None
        if self.recipe.seed != "luks":
            with suppress(BlockjobsError):
                before = await host.check_image(self.file)
        node = await host.blockdev_add(open_options(self.recipe.seed, self.image, discard="unmap"))
        errors = []
        async with host.access(node, write=True) as root:
            await self._write_all(root, node, errors)
        try:
            await host.close_nodes(node)
        except BlockjobsError as error:
            errors.append(error)
        self._look_after(before, errors)
        if self.recipe.seed != "luks":
            await self._check_after(host, before)
        return errors

    async def _write_all(self, root, node, errors):
        end = node.length // 512 * 512
        places = sorted({0, 4096 * 7, end // 2, end - 8192, *range(0, min(end, 1 << 20), 64 << 10)})
        for round_number in range(2):
            for at in places:
                if at < 0 or at + 4096 > end:
                    continue
                with self._noting(errors):
                    await root.node.write(at, MARK)
            store = getattr(node.driver, "internal_snapshots", None)
            with suppress(BlockjobsError):
                if store is not None and round_number == 0:
                    await store.create("made", date_ns=0)
            with self._noting(errors):
                await root.node.flush()
            if store is not None and round_number == 1 and store.table:
                with suppress(BlockjobsError):
                    await store.delete(store.table[0].id.decode())

    @contextlib.contextmanager
    def _noting(self, errors):
        try:
            yield
        except BlockjobsError as error:
            errors.append(error)

    def _look_after(self, before, errors):
        if self.recipe.seed == "luks":
            return
        with open(self.image, "rb") as file:
            raw = file.read(16 << 20)
        if raw[:4] != b"QFI\xfb" and self.raw[:4] == b"QFI\xfb":
            self.complain(self.write, "the header is gone")
            return
        corrupt = [error for error in errors if isinstance(error, ImageCorrupt)]
        if corrupt and struct.unpack_from(">I", raw, 4)[0] > 2 and not raw[79] & 2:
            self.complain(self.write, f"not marked corrupt: {corrupt[0]}")
        if self.recipe.seed.startswith("data-file") or self.recipe.seed == "luks-inside":
            return
        places = Places(raw)
        for what, tables in (("L2 table", places.l2), ("refcount block", places.blocks), ("L1", [places.l1_at])):
            for at in tables:
                table = raw[at : at + min(places.size, 512)]
                if MARK[:512] in table and MARK[:512] not in self.raw[at : at + places.size]:
                    self.complain(self.write, f"guest bytes lie over the {what} at {at:#x}")

    async def _check_after(self, host, before):
        try:
            after = await host.check_image(self.file)
        except BlockjobsError as error:
            if before is not None:
                self.complain(self.write, f"cannot be checked any more: {error}")
            return
        if before is not None and not before.corruptions and not before.check_errors and after.corruptions:
            self.complain(self.write, f"a sound image became corrupt: {after.problems[:5]}")


def prepare(directory):
    """The files that images may name, and some that they may not."""
    inside, outside = directory / "in", directory / "outside"
    for folder in (inside, outside):
        folder.mkdir(exist_ok=True)
    if (outside / "secret").exists():
        return
    (outside / "secret").write_bytes(b"secret")
    (inside / BACKING).write_bytes(b"backing." * 8192)
    (inside / DATA_FILE).write_bytes(b"")
    os.truncate(inside / DATA_FILE, 1 << 20)
    os.symlink("../outside/secret", inside / "outside-link")
    os.mkfifo(inside / "fifo")
