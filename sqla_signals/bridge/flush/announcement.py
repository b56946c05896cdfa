"""Before the first statement: ``pre_*`` for every row that the flush is going to write."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..._sqlalchemy.instances import instance_dict, is_still_kept
from ..._sqlalchemy.unit_of_work import (
    deleted_states,
    in_order,
    modified_states,
    pending_states,
)
from ...changes.change import NO_DIFF, Changes, Diff, PendingRow
from ...errors import SignalRecursionError
from ...receivers.receiver import Receiver
from ...signals.builtin import m2m_changed, pre_delete, pre_save
from ..calling.audience import Audiences, audience_of
from ..calling.guard import IN_PRE, guarded
from ..columns.columns import NOTHING
from .foresight import Foresight, Relations, RelationsByMapper, mappers_of

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper, Session

    from ...signals.signal import Signal
    from ..calling.calls import Calls
    from .m2m import M2M

    State = InstanceState[Any]
    Assigns = Mapping[State, Mapping[str, Any]]

MAX_ROUNDS: Final = 100
"""How often ``pre_*`` receivers may add to one flush; SQLAlchemy's own limit in ``commit()``."""


class Announcement:
    """The ``pre_*`` signals of one flush."""

    def __init__(
        self, session: Session, objects: Iterable[object] | None, calls: Calls, m2m: M2M
    ) -> None:
        self._session = session
        self._m2m = m2m
        self._objects = objects
        self._calls = calls
        self.hears_saves: bool = False
        """Whether anybody is to be told before any row is saved, after :meth:`send`."""
        # A state is in one of these at most: where what becomes of it was announced last.
        self.created: dict[State, None] = {}
        """Whose ``pre_save`` was sent for an INSERT. A set, without a call for each row."""
        self.updates: dict[State, Diff] = {}
        """Whose ``pre_save`` was sent for an UPDATE, with what was assigned then."""
        self.deletes: set[State] = set()
        """Whose ``pre_delete`` was sent."""
        self._called: dict[Receiver, None] = {}
        self._noted: tuple[Receiver, ...] | None = None
        self._foresight: Foresight | None = None

    @property
    def updated_mappers(self) -> Iterable[Mapper[Any]]:
        """The mappers of which a row may be updated, as far as it was asked."""
        return self._foresight.updated_mappers if self._foresight is not None else ()

    @property
    def failure(self) -> str | None:
        """Why the rows could not be foreseen."""
        return self._foresight.failure if self._foresight is not None else None

    def send(self) -> None:
        """Send ``pre_*`` for every row foreseen, until the receivers add nothing new."""
        if pre_save.table.receivers or pre_delete.table.receivers or m2m_changed.table.receivers:
            # The instances of a partial flush may be given by a generator, which is for the flush.
            if not isinstance(self._objects, Iterator) and not self._is_settled():
                self._send_until_settled()
            # Now, because a receiver may have connected the first one.
            self.hears_saves = bool(pre_save.table.receivers)

    def _is_settled(self) -> bool:
        """Whether nothing is left to announce, as far as that is seen without a dry run.

        In doubt it is not: an instance whose relationships may write other rows is for the dry run.
        """
        session = self._session
        return (
            _are_settled(pending_states(session), self.created, pre_save, Relations.of_pending)
            and _are_settled(
                modified_states(session), self.updates, pre_save, Relations.of_persistent
            )
            and _are_settled(
                deleted_states(session), self.deletes, pre_delete, Relations.of_deleted
            )
        )

    def _send_until_settled(self) -> None:
        rounds: deque[Iterable[Receiver]] = deque(maxlen=10)
        with guarded(self._session, IN_PRE):
            for _ in range(MAX_ROUNDS):
                self._called, self._noted = {}, None
                self._round()
                if not self._called:
                    self._announce_m2m()
                if not self._called or self._is_settled():
                    return
                rounds.append(self._called)
        names = " → ".join(dict.fromkeys(str(one) for called in rounds for one in called))
        raise SignalRecursionError(
            f"pre_* receivers kept adding to the flush for {MAX_ROUNDS} rounds: {names}. "
            f"Let one of them do nothing for what another one has caused."
        )

    def send_late(self, state: State, is_delete: bool) -> None:
        """Send ``pre_*`` right before the statement, for a row that could not be foreseen."""
        model = self._calls[state.manager.mapper]
        if model.receivers(pre_delete if is_delete else pre_save):
            with guarded(self._session, IN_PRE):
                if is_delete:
                    self._delete(state, state.obj(), None)
                elif state in pending_states(self._session):
                    self._save_new([state])
                else:
                    self._save_changed([state], {})

    def _announce_m2m(self) -> None:
        """Announce rows of secondary tables, once the signals of instances have settled."""
        if self._foresight is not None and m2m_changed.table.receivers:
            self._called.update(dict.fromkeys(self._m2m.announce(self._foresight.run)))

    def _round(self) -> None:
        """Look at what the flush is going to write; announce what was not announced.

        Each row is looked at again right before its own signal, because the receivers before may
        have changed its fate; what they have brought up is found in the next round.
        """
        session = self._session
        # Held until the next round or the end of the flush, with what it loaded, so that no row
        # comes back as another object.
        foresight = self._foresight = Foresight(session, self._objects, self.updates)
        audiences = Audiences()
        derived = [
            row
            for row in foresight.derived()
            if (
                audiences[row.state.manager.mapper].hears_before_deletes
                and row.state not in self.deletes
                if row.is_delete
                else audiences[row.state.manager.mapper].hears_before_saves
                and row.state not in self.updates
            )
        ]
        inserts = [
            state
            for state in foresight.inserts
            if state not in self.created and audiences[state.manager.mapper].hears_before_saves
        ]
        settled = self.updates.keys() | {row.state for row in derived}
        updates = [
            state
            for state in foresight.updates
            if state not in settled and audiences[state.manager.mapper].hears_before_saves
        ]
        deletes = [
            state
            for state in foresight.deletes
            if state not in self.deletes and audiences[state.manager.mapper].hears_before_deletes
        ]
        self._save_new(inserts)
        self._save_changed(in_order(updates), foresight.run.assigns)
        for row in derived:
            if not row.is_delete and row.still_stands(session):
                self._save_changed([row.state], {row.state: row.assigns})
        origins = foresight.origins() if deletes or any(row.is_delete for row in derived) else {}
        for state, instance in [(state, state.obj()) for state in deletes]:
            if state in deleted_states(session):
                self._delete(state, instance, origins.get(state))
        for row in derived:
            if row.is_delete and row.still_stands(session):
                self._delete(row.state, row.instance, origins.get(row.state))

    def _save_new(self, states: Sequence[State]) -> None:
        """Send ``pre_save`` of rows to be inserted, unless they are not any more."""
        calls, pending = self._calls, pending_states(self._session)
        for state, instance in zip(states, [state.obj() for state in states], strict=True):
            if state not in pending:
                continue
            model = calls[state.manager.mapper]
            self.created[state] = None
            if self.updates:
                self.updates.pop(state, None)
            if self.deletes:
                self.deletes.discard(state)
            receivers = model.receivers(pre_save)
            if receivers is not self._noted:
                self._note(receivers)
            for receiver in receivers:
                if state not in pending:  # the receiver before has made something else of it
                    break
                changes = PendingRow(model.columns.absent, instance_dict(instance).copy())
                model.save(pre_save, (receiver,), instance, True, changes, None, calls.raw)

    def _save_changed(self, states: Sequence[State], assigns: Assigns) -> None:
        """Send ``pre_save`` of rows to be updated, unless they are not any more.

        :param assigns: what the flush is going to assign to each.
        """
        session, calls = self._session, self._calls
        for state, instance in zip(states, [state.obj() for state in states], strict=True):
            if not is_still_kept(session, state) and not self._is_kept_though_marked(state):
                continue
            model = calls[state.manager.mapper]
            columns = model.columns
            diff = columns.diff(state)
            foreseen = assigns.get(state, NOTHING) if assigns else NOTHING
            if not (columns.will_write(state, foreseen) if foreseen else diff is not NO_DIFF):
                continue
            self.updates[state] = diff
            if self.created:
                self.created.pop(state, None)
            if self.deletes:
                self.deletes.discard(state)
            receivers = model.receivers(pre_save)
            if receivers is not self._noted:
                self._note(receivers)
            first = True
            for receiver in receivers:
                if not first:  # the receiver before may have assigned something, or deleted it
                    if not is_still_kept(session, state) and not self._is_kept_though_marked(state):
                        break
                    diff = columns.diff(state)
                first = False
                unknown = diff[0].unknown
                if foreseen:
                    written = columns.written_along((*diff[0].places, *foreseen))
                    unknown = columns.may_change(written)
                model.save(
                    pre_save,
                    (receiver,),
                    instance,
                    False,
                    Changes(diff),
                    diff[0].changed,
                    calls.raw,
                    unknown=unknown,
                )

    def _is_kept_though_marked(self, state: State) -> bool:
        return (
            self._foresight is not None
            and state in self._foresight.kept
            and state in deleted_states(self._session)
        )

    def _delete(self, state: State, instance: Any, origin: Any) -> None:
        """Send ``pre_delete``."""
        self.created.pop(state, None)
        self.updates.pop(state, None)
        self.deletes.add(state)
        model = self._calls[state.manager.mapper]
        receivers = model.receivers(pre_delete)
        self._note(receivers)
        for receiver in receivers:
            model.delete(pre_delete, (receiver,), instance, origin)

    def _note(self, receivers: tuple[Receiver, ...]) -> None:
        """These are called in this round. One by one: each sees what the one before has done."""
        self._noted = receivers
        self._called.update(dict.fromkeys(receivers))


def _are_settled(
    states: Collection[State],
    announced: Iterable[State],
    signal: Signal,
    matters: Callable[[Relations, State], bool],
) -> bool:
    """Whether each of the states was announced, if anybody listens, and concerns no other row.

    :param matters: whether flushing a state may write other rows, or delete its own.
    """
    if not states:
        return True
    mappers = mappers_of(states)
    heard = {mapper for mapper in mappers if audience_of(mapper).phases[signal]["flush"]}
    if heard == mappers:
        left = set(states).difference(announced)
    else:
        left = {one for one in states if one.manager.mapper in heard}.difference(announced)
    if left:
        return False
    relations = RelationsByMapper()
    if not relations.matter_to(mappers):
        return True
    return not any(matters(relations[state.manager.mapper], state) for state in states)
