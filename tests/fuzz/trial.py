"""Everything that a program does with an image, done to a spoiled one; what must never happen becomes a complaint.

A spoiled image may cost an error of one line, and nothing else: no other exception, no long wait, no memory, no look at
a file that the image has no business with, and no write over metadata.
"""

import os
import struct
import traceback
from dataclasses import replace
from functools import partial

from bench import Hung
from changes import MARK, Changes
from recipes import Places
from seeds import BACKING, DATA_FILE, open_options

from blockjobs.base.errors import BlockjobsError, ImageCorrupt
from blockjobs.block.events import BlockImageCorrupted


class Trial:
    """One spoiled image in a directory of its own, on a bench."""

    def __init__(self, recipe, directory, bench):
        self.recipe, self.directory, self.bench = recipe, directory, bench
        self.complaints = []
        self.outcomes = {}
        self.raw = recipe.build()
        self.image = directory / "in" / "image"
        prepare(directory)

    def run(self):
        """Do everything; returns complaints."""
        with self.bench.measuring(lambda text: self.complaints.append(f"all: {text}")):
            for action in (self.info, self.check, self.repair, self.convert, self.write, self.change):
                self.image.write_bytes(self.raw)
                self._put_data_file()
                self._one(action)
                looks_only = action not in (self.repair, self.write, self.change)
                if looks_only and self.image.read_bytes() != self.raw:
                    self.complain(action, "changed the image")
        return self.complaints

    def _put_data_file(self):
        length = self.recipe.data_bytes
        with open(self.directory / "in" / DATA_FILE, "wb") as file:
            file.truncate(1 << 20 if length is None else length)

    def complain(self, action, text):
        """Note what must not be."""
        self.complaints.append(f"{action.__name__}: {text}")

    def _one(self, action):
        try:
            self.outcomes[action.__name__] = self.bench.do(action, partial(self.complain, action))
        except BlockjobsError as error:
            self.outcomes[action.__name__] = f"{type(error).__name__}: {error}"
            self._judge(action, error)
        except (Exception, Hung):
            self.complain(action, traceback.format_exc())

    def _judge(self, action, error):
        """Is it an error as it should be?"""
        text = str(error)
        if not text or "\n" in text or not text.isprintable():
            self.complain(action, f"error text {text!r}")
        if isinstance(error, ImageCorrupt):
            told = [event for event in self.bench.events if isinstance(event, BlockImageCorrupted)]
            if not told:
                self.complain(action, f"found the image corrupt without an event: {text}")
            elif not told[0].msg.isprintable():
                self.complain(action, f"event {told[0]}")

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
        before = self.outcomes["check"]
        after = await host.repair_image(self.file)
        if isinstance(before, str):
            self.complain(self.repair, f"repaired what cannot be checked: {before}")
        elif after.corruptions > before.corruptions or after.leaks > before.leaks + before.corruptions:
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
        job = await host.backup(node, target)
        outcome = await job.outcome()
        return str(outcome)

    async def write(self, host):
        """A guest writes everywhere, somebody makes and deletes snapshots; metadata must keep its place."""
        return await self._changed(host, self.write, lambda changes, root: changes.write_all(root.node))

    async def change(self, host):
        """All requests that change an image, by chance."""
        return await self._changed(host, self.change, lambda changes, root: changes.by_chance(host, root.node))

    async def _changed(self, host, action, change):
        before = None if isinstance(self.outcomes.get("check"), str) else self.outcomes.get("check")
        node = await host.blockdev_add(open_options(self.recipe.seed, self.image, discard="unmap"))
        changes = Changes(replace(self.recipe, why="").to_json())
        async with host.access(node, write=True, resize=True) as root:
            await change(changes, root)
        if action == self.change and self.recipe.seed != "luks":
            await changes.amend(host, node)
        with changes.noting():
            await host.close_nodes(node)
        for error in changes.errors:
            self._judge(action, error)
        self._look_after(action, changes.errors)
        if self.recipe.seed != "luks":
            await self._check_after(host, action, before)
        return changes.errors

    def _look_after(self, action, errors):
        if self.recipe.seed == "luks":
            return
        with open(self.image, "rb") as file:
            raw = file.read(16 << 20)
        if raw[:4] != b"QFI\xfb" and self.raw[:4] == b"QFI\xfb":
            self.complain(action, "the header is gone")
            return
        corrupt = [error for error in errors if isinstance(error, ImageCorrupt)]
        if corrupt and struct.unpack_from(">I", raw, 4)[0] > 2 and not raw[79] & 2:
            self.complain(action, f"not marked corrupt: {corrupt[0]}")
        if self.recipe.seed.startswith("data-file") or self.recipe.seed == "luks-inside":
            return
        places = Places(raw)
        snapshots = [int.from_bytes(raw[at : at + 8]) for at in places.snapshots()]
        roots = [places.l1_at, places.reftable_at, *([places.snapshots_at, *snapshots] if snapshots else [])]
        # What is behind a root table in its cluster may be anything.
        known = ((places.l2, places.size), (places.blocks, places.size), (roots, 512))
        for what, (tables, length) in zip(("L2 table", "refcount block", "root"), known, strict=True):
            for at in tables:
                table = raw[at : at + length]
                if MARK[:512] in table and MARK[:512] not in self.raw[at : at + places.size]:
                    self.complain(action, f"guest bytes lie over the {what} at {at:#x}")

    async def _check_after(self, host, action, before):
        try:
            after = await host.check_image(self.file)
        except BlockjobsError as error:
            if before is not None:
                self.complain(action, f"cannot be checked any more: {error}")
            return
        if before is not None and not before.corruptions and not before.check_errors and after.corruptions:
            self.complain(action, f"a sound image became corrupt: {after.problems[:5]}")


def prepare(directory):
    """The files that images may name, and some that they may not."""
    inside, outside = directory / "in", directory / "outside"
    for folder in (inside, outside):
        folder.mkdir(exist_ok=True)
    if (outside / "secret").exists():
        return
    (outside / "secret").write_bytes(b"secret")
    (inside / BACKING).write_bytes(b"backing." * 8192)
    os.symlink("../outside/secret", inside / "outside-link")
    os.mkfifo(inside / "fifo")
