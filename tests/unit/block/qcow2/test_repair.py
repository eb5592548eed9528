import asyncio
import random
import struct
import subprocess

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.offload import InlineOffload
from blockjobs.base.units import KiB, MiB
from blockjobs.block.drivers.file_create import PreallocMode
from blockjobs.block.drivers.qcow2.check import check_image
from blockjobs.block.drivers.qcow2.create import NewImage, create_image
from blockjobs.block.drivers.qcow2.header import read_header
from blockjobs.block.drivers.qcow2.repair import repair_image, repair_leaks
from blockjobs.testing.child import MemoryChild
from blockjobs.wire.qcow2 import EXT_BITMAPS, HostAt
from blockjobs.wire.qcow2_tables import COPIED, SnapshotEntry

OFFSET = 0x00FF_FFFF_FFFF_FE00
OFFLOAD = InlineOffload()


def made(size=4 * MiB, **options):
    file = MemoryChild()
    asyncio.run(create_image(file, None, NewImage(size=size, preallocation=PreallocMode.METADATA, **options)))
    return bytes(file.content)


def word(raw, at):
    return int.from_bytes(raw[at : at + 8], "big")


def with_words(raw, *pokes):
    raw = bytearray(raw)
    for at, fmt, value in pokes:
        struct.pack_into(fmt, raw, at, value)
    return bytes(raw)


def repaired(raw, repair=repair_image):
    file = MemoryChild(raw)
    result = asyncio.run(repair(file, offload=OFFLOAD))
    return file, result


def checked(raw):
    return asyncio.run(check_image(MemoryChild(raw), offload=OFFLOAD))


def damages(raw):
    """Damage that can be mended: pokes for an image with one L2 table and one refcount block."""
    l1, table = word(raw, 40), word(raw, 48)
    l2, block = word(raw, l1) & OFFSET, word(raw, table) & OFFSET
    entry = word(raw, l2)
    return {
        "leak": [(l2, ">Q", 0)],
        "all leaked": [(l1, ">Q", 0)],
        "dirty": [(72, ">Q", 1)],
        "marked corrupt": [(72, ">Q", 2)],
        "refcount 0, dirty": [(block + 2 * 8, ">H", 0), (72, ">Q", 1)],
        "refcount 2": [(block + 2 * 8, ">H", 2)],
        "COPIED missing": [(l2, ">Q", entry & ~COPIED), (l1, ">Q", l2)],
        "two entries, one cluster": [(l2, ">Q", word(raw, l2 + 8))],
        "no block": [(table, ">Q", 0)],
        "block beyond": [(table, ">Q", 1 << 40)],
        "block unaligned": [(table, ">Q", block + 512)],
        "block with reserved bit": [(table, ">Q", block | 1)],
        "block on data": [(table, ">Q", l2 + 64 * KiB)],
    }


CASES = list(damages(made()))


@pytest.mark.parametrize("case", CASES)
def test_what_can_be_mended_is(case):
    raw = made()
    damaged = with_words(raw, *damages(raw)[case])
    file, result = repaired(damaged)
    assert result.is_clean
    assert checked(file.content).is_clean
    header = asyncio.run(read_header(file, read_only=False))
    assert header.incompatible == 0
    if case not in ("leak", "all leaked", "two entries, one cluster", "block on data"):
        kept = header.l1_at
        assert file.content[kept:][: 64 * KiB] == raw[kept:][: 64 * KiB]


