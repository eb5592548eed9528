import errno
import json
from pathlib import Path

import pytest
from msgspec.structs import replace
from tiny_images import in_loop, new_disk, new_file, reopen, write

from blockjobs.base.errors import ImageCorrupt, IoFailure, UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.span import Span
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.drivers.qcow2.options import (
    Qcow2Options,
    Qcow2OverlapCheckMode,
    QCryptoBlockOptionsLUKS,
    tuning_of,
)
from blockjobs.block.drivers.qcow2.reads import read_guest
from blockjobs.block.options import BlockdevOptions, NodeOptions, node_options
from blockjobs.block.vocabulary import Kind, ZeroMode
from blockjobs.schema.command import convert
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2 import Autoclear, Header, Incompatible
from blockjobs.wire.qcow2_tables import COMPRESSED, COPIED, ZERO, decode_table, encode_table, pack_compressed

SIZE = 4096
TRANSCRIPT = Path(__file__).parents[3] / "conformance/data/transcripts/qcow2_info.jsonl"


# --- options


def refusal(header=None, **options):
    with pytest.raises(UsageError) as caught:
        tuning_of(Qcow2Options(file="f", **options), header or Header())
    return str(caught.value)


# Texts as qemu-storage-daemon 7.2 gives them.
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"cache_size": 1000000, "l2_cache_size": 1000000, "refcount_cache_size": 100000},
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        ({"cache_size": 1000, "l2_cache_size": 1000000}, "l2-cache-size may not exceed cache-size"),
        ({"cache_size": 1000, "refcount_cache_size": 1000000}, "refcount-cache-size may not exceed cache-size"),
        (
            {"l2_cache_entry_size": 1000},
            "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
        ),
        (
            {"l2_cache_entry_size": 131072},
            "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
        ),
        ({"refcount_cache_size": 99999999999999999}, "Refcount cache size too big"),
        ({"cache_clean_interval": 99999999999999999}, "Cache clean interval too big"),
        ({"cache_clean_interval": -1}, "Cache clean interval too big"),
        ({"cache_size": -1}, "Parameter 'cache-size' expects a non-negative number below 2^64"),
        (
            {"encrypt": QCryptoBlockOptionsLUKS(key_secret="x")},
            "No encryption in image header, but options specified format 'luks'",
        ),
    ],
)
def test_options_are_refused_in_qemus_words(options, text):
    assert refusal(**options) == text


def test_lazy_refcounts_need_version_3():
    text = "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
    assert refusal(Header(version=2), lazy_refcounts=True) == text


def test_caches_have_bounds():
    tuning = tuning_of(Qcow2Options(file="f", l2_cache_size=1 << 40), Header())
    assert tuning.l2_cache_bytes == 32 << 20
    assert tuning_of(Qcow2Options(file="f", cache_size=1 << 20), Header())[:2] == ((1 << 20) - (256 << 10), 256 << 10)


def test_options_decode_from_what_clients_send():
    options = convert(
        {
            "driver": "qcow2",
            "node-name": "d",
            "file": "f",
            "backing": None,
            "overlap-check": "none",
            "encrypt": {"format": "luks"},
        },
        BlockdevOptions,
    )
    assert isinstance(options, Qcow2Options)
    assert options.overlap_check is Qcow2OverlapCheckMode.NONE
    assert options.backing is None
    assert isinstance(options, NodeOptions)
    assert node_options is not None


# --- listings


def recorded_images():
    """What QEMU told about each image in a recorded dialogue."""
    for line in TRANSCRIPT.read_text().splitlines():
        answer = json.loads(line).get("<", {}).get("return")
        if isinstance(answer, list):
            return {node["image"]["filename"]: node["image"] for node in answer if node["drv"] == "qcow2"}
    raise AssertionError("no such answer")


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("v2.img", NewImage(size=4 << 20, is_v2=True)),
        ("e.img", NewImage(size=4 << 20, extended_l2=True, lazy_refcounts=True, refcount_bits=64, zstd=True)),
    ],
)
def test_images_tell_about_themselves_as_qemu_does(name, image):
    async def body():
        file = MemoryChild()
        await create_image(file, None, image)
        driver = await reopen(file, read_only=True)
        recorded = recorded_images()[name]
        told = driver.info()
        assert told == {member: recorded[member] for member in told}
        assert recorded.keys() - told.keys() == {"filename", "format", "virtual-size", "actual-size"}
        assert driver.length == recorded["virtual-size"]

    in_loop(body)


