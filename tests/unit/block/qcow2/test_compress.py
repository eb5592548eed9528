import random
import zlib

import pytest
from backports import zstd

from blockjobs.block.drivers.qcow2 import compress as compress_module
from blockjobs.block.drivers.qcow2.compress import compressor, inflater
from blockjobs.wire.qcow2 import ZLIB, ZSTD

SIZE = 65536
TEXT = random.Random(1).randbytes(2000) * 40
CLUSTER = TEXT[:SIZE]
NOISE = random.Random(2).randbytes(SIZE)


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
@pytest.mark.parametrize("level", ["fast", "default", "best"])
def test_there_and_back(kind, level):
    compress, inflate = compressor(kind, level), inflater(kind, SIZE)
    for cluster in (CLUSTER, bytes(SIZE), bytearray(CLUSTER), memoryview(CLUSTER)):
        stream = compress(cluster)
        assert stream is not None
        assert len(stream) < SIZE
        assert inflate(stream) == bytes(cluster)
        assert inflate(stream + b"rest of the sector") == bytes(cluster)
    assert compress(NOISE) is None


@pytest.mark.parametrize("level", ["fast", "default", "best"])
def test_deflate_needs_a_window_of_4_kib_only(level):
    stream = compressor(ZLIB, level)(CLUSTER)
    assert zlib.decompressobj(-12).decompress(stream) == CLUSTER


def test_any_window_is_read():
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    cluster = (NOISE[:20000] * 4)[:SIZE]
    assert inflater(ZLIB, SIZE)(deflate.compress(cluster) + deflate.flush()) == cluster


def deflated(cluster: bytes) -> int:
    deflate = zlib.compressobj(6, zlib.DEFLATED, -12, 8)
    return len(deflate.compress(cluster) + deflate.flush())


def test_the_best_level_takes_the_fast_way_where_that_makes_it_smaller(monkeypatch):
    """And the slow way elsewhere: no data is stored at more than zlib's size, but for what lies between two trials."""
    words = [random.Random(number).randbytes(5).hex().encode() + b" " for number in range(4000)]
    prose = [b"".join(random.Random(number).choices(words, k=8000))[:SIZE] for number in range(64)]
    counted = []
    slow = compress_module._zlib
    monkeypatch.setattr(compress_module, "_zlib", lambda cluster: counted.append(cluster) or slow(cluster))
    compress, inflate = compressor(ZLIB, "best"), inflater(ZLIB, SIZE)
    streams = [compress(cluster) for cluster in prose]
    assert [inflate(stream) for stream in streams] == prose
    assert sum(map(len, streams)) < sum(map(deflated, prose))
    assert len(counted) == 64 // 8 + 7  # the trials, and what came before the second of them
    records = b"".join(b"%08d: %s\n" % (line, b"x" * (line % 60)) for line in range(3000))[:SIZE]
    assert [len(compress(records)) for _ in range(16)] == [deflated(records)] * 16


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_streams_of_the_wrong_length_or_no_streams(kind):
    inflate = inflater(kind, SIZE)
    good = compressor(kind, "default")(CLUSTER)
    assert inflate(good[: len(good) // 2]) is None
    assert inflate(b"") is None
    assert inflate(NOISE[:1000]) is None
    assert inflate(compressor(kind, "default")(CLUSTER[: SIZE // 2])) is None


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_a_bomb_gives_no_more_than_a_cluster(kind):
    bomb = zstd.compress(bytes(1 << 26)) if kind == ZSTD else zlib.compress(bytes(1 << 26), 9, -15)
    assert inflater(kind, SIZE)(bomb) == bytes(SIZE)


def test_a_frame_cannot_ask_for_much_memory():
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.compression_level: 1}
    huge = zstd.ZstdCompressor(options=options)
    frame = huge.compress(bytes(SIZE)) + huge.flush()
    assert zstd.get_frame_info(frame).decompressed_size is None
    assert inflater(ZSTD, SIZE)(frame) is None
