"""``@receiver``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from .receivers import Phase
from .signals import Signal

F = TypeVar("F", bound=Callable[..., Any])


def receiver(
    signal: Signal | Iterable[Signal],
    *,
    sender: Any = None,
    on: Phase = "flush",
    propagate: bool = False,
    fields: Collection[Any] | None = None,
    durable: bool = False,
    name: str | None = None,
    dispatch_uid: object = None,
    weak: bool = False,
) -> Callable[[F], F]:
    """Connect the decorated function to one signal or several, and return the function itself.

    The options are those of :meth:`Signal.connect`, except that ``weak`` is ``False`` here.
    """
    signals = [signal] if isinstance(signal, Signal) else list(signal)

    def decorate(fn: F) -> F:
        for one in signals:
            one.connect(
                fn,
                sender=sender,
                weak=weak,
                on=on,
                propagate=propagate,
                fields=fields,
                durable=durable,
                name=name,
                dispatch_uid=dispatch_uid,
            )
        return fn

    return decorate
