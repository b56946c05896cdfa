"""Receivers that act: each does one thing to the session when one signal comes for one class."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy import Integer, String, exc, inspect, select
from sqlalchemy.orm import Session

from .models import Audit, Base
from .recorder import Sent

if TYPE_CHECKING:
    from .program import Program


class Veto(Exception):
    """Raised by a receiver that prevents a flush."""


SIGNALS = ("pre_save", "post_save", "pre_delete", "post_delete")
ACTIONS = (
    "add_audit",
    "change_itself",
    "change_other",
    "delete_other",
    "expunge_other",
    "add_child",
    "query",
    "veto",
)


class Meddler:
    """Does `action` when `signal` comes for an instance of `sender`; others are of class `target`.

    All it assigns are constants, so that a flush settles.
    """

    def __init__(
        self,
        signal: str,
        sender: type[Base],
        action: str,
        target: type[Base],
        program: Program,
    ) -> None:
        self.signal, self.sender, self.action, self.target = signal, sender, action, target
        self.program = program
        self._done: set[int] = set()
        self._flush: Any = None

    def __str__(self) -> str:
        classes = self.sender.__name__, self.target.__name__
        return f"meddle({self.signal!r}, {classes[0]}, {self.action!r}, {classes[1]})"

    def __call__(self, sent: Sent, session: Session) -> None:
        if sent.signal != self.signal or type(sent.instance) is not self.sender:
            return
        if self._flush is not self.program.recorder.flush:
            self._flush, self._done = self.program.recorder.flush, set()
        if id(sent.instance) in self._done:
            return
        self._done.add(id(sent.instance))
        # What it wants to act on may not be in a state to be acted on.
        with suppress(exc.InvalidRequestError):
            getattr(self, f"_{self.action}")(sent.instance, session)

    def _others(self, instance: object, session: Session) -> list[Any]:
        return [
            value
            for value in self.program.variables.values()
            if isinstance(value, self.target) and value is not instance and value in session
        ]

    def _add_audit(self, instance: object, session: Session) -> None:
        session.add(Audit(name=self.signal))

    def _change_itself(self, instance: Any, session: Session) -> None:
        if self.signal.endswith("_save"):
            _change(instance, 7)

    def _change_other(self, instance: object, session: Session) -> None:
        for other in self._others(instance, session)[:1]:
            _change(other, 8)

    def _delete_other(self, instance: object, session: Session) -> None:
        for other in self._others(instance, session)[:1]:
            session.delete(other)

    def _expunge_other(self, instance: object, session: Session) -> None:
        for other in self._others(instance, session)[:1]:
            session.expunge(other)

    def _add_child(self, instance: Any, session: Session) -> None:
        for relation in inspect(instance).mapper.relationships:
            if relation.uselist and relation.collection_class is None and relation.lazy == "select":
                if len(getattr(instance, relation.key)) < 3:
                    getattr(instance, relation.key).append(relation.mapper.class_())
                return

    def _query(self, instance: object, session: Session) -> None:
        session.scalars(select(self.target)).all()

    def _veto(self, instance: object, session: Session) -> None:
        self.program.recorder.meddlers.remove(self)
        raise Veto(self.signal)


def _change(instance: Any, value: int) -> None:
    mapper = inspect(instance).mapper
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        if attribute.key == "name" and isinstance(column.type, String):
            instance.name = str(value)
            return
        if attribute.key in ("n", "x", "salary") and isinstance(column.type, Integer):
            setattr(instance, attribute.key, value)
            return
