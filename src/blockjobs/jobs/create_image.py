"""Making a file, or laying out an image in a node (spec/jobs.md §5).

LUKS comes with the libraries of its ciphers, so it is loaded for enciphered images only.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from msgspec.structs import replace

from blockjobs.base.buffers import zeroes
from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.file_create import EXTENT_SIZE_HINT, PreallocMode, create_file
from blockjobs.block.drivers.qcow2 import create as qcow2
from blockjobs.block.graph import Graph
from blockjobs.block.node import Node
from blockjobs.block.options import NodeOptions
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.jobs.create_options import (
    FORMATS_OF_OTHERS,
    BlockdevQcow2Version,
    CreateOptions,
    FileCreateOptions,
    LuksCreateOptions,
    Qcow2CompressionType,
    Qcow2CreateOptions,
    QCryptoBlockCreateOptionsLuks,
    create_options,
)
from blockjobs.wire.qcow2 import CRYPT_AES, CRYPT_LUKS

if TYPE_CHECKING:
    from blockjobs.block.luks.volume import Means, NewVolume


async def create_image(graph: Graph, options: CreateOptions, *, durably: bool = True) -> None:
    """Make what `options` say, without a job: for drive-backup, the command line and programs that embed a host.

    Args:
        durably: a new file is on disk on return; formats do as the cache mode of their node says.

    Raises:
        UsageError: with QEMU's text; see the drivers' functions for what is left then.
        IoFailure: a write failed; what is there does not open as an image.

    Checkpoint: no. Waits: I/O on the new file or image.
    """
    match options:
        case FileCreateOptions():
            await _create_file(graph, options, durably=durably)
        case Qcow2CreateOptions():
            await _create_qcow2(graph, options)
        case LuksCreateOptions():
            await _create_luks(graph, options)
        case _:
            raise UsageError("Driver does not support blockdev-create")


async def _create_file(graph: Graph, options: FileCreateOptions, *, durably: bool) -> None:
    hint = EXTENT_SIZE_HINT if options.extent_size_hint is None else options.extent_size_hint
    await graph.offload.run(
        lambda: create_file(
            options.filename,
            _signed(options.size),
            preallocation=options.preallocation or PreallocMode.OFF,
            nocow=bool(options.nocow),
            extent_size_hint=hint,
            durably=durably,
        )
    )


def new_qcow2(options: Qcow2CreateOptions, *, size: int) -> qcow2.NewImage:
    """What the options of the command mean; a data file has no name yet.

    Raises:
        ParameterError: the backing file's format is unknown.
    """
    named = options.backing_fmt
    if named is not None and named not in create_options.homes and named not in FORMATS_OF_OTHERS:
        raise ParameterError.bad_value("backing-fmt", named)
    return qcow2.NewImage(
        size=size,
        is_v2=options.version is BlockdevQcow2Version.V2,
        cluster_size=qcow2.DEFAULT_CLUSTER_SIZE if options.cluster_size is None else options.cluster_size,
        refcount_bits=qcow2.DEFAULT_REFCOUNT_BITS if options.refcount_bits is None else options.refcount_bits,
        backing_file=options.backing_file,
        backing_format=options.backing_fmt,
        data_file_name=None if options.data_file is None else "",
        data_file_raw=bool(options.data_file_raw),
        extended_l2=bool(options.extended_l2),
        lazy_refcounts=bool(options.lazy_refcounts),
        zstd=options.compression_type is Qcow2CompressionType.ZSTD,
        preallocation=options.preallocation or PreallocMode.OFF,
    )


async def _create_qcow2(graph: Graph, options: Qcow2CreateOptions) -> None:
    image = new_qcow2(options, size=_signed(options.size))
    async with _node(graph, options.file) as file:
        image.check()
        if options.data_file is None:
            async with _writing(graph, file):
                image, encryption = await _enciphered(graph, image, options)
                await qcow2.create_image(file, None, image, encryption=encryption)
            return
        async with _node(graph, options.data_file) as data_file:
            image = replace(image, data_file_name=data_file.filename)
            async with _writing(graph, file), _writing(graph, data_file, ALL & ~Perm.RESIZE):
                image, encryption = await _enciphered(graph, image, options)
                await qcow2.create_image(file, data_file, image, encryption=encryption)


async def _enciphered(graph: Graph, image: qcow2.NewImage, options: Qcow2CreateOptions) -> tuple[qcow2.NewImage, bytes]:
    """The image with its kind of encryption, and room for a LUKS header, and that header; nothing without LUKS."""
    if options.encrypt is None:
        return image, b""
    image.check_limits()
    from blockjobs.block.luks import volume

    passphrase = volume.secret_of(graph.objects, options.encrypt.key_secret, "encrypt.key-secret")
    if not isinstance(options.encrypt, QCryptoBlockCreateOptionsLuks):
        return replace(image, crypt_method=CRYPT_AES), b""
    header, _ = await volume.new_header(new_volume(options.encrypt), passphrase, _means(graph))
    image = replace(image, crypt_method=CRYPT_LUKS, encryption_bytes=len(header))
    image.check_limits()
    return image, header


async def _create_luks(graph: Graph, options: LuksCreateOptions) -> None:
    """A header and `size` bytes behind it, which show anything: nobody has enciphered them."""
    from blockjobs.block.drivers import luks
    from blockjobs.block.luks import volume
    from blockjobs.wire.luks import SECTOR

    size = _signed(options.size)
    passphrase = volume.secret_of(graph.objects, options.key_secret, "key-secret")
    wanted = new_volume(options)
    async with _node(graph, options.file) as file, _writing(graph, file):
        if size < 0 or size > luks.SIZE_MAX - wanted.payload_bytes():
            raise UsageError("The requested file size is too large")
        header, _ = await volume.new_header(wanted, passphrase, _means(graph))
        length = len(header) + size
        if file.length:
            await file.write(0, bytes(min(SECTOR, file.length)))
            await file.flush()
        await file.resize(length)
        if options.preallocation is PreallocMode.FALLOC:
            await file.zero(Span(len(header), size), mode=ZeroMode.KEEP)
        elif options.preallocation in (PreallocMode.FULL, PreallocMode.METADATA):
            for piece in Span(len(header), size).split(1 << 20):
                await file.write(piece.at, zeroes(piece.length))
        # Whoever finds the magic finds all of it.
        await file.write(SECTOR, header[SECTOR:])
        await file.flush()
        await file.write(0, header[:SECTOR])
        await file.flush()


def new_volume(options: LuksCreateOptions | QCryptoBlockCreateOptionsLuks) -> "NewVolume":
    """What the options of the command mean."""
    from blockjobs.block.luks.volume import ITER_TIME_MS, NewVolume

    given = {
        "cipher_alg": options.cipher_alg,
        "cipher_mode": options.cipher_mode,
        "ivgen_alg": options.ivgen_alg,
        "ivgen_hash_alg": options.ivgen_hash_alg,
        "hash_alg": options.hash_alg,
    }
    words = {name: str(value) for name, value in given.items() if value is not None}
    time_ms = ITER_TIME_MS if not options.iter_time else options.iter_time
    return NewVolume(**words, iter_time_ms=time_ms)


def _means(graph: Graph) -> "Means":
    from blockjobs.block.luks.volume import Means

    return Means(offload=graph.offload, clock=graph.clock, entropy=graph.entropy)


@asynccontextmanager
async def _node(graph: Graph, reference: str | NodeOptions) -> AsyncIterator[Node]:
    """The node of that name, or one that is open only inside the block."""
    if isinstance(reference, str):
        yield graph.find(reference)
        return
    node = await graph.open(reference, monitor_owned=False)
    try:
        yield node
    finally:
        await graph.close_unused(node)


@asynccontextmanager
async def _writing(graph: Graph, node: Node, shares: Perm = ALL) -> AsyncIterator[None]:
    """Hold the rights to write and resize `node` inside the block; a data file shared with the image is refused so."""
    root = await graph.claim("an unnamed block device", node, Perm.WRITE | Perm.RESIZE, shares)
    try:
        yield
    finally:
        await graph.release(root)


def _signed(size: int) -> int:
    """Undo the wrapping of negative sizes, which QMP takes as unsigned, so that they are refused as negative."""
    return size - (1 << 64) if size >= 1 << 63 else size