def test_children_that_the_header_names():
    async def body():
        file = await new_file(backing_file="../base.img", backing_format="raw")
        assert (await reopen(file)).implied_children() == [("backing", "../base.img", "raw")]
        file, data = MemoryChild(), MemoryChild()
        await create_image(file, data, NewImage(size=1 << 20, data_file_name="d.raw", data_file_raw=True))
        driver = await reopen(file, children={"data-file": data})
        assert driver.implied_children() == [("data-file", "d.raw", None)]
        assert driver.info()["format-specific"]["data"]["data-file-raw"] is True
        with pytest.raises(UsageError, match="'data-file' can only be set for images with an external data file"):
            await reopen(await new_file(), children={"data-file": data})

    in_loop(body)


def test_rights_on_children():
    async def body():
        driver = await reopen(await new_file(), read_only=True)
        seldom = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        assert driver.child_perms("file", Perm(0), ALL) == (Perm.CONSISTENT_READ, seldom)
        assert driver.child_perms("backing", Perm.CONSISTENT_READ | Perm.WRITE, ALL) == (Perm.CONSISTENT_READ, ALL)
        assert driver.child_perms("backing", Perm.WRITE, seldom) == (Perm(0), seldom)
        for needs in (Perm.WRITE, Perm.RESIZE):  # a change of the length writes zeroes
            assert driver.child_perms("data-file", needs, ALL) == (Perm.WRITE | Perm.RESIZE, ALL)
        driver = await reopen(await new_file())
        assert driver.child_perms("file", Perm(0), ALL) == (
            seldom & ~Perm.WRITE_UNCHANGED | Perm.WRITE | Perm.RESIZE,
            seldom,
        )

    in_loop(body)


# --- the header of an image that is written to


def test_autoclear_bits_are_cleared_durably_before_the_first_change():
    async def body():
        file = await new_file()
        header = Header.decode_fields(bytes(file.content))
        file.content[:112] = replace(header, autoclear=int(Autoclear.BITMAPS) | 1 << 40).encode_fields()
        driver = await reopen(file)
        await driver.flush()
        await driver.resolve(Span(0, SIZE))
        assert Header.decode_fields(bytes(file.content)).autoclear
        file.log.clear()
        await driver.reserve(Span(0, SIZE))
        assert [change[0] for change in file.log] == ["flush", "write", "flush"]
        assert Header.decode_fields(bytes(file.content)).autoclear == 0

    in_loop(body)


def test_refcounts_of_an_image_that_was_not_closed_are_rebuilt_before_it_is_written():
    async def body():
        file = await new_file()
        header = Header.decode_fields(bytes(file.content))
        file.content[:112] = replace(header, incompatible=int(Incompatible.DIRTY)).encode_fields()
        block = int.from_bytes(file.content[header.refcount_table_at :][:8], "big")
        file.content[block : block + 2] = bytes(2)  # the header's own refcount
        before = bytes(file.content)
        assert (await reopen(file, read_only=True)).info()["dirty-flag"] is True
        assert file.content == before
        assert (await reopen(file)).info()["dirty-flag"] is False
        assert (await check_image(file, offload=InlineOffload())).is_clean

    in_loop(body)


# --- tables that lie


async def broken(l2=None, l1=None, refcounts=None, **options):
    """An image of two used clusters whose tables are then changed by hand; reopened."""
    file, driver = await new_disk(**options)
    await write(driver, Span(0, 2 * SIZE), b"ab" * SIZE)
    await driver.close()
    header = driver.image.header

    def change(at, changes):
        table = decode_table(bytes(file.content[at : at + SIZE]))
        for index, word in changes.items():
            table[index] = word
        file.content[at : at + SIZE] = encode_table(table)

    change(driver.image.mapping.table_at(0), l2 or {})
    change(header.refcount_table_at, refcounts or {})
    file.content.extend(bytes(-len(file.content) % SIZE))
    change(header.l1_at, l1 or {})
    file.log.clear()
    return file, await reopen(file)


LIES = {
    "entry not at a cluster": {"l2": {0: COPIED | 5 * SIZE + 512}},
    "table not at a cluster": {"l1": {0: COPIED | 5 * SIZE + 512}},
    "table beyond the file": {"l1": {0: COPIED | 1 << 40}},
    "entry on the header": {"l2": {0: COPIED | 1 << 63}},
    "refcount block not at a cluster": {"refcounts": {0: 8192 + 512}},
    "no refcount block where the header is": {"refcounts": {0: 0}},
    "refcount block beyond the file": {"refcounts": {0: 1 << 50}},
    "entry on the L1 table": {"l2": {0: COPIED | 3 * SIZE}},
    "kept zero cluster on refcounts": {"l2": {0: COPIED | ZERO | 2 * SIZE}},
}


