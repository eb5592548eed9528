"""What `x-blockdev-amend` can change of an image (spec/jobs.md §6), and what a driver may ask meanwhile."""

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from blockjobs.schema.types import Options, Size
from blockjobs.schema.union import OpenUnion


class AmendOptions(Options, frozen=True, kw_only=True, tag_field="driver"):
    """The part that all formats have."""


class QCryptoBlockLUKSKeyslotState(StrEnum):
    """Whether a key slot opens the disk."""

    ACTIVE = "active"
    INACTIVE = "inactive"


class LuksAmendOptions(AmendOptions, frozen=True, kw_only=True, tag="luks"):
    """Key slots of a LUKS header.

    Attributes:
        state: what the slots are to be.
        new_secret: id of the secret with a new slot's passphrase.
        old_secret: id of a secret; the slots that it opens.
        keyslot: number of one slot, 0 to 7.
        iter_time: how long, in ms, it is to take to turn the new passphrase into a key.
        secret: id of a secret that opens the disk, if not the one that it was opened with.
    """

    state: QCryptoBlockLUKSKeyslotState
    new_secret: str | None = None
    old_secret: str | None = None
    keyslot: int | None = None
    iter_time: int | None = None
    secret: str | None = None


class QCryptoBlockAmendOptions(Options, frozen=True, kw_only=True, tag_field="format"):
    """Encryption of an image, by kind."""


encrypt_options = OpenUnion("QCryptoBlockAmendOptions", base=QCryptoBlockAmendOptions)
if TYPE_CHECKING:
    AnyEncryptOptions: TypeAlias = QCryptoBlockAmendOptions
else:
    AnyEncryptOptions = encrypt_options.type


@encrypt_options.add
class QCryptoBlockAmendOptionsQcow(QCryptoBlockAmendOptions, frozen=True, kw_only=True, tag="qcow"):
    """The old encryption, of which nothing can be changed."""


@encrypt_options.add
class QCryptoBlockAmendOptionsLuks(QCryptoBlockAmendOptions, frozen=True, kw_only=True, tag="luks"):
    """As `LuksAmendOptions`."""

    state: QCryptoBlockLUKSKeyslotState
    new_secret: str | None = None
    old_secret: str | None = None
    keyslot: int | None = None
    iter_time: int | None = None
    secret: str | None = None


class Qcow2AmendOptions(AmendOptions, frozen=True, kw_only=True, tag="qcow2"):
    """A qcow2 image. All but `encrypt` are ours; what they mean and refuse is as in `qemu-img amend`.

    Attributes:
        encrypt: key slots.
        version: v2 or v3.
        refcount_bits: width of a reference count.
        lazy_refcounts: counts may be behind while the image is open.
        backing_file: what the header names, "" for none. Nothing is copied: the disk may show something else then.
        backing_fmt: its format.
        size: virtual length in bytes; smaller ones need `force`.
        data_file: what the header names as the file that has the guest's bytes.
        data_file_raw: that file alone shows the disk; can only be given up.
    """

    encrypt: AnyEncryptOptions | None = None
    version: str | None = None
    refcount_bits: int | None = None
    lazy_refcounts: bool | None = None
    backing_file: str | None = None
    backing_fmt: str | None = None
    size: Size | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None


amend_options = OpenUnion("BlockdevAmendOptions", base=AmendOptions)
amend_options.add(LuksAmendOptions)
amend_options.add(Qcow2AmendOptions)

if TYPE_CHECKING:
    AnyAmendOptions: TypeAlias = AmendOptions
else:
    AnyAmendOptions = amend_options.type


class Amending(Struct, frozen=True, kw_only=True):
    """How a driver's `amend` speaks with whoever ordered it.

    Attributes:
        force: what loses data, or could lock its owner out, is wanted.
        expect: so many units of work more are to be done.
        advance: so many of them are done.
        checkpoint: waits while the work is to pause, and raises if it is not wanted any more; not called once the image
            has begun to show a change.
    """

    force: bool
    expect: Callable[[int], None]
    advance: Callable[[int], None]
    checkpoint: Callable[[], Awaitable[None]]
