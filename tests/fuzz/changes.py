"""What people do with a writable image: a run of requests by chance, the same for the same recipe.

Each may fail with an error of one line. The image takes all of them that it can.
"""

import random
import zlib
from contextlib import contextmanager

from blockjobs.base.errors import BlockjobsError
from blockjobs.base.span import Span
from blockjobs.block.vocabulary import ZeroMode

MARK = b"\xa5" * 4096
STEPS = 14
FLAT = b"flat " * 16384


class Changes:
    """The requests on one node, and the errors that they have cost."""

    def __init__(self, seed):
        self.chance = random.Random(zlib.crc32(seed.encode()))
        self.errors = []

    @contextmanager
    def noting(self):
        """Errors inside are expected."""
        try:
            yield
        except BlockjobsError as error:
            self.errors.append(error)

    async def write_all(self, node):
        """A guest writes everywhere, twice, with a snapshot between."""
        end = node.length // 512 * 512
        places = sorted({0, 4096 * 7, end // 2, end - 8192, *range(0, min(end, 1 << 20), 64 << 10)})
        store = getattr(node.driver, "internal_snapshots", None)
        for round_number in range(2):
            for at in places:
                if 0 <= at <= end - 4096:
                    with self.noting():
                        await node.write(at, MARK)
            if store is not None and round_number == 0:
                with self.noting():
                    await store.create("made", date_ns=0)
            with self.noting():
                await node.flush()
            if store is not None and round_number == 1 and store.table:
                with self.noting():
                    await store.delete(store.table[0].id.decode("utf-8", "replace"))

    async def by_chance(self, host, node):
        """Everything that changes an image, in any order."""
        kinds = [self._write, self._zero, self._discard, self._compressed, self._resize, self._bitmap, self._snapshot]
        for _ in range(STEPS):
            kind = self.chance.choice([*kinds, self._write, self._snapshot, self._flush])
            with self.noting():
                await kind(host, node)

    async def amend(self, host, node):
        """Make the image another one, now and then; nobody may use it meanwhile."""
        options = self.chance.choice([
            {}, {}, {"version": "v2"}, {"version": "v3"}, {"refcount_bits": 64}, {"refcount_bits": 1},
            {"size": 1 << 19}, {"lazy_refcounts": True}, {"backing_file": "base.raw", "backing_fmt": "raw"},
            {"data_file_raw": False},
        ])  # fmt: skip
        if options and node.driver.can_amend:
            with self.noting():
                job = await host.amend(node, force=True, **options)
                await job.outcome()

    def _span(self, node):
        """A run inside the disk, of whole sectors."""
        chance, sectors = self.chance, node.length // 512
        if not sectors:
            return Span(0, 0)
        if chance.random() < 0.15:
            return Span(0, min(sectors * 512, 8 << 20))
        at = chance.choice([0, chance.randrange(sectors), chance.randrange(sectors) // 8 * 8, max(0, sectors - 9)])
        return Span(at * 512, min(chance.choice([1, 7, 8, 16, 128]), sectors - at) * 512)

    async def _write(self, host, node):
        span = self._span(node)
        await node.write(span.at, (MARK * (span.length // len(MARK) + 1))[: span.length])

    async def _zero(self, host, node):
        await node.zero(self._span(node), mode=self.chance.choice(list(ZeroMode)))

    async def _discard(self, host, node):
        await node.discard(self._span(node))

    async def _flush(self, host, node):
        await node.flush()

    async def _compressed(self, host, node):
        span = self._span(node).narrow(node.driver.write_align)
        compress = node.driver.compressor("default")
        if compress is not None and 0 < span.length <= len(FLAT):
            await node.write(span.at, FLAT[: span.length], compressed=True)

    async def _resize(self, host, node):
        length = self.chance.choice([node.length + 4096, node.length // 2, node.length * 2, node.length - 512, 1 << 20])
        await node.resize(max(0, min(length, 1 << 40)) // 512 * 512)

    async def _bitmap(self, host, node):
        names = [each.name for each in host.bitmaps(node) if each.name]
        match self.chance.randrange(4):
            case 0 if names:
                await host.remove_bitmap(node, self.chance.choice(names))
            case 1 if names:
                host.clear_bitmap(node, self.chance.choice(names))
            case 2 if node.driver.bitmap_store is not None:
                await node.driver.bitmap_store.store()
            case _:
                granularity = self.chance.choice([512, 4096])
                await host.add_bitmap(node, f"b{len(names)}", granularity=granularity, persistent=True)

    async def _snapshot(self, host, node):
        store = getattr(node.driver, "internal_snapshots", None)
        if store is None:
            return
        kinds = ["create"] * 2 + ["apply", "delete", "state"] * bool(store.table)
        known = [each.id.decode("utf-8", "replace") for each in store.table]
        match self.chance.choice(kinds):
            case "create":
                await store.create(f"s{len(known)}", date_ns=0)
            case "state":
                await store.read_vm_state(self.chance.choice(known), 0, 512)
            case kind:
                await getattr(store, kind)(self.chance.choice(known))
