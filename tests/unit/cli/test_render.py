"""Text for people."""

from blockjobs.cli.image_opts import Image
from blockjobs.cli.render import check_lines, compare_lines, info_text, jobs_table, printable
from blockjobs.cli.serve import node_names


def test_names_from_images_cannot_speak_to_the_terminal() -> None:
    assert printable("a\x1b[2Jb\nc") == "a\\x1b[2Jb\\nc"
    assert printable("größe") == "größe"


def test_info_has_the_words_of_qemu_img() -> None:
    image = {
        "filename": "a.qcow2",
        "format": "qcow2",
        "virtual-size": 1536 << 20,
        "actual-size": 335872,
        "cluster-size": 65536,
        "dirty-flag": True,
        "backing-filename": "b\x1b.qcow2",
        "full-backing-filename": "dir/b\x1b.qcow2",
        "backing-filename-format": "qcow2",
        "snapshots": [
            {
                "id": "1",
                "name": "before",
                "vm-state-size": 0,
                "date-sec": 0,
                "date-nsec": 0,
                "vm-clock-sec": 3725,
                "vm-clock-nsec": 1_000_000,
            }
        ],
        "format-specific": {
            "type": "qcow2",
            "data": {
                "compat": "1.1",
                "lazy-refcounts": False,
                "refcount-bits": 16,
                "bitmaps": [{"name": "daily", "granularity": 65536, "flags": ["auto"]}],
            },
        },
    }
    lines = info_text(image).splitlines()
    for line in (
        "virtual size: 1.5 GiB (1610612736 bytes)",
        "disk size: 328 KiB",
        "cleanly shut down: no",
        "backing file: b\\x1b.qcow2 (actual path: dir/b\\x1b.qcow2)",
        "    refcount bits: 16",
        "    lazy refcounts: false",
        "            name: daily",
        "                [0]: auto",
        "            granularity: 65536",
    ):
        assert line in lines
    assert any("before" in line and "01:02:05.001" in line for line in lines)


def test_verdicts_of_compare() -> None:
    assert compare_lines(None, None, same_size=True, strict=False) == ["Images are identical."]
    assert compare_lines(512, None, same_size=False, strict=False) == [
        "Warning: Image size mismatch!",
        "Content mismatch at offset 512!",
    ]
    assert compare_lines(None, None, same_size=False, strict=True) == ["Strict mode: Image size mismatch!"]


def test_check_tells_leaks_from_damage() -> None:
    clean = check_lines({"check-errors": 0, "total-clusters": 4, "allocated-clusters": 1, "image-end-offset": 9})
    assert clean[0] == "No errors were found on the image."
    assert clean[1].startswith("1/4 = 25.00% allocated, 0.00% fragmented")
    text = "\n".join(check_lines({"check-errors": 1, "leaks": 2, "corruptions": 3, "image-end-offset": 9}))
    for part in ("3 errors were found", "2 leaked clusters", "1 internal errors"):
        assert part in text


def test_a_table_of_jobs() -> None:
    assert jobs_table([]) == "no jobs"
    plain = {"id": "make", "type": "create", "status": "concluded", "current-progress": 1, "total-progress": 1}
    block = {"device": "b", "speed": 1 << 20, "io-status": "nospace"}
    failed = {**plain, "id": "b", "type": "backup", "total-progress": 4 << 20, "error": "oh\x1b", "block-job": block}
    header, first, second = jobs_table([plain, failed]).splitlines()
    assert header.split() == ["ID", "TYPE", "STATUS", "PROGRESS", "SPEED", "LIMIT", "ERROR"]
    assert first.split() == ["make", "create", "concluded", "100%", "-", "-"]
    assert "0% of 4 MiB" in second
    assert "1 MiB/s" in second
    assert "(I/O error)" in second
    assert second.endswith("oh\\x1b")


def test_nodes_are_named_like_their_files() -> None:
    paths = ["/a/disk.qcow2", "/b/disk.qcow2", "/a/my disk (old).img", "/a/2024.raw", "/a/" + "x" * 60, "/a/.qcow2"]
    names = node_names([Image(path, path, "raw") for path in paths])
    assert list(names) == paths
    assert list(names.values())[:4] == ["disk", "disk-2", "my-disk--old", "disk-2024"]
    assert all(len(name) <= 31 and name for name in names.values())
    assert len(set(names.values())) == len(paths)


def test_described_nodes_keep_their_names() -> None:
    named = Image("json:1", "/a/disk.qcow2", "qcow2", {"driver": "qcow2", "node-name": "drive0"})
    plain = Image("json:2", "/a/disk.qcow2", "qcow2", {"driver": "qcow2"})
    none = Image("json:3", "", "null-co", {"driver": "null-co"})
    assert list(node_names([named, plain, none]).values()) == ["drive0", "disk", "disk-2"]
