"""Encryption inside qcow2.

LUKS: its header has clusters of its own, and tweaks count from the place in the file. The old kind, AES in CBC mode:
the passphrase itself is the key, and IVs count from the place on the disk; nothing in the file tells a wrong key.
"""

from dataclasses import dataclass
from typing import Final

from blockjobs.block.amend_options import QCryptoBlockAmendOptionsLuks
from blockjobs.block.driver import Child, OpenContext
from blockjobs.block.drivers.qcow2.options import Qcow2Options
from blockjobs.block.encipherment import Encipherment
from blockjobs.block.luks import volume
from blockjobs.block.luks.cipher import DiskCipher
from blockjobs.block.luks.slots import Keys
from blockjobs.block.luks.volume import Means
from blockjobs.wire.luks import LuksHeader
from blockjobs.wire.qcow2 import Header, HostAt

OLD_KEY_BYTES: Final = 16
"""Of the old encryption: a longer passphrase is cut off, a shorter one followed by zeroes."""


@dataclass(slots=True, kw_only=True)
class Volume:
    """LUKS of an open image.

    Attributes:
        at: where the LUKS header lies.
        header: what it says; key slots may change.
        context, key_secret: what it was opened with.
        encipherment: None if only headers are looked at.
    """

    at: HostAt
    header: LuksHeader
    context: OpenContext
    key_secret: str | None
    encipherment: Encipherment | None = None

    async def amend(self, file: Child, options: QCryptoBlockAmendOptionsLuks, *, force: bool) -> None:
        """Change key slots. Raises and waits: `Keys.amend`. Checkpoint: no."""
        context = self.context
        keys = Keys(
            file=file,
            at=self.at,
            objects=context.objects,
            key_secret=self.key_secret,
            means=Means(offload=context.offload, clock=context.clock, entropy=context.entropy),
            force=force,
        )
        self.header = await keys.amend(self.header, options)


async def open_volume(file: Child, header: Header, options: Qcow2Options, context: OpenContext) -> Volume:
    """Read the LUKS header of an image, and unlock it.

    Raises:
        UsageError: no such secret, the wrong one, or the header is broken.
        IoFailure: it could not be read.
    Waits: reads, and seconds of work in a worker. Checkpoint: no.
    """
    assert header.luks is not None
    at = header.luks.at
    passphrase = b""
    name = _key_secret(options)
    if not context.looks_only:
        passphrase = volume.secret_of(context.objects, name, "encrypt.key-secret")
    found = Volume(at=at, header=await volume.read_header(file, at), context=context, key_secret=name)
    if not context.looks_only:
        means = Means(offload=context.offload, clock=context.clock, entropy=context.entropy)
        key = await volume.unlock(file, at, found.header, passphrase, means)
        found.encipherment = Encipherment(DiskCipher(found.header.cipher, found.header.mode, key), 0)
    return found


def open_old(options: Qcow2Options, context: OpenContext) -> Encipherment | None:
    """The old encryption of an image; None if only headers are looked at.

    Raises:
        UsageError: no such secret.
    """
    if context.looks_only:
        return None
    passphrase = volume.secret_of(context.objects, _key_secret(options), "encrypt.key-secret")
    key = passphrase[:OLD_KEY_BYTES].ljust(OLD_KEY_BYTES, b"\0")
    return Encipherment(DiskCipher("aes", "cbc-plain64", key), None)


def _key_secret(options: Qcow2Options) -> str | None:
    return None if options.encrypt is None else options.encrypt.key_secret
