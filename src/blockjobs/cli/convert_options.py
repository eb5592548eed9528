"""What `blockjobs convert` can be told: qemu-img's options."""

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from cyclopts import Parameter

from blockjobs.base.errors import UsageError
from blockjobs.cli.arguments import CacheMode, Format, ImageRoots, Options, Size, SourceFormat, Switch, TargetFormat

COROUTINES_MAX: Final = 16
SPARSE_BYTES_MAX: Final = 16 << 20
SECTOR: Final = 512


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Converting:
    """How images become another.

    Attributes:
        format: format of the sources; without it, name and content must agree on one.
        target_format: format of the target; by default what its suffix says, else qcow2.
        options: options of the target, as qemu-img has them (cluster_size=128K,...).
        compress: store compressed clusters, of the kind that -o compression_type= says; all cores work.
        level: how hard to compress.
        backing: make an overlay of this image; only what SOURCE itself holds, without its backing files, is copied.
        backing_format: its format.
        snapshot: copy the disk as it was when that snapshot inside SOURCE was made: its name or number.
        image_opts: each SOURCE is no path but the options of a node: driver=qcow2,file.filename=a.qcow2,...
        target_image_opts: TARGET is; goes with -n.
        in_place: write into TARGET as it is, which must be there and large enough.
        sparse: 0 copies zeroes that are stored as bytes; anything else leaves them out, in units of 64 KiB or of the
            target's clusters.
        target_is_zero: accepted with -n; zeroes are written only where TARGET is not known to read so.
        bitmaps: copy the dirty bitmaps too.
        skip_broken_bitmaps: but not those that nobody can trust.
        force_share: a source may be in use by a writer.
        cache: none and directsync write around the page cache; unsafe does not wait until the image is on disk (the
            default of qemu-img, not ours).
        source_cache: none and directsync read around it.
        rate: at most so many bytes a second (100M); 0 is no limit.
        coroutines: accepted; how much is done at once depends on the machine.
        out_of_order: accepted; it is always so.
        copy_range: accepted; the kernel copies wherever it can.
        progress: show a bar.
        quiet: no bar.
        salvage: sectors of SOURCE that cannot be read become zeroes, with a warning for each.
        image_root: a folder besides the sources' own in which backing files may be.
    """

    format: SourceFormat = None
    target_format: TargetFormat = None
    options: Options = None
    compress: Annotated[Switch, Parameter(name=("-c", "--compress"))] = False
    level: Literal["fast", "default", "best"] = "default"
    backing: Annotated[str | None, Parameter(name=("-B", "--backing"))] = None
    backing_format: Annotated[Format | None, Parameter(name=("-F", "--backing-format"))] = None
    snapshot: Annotated[str | None, Parameter(name=("-l", "--snapshot"))] = None
    image_opts: Switch = False
    target_image_opts: Switch = False
    in_place: Annotated[Switch, Parameter(name="-n")] = False
    sparse: Annotated[Size | None, Parameter(name="-S")] = None
    target_is_zero: Switch = False
    bitmaps: Switch = False
    skip_broken_bitmaps: Switch = False
    force_share: Annotated[Switch, Parameter(name=("-U", "--force-share"))] = False
    cache: Annotated[CacheMode, Parameter(name="-t")] = "writeback"
    source_cache: Annotated[CacheMode, Parameter(name="-T")] = "writeback"
    rate: Annotated[Size, Parameter(name=("-r", "--rate"))] = 0
    coroutines: Annotated[int, Parameter(name="-m")] = 16
    out_of_order: Annotated[Switch, Parameter(name="-W")] = False
    copy_range: Annotated[Switch, Parameter(name="-C")] = False
    progress: Annotated[Switch, Parameter(name=("-p", "--progress"))] = False
    quiet: Annotated[Switch, Parameter(name=("-q", "--quiet"))] = False
    salvage: Switch = False
    image_root: ImageRoots = None

    def demand_sense(self, sources: int, target_format: str) -> None:
        """Refuse what contradicts itself, before anything is opened.

        Raises:
            UsageError: naming the options.
        """
        if self.salvage and self.copy_range:
            raise UsageError("Cannot use copy offloading in salvaging mode")
        if not 1 <= self.coroutines <= COROUTINES_MAX:
            raise UsageError(
                f"-m: Invalid number of coroutines. Allowed number of coroutines is between 1 and {COROUTINES_MAX}"
            )
        if self.sparse is not None and (self.sparse % SECTOR or self.sparse > SPARSE_BYTES_MAX):
            raise UsageError(
                "-S: Invalid buffer size for sparse output specified. Valid sizes are multiples of "
                f"{SECTOR} up to {SPARSE_BYTES_MAX}. Select 0 to disable sparse detection"
            )
        if self.copy_range and self.sparse is not None:
            raise UsageError("Cannot enable copy offloading when -S is used")
        if self.copy_range and self.compress:
            raise UsageError("Cannot enable copy offloading when -c is used")
        needs_qcow2 = {
            "-c": (self.compress, "be compressed"),
            "-B": (self.backing is not None, "have a backing file"),
            "--bitmaps": (self.bitmaps, "hold bitmaps"),
        }
        for option, (is_given, what) in needs_qcow2.items():
            if is_given and target_format != "qcow2":
                raise UsageError(f"{option}: {target_format} images cannot {what}: add -O qcow2")
        if self.backing is not None and self.backing_format is None:
            raise UsageError("-B needs the backing file's format: add -F qcow2 or -F raw")
        if self.backing is None and self.backing_format is not None:
            raise UsageError("-F goes with -B: Backing format cannot be used without backing file")
        if self.backing is not None and sources > 1:
            raise UsageError("-B: the new image can only be an overlay of one disk, and there are several")
        if self.bitmaps and sources > 1:
            raise UsageError("--bitmaps: copying bitmaps from several images into one is not possible")
        if self.skip_broken_bitmaps and not self.bitmaps:
            raise UsageError("--skip-broken-bitmaps goes with --bitmaps")
        if self.target_is_zero and not self.in_place:
            raise UsageError("--target-is-zero requires use of -n flag")
        if self.target_image_opts and not self.in_place:
            raise UsageError("--target-image-opts requires use of -n flag: the target must be there already")
        if self.snapshot is not None and sources > 1:
            raise UsageError("-l: No support for concatenating multiple snapshot")
        if self.bitmaps and self.snapshot is not None:
            raise UsageError("--bitmaps: those of the disk as it is say nothing about a snapshot (-l)")
        if self.in_place and self.options:
            raise UsageError("-n: the target is there already, so it takes no options (-o)")


DEFAULT_CONVERTING: Final = Converting()
