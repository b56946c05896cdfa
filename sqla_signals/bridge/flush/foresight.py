"""What a flush will write, found out before it begins.

``Session.dirty`` and ``Session.deleted`` do not tell: an orphan is found, a foreign key set or
nulled, only inside the flush. So the instances from which that could come, those with changed
relationships and deleted ones, go through a dry run of the unit of work; the others are written
for what they are: added, deleted, or changed in a column.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from operator import attrgetter
from traceback import format_exc
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import MANYTOONE

from ..._sqlalchemy.dry_run import DryRun
from ..._sqlalchemy.instances import (
    contains_state,
    has_pending_mutations,
    is_orphan,
    orphaned_outside_of_session,
    state_of,
)
from ..._sqlalchemy.mappers import (
    can_orphan,
    is_referenced,
    manager_of_class,
    referenced_keys,
    relations_size,
)
from ..._sqlalchemy.unit_of_work import deleted_states, in_order, modified_states, pending_states
from ..columns.by_mapper import columns_of

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper, Session

    State = InstanceState[Any]


class Derived(NamedTuple):
    """A row that is written because of another instance."""

    state: State
    instance: Any
    """Held, so that the row does not come back as another object."""
    is_delete: bool
    assigns: dict[str, Any]
    """Of an UPDATE: what the flush itself will assign; ``UNSET`` for a key not generated yet."""
    cause: State | None
    """The state because of which this one is written, if it is not its own relationship."""
    stamp: Stamp

    def still_stands(self, session: Session) -> bool:
        """Whether nothing has happened since that might have changed this row's fate.

        In doubt it does not stand: the next dry run finds the row again if it is still written.
        """
        return Stamp.of(session, self.state, self.cause) == self.stamp


class Stamp(NamedTuple):
    """What the fate of a derived row hangs on."""

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
    """The rows of one flush to come, as they are to be written at this moment.

    Keep it as long as what it found is of interest: it holds what the dry run loaded.

    :param announced: whose changes are known already; they may be left out of ``updates``.
    """

    inserts: list[State]
    updates: list[State]
    """Changed in a column by the application; whether it writes anything is not asked yet."""
    deletes: list[State]
    """Given to ``session.delete()``, or reached by its cascade."""
    kept: set[State]
    """Marked as deleted, but not by this flush: added to a collection since, which cancels the
    deletion, or left out of a partial flush."""
    failure: str | None = None
    """The traceback, if SQLAlchemy could not even find out what it is going to write."""

    def __init__(
        self, session: Session, objects: Iterable[object] | None, announced: Collection[State] = ()
    ) -> None:
        self._session = session
        if isinstance(objects, Iterator):  # of no second use, so it is left to the flush
            objects = None
        only = {state_of(instance) for instance in objects} if objects else None
        self.run: DryRun = DryRun(session, only)
        deleted = deleted_states(session)
        relations = RelationsByMapper()
        # As Session._flush sorts them: a top-level orphan is deleted, or was never to be added.
        pending = pending_states(session)
        self.inserts = list(pending if only is None else (s for s in pending if s in only))
        if relations.matter_to(mappers_of(self.inserts)):
            self.run.dropped = {
                state
                for state in self.inserts
                if relations[state.manager.mapper].can_orphan
                and orphaned_outside_of_session(state)
                and is_orphan(state)
            }
            self.inserts = [state for state in self.inserts if state not in self.run.dropped]
            for state in self.inserts:
                if relations[state.manager.mapper].of_pending(state):
                    self.run.register_object(state)
        modified = modified_states(session)
        self._changed = mappers_of(modified)
        modified.difference_update(deleted)
        if only is not None:
            modified &= only
        if relations.matter_to(self._changed):
            self._register_changed(modified, relations)
        else:
            modified.difference_update(announced)
        self.updates = list(modified)
        self._marked = {state: True for state in deleted if only is None or state in only}
        for state in self._marked:
            self.run.register_object(state, isdelete=True)
        if self.run.states:
            try:
                self.run.presort()
                self.run.synchronize()
            except DBAPIError:
                raise  # the first error is the cause: the transaction may be of no use from here on
            except Exception:
                # The flush is going to fail of it by itself, and then has something to roll back.
                self.failure = format_exc()
                self.run.forget()
            self.inserts = [state for state in self.inserts if not self._is_deleted(state)]
            self.updates = [state for state in self.updates if not self._is_deleted(state)]
        if only is not None:
            self._take_along(only)
        self.deletes = [state for state in self._marked if self._is_deleted(state)]
        self.kept = {state for state in deleted if not self._is_deleted(state)}
        self.updates += [state for state in self._marked if state in self.kept]

    def _register_changed(self, modified: set[State], relations: RelationsByMapper) -> None:
        """Register what may write other rows, and take the orphans out."""
        orphans = {state for state in modified if relations[state.manager.mapper].is_orphan(state)}
        related = [
            state for state in modified if relations[state.manager.mapper].of_persistent(state)
        ]
        for state in in_order(related):
            self.run.register_object(state, isdelete=state in orphans)
        modified -= orphans

    def _take_along(self, only: set[State]) -> None:
        """A partial flush writes all changes of an instance that a relationship leads to."""
        for state, (is_delete, listonly) in self.run.states.items():
            if not is_delete and not listonly and state not in only:
                (self.inserts if state.key is None else self.updates).append(state)

    @property
    def updated_mappers(self) -> set[Mapper[Any]]:
        """The mappers of which a row may be updated."""
        return self._changed | mappers_of(self.run.assigns)

    def derived(self) -> Iterator[Derived]:
        """The rows that are written because of another instance or a relationship.

        A state of ``updates`` can be among them, if the flush is going to assign it a foreign key.
        """
        run, session = self.run, self._session
        for state in dict.fromkeys((*run.assigns, *run.states)):
            is_delete, listonly = run.states.get(state, (False, True))
            if is_delete:
                if state in self._marked or state.key is None:  # the latter has no row
                    continue
            elif (
                state.key is None
                or state not in run.assigns
                or (listonly and state not in run.post_updates)
                or not columns_of(state.manager.mapper).will_write(state, run.assigns[state])
            ):
                continue
            cause = run.causes.get(state)
            stamp = Stamp.of(session, state, cause)
            assigns = run.assigns.get(state, {})
            yield Derived(state, state.obj(), is_delete, assigns, cause, stamp)

    def _is_deleted(self, state: State) -> bool:
        return bool(self.run.states.get(state, (False, False))[0])

    def origins(self) -> dict[State, Any]:
        """For each instance that a cascade deletes: the one that was deleted in the first place."""
        deletes = [state for state, (is_delete, _) in self.run.states.items() if is_delete]
        return cascade_origins(self._session, deletes)


class Relations:
    """What of one mapper's instances can make a flush write other rows, or a foreign key."""

    __slots__ = ("_changes", "_of_pending", "are_none", "can_orphan", "size")

    def __init__(self, mapper: Mapper[Any]) -> None:
        self.size: int = relations_size(mapper)
        active = [prop for prop in mapper.relationships if not prop.viewonly]
        keys = {prop.key for prop in active}
        # A new row writes its own foreign keys alone. But one that was another row before, as with
        # make_transient(), may have been the only parent of what it referred to.
        self._of_pending = frozenset(
            prop.key
            for prop in active
            if prop.direction is not MANYTOONE or prop.cascade.delete_orphan
        )
        keys |= {mapper.get_property_by_column(column).key for column in mapper.primary_key}
        keys |= set(referenced_keys(mapper))
        self._changes = frozenset(keys)
        self.can_orphan: bool = can_orphan(mapper)
        self.are_none: bool = not active and not self.can_orphan and not is_referenced(mapper)
        """Whether instances of this mapper are written for their own sake alone."""

    def of_pending(self, state: State) -> bool:
        """Whether adding this instance can change the row of another one."""
        return not self._of_pending.isdisjoint(state.dict)

    def of_persistent(self, state: State) -> bool:
        """Whether this instance's changes are more than columns of its own."""
        return (
            not self._changes.isdisjoint(state.committed_state)
            or has_pending_mutations(state)
            or self.is_orphan(state)
        )

    def of_deleted(self, state: State) -> bool:
        """Whether deleting this instance can change the row of another one."""
        return not self.are_none

    def is_orphan(self, state: State) -> bool:
        """Whether the flush deletes this persistent instance, which has lost its parent."""
        return self.can_orphan and is_orphan(state)


