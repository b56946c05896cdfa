"""A flush that is only planned: which rows it will write, and which foreign keys it will assign.

A flush takes these steps (``Session._flush``, and ``UOWTransaction`` in ``orm/unitofwork.py``):

1. It registers the instances that are new, changed or deleted.
2. *Presort*: for each relationship, a dependency processor (``orm/dependency.py``) looks at the
   registered instances, and registers others that are affected, such as the children of a deleted
   parent.
3. *Process*: between the INSERTs and UPDATEs the processors assign foreign keys, because a new
   primary key is not known before.

A dry run takes the same steps and neither executes a statement nor assigns a value. Step 1 is up to
the caller of :meth:`DryRun.register_object`. Step 2 is done by SQLAlchemy's own processors; the
collections that they load stay loaded, so the flush does not load them again. Step 3 would change
instances, so the foreign keys are computed here, by a class for each kind of processor.
"""

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
    """A unit of work that registers what the real one will, and assigns and writes nothing.

    :param only: the states that a partial flush is about, ``None`` for all.
    """

    def __init__(self, session: Session, only: set[State] | None) -> None:
        super().__init__(session)
        self.only = only
        self.dropped: set[State] = set()
        """New orphans, which the flush expunges before it registers anything."""
        self.assigns: dict[State, dict[str, Any]] = {}
        """What the flush will assign to attributes; ``UNSET`` for a key not generated yet."""
        self.post_updates: set[State] = set()
        """The states that get an extra UPDATE, if their foreign key has changed by then."""
        self.causes: dict[State, State] = {}
        """For each state that is written because of another one: that other one."""
        self._presorted: State | None = None
        """The state because of which processors register others at this moment."""
        self.late_clears: list[tuple[_ForeignKeys, State, State]] = []
        """Foreign keys to clear if something else asks for an extra UPDATE of the child.

        ``OneToManyDP.process_saves`` clears them with ``post_update``, too, but after the UPDATE of
        the child, and asks for no other.
        """

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
        """Register a state that is in the session.

        For any other the inherited method warns, which is left to the flush itself.
        """
        if not self.finds(state):
            return False
        if self._presorted is not None and self._presorted is not state:
            self.causes.setdefault(state, self._presorted)
        return super().register_object(state, isdelete, listonly, cancel_delete)

    def presort(self) -> None:
        """Let the processors register what is affected, until there is nothing new (step 2)."""
        # The list is for any() not to stop at the first: each processor has a turn in each round.
        while any([self._presort(action) for action in list(self.presort_actions.values())]):
            pass

    def _presort(self, action: Any) -> bool:
        """Do ``Preprocess.execute`` with one state after the other, so that causes are known.

        :returns: whether the action had anything new to process.
        """
        processor = action.dependency_processor
        saves, deletes = (
            [state for state in states if state not in action.processed]
            for states in self._registered(action)
        )
        for state in deletes:
            self._presorted = state
            processor.presort_deletes(self, [state])
        assigns_keys = isinstance(processor, DetectKeySwitch) and not processor.passive_updates
        for state in saves:
            self._presorted = state
            if assigns_keys:  # which presort_saves() must not do here
                _KeySwitch(self, processor).saves([state])
            else:
                processor.presort_saves(self, [state])
        self._presorted = None
        action.processed.update(saves, deletes)
        if not action.setup_flush_actions:
            action.setup_flush_actions = bool(
                processor.prop_has_changes(self, deletes, True)
                or processor.prop_has_changes(self, saves, False)
            )
        return bool(saves or deletes)

    def _registered(self, action: Any) -> tuple[list[State], list[State]]:
        """The states with the relationship that are to be saved, and those to be deleted."""
        saves: list[State] = []
        deletes: list[State] = []
        for mapper in action._mappers(self):
            for state in self.mappers.get(mapper, ()):
                is_delete, listonly = self.states[state]
                if not listonly:
                    (deletes if is_delete else saves).append(state)
        return saves, deletes

    def synchronize(self) -> None:
        """Compute the foreign keys that the processors will assign (step 3)."""
        for action in self.presort_actions.values():
            if not action.setup_flush_actions:
                continue
            for kind, compute in _KINDS.items():
                if isinstance(action.dependency_processor, kind):
                    saves, deletes = self._registered(action)
                    keys = compute(self, action.dependency_processor)
                    keys.deletes(deletes)
                    keys.saves(saves)
        for keys, child, parent in self.late_clears:
            if child in self.post_updates:
                keys.clear(child, parent)

    def forget(self) -> None:
        """Drop all that was found, except the states that were given to ``session.delete()``."""
        for found in (self.assigns, self.post_updates, self.causes):
            found.clear()
        marked = deleted_states(self.session)
        for state in [state for state in self.states if state not in marked]:
            del self.states[state]

    def is_replaced(self, state: State) -> bool:
        """Whether a new instance is going to take over the row of a deleted one."""
        return any(
            new.mapper.base_mapper is state.mapper.base_mapper
            and new.mapper._identity_key_from_state(new) == state.key
            for new in pending_states(self.session)
            if self.only is None or new in self.only
        )

    def value(self, state: State, key: str) -> Any:
        """The value that an attribute will have; ``UNSET`` if the INSERT generates it."""
        if key in self.assigns.get(state, ()):
            return self.assigns[state][key]
        if key in state.dict or state.key is not None:
            value = state.manager[key].impl.get(state, state.dict, PASSIVE_OFF)
            if value is not None or state.key is not None:
                return value
        is_left_out = self.only is not None and state not in self.only and state not in self.states
        return None if is_left_out else UNSET


