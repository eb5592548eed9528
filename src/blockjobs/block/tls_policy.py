"""How a server that speaks TLS decides about clients: credentials for the handshake, then the authorisation list."""

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blockjobs.base.errors import UsageError
from blockjobs.block.authz import authorizer
from blockjobs.block.tls_creds import QCryptoTLSCredsEndpoint, peer_identity, tls_credentials


@dataclass(frozen=True, slots=True)
class TlsPolicy:
    """How clients prove who they are.

    Attributes:
        context: for the handshake.
        admit: told the TLS object afterwards; raises UsageError to turn the client away.
        verifies: only clients come through whose certificate is vouched for.
    """

    context: ssl.SSLContext
    admit: Callable[[ssl.SSLObject], None]
    verifies: bool


def tls_policy(objects: Mapping[str, object], creds: str, authz: str | None) -> TlsPolicy:
    """The policy of a server.

    Args:
        objects: by id.
        creds: id of the credentials.
        authz: id of the object that says who may come in; it is looked up for each client.

    Raises:
        UsageError: there are no such credentials, or they are for clients.
    """
    credentials = tls_credentials(objects, creds, QCryptoTLSCredsEndpoint.SERVER)

    def admit(connection: ssl.SSLObject) -> None:
        if authz is None:
            return
        identity = peer_identity(connection)
        judge = authorizer(objects, authz)
        if identity is None or judge is None or not judge.is_allowed(identity):
            raise UsageError(f"TLS x509 authz check for {identity} is denied")

    return TlsPolicy(credentials.server_context(), admit, credentials.verify_peer)
