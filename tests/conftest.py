"""What every test gets: nothing it starts may outlive it."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import settings

# The same everywhere, and found again: a failure prints the line that reproduces it. No deadline: machines that share
# their processors would fail tests for being slow.
settings.register_profile("ci", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("ci")

#: Seconds for what was told to end to be gone. Only a test that leaks waits this long.
GRACE = 2.0


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fail the test that leaves a thread behind which would keep the process alive."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + GRACE
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    names = [thread.name for thread in left if thread.is_alive()]
    if names:
        pytest.fail(f"the test left threads running: {names}", pytrace=False)


@pytest.fixture(autouse=True)
def no_task_left(request: pytest.FixtureRequest, no_thread_left: None) -> None:
    """Fail the async test that leaves a task behind; pytest-asyncio would cancel it without a word."""
    # Only there: the fixture below runs an event loop, and a test without one must not be given one.
    if inspect.iscoroutinefunction(inspect.unwrap(request.function)):
        request.getfixturevalue("_no_task_left")


@pytest.fixture
async def _no_task_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=GRACE)
    names = sorted(f"{task.get_name()}: {task.get_coro()}" for task in left)
    if names:
        pytest.fail(f"the test left tasks running: {names}", pytrace=False)
