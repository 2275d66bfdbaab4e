"""DWS1xx: who could listen, and what could leak."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import parse_qsl, urlsplit

from durablews.analysis.findings import Problem, Rule
from durablews.analysis.subject import Subject, span

__all__ = ["RULES"]

# Words for switching verification off, in other libraries and in people's configurations.
_VERIFY = ("verify", "verify_ssl", "verify_tls", "verify_mode", "ssl_verify", "check_hostname", "rejectUnauthorized")
_INSECURE = ("insecure", "insecure_skip_verify", "skip_verify", "allow_insecure", "trust_all", "no_verify")
_NO = (False, 0, "false", "no", "off", "none", "0", None)

_SECRET_PARAMETERS = frozenset(
    "access_token api_key apikey auth authorization jwt key passwd password secret sig signature token".split()
)
_SECRET_HEADERS = ("authorization", "cookie", "token", "secret", "key", "password")
# What websockets asks for, in its order: urllib.request.getproxies() knows them by these names.
_PROXY_VARIABLES = {
    "wss": ("WSS_PROXY", "SOCKS_PROXY", "HTTPS_PROXY"),
    "ws": ("WS_PROXY", "SOCKS_PROXY", "HTTPS_PROXY", "HTTP_PROXY"),
}
# Anybody but the file's owner.
_OTHERS = 0o077


def _in_the_clear(subject: Subject) -> Iterator[Problem]:
    url = subject.settings.url
    if url is None or not url.startswith("ws://"):
        return
    host = _host(url)
    if host and not _is_this_machine(host):
        what = f"{subject.name('url')} goes to {host} in the clear: anybody on the way reads and changes what is said"
        yield Problem(("url",), f"{what}; use wss://")


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _unverified(subject: Subject) -> Iterator[Problem]:
    offs = [path for path, value in subject.unusable(*_VERIFY) if value in _NO]
    offs += [path for path, value in subject.unusable(*_INSECURE) if value not in _NO]
    offs += [path for path, value in subject.unusable("ssl", "tls") if value is False]
    for path in offs:
        what = f"{subject.name(*path)}: TLS verification cannot be switched off"
        yield Problem(path, f"{what}; name the authority of a private server in tls.ca_file")


def _secret_in_url(subject: Subject) -> Iterator[Problem]:
    for name in ("url", "proxy"):
        address = getattr(subject.settings, name)
        if ("proxy",) == (name,) and ("proxy",) in subject.rejected:
            address = str(subject.rejected[("proxy",)].value)
        if address in (None, "env"):
            continue
        found = _secrets_of(address)
        if found:
            # A proxy has no other place for its password, but the environment.
            instead = "use auth.token_file" if name == "url" else "give it in HTTPS_PROXY, from a file of yours"
            yield Problem((name,), f"{subject.name(name)} holds {found}, which servers and proxies log; {instead}")


def _secrets_of(address: str) -> str:
    try:
        parts = urlsplit(address)
        has_user = bool(parts.username or parts.password) or ("://" not in address and "@" in address)
    except ValueError:
        return ""
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if name.lower() in _SECRET_PARAMETERS]
    return "a user or a password" if has_user else f"a secret ({names[0]}=)" if names else ""


def _secret_in_file(subject: Subject) -> Iterator[Problem]:
    mode = subject.surroundings.mode(subject.file.path) if subject.file.path else None
    open_to_all = f", and others may read the file (mode {mode:04o})" if mode is not None and mode & _OTHERS else ""
    for name in subject.settings.auth.headers:
        if any(word in name.lower() for word in _SECRET_HEADERS):
            what = f"auth.headers keeps {name} in the configuration{open_to_all}"
            yield Problem(("auth", "headers"), f"{what}; use auth.token_file, or a callable")
    path = subject.settings.auth.token_file
    mode = subject.surroundings.mode(path) if path is not None else None
    if mode is not None and mode & _OTHERS:
        what = f"auth.token_file {path} may be read by others (mode {mode:04o})"
        yield Problem(("auth", "token_file"), f"{what}; chmod 600 it")


def _token_that_ends(subject: Subject) -> Iterator[Problem]:
    for name, value in subject.settings.auth.headers.items():
        ends = _expiry(value)
        if ends is None:
            continue
        left, outage = ends - subject.surroundings.now(), subject.load.max_outage
        if outage is not None and left > outage:
            continue
        when = "has expired" if left <= 0 else f"expires in {span(round(left))}"
        against = f", and an outage may last {span(outage)}" if outage is not None and left > 0 else ""
        yield Problem(
            ("auth", "headers"), f"the token in auth.headers.{name} {when}{against}; use auth.token_file, or a callable"
        )


def _expiry(header: str) -> float | None:
    """Return the `exp` of a JSON Web Token (RFC 7519 section 4.1.4) in a header; None when there is none."""
    pieces = header.rpartition(" ")[2].split(".")
    if len(pieces) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(pieces[1] + "=" * (-len(pieces[1]) % 4)))
        ends = claims.get("exp")
    except (binascii.Error, ValueError, AttributeError, RecursionError):
        return None
    usable = isinstance(ends, int | float) and not isinstance(ends, bool) and 0 <= ends < 1e15
    return float(ends) if usable else None


def _proxy_of_the_environment(subject: Subject) -> Iterator[Problem]:
    url = subject.settings.url or "wss://"
    if subject.settings.proxy != "env":
        return
    for name in _PROXY_VARIABLES.get(url.partition(":")[0], ()):
        if subject.surroundings.environment.get(name) or subject.surroundings.environment.get(name.lower()):
            what = f"{name} is set here, and proxy is not: the link will go through that proxy where it is set"
            yield Problem(("proxy",), f'{what}; say proxy = "none" or which one')
            return


RULES = (
    Rule(
        code="DWS101",
        severity="error",
        title="ws:// to another machine",
        why="Without TLS whoever sits on the way reads the token and the messages, and can acknowledge them: durablews"
        " then deletes what the server never got.",
        source="RFC 6455 section 10.5 and 10.6. Loopback (127.0.0.0/8, ::1, localhost) is left alone.",
        judge=_in_the_clear,
    ),
    Rule(
        code="DWS102",
        severity="error",
        title="TLS verification is to be off",
        why="A client that believes any certificate might as well use ws://. durablews has no such setting.",
        source="RFC 6455 section 4.1, step 5: a client that uses TLS verifies the server. The words are those of"
        " requests, Node.js, Go and curl.",
        judge=_unverified,
    ),
    Rule(
        code="DWS103",
        severity="error",
        title="a secret is part of an address",
        why="Addresses are logged: by servers, proxies and load balancers, and by anything that prints an error.",
        source="RFC 9110 section 17.9; RFC 3986 section 7.5. Seen in supabase/realtime-py, which logs its key.",
        judge=_secret_in_url,
    ),
    Rule(
        code="DWS104",
        severity="warning",
        title="a secret is in a file that others may read",
        why="Configurations are copied into images, repositories and support tickets. A token file can be changed"
        " without a restart, too: durablews reads it on every attempt.",
        source="File modes of the machine that checks; systemd's LoadCredential= and Docker's secrets give such files.",
        judge=_secret_in_file,
    ),
    Rule(
        code="DWS105",
        severity="warning",
        title="the token ends before the outage does",
        why="A token that was good when the device lost its link is no longer good when it comes back, and then nothing"
        " that waits can leave.",
        sums="time left = exp of the token - now; it must be longer than the longest outage (--max-outage), and no"
        " fixed token is right without one.",
        source="RFC 7519 section 4.1.4. Users: nlef/moonraker-telegram-bot #429, base/base #2298.",
        judge=_token_that_ends,
    ),
    Rule(
        code="DWS106",
        severity="info",
        title="a proxy comes from the environment",
        why="The link goes through it without the configuration saying so, on this machine and not on another.",
        source="websockets uses what urllib.request.getproxies() finds.",
        judge=_proxy_of_the_environment,
    ),
)
