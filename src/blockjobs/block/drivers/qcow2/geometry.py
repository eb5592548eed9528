"""The sizes of one image that follow from its header and never change while it is open."""

from typing import Self

from msgspec import Struct

from blockjobs.wire.qcow2 import Header


class Geometry(Struct, frozen=True, kw_only=True):
    """Plain numbers, so that inner loops need no properties.

    Attributes:
        name: the node's name, for messages.
        entry_words: 64-bit words of an L2 entry: 1, or 2 with extended entries (subclusters).
        l2_entries: entries of one L2 table.
        l2_span: guest bytes that one L2 table maps.
        subcluster_size: bytes of the unit that may be allocated alone; the cluster where there are no subclusters.
        refcounts_per_block: clusters that one refcount block counts.
        refcount_max: the largest count that fits.
        has_data_file: guest bytes are in the child `data-file`, at their guest offset, without refcounts.
        is_data_file_raw: that file alone shows the whole disk, so zeroes must really be in it.
    """

    name: str
    version: int
    cluster_bits: int
    cluster_size: int
    is_extended: bool
    entry_words: int
    l2_entries: int
    l2_span: int
    subcluster_size: int
    refcount_bits: int
    refcounts_per_block: int
    refcount_max: int
    has_data_file: bool
    is_data_file_raw: bool

    @classmethod
    def of(cls, header: Header, name: str) -> Self:
        """Read them from a checked header."""
        return cls(
            name=name,
            version=header.version,
            cluster_bits=header.cluster_bits,
            cluster_size=header.cluster_size,
            is_extended=header.has_extended_l2,
            entry_words=2 if header.has_extended_l2 else 1,
            l2_entries=header.l2_entries,
            l2_span=header.l2_span,
            subcluster_size=header.subcluster_size,
            refcount_bits=header.refcount_bits,
            refcounts_per_block=header.refcounts_per_block,
            refcount_max=(1 << header.refcount_bits) - 1,
            has_data_file=header.has_data_file,
            is_data_file_raw=header.is_data_file_raw,
        )

    @property
    def data_child(self) -> str:
        """Edge of the child that guest bytes are in."""
        return "data-file" if self.has_data_file else "file"
