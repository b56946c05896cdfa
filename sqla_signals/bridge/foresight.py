"""What a flush will write, found out before it begins.

``Session.dirty`` and ``Session.deleted`` do not tell: an orphan is found, a foreign key set or
nulled, only inside the flush. A :class:`Foresight` therefore makes a dry run of the unit of work,
registering what ``Session._flush`` would register, and reads off what it would write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import inspect

from .._sqlalchemy import (
    DryRun,
    contains_state,
    deleted_states,
    in_order,
    is_orphan,
    modified_states,
    orphaned_outside_of_session,
    pending_states,
)
from .columns import columns_of

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper, Session

    State = InstanceState[Any]


class Foreseen(NamedTuple):
    """One row that the flush is going to write."""

    state: State
    instance: Any
    """Held, so that the row does not come back as another object."""
    is_delete: bool
    origin: Any
    """Of a delete: the deleted instance whose cascade takes this one along."""
    assigns: dict[str, Any]
    """Of an UPDATE: what the flush itself will assign; ``UNSET`` for a key not generated yet."""
    cause: State | None
    """The state because of which this one is written, if it is not written for itself."""
    stamp: Stamp | None

    def still_stands(self, session: Session) -> bool:
        """Whether nothing has happened since that might have changed this row's fate.

        In doubt it does not stand: the next dry run finds the row again if it is still written.
        """
        state = self.state
        if self.stamp is not None:
            return Stamp.of(session, state, self.cause) == self.stamp
        if self.is_delete:
            return state in deleted_states(session)
        return state in pending_states(session) or (
            state not in deleted_states(session)
            and contains_state(session, state)
            and columns_of(state.mapper).will_write(state, self.assigns)
        )


class Stamp(NamedTuple):
    """What the fate of a row hangs on that is written because of another one."""

    fate: tuple[bool, bool, bool]
    parents: tuple[Any, ...]
    committed: int
    cause: Stamp | None

    @classmethod
    def of(cls, session: Session, state: State, cause: State | None) -> Stamp:
        """The stamp of a state, and of the one because of which it is written."""
        return cls(
            (
                state in pending_states(session),
                state in deleted_states(session),
                contains_state(session, state),
            ),
            tuple(state.parents.values()),
            len(state.committed_state),
            None if cause is None else cls.of(session, cause, None),
        )


class Foresight:
    """One dry run. Keep it as long as what it found is of interest: it holds what it loaded."""

    def __init__(self, session: Session, objects: Sequence[object] | None) -> None:
        self.session = session
        self._run = DryRun(session)
        self._register(objects)
        self._run.presort()
        self._run.synchronize()

    def _register(self, objects: Sequence[object] | None) -> None:
        """Register what ``Session._flush`` would, and drop what it would drop."""
        session, run = self.session, self._run
        deleted = deleted_states(session)
        only = {inspect(instance) for instance in objects} if objects else None
        saved = [*pending_states(session), *in_order(modified_states(session))]
        for state in saved:
            if state in deleted or (only is not None and state not in only):
                continue
            orphan = is_orphan(state)
            if orphan and not state.has_identity and orphaned_outside_of_session(state):
                continue
            run.register_object(state, isdelete=orphan and state.has_identity)
        for state in deleted:
            if only is None or state in only:
                run.register_object(state, isdelete=True)

    @property
    def mappers(self) -> Iterable[Mapper[Any]]:
        """The mappers of everything that takes part in the flush."""
        return self._run.mappers.keys()

    def rows(self, wanted: Callable[[Mapper[Any], bool], bool]) -> Iterator[Foreseen]:
        """The rows to be written: inserts and updates, then deletes, each in a settled order.

        :param wanted: asked with a mapper and whether it is a delete; others are left out.
        """
        run, pending = self._run, pending_states(self.session)
        saves: list[State] = []
        deletes: list[State] = []
        for state, (is_delete, listonly) in run.states.items():
            if not listonly or state in run.post_updates:
                (deletes if is_delete else saves).append(state)
        for state in saves:
            if wanted(state.mapper, False):
                assigns = run.assigns.get(state, {})
                if state in pending or columns_of(state.mapper).will_write(state, assigns):
                    yield self._row(state, False, None, assigns)
        if any(wanted(state.mapper, True) for state in deletes):
            origins = cascade_origins(self.session, deletes)
            for state in deletes:
                if wanted(state.mapper, True):
                    yield self._row(state, True, origins.get(state), {})

    def _row(self, state: State, is_delete: bool, origin: Any, assigns: dict[str, Any]) -> Foreseen:
        session, cause = self.session, self._run.causes.get(state)
        derived = assigns or (is_delete and state not in deleted_states(session))
        stamp = Stamp.of(session, state, cause) if derived else None
        return Foreseen(state, state.obj(), is_delete, origin, assigns, cause, stamp)


def cascade_origins(session: Session, deletes: Iterable[State]) -> dict[State, Any]:
    """For each state that a cascade deletes: the instance that was deleted in the first place.

    ``Session.delete()`` marks the instance first and what its cascade reaches right after it, so
    one that was marked before is a direct delete. Orphans, which are never marked, come last.
    """
    taken = set(deletes)
    marked = deleted_states(session)
    heads: dict[State, State] = {}
    if len(taken) > 1:
        direct: set[State] = set()
        for head in (*marked, *(state for state in taken if state not in marked)):
            if head in marked:
                direct.add(head)
            for _, _, state, _ in head.mapper.cascade_iterator("delete", head):
                if state in taken and state not in direct:
                    heads.setdefault(state, head)
    return {state: root.obj() for state in heads if (root := _root(state, heads)) is not state}


def _root(state: State, heads: dict[State, State]) -> State:
    seen = {state}
    while (head := heads.get(state)) is not None and head not in seen:
        seen.add(head)
        state = head
    return state
