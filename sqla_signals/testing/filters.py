"""What a test asks for: filters, and what they make of a signal that was sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

from blinker import ANY
from sqlalchemy import Table
from sqlalchemy.orm import QueryableAttribute, class_mapper

from .._sqlalchemy.mappers import all_mappers, is_mapped, secondary_relationship
from ..changes.change import Change
from ..errors import ReceiverOptionError
from ..receivers.installations import model_signals
from ..receivers.receiver import Receiver, describe_sender, matches
from ..signals.kinds import AssociationSignal
from ..signals.signal import Signal
from .capture import Sent, row_of

if TYPE_CHECKING:
    from ..receivers.receiver import Phase

Expected = Signal | tuple[Any, ...]
"""A signal, ``(signal, sender)``, or ``(signal, sender, filters)``."""


class Wanted:
    """The filters of one question."""

    def __init__(
        self,
        signal: Signal | None,
        sender: Any = None,
        on: Phase | None = None,
        receiver: Callable[..., Any] | str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        if signal is not None and not isinstance(signal, Signal):
            raise ReceiverOptionError(f"{signal!r} is not a signal; give post_save or another")
        self.arguments: dict[str, Any] = dict(arguments or {})
        if signal is not None and signal.arguments is not None:
            # A misspelt name would never be met, and let expect_nothing() pass.
            unknown = self.arguments.keys() - {*signal.arguments, "event"}
            if unknown:
                raise ReceiverOptionError(
                    f"{signal.name} has no argument {', '.join(sorted(unknown))}; it has "
                    f"{', '.join(signal.arguments)}"
                )
        if isinstance(sender, list | tuple | set | frozenset):
            raise ReceiverOptionError(f"sender={sender!r}: ask for one sender at a time")
        changes = self.arguments.get("changes")
        if isinstance(changes, Mapping) and isinstance(sender, type) and is_mapped(sender):
            unknown = changes.keys() - class_mapper(sender).column_attrs.keys()
            if unknown:
                raise ReceiverOptionError(
                    f"{sender.__name__} has no column attribute {', '.join(sorted(unknown))}"
                )
        self.signal = signal
        self.sender: Any = ANY if sender is None else sender
        self.on = on
        self.receiver = receiver

    @classmethod
    def of(cls, expected: Expected) -> Wanted:
        """The filters of one step of an order."""
        if isinstance(expected, Signal):
            return cls(expected)
        signal, sender, filters = (*expected, None, None)[:3]
        rest = dict(filters or {})
        return cls(signal, sender, rest.pop("on", None), rest.pop("receiver", None), rest)

    def is_met_by(self, sent: Sent) -> bool:
        """Whether all filters let it through."""
        return self.comes_close(sent) and not self.misses(sent)

    def comes_close(self, sent: Sent) -> bool:
        """Whether signal and sender are right."""
        return self.signal in (None, sent.signal) and self._is_sender(sent)

    def misses(self, sent: Sent) -> list[str]:
        """The filters besides signal and sender that do not let it through."""
        missed = [] if self.on in (None, sent.on) else [f"on={self.on!r}"]
        if self.receiver is not None and not any(map(self._is_receiver, sent.called)):
            missed.append(f"receiver={_shown(self.receiver)}")
        missed += [
            f"{name}={_shown(value)}"
            for name, value in self.arguments.items()
            if name not in sent.arguments or not _is_value(name, value, sent.arguments[name])
        ]
        return missed

    def is_of_models(self) -> bool:
        """Whether an installation sends it."""
        return self.signal is None or any(self.signal is one for one in model_signals)

    def has_listeners(self) -> bool:
        """Whether somebody listens; not who would get these arguments."""
        signals = [self.signal] if self.signal is not None else model_signals
        return any(
            self.on in (None, receiver.phase)
            and (self.receiver is None or self._is_receiver(receiver))
            and self._may_hear(signal, receiver)
            for signal in signals
            for receiver in signal.table.receivers
        )

    def _may_hear(self, signal: object, receiver: Receiver) -> bool:
        """Whether what this sender sends may reach a receiver; not if it can send nothing."""
        if self.sender is ANY:
            return True
        if all(signal is not one for one in model_signals):
            if receiver.matches(self.sender):  # it may be sent by anything
                return True
        elif isinstance(signal, AssociationSignal):
            table = _table_of(self.sender)
            wanted = _table_of(receiver.sender)
            return isinstance(table, Table) and (wanted is ANY or wanted is table)
        classes = [mapper.class_ for mapper in all_mappers()]
        return any(matches(self.sender, cls) and receiver.matches(cls) for cls in classes)

    def _is_sender(self, sent: Sent) -> bool:
        if isinstance(self.sender, QueryableAttribute):
            return _table_of(self.sender) is sent.sender
        return matches(self.sender, sent.sender)

    def _is_receiver(self, receiver: Receiver) -> bool:
        if isinstance(self.receiver, str):
            return receiver.name == self.receiver
        return bool(receiver.fn == self.receiver)

    def __str__(self) -> str:
        words = [self.signal.name if self.signal is not None else "any signal"]
        if self.sender is not ANY:
            words.append(describe_sender(self.sender))
        filters = {"on": self.on, "receiver": self.receiver}
        given = {name: value for name, value in filters.items() if value is not None}
        shown = [f"{name}={_shown(value)}" for name, value in {**given, **self.arguments}.items()]
        return " ".join(words) + (f" with {', '.join(shown)}" if shown else "")


def _table_of(sender: Any) -> Any:
    relationship = secondary_relationship(sender)
    return relationship.secondary if relationship is not None else sender


def _is_value(name: str, wanted: Any, value: Any) -> bool:
    if isinstance(wanted, FunctionType):
        return bool(wanted(value))
    if name == "changes" and isinstance(wanted, Mapping):
        return all(
            key in value and (value[key] if isinstance(new, Change) else value[key].new) == new
            for key, new in wanted.items()
        )
    if wanted is value:
        return True
    if name == "instance":
        return bool(row_of(wanted) == row_of(value))
    return bool(wanted == value)


def _shown(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)
