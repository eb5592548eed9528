"""What must be known of X.509 certificates before TLS begins: whether they can do their duty, and whose they are.

Peers are checked by the TLS library itself; here are the mistakes an operator makes with his own files (an expired
certificate, a client's in a server's place), found when the credentials are made instead of at each handshake. The
texts are QEMU's.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID

from blockjobs.base.errors import UsageError

_ATTRIBUTES: Final = {
    "0.9.2342.19200300.100.1.1": "UID",
    "0.9.2342.19200300.100.1.25": "DC",
    "1.2.840.113549.1.9.1": "EMAIL",
    "1.3.6.1.4.1.311.60.2.1.1": "jurisdictionOfIncorporationLocalityName",
    "1.3.6.1.4.1.311.60.2.1.2": "jurisdictionOfIncorporationStateOrProvinceName",
    "1.3.6.1.4.1.311.60.2.1.3": "jurisdictionOfIncorporationCountryName",
    "2.5.4.3": "CN",
    "2.5.4.4": "surName",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "street",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.12": "title",
    "2.5.4.15": "businessCategory",
    "2.5.4.17": "postalCode",
    "2.5.4.42": "givenName",
    "2.5.4.43": "initials",
    "2.5.4.44": "generationQualifier",
    "2.5.4.46": "dnQualifier",
    "2.5.4.65": "pseudonym",
}
_ESCAPED: Final = str.maketrans({character: "\\" + character for character in '\\,+"<>;'})


def distinguished_name(certificate: bytes) -> str:
    r"""Whom a certificate (DER) names, as QEMU spells it for authorisation: `C=GB,O=Example\\, Inc,CN=laptop`.

    The parts stand in the certificate's own order. Attributes without a short name are `1.2.3=#<hex of the DER>`.

    Raises:
        UsageError: this is no certificate.
    """
    try:
        subject = x509.load_der_x509_certificate(certificate).subject
        return ",".join("+".join(map(_attribute, part)) for part in subject.rdns)
    except ValueError as error:
        raise UsageError(f"A certificate's name cannot be read: {error}") from error


def _attribute(attribute: x509.NameAttribute[str | bytes]) -> str:
    name = _ATTRIBUTES.get(attribute.oid.dotted_string)
    if name is None or isinstance(attribute.value, bytes):
        return f"{attribute.oid.dotted_string}=#{_der_of_value(attribute).hex()}"
    value = attribute.value.translate(_ESCAPED)
    if value[:1] in ("#", " "):
        value = "\\" + value
    if len(attribute.value) > 1 and value.endswith(" "):
        value = value[:-1] + "\\ "
    return f"{name}={value}"


def _der_of_value(attribute: x509.NameAttribute[str | bytes]) -> bytes:
    """The value as it is encoded: what follows the type in SEQUENCE { SET { SEQUENCE { type, value } } }."""
    encoded = x509.Name([attribute]).public_bytes()
    for _ in range(3):
        encoded = encoded[_header_length(encoded) :]
    return encoded[2 + encoded[1] :]  # an object identifier is shorter than 128 bytes


def _header_length(encoded: bytes) -> int:
    return 2 if encoded[1] < 0x80 else 2 + (encoded[1] & 0x7F)


def check_authorities(path: str, content: bytes, now: datetime) -> Sequence[x509.Certificate]:
    """The certificates of a CA file, each fit to vouch for others.

    Raises:
        UsageError: one is not, or there is none.
    """
    try:
        certificates = x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise UsageError(f"Unable to import CA certificate list {path}") from error
    for certificate in certificates:
        _check_times(certificate, path, "CA", now)
        basic = _extension(certificate, x509.BasicConstraints)
        if basic is None:
            raise UsageError(f"The certificate {path} is missing basic constraints for a CA")
        if not basic.value.ca:
            raise UsageError(f"The certificate {path} basic constraints do not show a CA")
        usage = _extension(certificate, x509.KeyUsage)
        if usage is not None and usage.critical and not usage.value.key_cert_sign:
            raise UsageError(f"Certificate {path} usage does not permit certificate signing")
    return certificates


def check_own(path: str, content: bytes, endpoint: str, now: datetime) -> Sequence[x509.Certificate]:
    """Our own certificate, fit to serve as `endpoint` ("client" or "server"), and those after it in the file.

    Raises:
        UsageError: it is not fit.
    """
    try:
        chain = x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise UsageError(f"Unable to import {endpoint} certificate {path}: Base64 unexpected header error.") from error
    leaf = chain[0]
    _check_times(leaf, path, endpoint, now)
    basic = _extension(leaf, x509.BasicConstraints)
    if basic is not None and basic.value.ca:
        raise UsageError(f"The certificate {path} basic constraints show a CA, but we need one for a {endpoint}")
    usage = _extension(leaf, x509.KeyUsage)
    if usage is not None and usage.critical and not usage.value.digital_signature:
        raise UsageError(f"Certificate {path} usage does not permit digital signature")
    purpose = _extension(leaf, x509.ExtendedKeyUsage)
    wanted = ExtendedKeyUsageOID.SERVER_AUTH if endpoint == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    fitting = {wanted, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if purpose is not None and purpose.critical and not fitting & set(purpose.value):
        raise UsageError(f"Certificate {path} purpose does not allow use with a TLS {endpoint}")
    return chain


def is_vouched_for(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> bool:
    """Whether signatures lead from the leaf, over the rest of its file, to an authority."""
    current, rest = chain[0], list(chain[1:])
    while not any(_signed(current, authority) for authority in authorities):
        issuer = next((other for other in rest if _signed(current, other)), None)
        if issuer is None:
            return False
        rest.remove(issuer)
        current = issuer
    return True


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    if certificate == issuer:
        return True
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _check_times(certificate: x509.Certificate, path: str, whose: str, now: datetime) -> None:
    if certificate.not_valid_after_utc < now:
        raise UsageError(f"The {whose} certificate {path} has expired")
    if certificate.not_valid_before_utc > now:
        raise UsageError(f"The {whose} certificate {path} is not yet active")


def _extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> "x509.Extension | None":  # type: ignore[type-arg]
    try:
        return certificate.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None