class _ForeignKeys:
    """What one dependency processor will assign to foreign keys.

    An *owner* is an instance with the relationship. Either its own row has the foreign key, or the
    row at the other end has it.
    """

    _refers_to_other_end = True
    """Whether the owner's own row has the foreign key."""

    def __init__(self, run: DryRun, processor: Any) -> None:
        self.run = run
        self.processor = processor
        ends = processor.mapper, processor.parent
        self._referenced, self._referring = ends if self._refers_to_other_end else ends[::-1]

    def deletes(self, owners: Iterable[State]) -> None:
        """Compute what ``process_deletes`` assigns because these are deleted."""

    def saves(self, owners: Iterable[State]) -> None:
        """Compute what ``process_saves`` assigns because these are saved."""
        raise NotImplementedError

    def _history(self, owner: State, passive: Any = PASSIVE_NO_INITIALIZE) -> Any:
        return self.run.get_attribute_history(owner, self.processor.key, passive)  # type: ignore[no-untyped-call]

    def copy(self, source: State, dest: State | None, owner: State) -> None:
        """Copy the primary key of ``source`` to the foreign key of ``dest`` (``orm/sync.py``)."""
        if dest is not None and self._writes(dest, owner):
            for left, right in self.processor.prop.synchronize_pairs:
                key = self._referenced.get_property_by_column(left).key
                self._assign(dest, right, self.run.value(source, key))

    def clear(self, dest: State, owner: State) -> None:
        """Set the foreign key of ``dest`` to NULL."""
        if self._writes(dest, owner):
            for _, right in self.processor.prop.synchronize_pairs:
                self._assign(dest, right, None)

    def _writes(self, dest: State, owner: State) -> bool:
        if not self.processor.post_update and is_deleted(self.run, dest):
            return False
        if dest is not owner:
            self.run.causes.setdefault(dest, owner)
        if self.processor.post_update:
            self.run.post_updates.add(dest)
        return True

    def _assign(self, dest: State, column: Any, value: Any) -> None:
        key = self._referring.get_property_by_column(column).key
        impl = dest.manager[key].impl
        if key not in dest.dict and key not in dest.committed_state and impl.active_history:
            impl.get(dest, dest.dict, PASSIVE_OFF)  # as the assignment will
        self.run.assigns.setdefault(dest, {})[key] = value


class _OneToMany(_ForeignKeys):
    _refers_to_other_end = False

    def deletes(self, owners: Iterable[State]) -> None:
        processor = self.processor
        if processor.passive_deletes == "all" and not processor.post_update:
            return
        added: set[State] = self.run.memo(("children_added", processor), set)  # type: ignore[no-untyped-call]
        for owner in owners:
            # By then a replaced one has passed its row on to another instance, and its deletion was
            # turned into an UPDATE: what is post-updated is what the new instance asks for.
            if processor.post_update and self.run.is_replaced(owner):
                continue
            history = self._history(owner, processor._passive_delete_flag)
            if not history:
                continue
            for child in history.deleted:
                if child is not None and not processor.hasparent(child):
                    self.clear(child, owner)
            if processor.post_update or not processor.cascade.delete:
                for child in history.unchanged:
                    if child is not None and child not in added:
                        self.clear(child, owner)

    def saves(self, owners: Iterable[State]) -> None:
        processor = self.processor
        clears = not processor.cascade.delete_orphan and processor.passive_deletes != "all"
        for owner in owners:
            history = self._history(owner)
            if not history:
                continue
            for child in history.added:
                self.copy(owner, child, owner)
            for child in history.deleted if clears else ():
                if child is None or processor.hasparent(child):
                    continue
                if processor.post_update:
                    self.run.late_clears.append((self, child, owner))
                else:
                    self.clear(child, owner)
            if processor._pks_changed(self.run, owner):
                for child in history.unchanged:
                    self.copy(owner, child, owner)


class _ManyToOne(_ForeignKeys):
    def saves(self, owners: Iterable[State]) -> None:
        for owner in owners:
            history = self._history(owner)
            if not history:
                continue
            if self.processor.post_update and history.sum():
                self.run.post_updates.add(owner)
            if not history.added and history.deleted:
                self.clear(owner, owner)
            for target in history.added:
                if target is None:
                    self.clear(owner, owner)
                elif self.run.finds(target):
                    self.copy(target, owner, owner)


class _KeySwitch(_ForeignKeys):
    """For a many-to-one without a collection at the other end, whose target's key changes."""

    def saves(self, owners: Iterable[State]) -> None:
        """Look for those that refer to one of these, as ``_process_key_switches`` does.

        :param owners: instances of the target's class, unlike those of the other kinds.
        """
        processor = self.processor
        switched = processor._key_switchers(self.run, owners)
        if not switched:
            return
        for state in self.run.session.identity_map.all_states():
            if not issubclass(state.class_, processor.parent.class_):
                continue
            target = state.get_impl(processor.key).get(
                state, state.dict, passive=processor._passive_update_flag
            )
            if processor.prop.uselist:
                target = target[0] if target else None
            target_state = inspect(target, raiseerr=False) if target is not None else None
            if target_state is not None and target_state in switched:
                self.run.register_object(state, False, processor.passive_updates)
                self.copy(target_state, state, state)


_KINDS: Final[dict[type[Any], type[_ForeignKeys]]] = {
    OneToManyDP: _OneToMany,
    ManyToOneDP: _ManyToOne,
    DetectKeySwitch: _KeySwitch,
}
