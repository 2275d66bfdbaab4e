"""Asking the application: the loop stays free, no callable holds anything up, and nothing secret is said."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import until
from support import named

from durablews import ConfigError, Settings
from durablews.config import AuthConfig
from durablews.endpoint import Endpoint, Target, check_url, redacted
from durablews.providers import Provider, ProviderFailed

SECRET = "SECRET"


async def later(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


class Callable:
    async def __call__(self) -> str:
        return await later("x")


def plus(one: str, other: str) -> str:
    return one + other


async def given(one: str) -> str:
    return one


@pytest.mark.parametrize(
    "provided",
    [
        "x",
        lambda: "x",
        lambda: later("x"),
        functools.partial(later, "x"),
        functools.partial(plus, "", "x"),
        Callable(),
        Callable().__call__,
        functools.partial(given, "x"),
    ],
    ids=["value", "sync", "gives a coroutine", "partial async", "partial", "object", "method", "async"],
)
async def test_values_and_callables_of_every_kind(provided: Any) -> None:
    """A value, a function, an async one, what gives a coroutine, an object with an async call: all give the answer."""
    provider = Provider("token", provided, 5)
    assert await provider.ask() == "x"
    assert provider.is_callable == (provided != "x")


async def test_a_function_that_blocks_does_not_block_the_loop() -> None:
    """P7: while a sync callable reads a file or speaks to a server, the loop goes on."""
    free, asked = threading.Event(), threading.Event()

    def slow() -> str:
        asked.set()
        assert free.wait(20)
        return "x"

    asking = asyncio.create_task(Provider("token", slow, 20).ask())
    await until(asked.is_set)  # only a free loop gets here
    free.set()
    assert await asking == "x"


async def test_a_function_that_hangs_costs_one_thread() -> None:
    """It has its time, then the attempt fails; while it hangs no second one is started; later it is asked again."""
    free = threading.Event()
    provider = Provider("token", lambda: free.wait(20), 0.05)
    before = threading.active_count()
    with pytest.raises(ProviderFailed, match=r"the callable for token did not answer within 0\.05 s") as failed:
        await provider.ask()
    assert not failed.value.defect
    for _ in range(20):
        with pytest.raises(ProviderFailed, match="has not answered since it was asked last"):
            await provider.ask()
    assert threading.active_count() == before + 1
    free.set()
    await until(lambda: threading.active_count() == before)
    assert await provider.ask() is True


async def test_an_async_function_that_hangs_is_cancelled() -> None:
    """Its time is limited as well, and nothing of it is left."""
    ended = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    with pytest.raises(ProviderFailed, match="did not answer within"):
        await Provider("url", hang, 0.02).ask()
    assert ended.is_set()


@pytest.mark.parametrize(
    ("error", "defect"),
    [
        (ConnectionRefusedError(SECRET), False),
        (TimeoutError(SECRET), False),
        (ValueError(SECRET), False),
        (RuntimeError(SECRET), False),
        (StopIteration(SECRET), False),
        (KeyError(SECRET), True),
        (TypeError(SECRET), True),
        (ZeroDivisionError(SECRET), True),
        (AttributeError(SECRET), True),
    ],
    ids=named,
)
@pytest.mark.parametrize("sync", [True, False])
async def test_what_a_callable_raises_is_named_and_not_quoted(error: Exception, defect: bool, sync: bool) -> None:
    """The text says which callable and which error, never its words; the network's errors are not the owner's."""

    def fail() -> None:
        raise error

    async def fail_later() -> None:
        raise error

    with pytest.raises(ProviderFailed) as failed:
        await Provider("headers", fail if sync else fail_later, 5).ask()
    assert failed.value.reason.startswith("the callable for headers failed: ")
    assert SECRET not in str(failed.value)
    assert failed.value.defect == defect


async def test_a_timeout_of_the_callables_own_is_not_taken_for_ours() -> None:
    """What it raises itself is a failure, not a limit that was never reached."""

    async def fail() -> None:
        raise TimeoutError

    with pytest.raises(ProviderFailed, match="failed: TimeoutError"):
        await Provider("url", fail, 1000).ask()


async def test_a_function_sees_the_context_of_its_client() -> None:
    """Context variables are those of who opened the client, as in a task."""
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")
    tenant.set("a")
    assert await Provider("token", tenant.get, 5).ask() == "a"


async def test_who_stops_waiting_leaves_nothing() -> None:
    """A cancelled ask ends at once; what the function gives later goes nowhere."""
    free = threading.Event()
    asking = asyncio.create_task(Provider("token", lambda: free.wait(20), 20).ask())
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    free.set()
    await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("durablews asks")])


def test_a_function_that_outlives_its_loop_harms_nothing() -> None:
    """The loop may be closed before it answers: the thread ends in silence."""
    free = threading.Event()

    async def ask() -> None:
        with pytest.raises(ProviderFailed):
            await Provider("token", lambda: free.wait(20), 0.01).ask()

    asyncio.run(ask())
    free.set()
    for thread in threading.enumerate():
        if thread.name.startswith("durablews asks"):
            thread.join(10)


# -- endpoints


def endpoint(url: Any = "wss://x/", auth: dict[str, Any] | None = None, **given: Any) -> Endpoint:
    return Endpoint(Settings(auth=AuthConfig(**(auth or {}))), url=url, **given)


async def test_headers_and_token_come_together(tmp_path: Path) -> None:
    """Those of the configuration, those of the call over them, and the token over both."""
    (tmp_path / "token").write_text("  from-file\n")
    asked = endpoint(auth={"headers": {"A": "1", "B": "1"}}, headers=lambda: {"B": "2"}, token="t")
    assert (await asked.ask()).headers == {"A": "1", "B": "2", "Authorization": "Bearer t"}
    asked = endpoint(auth={"token_file": str(tmp_path / "token")})
    assert (await asked.ask()).headers == {"Authorization": "Bearer from-file"}
    assert (asked.may_change, asked.is_cheap) == (True, True)
    (tmp_path / "token").write_text("new")
    assert (await asked.ask()).headers == {"Authorization": "Bearer new"}
    assert (endpoint(token="t").may_change, endpoint(token="t").is_cheap) == (False, False)
    assert (endpoint(token=lambda: "t").may_change, endpoint(token=lambda: "t").is_cheap) == (True, False)
    assert (await endpoint(token=lambda: None).ask()).headers == {}


async def test_a_token_takes_the_place_of_the_urls_password() -> None:
    """Two Authorization headers would be sent otherwise; the answer shows neither."""
    target = await endpoint(f"wss://me:{SECRET}@x:1/p?q={SECRET}", token=SECRET).ask()
    assert target.url == f"wss://x:1/p?q={SECRET}"
    assert SECRET not in repr(target)
    assert (await endpoint("wss://me:pw@x/").ask()).url == "wss://me:pw@x/"


@pytest.mark.parametrize(
    "given",
    [
        {"url": lambda: "http://x"},
        {"url": lambda: f"ws://[{SECRET}"},
        {"url": lambda: "ws://"},
        {"url": lambda: None},
        {"headers": lambda: 5},
        {"auth": {"token_file": "/nowhere"}},
        {"auth": {"token_file": "/"}},
    ],
    ids=named,
)
async def test_what_cannot_be_used_is_its_owners_to_mend(given: Any) -> None:
    """A URL, headers or a file that cannot be used is said in a sentence, without what was given."""
    with pytest.raises(ProviderFailed) as failed:
        await endpoint(**given).ask()
    assert failed.value.defect
    assert SECRET not in failed.value.reason


async def test_a_token_file_that_is_no_text(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are said, not shown."""
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    with pytest.raises(ProviderFailed, match="the token file cannot be read: it is not UTF-8"):
        await endpoint(auth={"token_file": str(tmp_path / "token")}).ask()


def test_urls() -> None:
    """What is shown has no user, query or fragment; what cannot be one is said at once."""
    assert redacted("wss://u:p@h:1/a/b?token=x#y") == "wss://h:1/a/b"
    assert repr(Target(url="ws://h/?q", headers={})) == "<Target ws://h/>"
    check_url("wss://h")
    check_url(lambda: "anything")
    for url in ("http://h", "wss://", "ws://[", None, 5):
        with pytest.raises(ConfigError):
            check_url(url)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Every test lets its callables return."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("durablews asks"):
            thread.join(10)
            assert not thread.is_alive()
