"""Where a server listens, as QMP's older commands write it: the members apart from the `type`, under `data`."""

from typing import TYPE_CHECKING, TypeAlias

from blockjobs.block.socket_address import (
    FdSocketAddress,
    InetSocketAddress,
    UnixSocketAddress,
    VsockSocketAddress,
)
from blockjobs.schema.types import Options
from blockjobs.schema.union import OpenUnion

AddressMembers: TypeAlias = InetSocketAddress | UnixSocketAddress | VsockSocketAddress | FdSocketAddress
"""Any address, in either form."""


class SocketAddressLegacy(Options, frozen=True, kw_only=True, tag_field="type"):
    """An address in QMP's older form."""

    @property
    def address(self) -> AddressMembers:
        """The address itself."""
        raise AssertionError(f"{type(self).__name__} has no address")


legacy_addresses = OpenUnion("SocketAddressLegacy", base=SocketAddressLegacy)
if TYPE_CHECKING:
    AnySocketAddressLegacy: TypeAlias = SocketAddressLegacy
else:
    AnySocketAddressLegacy = legacy_addresses.type


@legacy_addresses.add
class InetLegacy(SocketAddressLegacy, frozen=True, kw_only=True, tag="inet"):
    """See `InetSocketAddress`."""

    data: InetSocketAddress

    @property
    def address(self) -> AddressMembers:
        """See `SocketAddressLegacy`."""
        return self.data


@legacy_addresses.add
class UnixLegacy(SocketAddressLegacy, frozen=True, kw_only=True, tag="unix"):
    """See `UnixSocketAddress`."""

    data: UnixSocketAddress

    @property
    def address(self) -> AddressMembers:
        """See `SocketAddressLegacy`."""
        return self.data


@legacy_addresses.add
class VsockLegacy(SocketAddressLegacy, frozen=True, kw_only=True, tag="vsock"):
    """See `VsockSocketAddress`."""

    data: VsockSocketAddress

    @property
    def address(self) -> AddressMembers:
        """See `SocketAddressLegacy`."""
        return self.data


@legacy_addresses.add
class FdLegacy(SocketAddressLegacy, frozen=True, kw_only=True, tag="fd"):
    """See `FdSocketAddress`."""

    data: FdSocketAddress

    @property
    def address(self) -> AddressMembers:
        """See `SocketAddressLegacy`."""
        return self.data
