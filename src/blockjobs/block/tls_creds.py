"""TLS credentials, made by `object-add` and used by both sides of NBD: certificates or shared keys from a directory.

Files are read once, when the object is made, so that a mistake shows there and not at some handshake; the texts are
QEMU's where it is QEMU that would complain.
"""

import os
import re
import ssl
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final

from blockjobs.base.clock import Clock
from blockjobs.base.errors import UsageError, error_text
from blockjobs.block.objects import ObjectOptions, Secret, object_options
from blockjobs.schema.types import features

CREDENTIALS_BYTES_MAX: Final = 8 << 20  # a long list of authorities, never a disk given by mistake


class QCryptoTLSCredsEndpoint(StrEnum):
    """Which side of a connection the credentials are for."""

    CLIENT = "client"
    SERVER = "server"


class TlsCredentials(ABC):
    """Makes contexts for handshakes.

    Attributes:
        endpoint: the side that this is for.
        verify_peer: the peer must show a certificate that our authorities vouch for.
    """

    endpoint: QCryptoTLSCredsEndpoint
    verify_peer: bool

    @abstractmethod
    def server_context(self) -> ssl.SSLContext:
        """For accepting connections; only of credentials for a server."""

    @abstractmethod
    def client_context(self) -> ssl.SSLContext:
        """For connecting, with `server_hostname`; only of credentials for a client."""


def tls_credentials(objects: Mapping[str, object], name: str, endpoint: QCryptoTLSCredsEndpoint) -> TlsCredentials:
    """The credentials of that id.

    Raises:
        UsageError: there are none, or for the other side.
    """
    found = objects.get(name)
    if found is None:
        raise UsageError(f"No TLS credentials with id '{name}'")
    if not isinstance(found, TlsCredentials):
        raise UsageError(f"Object with id '{name}' is not TLS credentials")
    if found.endpoint is not endpoint:
        raise UsageError(f"Expected TLS credentials for a {endpoint} endpoint")
    return found


def peer_identity(connection: ssl.SSLObject | ssl.SSLSocket) -> str | None:
    """The name in the peer's certificate, for authorisation; None if it has shown none.

    Raises:
        UsageError: the name cannot be read.
    """
    from blockjobs.block import x509  # not earlier: most runs need neither certificates nor the library for them

    certificate = connection.getpeercert(binary_form=True)
    return None if certificate is None else x509.distinguished_name(certificate)


class TlsCredsOptions(ObjectOptions, frozen=True, kw_only=True):
    """What all credentials can be told."""

    verify_peer: bool = True
    dir: str | None = None
    endpoint: QCryptoTLSCredsEndpoint = QCryptoTLSCredsEndpoint.CLIENT
    priority: str | None = None
    loaded: Annotated[bool | None, features("deprecated")] = None

    def directory(self) -> str:
        """Where the files are.

        Raises:
            UsageError: not given.
        """
        if self.dir is None:
            raise UsageError("Missing 'dir' property value")
        return self.dir


class X509Credentials(TlsCredentials):
    """A certificate and its key, and the authorities that vouch for the peer's."""

    def __init__(self, context: ssl.SSLContext, endpoint: QCryptoTLSCredsEndpoint, *, verify_peer: bool) -> None:
        self.endpoint, self.verify_peer, self._context = endpoint, verify_peer, context

    def server_context(self) -> ssl.SSLContext:
        """See `TlsCredentials`."""
        assert self.endpoint is QCryptoTLSCredsEndpoint.SERVER
        return self._context

    def client_context(self) -> ssl.SSLContext:
        """See `TlsCredentials`."""
        assert self.endpoint is QCryptoTLSCredsEndpoint.CLIENT
        return self._context


