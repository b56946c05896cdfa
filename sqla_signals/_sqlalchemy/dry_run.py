"""A flush that is only planned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import inspect
from sqlalchemy.orm import Session, UOWTransaction, dependency

from ..changes.change import UNSET
from . import renamed
from .instances import PASSIVE_NO_INITIALIZE, PASSIVE_OFF, contains_state
from .unit_of_work import deleted_states, is_deleted, pending_states

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState

    State = InstanceState[Any]

OneToManyDP: Final[type[Any]] = renamed(dependency, "OneToManyDP")
ManyToOneDP: Final[type[Any]] = renamed(dependency, "ManyToOneDP")
DetectKeySwitch: Final[type[Any]] = renamed(dependency, "DetectKeySwitch")


class DryRun(UOWTransaction):
    """A unit of work that registers as the real one will, and assigns and writes nothing.

    SQLAlchemy's own dependency processors find what else is affected (the presort actions); the
    foreign keys that they are going to assign are computed and kept in ``assigns``. Collections
    that this loads are loaded for good; the flush does not load them again.
    """

    def __init__(self, session: Session, only: set[State] | None) -> None:
        super().__init__(session)
        self._only = only
        """Of a partial flush: what it was given."""
        self.dropped: set[State] = set()
        """New orphans, which the flush expunges before it registers anything."""
        self.assigns: dict[State, dict[str, Any]] = {}
        self.post_updates: set[State] = set()
        """What gets an extra UPDATE, if its foreign key has changed by then."""
        self._unposted: list[tuple[Any, State, State]] = []
        """Foreign keys nulled after the child's UPDATE, and for no extra one: mostly lost."""
        self.causes: dict[State, State] = {}
        self._cause: State | None = None

    def finds(self, state: State) -> bool:
        """Whether the flush finds a state in its session."""
        return state not in self.dropped and contains_state(self.session, state)

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
        if not self.finds(state):
            return False
        if self._cause is not None and self._cause is not state:
            self.causes.setdefault(state, self._cause)
        return super().register_object(state, isdelete, listonly, cancel_delete)

    def forget(self) -> None:
        """Drop all that was found, except what was marked as deleted."""
        for found in (self.assigns, self.post_updates, self.causes):
            found.clear()
        marked = deleted_states(self.session)
        for state in [state for state in self.states if state not in marked]:
            del self.states[state]

    # -- orm/unitofwork.py: UOWTransaction._generate_actions, Preprocess.execute ----------------

    def presort(self) -> None:
        """Let the dependency processors register what else is affected, to a fixpoint."""
        while any([self._presort(action) for action in list(self.presort_actions.values())]):
            pass

    def _presort(self, action: Any) -> bool:
        processor = action.dependency_processor
        fresh: dict[bool, list[State]] = {True: [], False: []}
        for mapper in action._mappers(self):
            for state in self.mappers.get(mapper, ()):
                is_delete, listonly = self.states[state]
                if not listonly and state not in action.processed:
                    fresh[is_delete].append(state)
        presorts = ((True, processor.presort_deletes), (False, self._presort_saves(processor)))
        for is_delete, presort in presorts:
            states = fresh[is_delete]
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
                if processor.post_update and deletes:
                    # By then the row has a new instance, and the old one's deletion was dropped.
                    deletes = [state for state in deletes if not self._is_switched(state)]
                self._one_to_many_deletes(processor, deletes)
                self._one_to_many_saves(processor, saves)
            elif isinstance(processor, ManyToOneDP):
                self._many_to_one_saves(processor, saves)
        for processor, child, cause in self._unposted:
            if child in self.post_updates:
                self._clear(processor, processor.mapper, child, cause)

    def _is_switched(self, state: State) -> bool:
        """Whether a new instance is going to take over the row of a deleted one."""
        return any(
            new.mapper.base_mapper is state.mapper.base_mapper
            and new.mapper._identity_key_from_state(new) == state.key
            for new in pending_states(self.session)
            if self._only is None or new in self._only
        )

    def _history(self, processor: Any, state: State, passive: Any) -> Any:
        return self.get_attribute_history(state, processor.key, passive)  # type: ignore[no-untyped-call]

    def _one_to_many_deletes(self, processor: Any, states: list[State]) -> None:
        if not processor.post_update and processor.passive_deletes == "all":
            return
        added: set[State] = self.memo(("children_added", processor), set)  # type: ignore[no-untyped-call]
        for state in states:
            history = self._history(processor, state, processor._passive_delete_flag)
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
            history = self._history(processor, state, PASSIVE_NO_INITIALIZE)
            if not history:
                continue
            for child in history.added:
                self._populate(processor, state, processor.parent, child, processor.mapper, state)
            if nulls:
                for child in history.deleted:
                    if child is None or processor.hasparent(child):
                        continue
                    if processor.post_update:
                        self._unposted.append((processor, child, state))
                    else:
                        self._clear(processor, processor.mapper, child, state)
            if processor._pks_changed(self, state):
                for child in history.unchanged:
                    self._populate(
                        processor, state, processor.parent, child, processor.mapper, state
                    )

    def _many_to_one_saves(self, processor: Any, states: list[State]) -> None:
        for state in states:
            history = self._history(processor, state, PASSIVE_NO_INITIALIZE)
            if not history:
                continue
            if processor.post_update and history.sum():
                self.post_updates.add(state)
            for target in history.added:
                if target is None:
                    self._clear(processor, processor.parent, state, state)
                elif self.finds(target):
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
            if target is not None and target in switched:
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
        if dest is None or (not processor.post_update and is_deleted(self, dest)):
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
        partial = self._only is not None and source not in self._only and source not in self.states
        return None if partial else UNSET
