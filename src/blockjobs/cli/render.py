"""What people read: the same facts in the words and the order of qemu-img's output, so that old habits work."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

from blockjobs.base.text import printable
from blockjobs.base.units import format_bytes

SECTOR: Final = 512

_SPECIFIC = (
    "compat",
    "compression-type",
    "lazy-refcounts",
    "bitmaps",
    "refcount-bits",
    "encrypt",
    "data-file",
    "data-file-raw",
    "corrupt",
    "extended-l2",
)
_CIPHER = ("ivgen-alg", "detached-header", "hash-alg", "cipher-alg", "uuid", "format", "cipher-mode", "slots")
_BITMAP = ("flags", "name", "granularity")
_SLOT = ("active", "iters", "key-offset", "stripes")
_ORDER = {name: at for at, name in enumerate((*_SPECIFIC, *_CIPHER, *_BITMAP, *_SLOT))}
"""The order of qemu-img's text; what is not in it comes last."""


def info_text(image: dict[str, Any]) -> str:
    """An `ImageInfo` (as JSON has it) for people."""
    size = image["virtual-size"]
    lines = [
        f"image: {printable(image['filename'])}",
        f"file format: {image['format']}",
        f"virtual size: {format_bytes(size)} ({size} bytes)",
        f"disk size: {format_bytes(image['actual-size']) if 'actual-size' in image else 'unavailable'}",
    ]
    if image.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in image:
        lines.append(f"cluster_size: {image['cluster-size']}")
    if image.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    if "backing-filename" in image:
        name, full = image["backing-filename"], image.get("full-backing-filename", image["backing-filename"])
        actual = f" (actual path: {printable(full)})" if full != name else ""
        lines.append(f"backing file: {printable(name)}{actual}")
        if "backing-filename-format" in image:
            lines.append(f"backing file format: {printable(image['backing-filename-format'])}")
    if image.get("snapshots"):
        lines.append("Snapshot list:")
        lines.extend(snapshot_lines(image["snapshots"]))
    specific = image.get("format-specific", {}).get("data", {})
    if specific:
        lines.append("Format specific information:")
        lines.extend(_described(specific, "    "))
    return "\n".join(lines)


def _described(value: dict[str, Any] | list[Any], indent: str) -> Iterator[str]:
    """Members and elements of any depth, one a line."""
    if isinstance(value, list):
        items = [(f"[{index}]", item) for index, item in enumerate(value)]
    else:
        names = sorted(value, key=lambda name: _ORDER.get(name, len(_ORDER)))
        items = [(name.replace("-", " "), value[name]) for name in names]
    for label, item in items:
        if isinstance(item, dict | list):
            yield f"{indent}{label}:"
            yield from _described(item, indent + "    ")
        elif item is not None:
            yield f"{indent}{label}: {_plain(item)}"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else printable(str(value))


def snapshot_lines(snapshots: list[dict[str, Any]]) -> list[str]:
    """A table of members of SnapshotInfo, as `qemu-img snapshot -l` has it."""
    lines = [f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"]
    for each in snapshots:
        date = datetime.fromtimestamp(each["date-sec"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        minutes, seconds = divmod(each["vm-clock-sec"], 60)
        clock = f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}.{each['vm-clock-nsec'] // 1_000_000:03d}"
        size, name = format_bytes(each["vm-state-size"]), printable(each["name"])
        count = each.get("icount")
        shown = "" if count is None else count
        lines.append(f"{printable(each['id']):<9} {name:<16} {size:>8}{date:>20}{clock:>13}{shown:>11}")
    return lines


def compare_lines(found: int | None, status: int | None, *, same_size: bool, strict: bool) -> list[str]:
    """The verdict of a comparison.

    Args:
        found: the first byte that differs; qemu-img tells the sector that it is in.
        status: where one image is stored in another way than the other, which only `strict` minds.
    """
    if strict and not same_size:
        return ["Strict mode: Image size mismatch!"]
    if status is not None:
        return [f"Strict mode: Offset {status} block status mismatch!"]
    lines = [] if same_size else ["Warning: Image size mismatch!"]
    lines.append("Images are identical." if found is None else f"Content mismatch at offset {found - found % SECTOR}!")
    return lines


def jobs_table(jobs: list[dict[str, Any]]) -> str:
    """Jobs as `query-jobs` and `query-block-jobs` tell them, one a line."""
    if not jobs:
        return "no jobs"
    rows = [("ID", "TYPE", "STATUS", "PROGRESS", "SPEED LIMIT", "ERROR")]
    for job in jobs:
        done, total = job["current-progress"], job["total-progress"]
        percent = f"{100 * done // total}%" if total else "-"
        block_job = job.get("block-job", {})
        limit = f"{format_bytes(block_job['speed'])}/s" if block_job.get("speed") else "-"
        status = job["status"]
        if block_job.get("io-status", "ok") != "ok":
            status = f"{status} (I/O error)"
        if block_job:
            percent = f"{percent} of {format_bytes(total)}"
        rows.append((printable(job["id"]), job["type"], status, percent, limit, printable(job.get("error") or "-")))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def check_lines(found: dict[str, Any]) -> list[str]:
    """An `ImageCheck` (as JSON has it) for people."""
    corruptions, leaks, errors = found.get("corruptions", 0), found.get("leaks", 0), found["check-errors"]
    lines = []
    if "leaks-fixed" in found or "corruptions-fixed" in found:
        lines.append("The following inconsistencies were found and repaired:\n")
        lines.append(f"    {found.get('leaks-fixed', 0)} leaked clusters")
        lines.append(f"    {found.get('corruptions-fixed', 0)} corruptions\n")
        lines.append("Double checking the fixed image now...")
    if not (corruptions or leaks or errors):
        lines.append("No errors were found on the image.")
    if corruptions:
        lines.append(f"\n{corruptions} errors were found on the image.")
        lines.append("Data may be corrupted, or further writes to the image may corrupt it.")
    if leaks:
        lines.append(f"\n{leaks} leaked clusters were found on the image.")
        lines.append("This means waste of disk space, but no harm to data.")
    if errors:
        lines.append(f"\n{errors} internal errors have occurred during the check.")
    total, allocated = found.get("total-clusters", 0), found.get("allocated-clusters", 0)
    if total and allocated:
        fragmented, compressed = found.get("fragmented-clusters", 0), found.get("compressed-clusters", 0)
        lines.append(
            f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, "
            f"{100 * fragmented / allocated:.2f}% fragmented, {100 * compressed / allocated:.2f}% compressed clusters"
        )
    lines.append(f"Image end offset: {found['image-end-offset']}")
    return lines