@object_options.add
class TlsCredsX509Options(TlsCredsOptions, frozen=True, kw_only=True, tag="tls-creds-x509"):
    """Certificates: `ca-cert.pem`, `ca-crl.pem` (optional), `<endpoint>-cert.pem`, `<endpoint>-key.pem`.

    A client needs a certificate only for servers that ask for one.
    """

    sanity_check: bool = True
    passwordid: str | None = None

    def build(self, clock: Clock, objects: Mapping[str, object]) -> X509Credentials:
        """See `ObjectOptions.build`."""
        from blockjobs.block import x509

        directory, endpoint = self.directory(), self.endpoint
        is_server = endpoint is QCryptoTLSCredsEndpoint.SERVER
        authorities_path = f"{directory}/ca-cert.pem"
        authorities = _read(authorities_path)
        assert authorities is not None
        revoked = _read(f"{directory}/ca-crl.pem", optional=True)
        own_path, key_path = f"{directory}/{endpoint}-cert.pem", f"{directory}/{endpoint}-key.pem"
        own = _read(own_path, optional=not is_server)
        key = _read(key_path, optional=not is_server)
        password = self._password(objects)
        if self.sanity_check:
            now = datetime.fromtimestamp(clock.wall_ns() / 1e9, UTC)
            trusted = x509.check_authorities(authorities_path, authorities, now)
            if own is not None and not x509.is_vouched_for(x509.check_own(own_path, own, endpoint, now), trusted):
                raise UsageError(
                    f"Our own certificate {own_path} failed validation against {authorities_path}: "
                    "The certificate hasn't got a known issuer"
                )
        context = _context(endpoint, self.priority)
        context.check_hostname = not is_server and self.verify_peer
        context.verify_mode = ssl.CERT_REQUIRED if self.verify_peer else ssl.CERT_NONE
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        _load_authorities(context, authorities_path, authorities)
        if revoked is not None:
            _load_revoked(context, f"{directory}/ca-crl.pem")
        if own is not None and key is not None:
            _load_own(context, own_path, key_path, password, is_locked=b"ENCRYPTED" in key)
        return X509Credentials(context, endpoint, verify_peer=self.verify_peer)

    def _password(self, objects: Mapping[str, object]) -> bytes:
        if self.passwordid is None:
            return b""
        secret = objects.get(self.passwordid)
        if secret is None:
            raise UsageError(f"No secret with id '{self.passwordid}'")
        if not isinstance(secret, Secret):
            raise UsageError(f"Object with id '{self.passwordid}' is not a secret")
        return secret.content


def _read(path: str, *, optional: bool = False) -> bytes | None:
    """A file's content; None if it may be missing and is.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        # O_NONBLOCK: a FIFO without a writer must not hang the whole process.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if optional and isinstance(error, FileNotFoundError):
            return None
        raise UsageError(f"Unable to access credentials {path}: {error_text(error.errno or 0)}") from error
    with open(descriptor, "rb") as file:
        try:
            content = file.read(CREDENTIALS_BYTES_MAX + 1)
        except OSError as error:
            raise UsageError(f"Unable to access credentials {path}: {error_text(error.errno or 0)}") from error
    if len(content) > CREDENTIALS_BYTES_MAX:
        raise UsageError(f"Unable to access credentials {path}: they have at most {CREDENTIALS_BYTES_MAX} bytes")
    return content


def _load_authorities(context: ssl.SSLContext, path: str, content: bytes) -> None:
    try:
        context.load_verify_locations(cadata=content.decode("latin-1"))
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(f"Cannot load CA certificate '{path}': {_reason(error)}") from error


def _load_revoked(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot load CRL '{path}': {_reason(error)}") from error
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_own(context: ssl.SSLContext, own_path: str, key_path: str, password: bytes, *, is_locked: bool) -> None:
    try:
        # A callable: without one the library would ask for the password on the terminal.
        context.load_cert_chain(own_path, key_path, password=lambda: password)
    except (OSError, ValueError) as error:
        # The library does not tell a wrong password from a file that is no key.
        what = "Decryption has failed." if is_locked else _reason(error)
        raise UsageError(f"Cannot load certificate '{own_path}' & key '{key_path}': {what}") from error


def _reason(error: Exception) -> str:
    """One line, in GnuTLS's words where we know them."""
    if not isinstance(error, ssl.SSLError):
        return error_text(error.errno or 0) if isinstance(error, OSError) else str(error)
    if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
        return "The certificate and the given key do not match."
    return (error.reason or "Base64 decoding error.").replace("_", " ")


# --- shared keys


