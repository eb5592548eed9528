"""Zero and discard requests: entries change, bytes mostly do not."""

from array import array
from collections.abc import Sequence
from enum import Enum, auto

from blockjobs.base.span import Span
from blockjobs.block.drivers.qcow2.entries import ALL_BITS, ALL_ZERO, Mapped, check, is_stored, runs_in, runs_of
from blockjobs.block.drivers.qcow2.image import Image
from blockjobs.block.drivers.qcow2.mapping import TABLES_PER_STEP, Stretch
from blockjobs.block.drivers.qcow2.reads import reads_as_zeroes
from blockjobs.block.drivers.qcow2.tables import Table
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.wire.qcow2 import SUBCLUSTERS
from blockjobs.wire.qcow2_tables import COMPRESSED, OFFSET, ZERO


class Erasure(Enum):
    """What becomes of whole clusters."""

    KEEP = auto()
    """They read as zeroes and keep their space."""
    UNMAP = auto()
    """They read as zeroes; the space goes."""
    DISCARD = auto()
    """As UNMAP, but what is absent and has no backing file behind it stays absent."""
    FORGET = auto()
    """They become absent; the space goes."""


async def zero(image: Image, span: Span, mode: ZeroMode) -> list[Span]:
    """See `FormatDriver.zero`: returns the parts that must be written as bytes.

    Raises:
        IoFailure, ImageCorrupt: any part of the run may be zeroed.
    Waits: table reads, commits if too much is dirty or clusters are punched; the external data file. Checkpoint: no.
    """
    geometry = image.geometry
    await image.begin_change()
    if geometry.version < 3 and image.has_backing:
        return [span]
    erasure = Erasure.UNMAP if mode is ZeroMode.UNMAP or geometry.version < 3 else Erasure.KEEP
    if geometry.is_data_file_raw and image.encipherment is None:
        # The file alone must show the disk, and no part of it needs to be left to the caller.
        await image.child("data-file").zero(span, mode=mode)
        await erase(image, _whole(image, span, geometry.cluster_size), erasure)
        return []
    whole = _whole(image, span, geometry.subcluster_size)
    left: list[Span] = []
    if geometry.is_extended:
        left = await _erase_subclusters(image, whole)
    clusters = _whole(image, whole, geometry.cluster_size)
    await erase(image, clusters, erasure)
    if mode is ZeroMode.UNMAP and geometry.has_data_file and image.tuning.discard_requests and clusters:
        await _before_punching(image)
        await image.child("data-file").zero(clusters, mode=mode)
    edges = (Span.between(span.at, whole.at), Span.between(whole.end, span.end)) if whole else (span,)
    return [part for part in (*edges, *left) if part and not await reads_as_zeroes(image, part)]


async def zero_many(image: Image, spans: Sequence[Span], mode: ZeroMode) -> list[Span]:
    """See `Columnar.zero_many`: whole clusters whose entries say where their bytes are, table by table.

    Raises and waits as `zero`.
    """
    geometry = image.geometry
    is_simple = geometry.version > 2 and not (geometry.is_extended or geometry.has_data_file)
    if (
        not is_simple
        or image.tuning.discards_keep_clusters
        or any(_whole(image, span, geometry.cluster_size) != span for span in spans)
    ):
        return [part for span in spans for part in await zero(image, span, mode)]
    erasure = Erasure.UNMAP if mode is ZeroMode.UNMAP else Erasure.KEEP
    for index, parts in image.mapping.by_table(spans):
        await image.begin_change()
        table = await image.mapping.writable_table(index)
        runs = [run for run, _ in runs_in(table.items, geometry, parts)]
        _erase_runs(image, table, Stretch(index, 0, 0, index * geometry.l2_span), runs, erasure, absent_stays=False)
    return []


async def discard(image: Image, span: Span) -> None:
    """See `FormatDriver.discard`. Raises and waits as `zero`."""
    geometry = image.geometry
    if geometry.version < 3 and image.has_backing:
        return  # Such an image cannot hide the backing file's old content.
    await image.begin_change()
    clusters = _whole(image, span, geometry.cluster_size)
    if not clusters:
        return
    if geometry.is_data_file_raw and image.encipherment is None:
        await image.child("data-file").zero(clusters, mode=ZeroMode.UNMAP)
    await erase(image, clusters, Erasure.DISCARD)
    if geometry.has_data_file and not geometry.is_data_file_raw and image.tuning.discard_requests:
        await _before_punching(image)
        await image.child("data-file").discard(clusters)


async def _before_punching(image: Image) -> None:
    """Of an enciphered image make durable that clusters read as zeroes, since punched bytes decipher to nonsense.

    Raises, Waits: as a commit. Checkpoint: no.
    """
    if image.encipherment is not None:
        await image.transaction.commit()


