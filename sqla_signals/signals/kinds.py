"""Signals of an installation that are about something else than the row of one instance."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from blinker import ANY
from sqlalchemy.schema import Table

from .._sqlalchemy.associations import secondary_relationship
from ..errors import ReceiverOptionError, ReceiverTypeError
from ..receivers import mapping
from ..receivers.receiver import Phase, Receiver, describe, describe_sender
from .signal import ModelSignal, Signal, refuse_fields

if TYPE_CHECKING:
    from collections.abc import Callable


class FailureSignal(Signal):
    """Tells of what has failed after a transaction, where nothing can be awaited."""

    def _check_receivers(self, receivers: Collection[Receiver]) -> None:
        refuse_async(self, receivers)
        super()._check_receivers(receivers)


def refuse_async(signal: Signal, receivers: Collection[Receiver]) -> None:
    """Refuse receivers that would have to be awaited."""
    for receiver in receivers:
        if receiver.is_async:
            raise ReceiverTypeError(
                f"{signal.name}: receiver {receiver} is async, but what sends {signal.name} never "
                f"awaits. Make it a plain function."
            )


class SpecialSignal(Signal):
    """A signal that an installation sends, and not for the row of one instance.

    ``fields`` is refused: it filters by the changes of a row.
    """

    _remedy: str

    def __init__(
        self, name: str, doc: str, *, arguments: Collection[str], phases: tuple[Phase, ...]
    ) -> None:
        super().__init__(name, doc, arguments=arguments)
        self._phases = phases
        mapping.model_signals.append(self)

    def _is_sender(self, sender: Any) -> bool:
        raise NotImplementedError

    def _check_sender(self, sender: Any, receiver: Callable[..., Any]) -> None:
        if sender is not ANY and not self._is_sender(sender):
            raise ReceiverOptionError(
                f"{self.name}: receiver {describe(receiver)}: sender={describe_sender(sender)} is "
                f"no sender of this signal; {self._remedy}"
            )

    def _check_receivers(self, receivers: Collection[Receiver]) -> None:
        super()._check_receivers(receivers)
        mapping.connected(self, receivers)


class AssociationSignal(SpecialSignal):
    """Sent by the ``secondary`` table of a many-to-many relationship."""

    _remedy = (
        "give the Table that is the relationship's secondary, or the relationship itself, "
        "User.groups. The rows of an association class are instances: for these there are "
        "post_save and post_delete"
    )

    def _is_sender(self, sender: Any) -> bool:
        if isinstance(sender, Table):
            return True
        prop = secondary_relationship(sender)
        return prop is not None and not prop.viewonly


class BulkSignal(SpecialSignal):
    """Sent by a mapped class, for a statement about any number of its rows."""

    _remedy = "give a mapped class, a base class or mixin of models, or a class name"

    def _is_sender(self, sender: Any) -> bool:
        return isinstance(sender, str | type)


class InstanceSignal(ModelSignal):
    """A signal of the Python side of a model: no row is written, and nothing can be awaited."""

    def __init__(self, name: str, doc: str, *, arguments: Collection[str]) -> None:
        super().__init__(name, doc, arguments=arguments, phases=("flush",))

    def _check_receivers(self, receivers: Collection[Receiver]) -> None:
        refuse_async(self, receivers)
        refuse_fields(self, receivers)
        super()._check_receivers(receivers)