class PskCredentials(TlsCredentials):
    """A key that both sides know, found by the client's name."""

    verify_peer = False

    def __init__(
        self, keys: Mapping[str, bytes], username: str, endpoint: QCryptoTLSCredsEndpoint, priority: str | None
    ) -> None:
        self._keys, self._username, self.endpoint = keys, username, endpoint
        self._priority = priority

    def server_context(self) -> ssl.SSLContext:
        """See `TlsCredentials`."""
        context = self._context()
        context.set_psk_server_callback(  # type: ignore[attr-defined]  # from Python 3.13 on
            lambda identity: self._keys.get(identity or "", b"")
        )
        return context

    def client_context(self) -> ssl.SSLContext:
        """See `TlsCredentials`."""
        context = self._context()
        key = self._keys[self._username]
        context.set_psk_client_callback(lambda hint: (self._username, key))  # type: ignore[attr-defined]
        return context

    def _context(self) -> ssl.SSLContext:
        context = _context(self.endpoint, self._priority)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # the callbacks know nothing of TLS 1.3's binders
        context.set_ciphers("ECDHE-PSK:DHE-PSK:PSK")
        return context


@object_options.add
class TlsCredsPskOptions(TlsCredsOptions, frozen=True, kw_only=True, tag="tls-creds-psk"):
    """Shared keys: `keys.psk`, with lines `name:hexadecimal key`; a client uses the one of its `username`."""

    username: str | None = None

    def build(self, clock: Clock, objects: Mapping[str, object]) -> PskCredentials:
        """See `ObjectOptions.build`."""
        del clock, objects
        is_server = self.endpoint is QCryptoTLSCredsEndpoint.SERVER
        path = f"{self.directory()}/keys.psk"
        if is_server and self.username is not None:
            raise UsageError("username should not be set when endpoint=server")
        content = _read(path)
        assert content is not None
        keys = _psk_keys(path, content)
        username = self.username or "qemu"
        if not is_server and username not in keys:
            raise UsageError(f"Username {username} not found in PSK file {path}")
        if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
            raise UsageError("TLS with shared keys (tls-creds-psk) needs Python 3.13 or later")
        return PskCredentials(keys, username, self.endpoint, self.priority)


def _psk_keys(path: str, content: bytes) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, digits = line.rpartition(":")
        try:
            key = bytes.fromhex(digits.strip())
        except ValueError:
            key = b""
        if not separator or not key:
            raise UsageError(f"Cannot load PSK file '{path}': line {number} is no 'name:hexadecimal key'")
        keys[name] = key
    return keys


# --- priorities

_BASES: Final = ("NORMAL", "SECURE128", "SECURE192", "SECURE256", "PFS", "PERFORMANCE", "@SYSTEM")
_VERSIONS: Final = {"TLS1.2": ssl.TLSVersion.TLSv1_2, "TLS1.3": ssl.TLSVersion.TLSv1_3}


def _context(endpoint: QCryptoTLSCredsEndpoint, priority: str | None) -> ssl.SSLContext:
    """A fresh context for TLS 1.2 and later.

    Of GnuTLS's priority strings a base word and the choice of versions are understood (`NORMAL:-VERS-TLS1.3`); what
    else they say is about GnuTLS's own ciphers and refused.

    Raises:
        UsageError: the priority string says something that cannot be done here.
    """
    is_server = endpoint is QCryptoTLSCredsEndpoint.SERVER
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    versions = dict.fromkeys(_VERSIONS, True)
    base, *changes = (priority or "NORMAL").split(":")
    understood = base in _BASES
    for change in changes:
        match = re.fullmatch(r"([-+!])VERS-(?:ALL|TLS-ALL|(TLS1\.[0-3]))", change)
        if match is None:
            understood = False
            break
        for name in [match[2]] if match[2] else list(versions):
            versions[name] = match[1] == "+"
    allowed = [_VERSIONS[name] for name, wanted in versions.items() if wanted and name in _VERSIONS]
    if not understood or not allowed:
        raise UsageError(
            f"Unable to set TLS session priority {priority}: only {', '.join(_BASES)} and changes of versions "
            "such as ':-VERS-TLS1.3' are supported"
        )
    context.minimum_version, context.maximum_version = allowed[0], allowed[-1]
    return context
