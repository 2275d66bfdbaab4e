"""Asks the application: values, or callables that give them, sync or async, each with a time limit.

The sync ones run in a thread, for they may read files and speak to other servers, which must not stop the event loop.
It is a daemon of its own and not one of the loop's executor: a callable that never returns would keep the interpreter
from ending there, and would take one of the few workers away from the application.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["Provided", "Provider", "ProviderFailed", "raise_if_cancelled"]

#: A value, or a callable that gives it, sync or async.
Provided = Any

# What a callable raises that is wrong itself; anything else may be the network that it asked.
_DEFECTS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError)


class ProviderFailed(Exception):
    """A callable did not give what it was asked for. The text says which and how, never what it said, for secrecy.

    Attributes:
        defect: whether only its author can mend it.
    """

    def __init__(self, reason: str, *, defect: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.defect = defect


class Provider:
    """A value that the application gives, or a callable to be asked for it.

    Args:
        name: for people.
        provided: the value or the callable.
        timeout: seconds that the callable may take.
        read: makes what is needed of the answer, and raises ProviderFailed when that cannot be.
    """

    def __init__(
        self, name: str, provided: Provided, timeout: float, read: Callable[[Any], Any] = lambda answer: answer
    ) -> None:
        self._name = name
        self._provided = provided
        self._timeout = timeout
        self._read = read
        self._thread: threading.Thread | None = None

    @property
    def is_callable(self) -> bool:
        """Whether a later answer may be another one."""
        return callable(self._provided)

    async def ask(self, *arguments: Any) -> Any:
        """Return the value.

        Raises:
            ProviderFailed: the callable raised, or took too long.
        """
        if not callable(self._provided):
            return self._understood(self._provided)
        try:
            async with asyncio.timeout(self._timeout) as limit:
                answer = await self._call(self._provided, arguments)
        except ProviderFailed:
            raise
        except asyncio.CancelledError as exc:
            raise_if_cancelled(exc)
            raise ProviderFailed(f"the callable for {self._name} failed: CancelledError", defect=False) from exc
        except TimeoutError as exc:
            late = f"did not answer within {self._timeout:g} s" if limit.expired() else "failed: TimeoutError"
            raise ProviderFailed(f"the callable for {self._name} {late}", defect=False) from exc
        except (Exception, GeneratorExit) as exc:
            what = f"the callable for {self._name} failed: {type(exc).__name__}"
            raise ProviderFailed(what, defect=isinstance(exc, _DEFECTS)) from exc
        return self._understood(answer)

    def _understood(self, answer: Any) -> Any:
        try:
            return self._read(answer)
        except ProviderFailed:
            raise
        except Exception as exc:  # of an object of the application's, such as one without a proper __iter__
            raise ProviderFailed(f"{self._name} cannot be used: {type(exc).__name__}", defect=True) from exc

    async def _call(self, provided: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        # An instance whose __call__ is async is no coroutine function, its class's method is one.
        if inspect.iscoroutinefunction(provided) or inspect.iscoroutinefunction(type(provided).__call__):
            return await provided(*arguments)
        if self._thread is not None and self._thread.is_alive():
            # Not a second one beside it: a callable that hangs must not gather threads.
            raise ProviderFailed(
                f"the callable for {self._name} has not answered since it was asked last", defect=False
            )
        answer = await self._in_thread(provided, arguments)
        return await answer if inspect.isawaitable(answer) else answer

    def _in_thread(self, provided: Callable[..., Any], arguments: tuple[Any, ...]) -> Awaitable[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def deliver(result: Any, error: Exception | None) -> None:
            # It has answered, though the thread may not have ended: who hears of it may ask again at once.
            self._thread = None
            if future.done():
                return  # who asked has stopped waiting
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def run() -> None:
            result: Any = None
            error: Exception | None = None
            try:
                result = context.run(provided, *arguments)
            except StopIteration as exc:  # which no future takes
                error = RuntimeError("StopIteration")
                error.__cause__ = exc
            except Exception as exc:
                error = exc
            except BaseException as exc:  # the end of a thread of ours is not that of the program, or of a task
                error = RuntimeError(type(exc).__name__)
                error.__cause__ = exc
            try:
                # Not as arguments: asyncio logs those, in its debug mode, and one may be a token.
                loop.call_soon_threadsafe(lambda: deliver(result, error))
            except RuntimeError:
                pass  # the loop is closed, and with it who asked

        self._thread = threading.Thread(target=run, name=f"durablews asks for {self._name}", daemon=True)
        self._thread.start()
        return future


def raise_if_cancelled(exc: asyncio.CancelledError) -> None:
    """Raise `exc` again if it is for the task that runs: an application's code may raise one of its own."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise exc