def _whole(image: Image, span: Span, unit: int) -> Span:
    """The units that `span` covers; the last one of the disk may be cut short."""
    start = -(-span.at // unit) * unit
    end = span.end if span.end == image.size else span.end // unit * unit
    return Span.between(start, max(start, end))


async def erase(image: Image, span: Span, erasure: Erasure) -> None:
    """Erase whole clusters, table by table.

    Raises:
        IoFailure, ImageCorrupt: any part of the run may be erased.
    Waits: table reads, commits if too much is dirty. Checkpoint: no.
    """
    absent_stays = erasure is Erasure.FORGET or (erasure is Erasure.DISCARD and not image.has_backing)
    step = image.geometry.entry_words
    keeps = image.tuning.discards_keep_clusters and erasure in (Erasure.UNMAP, Erasure.DISCARD)
    for part, is_absent in image.mapping.steps(span):
        if is_absent and absent_stays:
            continue
        for some in part.split(TABLES_PER_STEP * image.geometry.l2_span):
            await image.begin_change()
            stretches = list(image.mapping.stretches(some))
            await image.mapping.prefetch(stretches[0].l1_index, stretches[-1].l1_index + 1)
            for stretch in stretches:
                if absent_stays and not image.mapping.table_at(stretch.l1_index):
                    continue
                table = await image.mapping.writable_table(stretch.l1_index)
                if keeps:
                    await _erase_in_place(image, table, stretch, absent_stays=absent_stays)
                else:
                    runs = runs_of(table.items[stretch.first * step : stretch.end * step], image.geometry)
                    _erase_runs(image, table, stretch, runs, erasure, absent_stays=absent_stays)


async def _erase_in_place(image: Image, table: Table, stretch: Stretch, *, absent_stays: bool) -> None:
    """Let the clusters of one table read as zeroes where they are; only the file system gets their space back.

    The entries may become durable later: bytes that are punched read as zeroes too, unless they are deciphered.

    Raises:
        IoFailure, ImageCorrupt: they read as zeroes, but may not all be punched.
    Waits: discards, reads of refcount blocks, a commit if the image is enciphered. Checkpoint: no.
    """
    geometry = image.geometry
    step, size = geometry.entry_words, geometry.cluster_size
    runs = runs_of(table.items[stretch.first * step : stretch.end * step], geometry)
    _erase_runs(image, table, stretch, runs, Erasure.KEEP, absent_stays=absent_stays)
    if geometry.has_data_file or not image.tuning.discard_requests:
        return
    await _before_punching(image)
    for run in runs:
        if not run.word & COMPRESSED and is_stored(run, geometry):
            for cluster, length in await image.refcounts.last_uses(run.offset // size, run.end - run.start):
                await image.child("file").discard(Span(cluster * size, length * size))


def _erase_runs(
    image: Image, table: Table, stretch: Stretch, runs: Sequence[Mapped], erasure: Erasure, *, absent_stays: bool
) -> None:
    """Change entries of one table; nothing is awaited, so readers see all of it or nothing.

    Args:
        runs: what the entries say, as seen from the first one of `stretch`.
    """
    geometry = image.geometry
    step, size = geometry.entry_words, geometry.cluster_size
    for run in runs:
        image.check_entries(run, stretch.at + run.start * size)
    flag = ZERO if geometry.version > 2 and not geometry.is_extended and erasure is not Erasure.FORGET else 0
    bitmap = 0 if erasure is Erasure.FORGET else ALL_ZERO
    for run in runs:
        is_absent = not run.word & COMPRESSED and not is_stored(run, geometry)
        if is_absent and absent_stays and not (erasure is Erasure.FORGET and (run.word or run.bitmap)):
            continue
        frees = not is_absent and (erasure is not Erasure.KEEP or bool(run.word & COMPRESSED))
        if frees:
            image.free_entries(run, requested=True)
        word = flag if frees or is_absent else run.word | flag
        first, end = (stretch.first + run.start) * step, (stretch.first + run.end) * step
        count = run.end - run.start
        words = array("Q", range(word, word + count * size, size)) if word & OFFSET else array("Q", (word,)) * count
        table.items[first:end:step] = words
        if geometry.is_extended:
            table.items[first + 1 : end : 2] = array("Q", (bitmap,)) * count
        image.mapping.l2.touch(table, first, end)


async def _erase_subclusters(image: Image, span: Span) -> list[Span]:
    """Let the subclusters of `span` that are no whole cluster read as zeroes; returns what cannot be done so."""
    size, sub = image.geometry.cluster_size, image.geometry.subcluster_size
    whole = _whole(image, span, size)
    edges = (Span.between(span.at, whole.at), Span.between(whole.end, span.end)) if whole else tuple(span.split(size))
    left: list[Span] = []
    for edge in edges:
        if not edge:
            continue
        [stretch] = image.mapping.stretches(edge)
        table = await image.mapping.writable_table(stretch.l1_index)
        index = stretch.first * 2
        run = Mapped(0, 1, table.items[index], table.items[index + 1])
        check(run, image.geometry, stretch.at)
        if run.word & COMPRESSED:
            left.append(edge)
            continue
        low, high = (edge.at - stretch.at) // sub, (edge.end - 1 - stretch.at) // sub
        bits = (2 << high) - (1 << low)
        allocated, zeroed = run.bitmap & ALL_BITS & ~bits, run.bitmap >> SUBCLUSTERS | bits
        table.items[index + 1] = zeroed << SUBCLUSTERS | allocated
        image.mapping.l2.touch(table, index, index + 2)
    return left
