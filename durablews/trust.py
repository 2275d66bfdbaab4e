"""Whom this client trusts, and as whom it appears: TLS from the owner's files, read anew at every attempt."""

from __future__ import annotations

import ssl

from durablews.config import TLSConfig

__all__ = ["FilesUnusable", "in_words", "tls_context"]


class FilesUnusable(Exception):
    """A file of the settings cannot be used. The text says which and why."""


class _Encrypted(Exception):
    """A key needs a password, which nobody is there to type."""


def tls_context(config: TLSConfig) -> ssl.SSLContext:
    """Return a context that verifies certificates and host names, always. Blocks: the system's authorities are 20 ms.

    Raises:
        FilesUnusable: the authorities, the certificate or its key cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
    except (OSError, ValueError) as exc:
        raise FilesUnusable(f"tls.ca_file cannot be used: {_why(exc)}") from exc
    if config.cert_file is not None:
        try:
            context.load_cert_chain(config.cert_file, config.key_file, password=_no_password)
        except (OSError, ValueError, _Encrypted) as exc:
            raise FilesUnusable(f"tls.cert_file and tls.key_file cannot be used: {_why(exc)}") from exc
    return context


def _no_password() -> str:
    """Stand in for OpenSSL's own question at the terminal, which would hold up the client for ever."""
    raise _Encrypted


def _why(exc: Exception) -> str:
    if isinstance(exc, _Encrypted):
        return "the key has a password; it must be one without"
    if isinstance(exc, ssl.SSLError):
        return in_words(exc)
    return (exc.strerror if isinstance(exc, OSError) else None) or type(exc).__name__


def in_words(exc: ssl.SSLError) -> str:
    """Return OpenSSL's own word for what went wrong, such as "unknown ca" for TLSV1_ALERT_UNKNOWN_CA."""
    reason = exc.reason or type(exc).__name__
    return reason.rpartition("_ALERT_")[2].lower().replace("_", " ")