class RelationsByMapper(dict["Mapper[Any]", Relations]):
    """The :class:`Relations` of the classes that one flush meets."""

    def __missing__(self, mapper: Mapper[Any]) -> Relations:
        self[mapper] = found = relations_of(mapper)
        return found

    def matter_to(self, mappers: Iterable[Mapper[Any]]) -> bool:
        """Whether an instance of any of the classes can make a flush write more than itself."""
        return not all([self[mapper].are_none for mapper in mappers])


def mappers_of(states: Iterable[State]) -> set[Mapper[Any]]:
    """The mappers of the states. By way of the classes, because there are many states."""
    return {manager_of_class(cls).mapper for cls in set(map(_class, states))}


_class: Final = attrgetter("class_")


_relations: WeakKeyDictionary[Mapper[Any], Relations] = WeakKeyDictionary()


def relations_of(mapper: Mapper[Any]) -> Relations:
    """The :class:`Relations` of a mapper, made again if relationships were added since."""
    found = _relations.get(mapper)
    if found is None or found.size != relations_size(mapper):
        found = _relations[mapper] = Relations(mapper)
    return found


def cascade_origins(session: Session, deletes: Iterable[State]) -> dict[State, Any]:
    """For each state that a cascade deletes: the instance that was deleted in the first place.

    ``Session.delete()`` marks the instance first and what its cascade reaches right after it, so
    one that was marked before is a direct delete. Orphans, which are never marked, come last.
    """
    taken = dict.fromkeys(deletes)
    marked = deleted_states(session)
    heads: dict[State, State] = {}
    if len(taken) > 1:
        direct: set[State] = set()
        for head in (*marked, *(state for state in taken if state not in marked)):
            if head in heads or head not in taken:
                continue  # in heads, and so is all that its own cascade reaches; or it was kept
            if head in marked:
                direct.add(head)
            for _, _, state, _ in head.mapper.cascade_iterator("delete", head, heads.__contains__):
                if state in taken and state not in direct:
                    heads.setdefault(state, head)
    return {state: root.obj() for state in heads if (root := _root(state, heads)) is not state}


def _root(state: State, heads: dict[State, State]) -> State:
    path = {state: None}
    while (head := heads.get(state)) is not None and head not in path:
        path[head] = None
        state = head
    for one in path:  # so that the next one has a shorter way
        if one is not state:
            heads[one] = state
    return state
