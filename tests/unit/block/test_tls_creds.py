"""TLS credentials: the texts are those the installed QSD gave (probed), the handshakes are real, over memory."""

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from blockjobs.base.clock import SystemClock
from blockjobs.base.errors import UsageError
from blockjobs.block.objects import AnyObjectOptions, Secret, add_object
from blockjobs.block.tls_creds import (
    QCryptoTLSCredsEndpoint,
    TlsCredentials,
    peer_identity,
    tls_credentials,
)
from blockjobs.block.x509 import distinguished_name
from blockjobs.schema.command import convert
from blockjobs.testing.certificates import CA, NO_CA, Authority, Extensions

SERVER, CLIENT = QCryptoTLSCredsEndpoint.SERVER, QCryptoTLSCredsEndpoint.CLIENT


def build(
    directory: Path, endpoint: str, objects: dict[str, object] | None = None, **members: object
) -> TlsCredentials:
    objects = {} if objects is None else objects
    options = {"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(directory), "endpoint": endpoint}
    options |= {name.replace("_", "-"): value for name, value in members.items()}
    add_object(objects, convert(options, AnyObjectOptions), SystemClock())
    return tls_credentials(objects, "tls0", QCryptoTLSCredsEndpoint(endpoint))


def refusal(directory: Path, endpoint: str, objects: dict[str, object] | None = None, **members: object) -> str:
    with pytest.raises(UsageError) as caught:
        build(directory, endpoint, objects, **members)
    return str(caught.value).replace(str(directory), "D")


def shake_hands(
    client: TlsCredentials, server: TlsCredentials, *, hostname: str = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends after a handshake and one byte each way, so that TLS 1.3's late refusals are seen too."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.client_context().wrap_bio(to_client, to_server, server_hostname=hostname)
    there = server.server_context().wrap_bio(to_server, to_client, server_side=True)
    done = set()
    for _ in range(10):
        for side in (here, there):
            if side not in done:
                try:
                    side.do_handshake()
                    done.add(side)
                except ssl.SSLWantReadError:
                    pass
    here.write(b"a")
    there.write(b"b")
    assert there.read(1) == b"a"
    assert here.read(1) == b"b"
    return here, there


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def test_both_sides_know_each_other(authority: Authority, tmp_path: Path) -> None:
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "GB"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example, Home + Co"),
            x509.NameAttribute(NameOID.COMMON_NAME, "client é 1"),
        ]
    )
    server = build(authority.issue(tmp_path / "server", "server"), "server")
    client = build(authority.issue(tmp_path / "client", "client", name=name), "client")
    here, there = shake_hands(client, server)
    assert peer_identity(there) == "C=GB,O=Example\\, Home \\+ Co,CN=client é 1"
    assert peer_identity(here) == "CN=localhost"


def test_a_client_without_certificate_comes_in_only_if_the_server_asks_for_none(
    authority: Authority, tmp_path: Path
) -> None:
    directory = authority.issue(tmp_path / "server", "server")
    client = build(authority.introduce(tmp_path / "client"), "client")
    with pytest.raises(ssl.SSLError):
        shake_hands(client, build(directory, "server"))
    _, there = shake_hands(client, build(directory, "server", verify_peer=False))
    assert peer_identity(there) is None


def test_strangers_are_refused(authority: Authority, tmp_path: Path) -> None:
    server = build(authority.issue(tmp_path / "server", "server"), "server")
    other = Authority("Other CA")
    stranger = other.issue(tmp_path / "stranger", "client", name="stranger")
    authority.introduce(stranger)  # trusts our server, but is vouched for by somebody else
    with pytest.raises(ssl.SSLError):
        shake_hands(build(stranger, "client", sanity_check=False), server)
    with pytest.raises(ssl.SSLCertVerificationError, match="self-signed"):
        shake_hands(build(other.issue(tmp_path / "foreign", "client"), "client"), server)
    known = build(authority.issue(tmp_path / "client", "client"), "client")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(known, server, hostname="elsewhere")
    careless = build(authority.issue(tmp_path / "careless", "client"), "client", verify_peer=False)
    shake_hands(careless, server, hostname="elsewhere")


def test_a_revoked_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    directory = authority.issue(tmp_path / "server", "server")
    lost = authority.issue(tmp_path / "lost", "client", name="lost")
    kept = authority.issue(tmp_path / "kept", "client", name="kept")
    authority.revoke(lost / "client-cert.pem", directory)
    server = build(directory, "server")
    shake_hands(build(kept, "client"), server)
    with pytest.raises(ssl.SSLError):
        shake_hands(build(lost, "client"), server)


def test_files_that_are_missing(authority: Authority, tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "none", "server") == "Unable to access credentials D/ca-cert.pem: No such file or directory"
    )
    for missing in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        directory = authority.issue(tmp_path / missing, "server")
        (directory / missing).unlink()
        assert refusal(directory, "server") == f"Unable to access credentials D/{missing}: No such file or directory"
    build(authority.introduce(tmp_path / "client"), "client")
    objects: dict[str, object] = {}
    with pytest.raises(UsageError, match="Missing 'dir' property value"):
        add_object(objects, convert({"qom-type": "tls-creds-x509", "id": "t"}, AnyObjectOptions), SystemClock())
    assert not objects


