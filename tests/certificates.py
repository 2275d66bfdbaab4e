"""An authority for tests, with good and bad certificates as PEM files, and a server that shows them."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from servers import PlainServer
from websockets.asyncio.server import ServerConnection, serve

__all__ = ["Certificates", "Pair", "SecureServer", "certificates_fixture"]

# The servers of a test log nothing: a test that looks for secrets in the logs means those of the client.
_silent = logging.Logger("silent", logging.CRITICAL)


@dataclass(frozen=True)
class Pair:
    """A certificate with its chain, and its key, as PEM files."""

    cert_file: str
    key_file: str


class Certificates:
    """Two authorities and what they have signed, in `folder`.

    Attributes:
        ca_file: the authority of everything here but `stranger`.
        good: for ``localhost`` and 127.0.0.1.
        expired: for the same, until yesterday.
        misnamed: for another host.
        stranger: for the same as `good`, from an authority that `ca_file` does not know.
        client: for a client called ``agent``.
        encrypted_key: the key of `client`, with a password.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        authority, foreign = trustme.CA(organization_name="tests"), trustme.CA(organization_name="strangers")
        self.ca_file = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        here = ("localhost", "127.0.0.1")
        now = datetime.now(UTC)
        self.good = self._write("good", authority.issue_cert(*here))
        past = {"not_before": now - timedelta(days=30), "not_after": now - timedelta(days=1)}
        self.expired = self._write("expired", authority.issue_cert(*here, **past))
        self.misnamed = self._write("misnamed", authority.issue_cert("elsewhere.example"))
        self.stranger = self._write("stranger", foreign.issue_cert(*here))
        self.client = self._write("client", authority.issue_cert("agent@elsewhere.example", common_name="agent"))
        self.encrypted_key = str(folder / "encrypted.key")
        key = load_pem_private_key(Path(self.client.key_file).read_bytes(), None)
        encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
        Path(self.encrypted_key).write_bytes(encrypted)

    def server_context(self, pair: Pair | None = None, *, wants_clients: bool = False) -> ssl.SSLContext:
        """Return what a server needs that shows `pair` (`good`), and wants a certificate of `ca_file` from clients."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pair = pair or self.good
        context.load_cert_chain(pair.cert_file, pair.key_file)
        if wants_clients:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca_file)
        return context

    def _write(self, name: str, leaf: trustme.LeafCert) -> Pair:
        pair = Pair(str(self._folder / f"{name}.pem"), str(self._folder / f"{name}.key"))
        for i, certificate in enumerate(leaf.cert_chain_pems):
            certificate.write_to_path(pair.cert_file, append=i > 0)
        leaf.private_key_pem.write_to_path(pair.key_file)
        return pair


@pytest.fixture(name="certificates", scope="session")
def certificates_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Certificates]:
    """The same certificates for every test of a run: making keys costs time."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


class SecureServer(PlainServer):
    """A `PlainServer` on TLS. Another `context` counts from the next `start`.

    Attributes:
        peers: the certificate of each client that showed one, as Python describes it.
    """

    def __init__(self, context: ssl.SSLContext, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.context = context
        self.peers: list[dict[str, Any]] = []

    async def start(self) -> None:
        self._server = await serve(
            self._handle,
            "127.0.0.1",
            self.port,
            ssl=self.context,
            process_request=self._request,
            select_subprotocol=self._select,
            compression=None,
            logger=_silent,
        )
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"wss://127.0.0.1:{self.port}/"

    async def _handle(self, ws: ServerConnection) -> None:
        certificate = ws.transport.get_extra_info("peercert")
        if certificate:
            self.peers.append(certificate)
        await super()._handle(ws)
