"""What a flush will write, found out before it begins.

``Session.dirty`` and ``Session.deleted`` do not tell: an orphan is found, a foreign key set or
nulled, only inside the flush. :func:`foresee` therefore makes a dry run of the unit of work:
registers what ``Session._flush`` would register, lets SQLAlchemy's own dependency processors find
the rest (``orm/unitofwork.py``: the presort actions), and computes the foreign keys they are going
to assign (``orm/dependency.py``: ``process_saves``, ``process_deletes``) without assigning them.
The collections that this loads are loaded for good; the flush does not load them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import inspect

from .._sqlalchemy import (
    PASSIVE_NO_INITIALIZE,
    PASSIVE_OFF,
    DetectKeySwitch,
    ManyToOneDP,
    OneToManyDP,
    UOWTransaction,
    contains_state,
    deleted_states,
    is_orphan,
    modified_states,
    orphaned_outside_of_session,
    pending_states,
)
from ..changes import UNSET
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
        self._run = _DryRun(session)
        self._register(objects)
        self._run.presort()
        self._run.synchronize()

    def _register(self, objects: Sequence[object] | None) -> None:
        """Register what ``Session._flush`` would, and drop what it would drop."""
        session, run = self.session, self._run
        deleted = deleted_states(session)
        only = {inspect(instance) for instance in objects} if objects else None
        saved = [*pending_states(session), *_in_order(modified_states(session))]
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

    def _row(
        self, state: State, is_delete: bool, origin: Any, assigns: dict[str, Any]
    ) -> Foreseen:
        session, cause = self.session, self._run.causes.get(state)
        derived = assigns or (is_delete and state not in deleted_states(session))
        stamp = Stamp.of(session, state, cause) if derived else None
        return Foreseen(state, state.obj(), is_delete, origin, assigns, cause, stamp)

def cascade_origins(session: Session, deletes: Iterable[State]) -> dict[State, Any]:
    """For each state that a cascade deletes: the instance that was deleted in the first place.

    ``Session.delete()`` marks the instance first and what its cascade reaches right after it, so
    one that was marked before is a direct delete. Orphans, which are never marked, come last.
    """
    taken: set[State] = set(deletes)
    heads: dict[State, State] = {}
    marked = deleted_states(session)
    if len(taken) > 1:
        seen: set[State] = set()
        for head in [*marked, *(state for state in taken if state not in marked)]:
            seen.add(head)
            for _, _, state, _ in head.mapper.cascade_iterator("delete", head):
                if state in taken and state not in heads and (state not in seen or head not in marked):
                    heads[state] = head
    return {
        state: root.obj() for state in heads if (root := _root(state, heads)) is not state
    }


def _root(state: State, heads: dict[State, State]) -> State:
    seen = {state}
    while (head := heads.get(state)) is not None and head not in seen:
        seen.add(head)
        state = head
    return state


def _in_order(states: Iterable[State]) -> list[State]:
    """Persistent states by class and primary key, as far as the keys can be compared."""
    return sorted(states, key=_order)


def _order(state: State) -> tuple[Any, ...]:
    if state.key is None:
        return (state.class_.__name__, state.insert_order)
    parts = (part if isinstance(part, int) else str(part) for part in state.key[1])
    return (state.class_.__name__, -1, *((type(part).__name__, part) for part in parts))


class _DryRun(UOWTransaction):
    """A unit of work that registers and sorts as the real one will, and assigns nothing."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.assigns: dict[State, dict[str, Any]] = {}
        self.post_updates: set[State] = set()
        self.causes: dict[State, State] = {}
        self._cause: State | None = None

    def register_object(
        self,
        state: State,
        isdelete: bool = False,
        listonly: bool = False,
        cancel_delete: bool = False,
        operation: str | None = None,
        prop: Any = None,
    ) -> bool:
        # The real run warns of objects outside of the session; warning twice would be noise.
        if not contains_state(self.session, state):
            return False
        if self._cause is not None and self._cause is not state:
            self.causes.setdefault(state, self._cause)
        return super().register_object(state, isdelete, listonly, cancel_delete)

    # -- orm/unitofwork.py: UOWTransaction._generate_actions, Preprocess.execute ----------------

    def presort(self) -> None:
        """Let the dependency processors register what else is affected, to a fixpoint."""
        while any([self._presort(action) for action in list(self.presort_actions.values())]):
            pass

    def _presort(self, action: Any) -> bool:
        processor = action.dependency_processor
        fresh: dict[bool, list[State]] = {True: [], False: []}
        for mapper in action._mappers(self):
            for state in self.mappers[mapper].difference(action.processed):
                is_delete, listonly = self.states[state]
                if not listonly:
                    fresh[is_delete].append(state)
        presorts = ((True, processor.presort_deletes), (False, self._presort_saves(processor)))
        for is_delete, presort in presorts:
            states = _in_order(fresh[is_delete])
            for state in states:
                self._cause = state
                presort(self, [state])
            action.processed.update(states)
        self._cause = None
        if not action.setup_flush_actions:
            action.setup_flush_actions = bool(
                processor.prop_has_changes(self, fresh[True], True)
                or processor.prop_has_changes(self, fresh[False], False)
            )
        return bool(fresh[True] or fresh[False])

    def _presort_saves(self, processor: Any) -> Any:
        # With passive_updates=False a key switch assigns the foreign keys while presorting.
        if isinstance(processor, DetectKeySwitch) and not processor.passive_updates:
            return lambda uow, states: self._key_switches(processor, states)
        return processor.presort_saves

    # -- orm/dependency.py: process_saves and process_deletes, as assignments to be -------------

    def synchronize(self) -> None:
        """Compute what the dependency processors will assign to foreign keys."""
        for action in self.presort_actions.values():
            processor = action.dependency_processor
            if not action.setup_flush_actions:
                continue
            saves: list[State] = []
            deletes: list[State] = []
            for mapper in action._mappers(self):
                for state in self.mappers[mapper]:
                    is_delete, listonly = self.states[state]
                    if not listonly:
                        (deletes if is_delete else saves).append(state)
            if isinstance(processor, DetectKeySwitch):
                if processor.passive_updates:
                    self._key_switches(processor, saves)
            elif isinstance(processor, OneToManyDP):
                self._one_to_many_deletes(processor, deletes)
                self._one_to_many_saves(processor, saves)
            elif isinstance(processor, ManyToOneDP):
                self._many_to_one_saves(processor, saves)

    def _one_to_many_deletes(self, processor: Any, states: list[State]) -> None:
        if not processor.post_update and processor.passive_deletes == "all":
            return
        added = self.memo(("children_added", processor), set)
        for state in states:
            history = self.get_attribute_history(
                state, processor.key, processor._passive_delete_flag
            )
            if not history:
                continue
            cleared = [c for c in history.deleted if c is not None and not processor.hasparent(c)]
            if processor.post_update or not processor.cascade.delete:
                cleared += [c for c in history.unchanged if c is not None and c not in added]
            for child in cleared:
                self._clear(processor, processor.mapper, child, state)

    def _one_to_many_saves(self, processor: Any, states: list[State]) -> None:
        nulls = not processor.cascade.delete_orphan and processor.passive_deletes != "all"
        for state in states:
            history = self.get_attribute_history(state, processor.key, PASSIVE_NO_INITIALIZE)
            if not history:
                continue
            for child in history.added:
                self._populate(processor, state, processor.parent, child, processor.mapper, state)
            if nulls:
                for child in history.deleted:
                    if child is not None and not processor.hasparent(child):
                        self._clear(processor, processor.mapper, child, state)
            if processor._pks_changed(self, state):
                for child in history.unchanged:
                    self._populate(
                        processor, state, processor.parent, child, processor.mapper, state
                    )

    def _many_to_one_saves(self, processor: Any, states: list[State]) -> None:
        for state in states:
            history = self.get_attribute_history(state, processor.key, PASSIVE_NO_INITIALIZE)
            if not history:
                continue
            for target in history.added:
                if target is None:
                    self._clear(processor, processor.parent, state, state)
                elif contains_state(self.session, target):
                    self._populate(
                        processor, target, processor.mapper, state, processor.parent, state
                    )
            if not history.added and history.deleted:
                self._clear(processor, processor.parent, state, state)

    def _key_switches(self, processor: Any, states: Iterable[State]) -> None:
        switched = processor._key_switchers(self, states)
        if not switched:
            return
        for state in self.session.identity_map.all_states():
            if not issubclass(state.class_, processor.parent.class_):
                continue
            related = state.get_impl(processor.key).get(
                state, state.dict, passive=processor._passive_update_flag
            )
            if processor.prop.uselist:
                related = related[0] if related else None
            target = inspect(related, raiseerr=False) if related is not None else None
            if target in switched:
                self.register_object(state, False, processor.passive_updates)
                self._populate(processor, target, processor.mapper, state, processor.parent, state)

    # -- orm/sync.py ----------------------------------------------------------------------------

    def _populate(
        self,
        processor: Any,
        source: State,
        source_mapper: Any,
        dest: State | None,
        dest_mapper: Any,
        cause: State,
    ) -> None:
        if not self._takes_part(processor, dest, cause):
            return
        assert dest is not None
        for left, right in processor.prop.synchronize_pairs:
            key = source_mapper.get_property_by_column(left).key
            self._assign(dest, dest_mapper, right, self._value(source, key))

    def _clear(self, processor: Any, dest_mapper: Any, dest: State, cause: State) -> None:
        if self._takes_part(processor, dest, cause):
            for _, right in processor.prop.synchronize_pairs:
                self._assign(dest, dest_mapper, right, None)

    def _takes_part(self, processor: Any, dest: State | None, cause: State) -> bool:
        if dest is None or (not processor.post_update and self.is_deleted(dest)):
            return False
        if dest is not cause:
            self.causes.setdefault(dest, cause)
        if processor.post_update:
            self.post_updates.add(dest)
        return True

    def _assign(self, dest: State, mapper: Any, column: Any, value: Any) -> None:
        key = mapper.get_property_by_column(column).key
        impl = dest.manager[key].impl
        if key not in dest.dict and key not in dest.committed_state and impl.active_history:
            impl.get(dest, dest.dict, PASSIVE_OFF)
        self.assigns.setdefault(dest, {})[key] = value

    def _value(self, source: State, key: str) -> Any:
        if key in self.assigns.get(source, ()):
            return self.assigns[source][key]
        if key in source.dict or source.key is not None:
            value = source.manager[key].impl.get(source, source.dict, PASSIVE_OFF)
            if value is not None or source.key is not None:
                return value
        return UNSET