@pytest.mark.parametrize("level", ["L1", "L2"])
@pytest.mark.parametrize("clusters", [0, 1])
@pytest.mark.parametrize("options", [{}, {"cluster_size": 512}, {"refcount_bits": 64, "cluster_size": 4096}])
def test_entries_that_name_clusters_behind_the_end_get_them(options, clusters, level):
    """New refcounts go behind the end too, and one of the two must give way."""
    raw = made(**options)
    size = 1 << word(raw, 16) % (1 << 32)
    end = -(-len(raw) // size) * size
    l1 = word(raw, 40)
    at = l1 if level == "L1" else word(raw, l1) & OFFSET
    file, result = repaired(with_words(raw, (at, ">Q", COPIED | end + clusters * size)))
    assert result.is_clean
    assert checked(file.content).is_clean


@pytest.mark.parametrize(
    "options", [{"refcount_bits": 1}, {"refcount_bits": 64, "cluster_size": 4096}, {"is_v2": True}]
)
def test_every_width_is_rebuilt(options):
    raw = made(**options)
    table = word(raw, 48)
    assert repaired(with_words(raw, (table, ">Q", 0)))[1].is_clean


def test_nothing_is_written_to_a_clean_image():
    assert repaired(made())[0].log == []


def test_what_cannot_be_mended_stays_and_is_reported():
    raw = made()
    l2 = word(raw, word(raw, 40)) & OFFSET
    file, result = repaired(with_words(raw, (l2, ">Q", COPIED | 1 << 40), (72, ">Q", 3)))
    assert (result.corruptions > 0, result.leaks) == (True, 0)
    assert word(file.content, 72) == 2  # still marked corrupt
    assert word(file.content, l2) == COPIED | 1 << 40


def test_too_many_references_for_the_width():
    raw = made(refcount_bits=1)
    l2 = word(raw, word(raw, 40)) & OFFSET
    damaged = with_words(raw, (l2, ">Q", word(raw, l2 + 8)))
    with pytest.raises(UsageError, match="Cluster 6 has 2 references, more than refcounts of 1 bits can hold"):
        repaired(damaged)


def test_no_repair_without_all_references():
    raw = made()
    damaged = with_words(raw, (60, ">I", 1), (64, ">Q", 64 * KiB), (64 * KiB + 36, ">I", 1 << 31), (72, ">Q", 1))
    with pytest.raises(UsageError, match="Cannot repair the image without its snapshot table"):
        repaired(damaged)
    extension = struct.pack(">IIIIQQI", EXT_BITMAPS, 24, 1, 0, 32, 1 << 40, 0)
    damaged = bytearray(with_words(raw, (88, ">Q", 1), (72, ">Q", 1)))
    damaged[112 : 112 + len(extension)] = extension
    with pytest.raises(UsageError, match="Cannot repair the image without its bitmap"):
        repaired(bytes(damaged))


def test_an_l1_entry_with_reserved_bits_gets_its_flag():
    raw = made()
    l1 = word(raw, 40)
    l2, block = word(raw, l1) & OFFSET, word(raw, word(raw, 48)) & OFFSET
    damaged = with_words(raw, (l1, ">Q", 1 << 62 | l2), (block + l2 // (64 * KiB) * 2, ">H", 7))
    file, result = repaired(damaged)
    assert word(file.content, l1) == COPIED | 1 << 62 | l2
    assert result.corruptions == 1
    assert "reserved bits" in result.problems[0]


def test_a_name_for_terminals_is_escaped_in_errors():
    raw = made()
    snapshot = SnapshotEntry(l1_at=HostAt(512), l1_entries=1, id=b"1", name=b"\x1b[2J\xe8")
    damaged = with_words(raw, (60, ">I", 1), (64, ">Q", len(raw)), (72, ">Q", 1)) + snapshot.encode()
    with pytest.raises(UsageError) as caught:
        repaired(damaged)
    assert "'\\x1b[2J\N{REPLACEMENT CHARACTER}'" in str(caught.value)
    assert all(line.isprintable() for line in checked(damaged).problems)


def put(content, at, part):
    content.extend(bytes(max(0, at + len(part) - len(content))))
    content[at : at + len(part)] = part


def harm(result):
    """How many corruptions are more than a COPIED flag that could be set and is not: that only costs time."""
    missing = [line for line in result.problems if "OFLAG_COPIED" in line and line.endswith("refcount=1")]
    return result.corruptions - len(missing)


@pytest.mark.parametrize("repair", [repair_image, repair_leaks])
@pytest.mark.parametrize("case", [*CASES, "shared, COPIED missing"])
def test_a_crash_during_repair_makes_nothing_worse(case, repair):
    rng = random.Random(3)
    raw = made()
    before = with_words(raw, *(damages(raw) | leaks(raw))[case])
    worst = harm(checked(before))
    file, result = repaired(before, repair)
    durable, pending = bytearray(before), []
    for change in file.log:
        if change[0] == "flush":
            for at, part in pending:
                put(durable, at, part)
            pending = []
            continue
        pending += [(change[1] + cut, change[2][cut : cut + 512]) for cut in range(0, len(change[2]), 512)]
        torn = bytearray(durable)
        for at, part in pending:
            if rng.random() < 0.5:
                put(torn, at, part)
        assert harm(checked(torn)) <= worst
    assert not pending
    assert bytes(durable) == bytes(file.content)
    assert checked(durable).members() == result.members()
    assert result.is_clean or repair is repair_leaks


def leaks(raw):
    """Leaks, and what may stand beside them: pokes for an image with one L2 table and one refcount block."""
    l1 = word(raw, 40)
    l2, block = word(raw, l1) & OFFSET, word(raw, word(raw, 48)) & OFFSET
    entry = word(raw, l2)
    leak = (block + 2 * 30, ">H", 3)  # of a cluster that one entry refers to
    return {
        "leak": [leak],
        "shared, COPIED missing": [(block + 2 * 5, ">H", 2), (l2, ">Q", entry & ~COPIED)],
        "leak and wrong flag": [leak, (l2, ">Q", entry & ~COPIED)],
        "leak and flag of L1": [leak, (l1, ">Q", l2)],
        "leak and reserved bit": [leak, (l2 + 8, ">Q", word(raw, l2 + 8) | 2)],
        "leak and entry beyond": [leak, (l2, ">Q", COPIED | 1 << 40)],
        "leak, dirty": [leak, (72, ">Q", 1)],
        "leak, marked corrupt": [leak, (72, ">Q", 2)],
        "wrong flag": [(l2, ">Q", entry & ~COPIED)],
        "past the end": [leak, (block + 2 * 300, ">H", 1)],
    }


@pytest.mark.qemu
@pytest.mark.parametrize("case", leaks(made()))
def test_leaks_alone_are_repaired_as_qemu_does(tmp_path, case):
    raw = made()
    damaged = with_words(raw, *leaks(raw)[case])
    (tmp_path / "t.qcow2").write_bytes(damaged)
    subprocess.run(["qemu-img", "check", "-r", "leaks", "t.qcow2"], cwd=tmp_path, capture_output=True, check=False)
    file, result = repaired(damaged, repair_leaks)
    assert bytes(file.content) == (tmp_path / "t.qcow2").read_bytes()
    assert result.leaks == 0


def test_leaks_are_repaired_beside_references_that_lack_their_refcount():
    raw = made()
    block = word(raw, word(raw, 48)) & OFFSET
    damaged = with_words(raw, *leaks(raw)["leak"], (block + 2 * 8, ">H", 0))
    file, result = repaired(damaged, repair_leaks)
    assert bytes(file.content) == with_words(raw, (block + 2 * 8, ">H", 0))
    assert (result.leaks, result.corruptions) == (0, 2)


def test_a_refcount_block_that_is_also_data_is_not_written():
    raw = made()
    l2, block = word(raw, word(raw, 40)) & OFFSET, word(raw, word(raw, 48)) & OFFSET
    damaged = with_words(raw, *leaks(raw)["leak"], (l2, ">Q", COPIED | block))
    file, result = repaired(damaged, repair_leaks)
    assert bytes(file.content) == damaged
    assert result.leaks > 0


@pytest.mark.qemu
@pytest.mark.parametrize("options", ["", "-o cluster_size=4k,refcount_bits=8", "-o extended_l2=on"])
def test_qemu_finds_nothing_and_the_same_content_afterwards(tmp_path, options):
    def run(*command):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    run(*f"qemu-img create -q -f qcow2 {options} t.qcow2 8M".split())
    run("qemu-io", "-c", "write -P 1 0 1M", "-c", "write -P 2 3M 64k", "t.qcow2")
    run("qemu-img", "snapshot", "-c", "one", "t.qcow2")
    run("qemu-io", "-c", "write -P 3 100k 300k", "-c", "write -P 4 6M 64k", "t.qcow2")
    run("qemu-img", "bitmap", "--add", "t.qcow2", "b0")
    raw = (tmp_path / "t.qcow2").read_bytes()
    block = word(raw, word(raw, 48))
    damaged = bytearray(with_words(raw, (72, ">Q", word(raw, 72) | 1)))
    damaged[block : block + 60] = bytes(60)
    file, result = repaired(bytes(damaged))
    assert result.is_clean
    (tmp_path / "fixed.qcow2").write_bytes(file.content)
    run("qemu-img", "check", "fixed.qcow2")
    for snapshot in ([], ["-l", "one"]):
        for name in ("t", "fixed"):
            run("qemu-img", "convert", *snapshot, "-O", "raw", f"{name}.qcow2", f"{name}.raw")
        assert (tmp_path / "t.raw").read_bytes() == (tmp_path / "fixed.raw").read_bytes()
