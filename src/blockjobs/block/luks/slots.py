"""Key slots, activated and erased: what `x-blockdev-amend` can change of a LUKS header (spec/jobs.md §6).

Checks and texts are those of QEMU's storage daemon (probed). The last slot that opens the disk stays, unless the user
forces it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from blockjobs.base.errors import UsageError
from blockjobs.block.amend_options import (
    LuksAmendOptions,
    QCryptoBlockAmendOptionsLuks,
    QCryptoBlockLUKSKeyslotState,
)
from blockjobs.block.driver import Child
from blockjobs.block.luks import volume
from blockjobs.block.luks.volume import Means
from blockjobs.wire.luks import SLOTS, KeySlot, LuksHeader

SlotOptions = LuksAmendOptions | QCryptoBlockAmendOptionsLuks


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """A header whose slots are to be changed, and what that needs.

    Attributes:
        file: the node that has it, at `at`.
        objects: secrets by id.
        key_secret: id of the secret that the disk was opened with.
        force: slots in use may be overwritten, and the last one erased.
    """

    file: Child
    at: int
    objects: Mapping[str, object]
    key_secret: str | None
    means: Means
    force: bool

    async def amend(self, header: LuksHeader, options: SlotOptions) -> LuksHeader:
        """Do what the options say; returns the header then.

        Raises:
            UsageError: in QEMU's words; nothing changed.
            IoFailure: each slot is what it was, or what it was to be, or inactive; there is a key, perhaps the new one
                in a slot more.
        Waits: I/O, and seconds of work in workers. Checkpoint: no.
        """
        if options.state is QCryptoBlockLUKSKeyslotState.ACTIVE:
            return await self._activate(header, options)
        return await self._erase(header, options)

    async def _activate(self, header: LuksHeader, options: SlotOptions) -> LuksHeader:
        if options.new_secret is None:
            raise UsageError("'new-secret' is required to activate a keyslot")
        if options.old_secret is not None:
            raise UsageError("'old-secret' must not be given when activating keyslots")
        number = self._slot_to_fill(header, options)
        new = volume.secret_of(self.objects, options.new_secret, "new-secret")
        old = volume.secret_of(self.objects, options.secret or self.key_secret, "secret")
        key = await volume.unlock(self.file, self.at, header, old, self.means)
        time_ms = options.iter_time or volume.ITER_TIME_MS
        slot, material = await volume.make_slot(header, number, key, new, time_ms, self.means)
        if header.slots[number].is_active:
            return await self._replace(header, number, slot, material)
        await volume.write_slot(self.file, self.at, header, number, slot, material)
        return header.with_slot(number, slot)

    async def _replace(self, header: LuksHeader, number: int, slot: KeySlot, material: bytes) -> LuksHeader:
        """Overwrite an active slot. If it is the only one, the new key is in another one too while none is in it."""
        spare = None
        if sum(each.is_active for each in header.slots) == 1:
            spare = next(other for other, each in enumerate(header.slots) if not each.is_active)
            copy = slot._replace(material_sector=header.slots[spare].material_sector)
            await volume.write_slot(self.file, self.at, header, spare, copy, material)
            header = header.with_slot(spare, copy)
        for_old, for_spare = self.means.random(len(material)), self.means.random(len(material))
        header = await volume.erase_slot(self.file, self.at, header, number, for_old)
        await volume.write_slot(self.file, self.at, header, number, slot, material)
        header = header.with_slot(number, slot)
        return header if spare is None else await volume.erase_slot(self.file, self.at, header, spare, for_spare)

    def _slot_to_fill(self, header: LuksHeader, options: SlotOptions) -> int:
        if options.keyslot is not None:
            number = _checked(options.keyslot)
            if header.slots[number].is_active and not self.force:
                raise UsageError(f"Refusing to overwrite active keyslot {number} - please erase it first")
            return number
        for number, slot in enumerate(header.slots):
            if not slot.is_active:
                return number
        raise UsageError("Can't add a keyslot - all keyslots are in use")

    async def _erase(self, header: LuksHeader, options: SlotOptions) -> LuksHeader:
        if options.new_secret is not None:
            raise UsageError("'new-secret' must not be given when erasing keyslots")
        if options.iter_time is not None:
            raise UsageError("'iter-time' must not be given when erasing keyslots")
        old = None if options.old_secret is None else volume.secret_of(self.objects, options.old_secret, "old-secret")
        active = [number for number, slot in enumerate(header.slots) if slot.is_active]
        if options.keyslot is not None:
            chosen = [await self._slot_to_erase(header, _checked(options.keyslot), old, active)]
        elif old is not None:
            chosen = [number for number in active if await self._opens(header, number, old)]
            if not chosen:
                raise UsageError("No keyslots match given (old) password for erase operation")
            if chosen == active and not self.force:
                raise UsageError(
                    "All the active keyslots match the (old) password that was given and erasing them will "
                    "erase all the data in the image irreversibly - refusing operation"
                )
        else:
            raise UsageError(
                "To erase keyslot(s), either explicit keyslot index or the password currently contained in them "
                "must be given"
            )
        for number in chosen:
            noise = self.means.random(header.material_bytes)
            header = await volume.erase_slot(self.file, self.at, header, number, noise)
        return header

    async def _slot_to_erase(self, header: LuksHeader, number: int, old: bytes | None, active: list[int]) -> int:
        if old is not None and not (number in active and await self._opens(header, number, old)):
            raise UsageError(f"Given keyslot {number} doesn't contain the given old password for erase operation")
        if number not in active:
            raise UsageError(f"Given keyslot {number} is already erased (inactive) ")
        if active == [number] and not self.force:
            raise UsageError(
                f"Attempt to erase the only active keyslot {number} which will erase all the data in the image "
                "irreversibly - refusing operation"
            )
        return number

    async def _opens(self, header: LuksHeader, number: int, passphrase: bytes) -> bool:
        return await volume.open_slot(self.file, self.at, header, number, passphrase, self.means) is not None


def _checked(number: int) -> int:
    if not 0 <= number < SLOTS:
        raise UsageError(f"Invalid keyslot {number % (1 << 32)} specified, must be between 0 and {SLOTS - 1}")
    return number
