"""Certificates for tests of TLS: an authority, and directories as `tls-creds-x509` wants them."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CA: Final = x509.BasicConstraints(ca=True, path_length=None)
NO_CA: Final = x509.BasicConstraints(ca=False, path_length=None)
LOCALHOST: Final = x509.SubjectAlternativeName([x509.DNSName("localhost")])

Extensions = Sequence[tuple[x509.ExtensionType, bool]]


class Authority:
    """Signs what tests ask for. Valid from yesterday on for `days`, which may be negative for one that has expired."""

    def __init__(self, name: str = "Test CA", *, days: int = 100, extensions: Extensions = ((CA, True),)) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        self.certificate = _sign(self.name, self.key, self.name, self.key, days, extensions)

    def issue(
        self,
        directory: Path,
        endpoint: str,
        *,
        name: str | x509.Name = "localhost",
        days: int = 100,
        extensions: Extensions = ((NO_CA, True), (LOCALHOST, False)),
        password: bytes | None = None,
    ) -> Path:
        """Write `ca-cert.pem`, `<endpoint>-cert.pem` and `<endpoint>-key.pem` into `directory`, which is returned."""
        directory.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = name if isinstance(name, x509.Name) else _name(name)
        certificate = _sign(subject, key, self.name, self.key, days, extensions)
        self.introduce(directory)
        (directory / f"{endpoint}-cert.pem").write_bytes(_pem(certificate))
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        (directory / f"{endpoint}-key.pem").write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        )
        return directory

    def introduce(self, directory: Path) -> Path:
        """Write only `ca-cert.pem`."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "ca-cert.pem").write_bytes(_pem(self.certificate))
        return directory

    def revoke(self, certificate: Path, into: Path) -> None:
        """Write `ca-crl.pem` into the directory `into`, naming the certificate of that file."""
        serial = x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number
        now = datetime.now(UTC)
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - timedelta(hours=1)).build()
        revoked = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name)
            .last_update(now - timedelta(hours=1))
            .next_update(now + timedelta(days=10))
            .add_revoked_certificate(entry)
            .sign(self.key, hashes.SHA256())
        )
        (into / "ca-crl.pem").write_bytes(revoked.public_bytes(serialization.Encoding.PEM))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _sign(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: int,
    extensions: Extensions,
) -> x509.Certificate:
    now = datetime.now(UTC)
    begin = now - timedelta(days=1 if days > 0 else 10 - days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + timedelta(days=days))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(issuer_key, hashes.SHA256())