def test_files_that_are_wrong(authority: Authority, tmp_path: Path) -> None:
    def spoiled(name: str, content: bytes = b"junk\n") -> Path:
        directory = authority.issue(tmp_path / name, "server")
        (directory / name).write_bytes(content)
        return directory

    own = "D/server-cert.pem' & key 'D/server-key.pem'"
    assert refusal(spoiled("ca-cert.pem"), "server") == "Unable to import CA certificate list D/ca-cert.pem"
    assert (
        refusal(spoiled("server-cert.pem"), "server")
        == "Unable to import server certificate D/server-cert.pem: Base64 unexpected header error."
    )
    assert (
        refusal(tmp_path / "server-cert.pem", "server", sanity_check=False)
        == f"Cannot load certificate '{own}: Base64 decoding error."
    )
    assert refusal(spoiled("ca-crl.pem"), "server").startswith("Cannot load CRL 'D/ca-crl.pem': ")
    assert refusal(spoiled("server-key.pem"), "server").startswith(f"Cannot load certificate '{own}: ")
    other = authority.issue(tmp_path / "other", "server")
    mixed = spoiled("server-key.pem", (other / "server-key.pem").read_bytes())
    text = f"Cannot load certificate '{own}: The certificate and the given key do not match."
    assert refusal(mixed, "server") == text


def usage(*, critical: bool, **allowed: bool) -> tuple[x509.ExtensionType, bool]:
    names = [
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ]
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names}), critical


def purpose(oid: ObjectIdentifier, *, critical: bool) -> tuple[x509.ExtensionType, bool]:
    return x509.ExtendedKeyUsage([oid]), critical


@pytest.mark.parametrize(
    ("extensions", "text"),
    [
        ((), "The certificate D/ca-cert.pem is missing basic constraints for a CA"),
        (((NO_CA, True),), "The certificate D/ca-cert.pem basic constraints do not show a CA"),
        (
            ((CA, True), usage(critical=True, digital_signature=True)),
            "Certificate D/ca-cert.pem usage does not permit certificate signing",
        ),
    ],
)
def test_authorities_that_cannot_vouch(tmp_path: Path, extensions: Extensions, text: str) -> None:
    assert refusal(Authority(extensions=extensions).issue(tmp_path, "server"), "server") == text


@pytest.mark.parametrize(
    ("endpoint", "extension", "text"),
    [
        ("server", (CA, True), "The certificate {} basic constraints show a CA, but we need one for a server"),
        ("client", (CA, True), "The certificate {} basic constraints show a CA, but we need one for a client"),
        ("server", usage(critical=True, key_cert_sign=True), "Certificate {} usage does not permit digital signature"),
        ("server", usage(critical=False, key_cert_sign=True), None),
        ("server", usage(critical=True, digital_signature=True), None),
        (
            "server",
            purpose(ExtendedKeyUsageOID.CLIENT_AUTH, critical=True),
            "Certificate {} purpose does not allow use with a TLS server",
        ),
        ("server", purpose(ExtendedKeyUsageOID.CLIENT_AUTH, critical=False), None),
        ("server", purpose(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, critical=True), None),
        (
            "client",
            purpose(ExtendedKeyUsageOID.SERVER_AUTH, critical=True),
            "Certificate {} purpose does not allow use with a TLS client",
        ),
    ],
)
def test_certificates_for_another_duty(
    authority: Authority, tmp_path: Path, endpoint: str, extension: tuple[x509.ExtensionType, bool], text: str | None
) -> None:
    directory = authority.issue(tmp_path, endpoint, extensions=(extension,))
    if text is None:
        build(directory, endpoint)
    else:
        assert refusal(directory, endpoint) == text.format(f"D/{endpoint}-cert.pem")
        build(directory, endpoint, sanity_check=False)


def test_times_and_issuers(authority: Authority, tmp_path: Path) -> None:
    old = authority.issue(tmp_path / "old", "server", days=-1)
    assert refusal(old, "server") == "The server certificate D/server-cert.pem has expired"
    assert (
        refusal(Authority(days=-1).issue(tmp_path / "old-ca", "server"), "server")
        == "The CA certificate D/ca-cert.pem has expired"
    )
    stranger = Authority("Other CA").issue(tmp_path / "stranger", "server")
    authority.introduce(stranger)
    assert (
        refusal(stranger, "server") == "Our own certificate D/server-cert.pem failed validation against D/ca-cert.pem: "
        "The certificate hasn't got a known issuer"
    )