@pytest.mark.parametrize("name", LIES)
def test_nothing_is_written_over_metadata_and_the_image_is_marked(name):
    async def body():
        file, driver = await broken(**LIES[name])
        before = bytes(file.content)
        if name == "entry on the header":
            # Offset 0 means absent: the entry is legal, and a new cluster is taken.
            await write(driver, Span(0, SIZE), b"x" * SIZE)
            return
        with pytest.raises(ImageCorrupt):
            # Where the old cluster may be written in place, refcounts are only looked at for the new one.
            await write(driver, Span(0, 30 * SIZE), b"x" * SIZE * 30)
        marked = Header.decode_fields(bytes(file.content))
        assert marked.incompatible == Incompatible.CORRUPT
        assert file.content[96:] == before[96:]
        assert driver.info()["format-specific"]["data"]["corrupt"] is True
        for attempt in (driver.reserve(Span(8 * SIZE, SIZE)), driver.zero(Span(0, SIZE), ZeroMode.UNMAP)):
            with pytest.raises(IoFailure) as caught:
                await attempt
            assert caught.value.errno == errno.EIO
        await driver.close()

    in_loop(body)


def test_reading_what_may_not_be_written_marks_nothing_but_fails():
    async def body():
        file, _ = await broken(l1={0: COPIED | 1 << 40})
        driver = await reopen(file, read_only=True)
        with pytest.raises(ImageCorrupt) as caught:
            await driver.resolve(Span(0, SIZE))
        assert caught.value.text == f"L2 table at {1 << 40:#x} lies beyond the end of the file"
        assert file.log == []
        with pytest.raises(IoFailure):
            await driver.reserve(Span(0, SIZE))

    in_loop(body)


