"""What the unit of work hands to the database, and whether the signals say the same.

A flush is watched where SQLAlchemy's unit of work hands its records to INSERT, UPDATE and DELETE
statements. Nothing here asks `sqla_signals` what a flush wrote.

The names that begin with an underscore are SQLAlchemy's own. They stand here and not in
`sqla_signals/_sqlalchemy.py`, because a witness shares no code with what it judges.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import event, inspect
from sqlalchemy.orm import InstanceState, Session, UOWTransaction, dependency, persistence

from sqla_signals import post_delete, post_save, pre_delete, pre_save

State = InstanceState[Any]
CREATED, UPDATED, DELETED = "created", "updated", "deleted"


@dataclass
class Report:
    """What the tests of one process have shown."""

    rows: int = 0
    """Rows handed to a statement; an instance of a joined hierarchy has one in each table."""
    instances: int = 0
    """Instances with such rows, counted once for each flush."""
    mismatches: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Flush:
    """One flush: the rows it wrote and the signals sent for it. It holds states, no instances."""

    session: Session
    has_begun: bool = False
    """Whether a statement was emitted; a `pre_*` signal sent after that is late."""
    rows: int = 0
    inserted: set[State] = field(default_factory=set)
    updated: dict[State, set[str]] = field(default_factory=dict)
    """With the attributes whose columns an UPDATE was given."""
    deleted: set[State] = field(default_factory=set)
    became_persistent: set[State] = field(default_factory=set)
    became_deleted: set[State] = field(default_factory=set)
    pre: Counter[tuple[State, str]] = field(default_factory=Counter)
    post: Counter[tuple[State, str]] = field(default_factory=Counter)
    update_fields: dict[State, frozenset[str] | None] = field(default_factory=dict)
    """What `post_save` told."""

    @property
    def instances(self) -> int:
        return len(self.inserted | self.updated.keys() | self.deleted)

    def mismatches(self) -> Iterator[str]:
        """Where the signals differ from the rows, after a flush that has ended well."""
        for state in self.inserted - self.became_persistent:
            yield f"{state.class_.__name__}: an INSERT, but it did not become persistent"
        for state in self.deleted - self.became_deleted:
            yield f"{state.class_.__name__}: a DELETE, but it did not become deleted"
        # A new instance takes over the row of a deleted one, with an UPDATE or with nothing.
        taken_over = {state.key for state in self.became_persistent - self.inserted}
        switched = {state for state in self.became_deleted if state.key in taken_over}
        fates = dict.fromkeys(self.updated, UPDATED)
        fates |= dict.fromkeys(self.became_persistent, CREATED)
        fates |= dict.fromkeys(self.deleted | switched, DELETED)
        expected = Counter(fates.items())
        for moment, sent in (("pre_*", self.pre), ("post_*", self.post)):
            for state, fate in expected - sent:
                yield f"{state.class_.__name__} {fate}: no {moment}"
            for (state, fate), number in (sent - expected).items():
                really = fates.get(state, "not written")
                yield f"{state.class_.__name__} {really}: {number} × {moment} of {fate} too many"
        for state, written in self.updated.items():
            told = self.update_fields.get(state)
            if fates[state] == UPDATED and told is not None and told != written:
                unwritten = {key for key in told - written if not _is_filled_in(state, key)}
                if unwritten or written - told:
                    name = state.class_.__name__
                    yield f"{name}: update_fields {sorted(told)}, but {sorted(written)} written"

    def mismatches_of_failed(self) -> Iterator[str]:
        """Where the signals differ from the rows written until a flush has failed."""
        fates = dict.fromkeys(self.updated, UPDATED) | dict.fromkeys(self.inserted, CREATED)
        for state, fate in (fates | dict.fromkeys(self.deleted, DELETED)).items():
            if self.pre[state, fate] != 1 and not (fate == UPDATED and state.key is None):
                yield f"{state.class_.__name__} {fate} by a flush that failed: no pre_*, or several"


class Witness:
    """Watches each flush of the process, from :meth:`start` on."""

    def __init__(self) -> None:
        self.report = Report()
        self._flushes: list[Flush] = []
        """Those going on; a listener of one session may flush another one."""

    def start(self) -> None:
        """Take the places of SQLAlchemy's functions, and connect receivers of all four signals."""
        # orm/session.py, Session._flush: a flush from before_flush to after_flush_postexec.
        self._wrap(Session, "_flush", self._flush)
        # orm/persistence.py: _save_obj and _post_update hand generators of records to these, which
        # take each record as they put it into a statement.
        self._wrap(persistence, "_emit_insert_statements", self._insert)
        self._wrap(persistence, "_emit_update_statements", self._update)
        self._wrap(persistence, "_emit_post_update_statements", self._post_update)
        # orm/persistence.py: the records that _delete_obj hands to _emit_delete_statements name no
        # state. So they are seen where they are made, which is when they are taken.
        self._wrap(persistence, "_collect_delete_commands", self._delete)
        # orm/dependency.py: what writes the rows of a secondary table. SQLAlchemy 2.0 has it
        # without the underscore.
        many_to_many = getattr(dependency, "_ManyToManyDP", None) or dependency.ManyToManyDP
        self._wrap(many_to_many, "_run_crud", self._secondary)
        for signal in (pre_save, post_save, pre_delete, post_delete):
            signal.connect(self._receive, weak=False)

    def listen(self) -> None:
        """Listen to all sessions."""
        for name, listener in self._listeners():
            event.listen(Session, name, listener)

    def stop_listening(self) -> None:
        """Remove the listeners, unless SQLAlchemy's fixtures have done so."""
        for name, listener in self._listeners():
            if event.contains(Session, name, listener):
                event.remove(Session, name, listener)

    def _listeners(self) -> Iterable[tuple[str, Callable[[Session, Any], None]]]:
        yield "pending_to_persistent", self._became_persistent
        yield "persistent_to_deleted", self._became_deleted

    # -- SQLAlchemy's functions -------------------------------------------------------------------

    @staticmethod
    def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        setattr(owner, name, wrapped)

    def _flush(self, original: Any, session: Session, *args: Any) -> None:
        flush = Flush(session)
        self._flushes.append(flush)
        try:
            original(session, *args)
        except BaseException:
            self._judge(flush, flush.mismatches_of_failed())
            raise
        else:
            self._judge(flush, flush.mismatches())
        finally:
            self._flushes.remove(flush)

    def _insert(
        self,
        original: Any,
        base: Any,
        context: Any,
        mapper: Any,
        table: Any,
        records: Any,
        **kwargs: Any,
    ) -> Any:
        def seen() -> Iterator[Any]:
            for record in records:
                self._row(context).inserted.add(record[0])
                yield record

        is_bulk = not isinstance(context, UOWTransaction)
        return original(base, context, mapper, table, records if is_bulk else seen(), **kwargs)

    def _update(
        self,
        original: Any,
        base: Any,
        context: Any,
        mapper: Any,
        table: Any,
        records: Any,
        **kwargs: Any,
    ) -> Any:
        def seen() -> Iterator[Any]:
            for record in records:
                state, _, parameters, mapper_of_state, _, expressions, *_ = record
                written = _attributes(mapper_of_state, table, {*parameters, *expressions})
                self._row(context).updated.setdefault(state, set()).update(written)
                yield record

        is_bulk = not isinstance(context, UOWTransaction)
        return original(base, context, mapper, table, records if is_bulk else seen(), **kwargs)

    def _post_update(
        self, original: Any, base: Any, context: Any, mapper: Any, table: Any, records: Any
    ) -> None:
        def seen() -> Iterator[Any]:
            for record in records:
                state, _, mapper_of_state, _, parameters = record
                written = _attributes(mapper_of_state, table, parameters)
                self._row(context).updated.setdefault(state, set()).update(written)
                yield record

        original(base, context, mapper, table, seen())

    def _delete(
        self, original: Any, base: Any, context: Any, table: Any, states: Any
    ) -> Iterator[Any]:
        for one in states:
            for record in original(base, context, table, [one]):
                self._row(context).deleted.add(one[0])
                yield record

    def _secondary(self, original: Any, processor: Any, context: Any, *rows: Any) -> None:
        if any(rows):
            self._flush_of(context.session).has_begun = True
        original(processor, context, *rows)

    def _row(self, context: UOWTransaction) -> Flush:
        """The flush, which hands over one more row."""
        flush = self._flush_of(context.session)
        flush.has_begun = True
        flush.rows += 1
        return flush

    # -- events and signals -----------------------------------------------------------------------

    def _became_persistent(self, session: Session, instance: Any) -> None:
        self._flush_of(session).became_persistent.add(inspect(instance))

    def _became_deleted(self, session: Session, instance: Any) -> None:
        self._flush_of(session).became_deleted.add(inspect(instance))

    def _receive(
        self,
        sender: type,
        instance: Any,
        session: Session,
        signal: Any,
        created: bool | None = None,
        update_fields: frozenset[str] | None = None,
        **kwargs: Any,
    ) -> None:
        state, flush = inspect(instance), self._flush_of(session)
        fate = DELETED if created is None else CREATED if created else UPDATED
        if signal in (pre_save, pre_delete):
            flush.pre[state, fate] += 1
            if flush.has_begun:
                self._tell(self.report.late, f"{sender.__name__} {fate}")
        else:
            flush.post[state, fate] += 1
            flush.update_fields[state] = update_fields

    # -- the report -------------------------------------------------------------------------------

    def _flush_of(self, session: Session) -> Flush:
        return next(one for one in reversed(self._flushes) if one.session is session)

    def _judge(self, flush: Flush, mismatches: Iterable[str]) -> None:
        self.report.rows += flush.rows
        self.report.instances += flush.instances
        for mismatch in mismatches:
            self._tell(self.report.mismatches, mismatch)

    @staticmethod
    def _tell(where: list[str], what: str) -> None:
        where.append(f"{os.environ['PYTEST_CURRENT_TEST']}: {what}")


def _attributes(mapper: Any, table: Any, parameters: Container[Any]) -> set[str]:
    """The attributes whose columns an UPDATE of one table is given.

    By the key of the column for a value, by the column itself for an expression of SQL; the other
    parameters, which find the row, are named by table and column.
    """
    return {
        mapper.get_property_by_column(column).key
        for column in mapper._cols_by_table[table]  # orm/mapper.py
        if column.key in parameters or column in parameters
    }


def _is_filled_in(state: State, key: str) -> bool:
    """Whether each UPDATE writes the attribute, although it is not given it."""
    columns = state.mapper.column_attrs[key].columns
    return any(one.onupdate is not None or one.server_onupdate is not None for one in columns)
