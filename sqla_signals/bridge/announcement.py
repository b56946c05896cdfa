"""Before the first statement: ``pre_*`` for every row that the flush is going to write."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from .._sqlalchemy import contains_state, deleted_states, pending_states
from ..changes import Changes
from ..errors import SignalRecursionError
from ..receivers import Receiver
from ..signals import m2m_changed, pre_delete, pre_save
from .columns import NOTHING
from .foresight import Foresight
from .guard import GUARDED_BEFORE, guarded

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper, Session

    from .calls import Calls
    from .m2m import M2M

    State = InstanceState[Any]

MAX_ROUNDS: Final = 100
"""How often ``pre_*`` receivers may add to one flush; SQLAlchemy's own limit in ``commit()``."""


class Announcement:
    """The ``pre_*`` signals of one flush."""

    def __init__(
        self, session: Session, objects: Sequence[object] | None, calls: Calls, m2m: M2M
    ) -> None:
        self._session = session
        self._m2m = m2m
        self._objects = objects
        self._calls = calls
        self._announced: dict[State, bool] = {}
        """Whose ``pre_*`` was sent, and whether that was ``pre_delete``."""
        self._foresight: Foresight | None = None

    @property
    def updated_mappers(self) -> Iterable[Mapper[Any]]:
        """The mappers of the changed instances."""
        foresight = self._foresight
        return {state.manager.mapper for state in foresight.updates} if foresight else ()

    def send(self) -> None:
        """Send ``pre_*`` for every row foreseen, until the receivers add nothing new."""
        if not (pre_save.receivers or pre_delete.receivers or m2m_changed.receivers):
            return
        callers: deque[list[Receiver]] = deque(maxlen=10)
        with guarded(self._session, GUARDED_BEFORE):
            for _ in range(MAX_ROUNDS):
                called = self._round() or self._announce_m2m()
                if not called:
                    return
                callers.append(called)
        names = " → ".join(dict.fromkeys(str(one) for called in callers for one in called))
        raise SignalRecursionError(
            f"pre_* receivers kept adding to the flush for {MAX_ROUNDS} rounds: {names}. "
            f"Let one of them do nothing for what another one has caused."
        )

    def send_late(self, state: State, is_delete: bool) -> None:
        """Send ``pre_*`` right before the statement, for a row that could not be foreseen."""
        if self._announced.get(state) is is_delete:
            return
        if self._calls.of(state.manager.mapper).receivers(pre_delete if is_delete else pre_save):
            with guarded(self._session, GUARDED_BEFORE):
                if is_delete:
                    self._delete(state, None)
                else:
                    self._save(state, NOTHING)

    def _announce_m2m(self) -> list[Receiver]:
        """Announce rows of secondary tables, once the signals of instances have settled."""
        if self._foresight is None or not m2m_changed.receivers:
            return []
        return self._m2m.announce(self._foresight.run)

    def _round(self) -> list[Receiver]:
        """Look at what the flush is going to write; announce what was not announced.

        Returns the receivers that were called, none if there was nothing new. Each row is looked
        at again right before its own signal, because the receivers before may have changed its
        fate; what they have brought up is found in the next round.
        """
        session, announced = self._session, self._announced
        # Held until the next round or the end of the flush, with what it loaded, so that no row
        # comes back as another object.
        foresight = self._foresight = Foresight(session, self._objects)
        saved = _Wanted(self._calls, is_delete=False)
        deleted = _Wanted(self._calls, is_delete=True)
        derived = [
            row
            for row in foresight.derived()
            if (deleted if row.is_delete else saved)[row.state.manager.mapper]
            and announced.get(row.state) is not row.is_delete
        ]
        assigned = {row.state for row in derived}
        saves = [
            state
            for states in (foresight.inserts, foresight.updates)
            for state in states
            if saved[state.manager.mapper]
            and announced.get(state) is not False
            and state not in assigned
        ]
        deletes = [
            state
            for state in foresight.deletes
            if deleted[state.manager.mapper] and announced.get(state) is not True
        ]
        held = [state.obj() for states in (saves, deletes) for state in states]
        callers: list[Receiver] = []
        for state in saves:
            callers += self._save(state, foresight.assigns(state))
        for row in derived:
            if not row.is_delete and row.still_stands(session):
                callers += self._save(row.state, row.assigns)
        origins = foresight.origins() if deletes or any(row.is_delete for row in derived) else {}
        for state in deletes:
            if state in deleted_states(session):
                callers += self._delete(state, origins.get(state))
        for row in derived:
            if row.is_delete and row.still_stands(session):
                callers += self._delete(row.state, origins.get(row.state))
        del held
        return callers

    def _save(self, state: State, assigns: Mapping[str, Any]) -> Sequence[Receiver]:
        """Send ``pre_save``, unless the row is not going to be written any more.

        :param assigns: what the flush is going to assign to it.
        """
        calls = self._calls.of(state.manager.mapper)
        if state in pending_states(self._session):
            self._announced[state] = False
            return self._save_new(state, calls.receivers(pre_save))
        columns = calls.columns
        changed = columns.assigned(state)
        if not self._is_written(state) or not (
            columns.will_write(state, assigns) if assigns else changed
        ):
            return ()
        self._announced[state] = False
        receivers = calls.receivers(pre_save)
        for receiver in receivers:
            if receiver is not receivers[0]:  # the one before may have assigned something
                changed = columns.assigned(state)
            fields = frozenset(changed)
            if receiver.passes(calls.mapper, fields, assigns):
                calls.save(
                    pre_save,
                    receiver,
                    state.obj(),
                    False,
                    Changes(changed.copy),
                    fields,
                    self._calls.raw,
                )
        return receivers

    def _save_new(self, state: State, receivers: Sequence[Receiver]) -> Sequence[Receiver]:
        calls = self._calls.of(state.manager.mapper)
        instance = state.obj()
        for receiver in receivers:
            changes = Changes(partial(calls.columns.given, dict(state.dict)))
            calls.save(pre_save, receiver, instance, True, changes, None, self._calls.raw)
        return receivers

    def _is_written(self, state: State) -> bool:
        session, foresight = self._session, self._foresight
        if state in deleted_states(session):
            return foresight is not None and state in foresight.kept
        return contains_state(session, state)

    def _delete(self, state: State, origin: Any) -> Sequence[Receiver]:
        self._announced[state] = True
        calls = self._calls.of(state.manager.mapper)
        receivers = calls.receivers(pre_delete)
        for receiver in receivers:
            calls.delete(pre_delete, receiver, state.obj(), origin)
        return receivers


class _Wanted(dict["Mapper[Any]", bool]):
    """For each mapper: whether anybody is to be told of its saves, or of its deletes."""

    def __init__(self, calls: Calls, *, is_delete: bool) -> None:
        super().__init__()
        self._calls = calls
        self._signal = pre_delete if is_delete else pre_save

    def __missing__(self, mapper: Mapper[Any]) -> bool:
        self[mapper] = found = bool(self._calls.of(mapper).receivers(self._signal))
        return found