@pytest.mark.parametrize(
    "entry",
    [
        pack_compressed(1 << 40, 500, 12),
        pack_compressed(5 * SIZE, 500, 12),
        COMPRESSED | 0x3FFF_FFFF_FFFF_FFFF,
    ],
)
def test_compressed_clusters_that_are_none(entry):
    async def body():
        _, driver = await broken(l2={0: entry})
        [segment] = await driver.resolve(Span(0, SIZE))
        assert segment.kind is Kind.SPECIAL
        with pytest.raises(IoFailure) as caught:
            await driver.read_special(segment, memoryview(bytearray(SIZE)))
        assert caught.value.errno == errno.EIO
        assert await read_guest(driver.image, Span(SIZE, SIZE)) == b"ab" * (SIZE // 2)

    in_loop(body)


# --- sharing with snapshots


def test_what_a_snapshot_shares_is_copied():
    """A snapshot by hand: the active L1 loses its copied flag, L2 and data count twice, and their entries know."""

    async def body():
        file, driver = await new_disk()
        await write(driver, Span(0, 3 * SIZE), b"old" * SIZE)
        await driver.close()
        image = driver.image
        l2_at = image.mapping.table_at(0)
        table = decode_table(bytes(file.content[l2_at : l2_at + SIZE]))
        hosts = [word & ~COPIED for word in table[:3]]
        for index, host in enumerate(hosts):
            table[index] = host
            await image.refcounts.add(host // SIZE, 1)
        file.content[l2_at : l2_at + SIZE] = encode_table(table)
        await image.refcounts.add(l2_at // SIZE, 1)
        await driver.flush()
        l1_at = image.header.l1_at
        file.content[l1_at : l1_at + 8] = l2_at.to_bytes(8, "big")
        driver = await reopen(file)
        await write(driver, Span(SIZE + 10, 5), b"newer")
        await driver.zero(Span(2 * SIZE, SIZE), ZeroMode.KEEP)
        await driver.close()
        assert file.content[hosts[0] : hosts[0] + SIZE] == (b"old" * SIZE)[:SIZE]
        assert decode_table(bytes(file.content[l2_at : l2_at + SIZE])) == table, "the snapshot's table is as it was"
        again = (await reopen(file)).image
        counts = [await again.refcounts.count(at // SIZE) for at in (l2_at, *hosts)]
        assert counts == [1, 2, 1, 2]
        expected = bytearray(b"old" * SIZE)
        expected[SIZE + 10 : SIZE + 15] = b"newer"
        expected[2 * SIZE :] = bytes(SIZE)
        assert await read_guest(again, Span(0, 3 * SIZE)) == expected

    in_loop(body)


def test_copied_flags_that_are_not_true_are_not_believed():
    """A writer died while it made a snapshot: counts had been raised, flags not yet cleared."""

    async def body():
        file, driver = await new_disk()
        await write(driver, Span(0, 3 * SIZE), b"old" * SIZE)
        await driver.close()
        image = driver.image
        l2_at = image.mapping.table_at(0)
        [segment] = await driver.resolve(Span(0, 3 * SIZE))
        shared = [l2_at // SIZE, segment.child_at // SIZE, segment.child_at // SIZE + 1]
        for cluster in shared:
            await image.refcounts.add(cluster, 1)
        await driver.flush()
        before = bytes(file.content)
        driver = await reopen(file)
        driver.image.mapping.trusts_flags = False  # as with a snapshot in the header
        await write(driver, Span(100, 2 * SIZE), b"n" * 2 * SIZE)
        await driver.close()
        for at in (l2_at, segment.child_at, segment.child_at + SIZE):
            assert file.content[at : at + SIZE] == before[at : at + SIZE]
        assert [await driver.image.refcounts.count(cluster) for cluster in shared] == [1, 1, 1]
        expected = (b"old" * SIZE)[:100] + b"n" * 2 * SIZE + (b"old" * SIZE)[100 + 2 * SIZE :]
        assert await read_guest(driver.image, Span(0, 3 * SIZE)) == expected

    in_loop(body)


# --- the length


def test_growing_shows_zeroes_and_shrinking_gives_space_back():
    async def body():
        file, driver = await new_disk(size=10 * SIZE + 512)
        await write(driver, Span(0, 10 * SIZE + 512), b"x" * (10 * SIZE + 512))
        await driver.resize(4 * SIZE + 1024)
        await driver.resize(5000 * SIZE)
        expected = (b"x" * (4 * SIZE + 1024)).ljust(11 * SIZE, b"\0")
        assert await read_guest(driver.image, Span(0, 11 * SIZE)) == expected
        assert Header.decode_fields(bytes(file.content)).size == 5000 * SIZE
        with pytest.raises(UsageError, match="multiple of 512"):
            await driver.resize(1000)
        with pytest.raises(UsageError, match="Failed to grow the L1 table: File too large"):
            await driver.resize(1 << 60)
        assert driver.length == 5000 * SIZE

    in_loop(body)


def test_shrinking_gives_back_what_machine_state_takes_behind_the_end():
    async def body():
        file, driver = await new_disk(size=10 * SIZE)
        await driver.internal_snapshots.write_vm_state(0, b"state" * SIZE)
        await driver.resize(4 * SIZE)
        await driver.close()
        result = await check_image(file, offload=InlineOffload())
        assert (result.leaks, result.corruptions) == (0, 0)

    in_loop(body)


def test_a_last_cluster_cut_short_is_zero_behind_the_end():
    async def body():
        file, driver = await new_disk(size=SIZE + 512)
        file.content.extend(b"\xff" * 64 * SIZE)
        await write(driver, Span(SIZE, 512), b"x" * 512)
        await driver.resize(2 * SIZE)
        assert await read_guest(driver.image, Span(SIZE, SIZE)) == (b"x" * 512).ljust(SIZE, b"\0")

    in_loop(body)


def test_millions_of_empty_tables_are_passed_over_at_once():
    async def body():
        _, driver = await new_disk(size=64 << 30, cluster_size=512)
        await write(driver, Span(5 << 30, 512), b"x" * 512)
        assert [segment.kind for segment in await driver.resolve(Span(0, 64 << 30))] == [
            Kind.BACKING,
            Kind.DATA,
            Kind.BACKING,
        ]
        await driver.discard(Span(0, 64 << 30))
        assert [segment.kind for segment in await driver.resolve(Span(0, 64 << 30))] == [
            Kind.BACKING,
            Kind.ZERO,
            Kind.BACKING,
        ]

    in_loop(body)


def test_places_of_a_long_write_are_few():
    async def body():
        _, driver = await new_disk(size=1 << 30, cluster_size=65536)
        reservation = await driver.reserve(Span(0, 64 << 20))
        assert len(reservation.placements) == 1
        assert reservation.fills == []
        await driver.release(reservation)
        again = await driver.reserve(Span(65536, 64 << 20))
        assert again.placements[0].child_at == reservation.placements[0].child_at, "given back, and taken again"

    in_loop(body)


def test_bytes_behind_the_end_of_a_raw_data_file_are_gone_before_the_disk_grows_over_them():
    async def body():
        file, data = MemoryChild(), MemoryChild(name="data")
        await create_image(
            file, data, NewImage(size=1 << 18, cluster_size=4096, data_file_name="d", data_file_raw=True)
        )
        driver = await reopen(file, children={"data-file": data})
        await data.write(1 << 18, b"G" * (1 << 17))
        switches = []

        async def switch(*args, before=driver.image.header_file.switch):
            switches.append((bytes(data.content[1 << 18 : 1 << 19]), data.log[-1]))
            await before(*args)

        driver.image.header_file.switch = switch
        await driver.resize(1 << 19)
        assert switches[-1] == (bytes(1 << 17), ("flush",))
        assert bytes(data.content[1 << 18 :]) == bytes(1 << 18)
        assert await read_guest(driver.image, Span(1 << 18, 1 << 18)) == bytes(1 << 18)

    in_loop(body)
