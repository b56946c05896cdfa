"""``with`` blocks that let any exception through as it is.

``contextlib.contextmanager`` assigns to the ``__traceback__`` of an exception that leaves its block
(``_GeneratorContextManager.__exit__``). One that cannot be assigned to, such as a frozen dataclass,
is replaced by the error of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator
from functools import wraps
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def block(generate: Callable[P, Iterator[T]]) -> Callable[P, Block[T]]:
    """Make a context manager of a generator function, as ``contextlib.contextmanager`` does."""

    @wraps(generate)
    def make(*args: P.args, **kwargs: P.kwargs) -> Block[T]:
        return Block(lambda: generate(*args, **kwargs))

    return make


class Block(ContextDecorator, AbstractContextManager[T], Generic[T]):
    """What a generator does before and after its ``yield``; also a decorator."""

    def __init__(self, generate: Callable[[], Iterator[T]]) -> None:
        self._generate = generate

    def _recreate_cm(self) -> Block[T]:
        return Block(self._generate)

    def __enter__(self) -> T:
        self._generator: Any = self._generate()
        entered: T = next(self._generator)
        return entered

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            next(self._generator, None)
            return
        try:
            self._generator.throw(error)
        except BaseException as raised:
            # A generator makes a RuntimeError of StopIteration (PEP 479).
            is_wrapped = isinstance(error, StopIteration) and raised.__cause__ is error
            if raised is not error and not is_wrapped:
                raise
        BaseException.with_traceback(error, traceback)