def test_keys_with_a_password(authority: Authority, tmp_path: Path) -> None:
    directory = authority.issue(tmp_path / "locked", "server", password=b"123456")
    wrong = "Cannot load certificate 'D/server-cert.pem' & key 'D/server-key.pem': Decryption has failed."
    assert refusal(directory, "server") == wrong
    assert refusal(directory, "server", {"s": Secret(b"bad")}, passwordid="s") == wrong
    assert refusal(directory, "server", {"s": 1}, passwordid="s") == "Object with id 's' is not a secret"
    assert refusal(directory, "server", passwordid="s") == "No secret with id 's'"
    build(directory, "server", {"s": Secret(b"123456")}, passwordid="s")


def test_priorities(authority: Authority, tmp_path: Path) -> None:
    directory = authority.issue(tmp_path, "server")
    authority.issue(tmp_path, "client")
    client = build(directory, "client")
    here, _ = shake_hands(client, build(directory, "server", priority="NORMAL"))
    assert here.version() == "TLSv1.3"
    here, _ = shake_hands(client, build(directory, "server", priority="NORMAL:-VERS-TLS1.3"))
    assert here.version() == "TLSv1.2"
    newest = build(directory, "server", priority="SECURE256:-VERS-ALL:+VERS-TLS1.3")
    here, _ = shake_hands(client, newest)
    assert here.version() == "TLSv1.3"
    for bad in ("BOGUS", "NORMAL:+ANON-DH", "NORMAL:-VERS-ALL", "NORMAL:-VERS-ALL:+VERS-TLS1.0"):
        assert refusal(directory, "server", priority=bad).startswith(f"Unable to set TLS session priority {bad}: only ")


def test_credentials_are_for_one_side(authority: Authority, tmp_path: Path) -> None:
    objects: dict[str, object] = {"secret": Secret(b"")}
    build(authority.issue(tmp_path, "server"), "server", objects)
    with pytest.raises(UsageError, match="Expected TLS credentials for a client endpoint"):
        tls_credentials(objects, "tls0", CLIENT)
    with pytest.raises(UsageError, match="Object with id 'secret' is not TLS credentials"):
        tls_credentials(objects, "secret", SERVER)
    with pytest.raises(UsageError, match="No TLS credentials with id 'other'"):
        tls_credentials(objects, "other", SERVER)


def test_rare_attributes_of_names(authority: Authority, tmp_path: Path) -> None:
    """Spelled as GnuTLS's certtool prints them (probed), in the certificate's order."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.EMAIL_ADDRESS, "a@b"),
            x509.NameAttribute(NameOID.SURNAME, "s"),
            x509.NameAttribute(ObjectIdentifier("1.2.3.4"), "odd"),
            x509.NameAttribute(NameOID.COMMON_NAME, ' #a"b<c>;d=e\\f '),
        ]
    )
    path = authority.issue(tmp_path, "client", name=name) / "client-cert.pem"
    der = ssl.PEM_cert_to_DER_cert(path.read_text())
    assert distinguished_name(der) == 'EMAIL=a@b,surName=s,1.2.3.4=#0c036f6464,CN=\\ #a\\"b\\<c\\>\\;d=e\\\\f\\ '
    with pytest.raises(UsageError, match="name cannot be read"):
        distinguished_name(b"\x30\x03abc")


def psk(directory: Path, endpoint: str, **members: object) -> TlsCredentials:
    objects: dict[str, object] = {}
    options = {"qom-type": "tls-creds-psk", "id": "p", "dir": str(directory), "endpoint": endpoint, **members}
    add_object(objects, convert(options, AnyObjectOptions), SystemClock())
    return tls_credentials(objects, "p", QCryptoTLSCredsEndpoint(endpoint))


def psk_refusal(directory: Path, endpoint: str, **members: object) -> str:
    with pytest.raises(UsageError) as caught:
        psk(directory, endpoint, **members)
    return str(caught.value).replace(str(directory), "D")


def test_shared_keys_that_are_wrong(tmp_path: Path) -> None:
    missing = "Unable to access credentials D/keys.psk: No such file or directory"
    assert psk_refusal(tmp_path, "server") == missing
    assert psk_refusal(tmp_path, "server", username="a") == "username should not be set when endpoint=server"
    (tmp_path / "keys.psk").write_text("# keys\nalice:00ff\n")
    assert psk_refusal(tmp_path, "client", username="bob") == "Username bob not found in PSK file D/keys.psk"
    (tmp_path / "keys.psk").write_text("alice:00ff\nbob:xyz\n")
    assert psk_refusal(tmp_path, "server") == "Cannot load PSK file 'D/keys.psk': line 2 is no 'name:hexadecimal key'"


def test_shared_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("alice:00ff00ff00ff00ff00ff00ff00ff00ff\nbob:11\n")
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
        text = "TLS with shared keys (tls-creds-psk) needs Python 3.13 or later"
        assert psk_refusal(tmp_path, "server") == text
        return
    here, there = shake_hands(psk(tmp_path, "client", username="alice"), psk(tmp_path, "server"))
    assert peer_identity(there) is None
    assert here.version() == "TLSv1.2"
