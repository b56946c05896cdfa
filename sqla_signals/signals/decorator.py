"""``@receiver``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack, overload

from ..errors import ReceiverTypeError
from ..receivers.protocols import F, M, Options, OtherSender, OwnSignal, ReceiverDecorator
from .kinds import ModelSignal
from .signal import Signal


@overload
def receiver(  # type: ignore[overload-overlap]
    signal: ModelSignal | Iterable[ModelSignal],
    *,
    sender: type[M] | OtherSender = None,
    weak: bool = False,
    **options: Unpack[Options],
) -> ReceiverDecorator[M]: ...
# Model signals and others in one list. The type of ``sender`` is the same as above: mypy gives up
# where a sender of type Any matches several overloads that differ in it.
@overload
def receiver(
    signal: Iterable[Signal],
    *,
    sender: type[M] | OtherSender = None,  # pyright: ignore[reportInvalidTypeVarUse]
    weak: bool = False,
    **options: Unpack[Options],
) -> Callable[[F], F]: ...
@overload
def receiver(
    signal: OwnSignal | Iterable[OwnSignal],
    *,
    sender: Any = None,
    weak: bool = False,
    **options: Unpack[Options],
) -> Callable[[F], F]: ...
def receiver(signal: Any, *, sender: Any = None, weak: bool = False, **options: Any) -> Any:
    """Connect the decorated function to one signal or several, and return the function itself.

    The options are those of :meth:`Signal.connect`, except that ``weak`` is ``False`` here.
    """
    given: Any = [signal] if isinstance(signal, Signal) else signal
    signals: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    for one in signals:
        if not isinstance(one, Signal):
            raise ReceiverTypeError(f"receiver() takes signals such as post_save, not {signal!r}")

    chooses_saves = "created" in options and any(one._tells_saves for one in signals)

    def decorate(fn: F) -> F:
        for one in signals:
            given = options
            if chooses_saves and not one._tells_saves:  # it chooses among saves; deletes pass
                given = {key: value for key, value in options.items() if key != "created"}
            one.connect(fn, sender, weak, **given)
        return fn

    return decorate
