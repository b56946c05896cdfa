"""The kinds of signals that are built in: what may connect to each, and with which options."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Unpack

from blinker import ANY
from sqlalchemy.schema import Table

from .._sqlalchemy.mappers import secondary_relationship
from ..errors import ReceiverOptionError
from ..receivers import mapped
from ..receivers.installations import model_signals
from ..receivers.protocols import M, Options, OtherSender, P, R, ReceiverOf
from ..receivers.receiver import (
    On,
    Receiver,
    check_durable_name,
    describe_sender,
    identity,
    is_class_name,
)
from .signal import Signal

if TYPE_CHECKING:
    from collections.abc import Callable


class FailureSignal(Signal):
    """Sent when a call after the transaction has failed, where nothing can be awaited."""

    _awaits = False


class InstalledSignal(Signal):
    """A signal that an installation sends, not the user; its sender is a mapped class."""

    _remedy = "give a mapped class, a base class or mixin of models, or a class name"

    def __init__(
        self,
        name: str,
        doc: str,
        *,
        arguments: Collection[str],
        phases: tuple[On, ...] = ("flush",),
    ) -> None:
        super().__init__(name, doc, arguments=arguments)
        self._phases = phases
        model_signals.append(self)

    def _is_sender(self, sender: Any) -> bool:
        return isinstance(sender, str | type)

    def _check_sender(self, sender: Any) -> None:
        if sender is not ANY and not self._is_sender(sender):
            raise ReceiverOptionError(
                f"sender={describe_sender(sender)} is not a sender of this signal; {self._remedy}"
            )
        if isinstance(sender, str) and not is_class_name(sender):
            raise ReceiverOptionError(
                f"sender={sender!r} is not the name of a class. Write 'Order', or "
                f"'shop.models.Order' if there are several."
            )

    def _check_receivers(self, receivers: Collection[Receiver]) -> None:
        super()._check_receivers(receivers)
        mapped.connect(self, receivers)


class AssociationSignal(InstalledSignal):
    """Sent by the ``secondary`` table of a many-to-many relationship, not by a class."""

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


class ModelSignal(InstalledSignal):
    """Sent by a mapped class, for one of its instances."""

    _tells_changes = True

    if TYPE_CHECKING:

        def connect(  # type: ignore[override]  # takes fewer receivers than its base
            self,
            receiver: ReceiverOf[M, P, R],
            sender: type[M] | OtherSender = ANY,
            weak: bool = True,
            **options: Unpack[Options],
        ) -> Callable[P, R]:
            """Like :meth:`Signal.connect`, for receivers that take an instance of ``sender``."""
            ...

    def _check_durable(self, receiver: Callable[..., Any], on: On, name: str) -> None:
        if "commit" not in self._phases or on == "rollback":
            raise ReceiverOptionError(
                f"durable=True delivers what was committed, which "
                f"{self.name if on != 'rollback' else 'on=' + repr(on)} does not know. "
                f"Connect it to post_save or post_delete, and leave out on="
            )
        check_durable_name(name)
        for known in mapped.durable_receivers():
            if known.name == name and known.fn_id != identity(receiver):
                raise ReceiverOptionError(
                    f"durable=True: {known} has the name {name!r} already, and a worker could not "
                    f"tell the two apart. Give one of them another name="
                )


class InstanceSignal(ModelSignal):
    """Sent while Python makes a class or an instance: no row is written, nothing is awaited."""

    _awaits = False
    _tells_changes = False
