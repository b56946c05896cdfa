"""What one mapper writes: which column attributes an INSERT or UPDATE of an instance covers.

The rules are those of SQLAlchemy's ``orm/persistence.py``, asked from outside. No SQL is emitted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import CompileError
from sqlalchemy.orm import LoaderCallableStatus
from sqlalchemy.schema import Column

from ..._sqlalchemy.instances import instance_dict, readable_values
from ..._sqlalchemy.mappers import property_count
from ..._sqlalchemy.unit_of_work import pk_cascaded
from ...changes.change import NO_DIFF, UNSET, Change, Changes, Diff, Pairs, Shape, diff_of, pairs_of
from .copies import IMMUTABLE, copies_of, copy_of, have_same_content
from .values import (
    absent_value,
    differs,
    equality,
    is_expression,
    is_mutable,
    known,
    table_of,
    words,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper, UOWTransaction

Values = Mapping[str, Any]
NOTHING: Final[Values] = {}
MAX_SHAPES: Final = 1000


class Columns:
    """The column attributes of one mapper, with what is asked of them for each row."""

    __slots__ = (
        "__weakref__",
        "_counts_version",
        "_delicate",
        "_equal",
        "_keys",
        "_primary_key",
        "_shapes",
        "_tables",
        "_version",
        "_version_table",
        "_written_along",
        "absent",
        "computed",
        "filled_in",
        "keys",
        "mutable",
        "property_count",
        "unfetched",
        "watched",
        "watching",
    )

    def __init__(self, mapper: Mapper[Any], watched: frozenset[str] = frozenset()) -> None:
        manager = mapper.class_manager
        # A polymorphic_on that the class does not map is a property without an attribute
        # (_configure_polymorphic_setter of orm/mapper.py).
        props = {
            prop.key: prop
            for prop in mapper.column_attrs
            if isinstance(prop.columns[0], Column) and prop.key in manager
        }
        self.property_count: int = property_count(mapper)
        self.keys: frozenset[str] = frozenset(props)
        self._keys = {column: key for key, prop in props.items() for column in prop.columns}
        self._equal = {key: equality(manager[key].impl.is_equal) for key in props}
        self._primary_key = {
            mapper.get_property_by_column(column).key: column for column in mapper.primary_key
        }
        self.mutable: frozenset[str] = frozenset(
            key for key, prop in props.items() if is_mutable(prop.columns[0].type)
        )
        """Whose values could be changed in place."""
        self.absent: Values = {key: absent_value(prop.columns) for key, prop in props.items()}
        """What each attribute is after an INSERT that was given no value for it."""
        self._shapes = _Shapes(self)
        self._tables = {key: frozenset(map(table_of, prop.columns)) for key, prop in props.items()}
        self.computed: dict[str, frozenset[str]] = {
            key: self._sources(column)
            for key, prop in props.items()
            for column in prop.columns
            if column.server_onupdate is not None
        }
        """What the database computes when a row is updated, and which attributes that hangs on."""
        for _ in range(len(self.computed)):  # one computed column may be computed from another
            for key, sources in self.computed.items():
                more = [self.computed[one] for one in sources if one in self.computed]
                self.computed[key] = sources.union(*more)
        self.unfetched: frozenset[str] = frozenset(self.computed)
        self._written_along: dict[Any, frozenset[str]] = {}
        for key, prop in props.items():
            for column in prop.columns:
                if column.onupdate is not None:
                    along = self._written_along.get(table_of(column), frozenset())
                    self._written_along[table_of(column)] = along | {key}
        self.filled_in: frozenset[str] = self.unfetched.union(*self._written_along.values())
        """What the UPDATE of other attributes fills in: versions, ``onupdate`` columns, and what
        the database computes. The history of these goes when the new value is fetched."""
        self._version: str | None = None
        self._version_table: Any = None
        self._counts_version: bool = mapper.version_id_generator is not False
        version_column: Any = mapper.version_id_col
        if version_column is not None:
            self._version = mapper.get_property_by_column(version_column).key
            self._version_table = table_of(version_column)
            self.filled_in |= {self._version}
            if not self._counts_version and version_column.server_default is not None:
                self.computed[self._version] = self.keys  # as PostgreSQL's xmin
        self._delicate = self.unfetched.union(self._primary_key)
        """That differ after an UPDATE does not say that it has written them."""
        self.watched: frozenset[str] = watched & self.filled_in
        """What of :attr:`filled_in` somebody asks for, so that its values are looked at."""
        self.watching: dict[frozenset[str], Columns] = {}
        """The same columns, by what of them is watched; see :func:`current_columns_of`."""

    def _sources(self, column: Any) -> frozenset[str]:
        """The attributes from which the database computes a column; all of its table, in doubt."""
        siblings = {one: self._keys[one] for one in column.table.c if one in self._keys}
        if column.computed is not None:
            try:
                found = words(str(column.computed.sqltext))
            except CompileError:  # an expression of one database alone
                found = set()
            named = {key for one, key in siblings.items() if words(one.name) <= found}
            if named:
                return frozenset(named)
        return frozenset(siblings.values())

    def diff(self, state: InstanceState[Any], foreseen: Values = NOTHING) -> Diff:
        """What an UPDATE of this instance would write if it were flushed now.

        :param foreseen: what the flush is going to assign itself, on top of what is there.
        """
        is_plain = not state.expired_attributes
        keys: list[str] = []
        found: list[Any] = [None]
        values = instance_dict(state.obj())
        equals = self._equal
        for key, old in state.committed_state.items():
            if key not in equals or key not in values or key in foreseen:
                continue
            new = values[key]
            if type(new) in IMMUTABLE and type(old) in IMMUTABLE:  # what nearly every value is
                if equals[key](new, old) is True:
                    continue
            elif differs(equals[key], new, old) and self._is_update_of(key, old):
                is_plain = False
                old = known(old)
            else:
                continue
            keys.append(key)
            found += old, new
        if not keys:
            return NO_DIFF
        shape = self._shapes[tuple(keys)]
        found[0] = shape if is_plain else shape.exotic
        return tuple(found)

    def diff_of(self, pairs: Pairs) -> Diff:
        """A diff of values that are known by name."""
        return diff_of(pairs, self._shapes[tuple(pairs)].exotic)

    def update_of(self, state: InstanceState[Any], pairs: Pairs) -> Diff:
        """A diff of what the UPDATE changed that has just been emitted for a row."""
        diff = self.diff_of(pairs)
        version = self._version
        if (
            version is not None
            and version in diff[0].along
            and state.dict.get(version, UNSET) is None
        ):
            # _collect_update_commands of orm/persistence.py: a row without a version gets none, and
            # no UPDATE of the version's table for its sake.
            written = self.written_along(pairs, of_one_table=True)
            unknown = self.may_change(written).difference(pairs)
            return diff_of(pairs, Shape(pairs, written, unknown))
        return diff

    def shape(self, keys: tuple[str, ...]) -> Shape:
        """The shape of an UPDATE that changes these attributes."""
        written = self.written_along(keys)
        unknown = self.may_change(written) - set(keys)
        is_plain = self._delicate.union(self.filled_in).isdisjoint(keys) and (
            self._version is None or any(self._version_table in self._tables[key] for key in keys)
        )
        return Shape(keys, written, unknown, is_plain and self.watched.isdisjoint(unknown))

    def will_write(self, state: InstanceState[Any], foreseen: Values) -> bool:
        """Whether an UPDATE is going to be written once the flush has assigned ``foreseen``."""
        if self.diff(state, foreseen) is not NO_DIFF:
            return True
        committed, values = state.committed_state, state.dict
        for key, new in foreseen.items():
            old = committed[key] if key in committed else values.get(key, UNSET)
            if new is UNSET or old is UNSET or differs(self._equal[key], new, old):
                return True
        return False

    def still_stands(self, state: InstanceState[Any], diff: Diff) -> bool:
        """Whether a diff is still what an UPDATE would write, or has just written.

        In doubt it is not: :meth:`updated` finds out.
        """
        shape = diff[0]
        committed = state.committed_state
        if not shape.is_plain or len(committed) != len(shape.places) or state.expired_attributes:
            return False
        values = instance_dict(state.obj())
        try:
            for key, at in shape.places.items():
                if committed[key] is not diff[at] or values[key] is not diff[at + 1]:
                    return False
        except KeyError:
            return False
        return True

    def updated(
        self,
        state: InstanceState[Any],
        before: Diff,
        expired: frozenset[str],
        context: Callable[[], UOWTransaction | None],
    ) -> Pairs:
        """What the UPDATE that has just been emitted wrote; empty if none was.

        Versions, ``onupdate`` defaults and SQL expressions lose their history when the new value
        is fetched or expired, so what there was right before the statement is asked too: an entry
        that vanished was written. Any other counts if it still differs: a listener behind ours may
        have taken it back.

        :param before: what was going to be written.
        :param expired: what was expired already.
        """
        committed, assigned = state.committed_state, pairs_of(before)
        computed = {
            key for key, (_, new) in assigned.items() if key in self.filled_in or is_expression(new)
        }
        changed: dict[str, tuple[Any, Any]] = {}
        values = state.dict
        for key, old in committed.items():
            equal = self._equal.get(key)
            if (
                equal is not None
                and key in values
                and (
                    key in computed
                    # Fetched after the statement, so that a difference is the database's.
                    or (key not in self.unfetched and differs(equal, values[key], old))
                )
                and self._is_update_of(key, old)
                and not self._is_cascaded(key, state, context)
            ):
                changed[key] = (known(old), values[key])
        for key, (old, _) in assigned.items():
            # What is neither was refreshed by a listener behind ours, before the statement.
            if key not in committed and (key in computed or key in state.expired_attributes):
                changed[key] = (old, values.get(key, UNSET))
        # A SQL expression that another before_update listener assigned after ours.
        for key in state.expired_attributes.difference(expired, changed, self.unfetched):
            if key in self.keys and key not in self.filled_in:
                changed[key] = (UNSET, UNSET)
        return changed

    def post_updated(
        self,
        state: InstanceState[Any],
        columns: Iterable[Any],
        context: Callable[[], UOWTransaction | None],
    ) -> Pairs:
        """What the extra UPDATE of a ``post_update`` relationship wrote."""
        keys = {self._keys.get(column) for column in columns}
        changed = self.updated(state, NO_DIFF, frozenset(state.expired_attributes), context)
        return {key: pair for key, pair in changed.items() if key in keys}

    def written_along(self, changed: Iterable[str], of_one_table: bool = False) -> frozenset[str]:
        """``update_fields`` for an UPDATE that changed these: with versions and ``onupdate``.

        :param of_one_table: an extra UPDATE, which leaves a version in another table alone.
        """
        fields = frozenset(changed)
        if not fields or not self.filled_in:
            return fields
        tables = {table for key in fields for table in self._tables[key]}
        if self._version is not None and not of_one_table and self._version_table not in tables:
            # _collect_update_commands of orm/persistence.py: the table of the version gets an
            # UPDATE too, which repeats the version where the program or the database counts it.
            tables.add(self._version_table)
            fields |= {self._version}
        for table in tables:
            fields |= self._written_along.get(table, frozenset())
        if self._version is not None and self._counts_version and self._version_table in tables:
            fields |= {self._version}
        return fields

    def may_change(self, written: Iterable[str]) -> frozenset[str]:
        """What may have another value after an UPDATE that writes these, computed columns too."""
        fields = frozenset(written)
        computed = [key for key, sources in self.computed.items() if sources & fields]
        return fields.union(computed) if computed else fields

    def still_unknown(self, changes: Iterable[str], unknown: frozenset[str]) -> frozenset[str]:
        """What of ``unknown`` may differ after ``changes``, which may have been reverted since.

        A computed column is as it was if what it is computed from is.
        """
        if self.computed and not unknown.isdisjoint(self.computed):
            return unknown & self.may_change(unknown.difference(self.computed).union(changes))
        return unknown

    def filled(
        self, state: InstanceState[Any], changed: Pairs, written: frozenset[str], before: Values
    ) -> Diff:
        """``changed`` with the values that an UPDATE has filled in, as far as somebody asks.

        :param written: what the UPDATE wrote.
        :param before: the values of :attr:`watched` before it, as far as they were known.
        """
        unknown = set(self.may_change(written).difference(changed))
        pairs = dict(changed)
        for key in self.watched & unknown:
            old, new = before.get(key, UNSET), state.dict.get(key, UNSET)
            if new is UNSET:  # to be fetched when somebody reads it
                continue
            unknown.discard(key)
            if old is UNSET or not self.same(key, old, new):
                pairs[key] = old, new
        return diff_of(pairs, Shape(pairs, written.union(pairs), frozenset(unknown)))

    def same(self, key: str, old: Any, new: Any) -> bool:
        """Whether the database would see no difference between two values."""
        return not differs(self._equal[key], new, old) or have_same_content(old, new)

    def values(self, state: InstanceState[Any]) -> Values:
        """The column values that the instance holds and the database knows."""
        values = readable_values(state)
        if values.keys() != self.keys:
            values = {key: values[key] for key in self.keys if key in values}
        if state.modified:
            for key, old in state.committed_state.items():
                if key in values:
                    if isinstance(old, LoaderCallableStatus):
                        del values[key]
                    else:
                        values[key] = old
        return copies_of(values) if self.mutable else values

    def own_values(self, values: Values) -> Values:
        """The same values, but copies of what could be changed in place."""
        exotic = self.mutable.intersection(values) if self.mutable else None
        return {**values, **{k: copy_of(values[k]) for k in exotic}} if exotic else values

    def own_diff(self, diff: Diff) -> Diff:
        """The same old and new values, but copies of what could be changed in place."""
        exotic = self.mutable.intersection(diff[0].places) if self.mutable else None
        if not exotic:
            return diff
        own = list(diff)
        for key in exotic:
            at = diff[0].places[key]
            own[at : at + 2] = copy_of(diff[at]), copy_of(diff[at + 1])
        return tuple(own)

    def own_changes(self, changes: Mapping[str, Change]) -> Mapping[str, Change]:
        """The same for what is shown to a receiver."""
        if not self.mutable or self.mutable.isdisjoint(changes):
            return changes
        return Changes(self.own_diff(self.diff_of(changes)))

    def _is_update_of(self, key: str, old: Any) -> bool:
        # A primary key whose old value was never loaded locates the row and is not SET.
        return key not in self._primary_key or not isinstance(old, LoaderCallableStatus)

    def _is_cascaded(
        self, key: str, state: InstanceState[Any], context: Callable[[], UOWTransaction | None]
    ) -> bool:
        column = self._primary_key.get(key)
        unit_of_work = context() if column is not None else None
        return unit_of_work is not None and pk_cascaded(unit_of_work, state, column)


class _Shapes(dict[tuple[str, ...], Shape]):
    """The shapes of one mapper's updates, one for each combination there was so far."""

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self._columns = weakref.proxy(columns)

    def __missing__(self, keys: tuple[str, ...]) -> Shape:
        if len(self) >= MAX_SHAPES:
            self.clear()
        shape: Shape = self._columns.shape(keys)
        self[keys] = shape
        return shape
