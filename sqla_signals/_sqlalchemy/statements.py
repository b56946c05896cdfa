"""INSERT, UPDATE and DELETE of mapped classes: what they write, and how they are executed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import select
from sqlalchemy.engine.cursor import CursorResult, FullyBufferedCursorFetchStrategy
from sqlalchemy.orm import FromStatement, bulk_persistence
from sqlalchemy.schema import Column
from sqlalchemy.sql import Select
from sqlalchemy.sql.expression import BinaryExpression, BindParameter
from sqlalchemy.util import immutabledict

from . import renamed
from .mappers import attribute_of

if TYPE_CHECKING:
    from sqlalchemy import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState


SEEN_OPTION: Final = "_sqla_signals_seen"
"""Execution option of a statement that one installation has taken care of.

The underscore hides it from users, as it does for SQLAlchemy's own options.
"""
BIND_ARGUMENT: Final = "_sa_skip_events"
"""A bind argument that ``ORMExecuteState.invoke_statement()`` adds, and nothing reads.

It must not reach a ``get_bind(self, mapper=None, clause=None)``, as in SQLAlchemy's recipe for
readers and writers, because that takes no other arguments.
"""


def dml_of(statement: Any) -> Any:
    """The INSERT, UPDATE or DELETE itself, also where ``from_statement()`` is around it."""
    return statement.element if isinstance(statement, FromStatement) else statement


def dml_mapper(statement: Any) -> Mapper[Any] | None:
    """The mapper of the class that an INSERT, UPDATE or DELETE names, ``None`` for any other."""
    entity = _dml_entity(statement)
    return None if entity is None else entity.mapper


def _dml_entity(statement: Any) -> Any:
    if not statement.is_dml:
        return None
    # Of a Table there is none, even where the ORM has a part in the statement by a WHERE.
    return dml_of(statement).table._annotations.get("parententity")


def dml_table(statement: Any) -> Any:
    """The table that an UPDATE or DELETE writes, or the alias of it that it names."""
    entity = _dml_entity(statement)
    return entity.selectable if entity.is_aliased_class else entity.mapper.local_table


def dml_operation(statement: Any) -> Literal["insert", "update", "delete"]:
    """What a statement does.

    ``ORMExecuteState.is_insert`` does not see through ``from_statement()`` before 2.0.30.
    """
    dml = dml_of(statement)
    return "insert" if dml.is_insert else "update" if dml.is_update else "delete"


def dml_strategy(context: ORMExecuteState) -> str:
    """How the ORM is going to execute an INSERT, UPDATE or DELETE.

    The rule is that of ``orm_pre_session_exec`` in ``orm/bulk_persistence.py``.
    """
    strategy: str = execution_options_of(context).get("dml_strategy", "auto")
    if strategy != "auto":
        return strategy
    parameters = context.parameters
    is_bulk = bool(parameters) if context.is_insert else isinstance(parameters, list)
    return "bulk" if is_bulk else "orm"


def execution_options_of(context: ORMExecuteState) -> Mapping[str, Any]:
    """The execution options of a statement, with those that listeners have added so far."""
    statement: Any = context.statement
    return {**statement.get_execution_options(), **context.local_execution_options}


def returns_rows(statement: Any) -> bool:
    """Whether an INSERT, UPDATE or DELETE has a RETURNING of the user's."""
    return bool(dml_of(statement)._returning)


def may_skip_rows(statement: Any) -> bool:
    """Whether a statement with a list of parameters may leave some of these rows alone."""
    return bool(
        getattr(statement, "_where_criteria", ())
        or getattr(statement, "_post_values_clause", None) is not None
    )


def is_replacing(statement: Any) -> bool:
    """Whether SQLite is to delete rows that are in the way: ``INSERT OR REPLACE``, and UPDATE."""
    return any("REPLACE" in str(text).upper() for text, _ in dml_of(statement)._prefixes)


def is_extended(statement: Any) -> bool:
    """Whether something follows the condition of an UPDATE or DELETE (from SQLAlchemy 2.1 on)."""
    return getattr(statement, "_post_criteria_clause", None) is not None


def is_beyond_its_condition(statement: Any) -> bool:
    """Whether an UPDATE or DELETE of MySQL has a LIMIT, or sets columns of a second table."""
    if any(name.endswith("limit") for name in statement.dialect_kwargs):
        return True
    table = dml_table(statement)
    columns = getattr(statement, "_ordered_values", None) or getattr(statement, "_values", None)
    return any(
        isinstance(one, Column) and not table.c.contains_column(one) for one in dict(columns or {})
    )


def set_values(statement: Any, mapper: Mapper[Any]) -> dict[str, Any]:
    """What an UPDATE sets, by attribute: Python values, or SQL."""
    stated = dict(getattr(statement, "_ordered_values", None) or statement._values or {})
    values: dict[Any, Any] = {}
    for target, value in stated.items():
        column = target
        while isinstance(column, BinaryExpression):  # column["key"], a part of its value
            column, value = column.left, target
        values[column] = value
    return by_attribute(values, mapper)


def inserted_values(statement: Any, mapper: Mapper[Any]) -> list[dict[str, Any]] | None:
    """What an INSERT says in ``values()``, by row and attribute; ``None`` if it selects them."""
    if statement.select is not None:
        return None
    if not statement._multi_values:
        return [set_values(statement, mapper)]
    return [by_attribute(row, mapper) for rows in statement._multi_values for row in rows]


def has_many_values(statement: Any) -> bool:
    """Whether an INSERT has a list in its ``values()``."""
    return bool(statement._multi_values)


def by_attribute(values: Mapping[Any, Any], mapper: Mapper[Any]) -> dict[str, Any]:
    """Values by the attributes of their columns, or of the keys of these; no others."""
    return {
        name: _plain(value)
        for column, value in values.items()
        if (name := attribute_of(column, mapper)) is not None
    }


def _plain(value: Any) -> Any:
    is_plain = isinstance(value, BindParameter) and value.callable is None and not value.required
    return value.value if is_plain else value


def by_column(parameters: Iterable[Mapping[str, Any]], mapper: Mapper[Any]) -> list[dict[str, Any]]:
    """Parameters with the columns of a composite in place of the composite."""
    expanded = [dict(one) for one in parameters]
    _expand(mapper, expanded)
    return expanded


_EXPANSIONS: Final = ("_expand_other_attrs", "_expand_composites")  # of 2.1, and of 2.0
_expand: Final[Any] = next(
    getattr(bulk_persistence, name) for name in _EXPANSIONS if hasattr(bulk_persistence, name)
)


def upsert_of(statement: Any, mapper: Mapper[Any]) -> Upsert | None:
    """The ``ON CONFLICT`` of an INSERT; ``TypeError`` for ``ON DUPLICATE KEY`` and the like."""
    clause = getattr(statement, "_post_values_clause", None)
    if clause is None:
        return None
    if not hasattr(clause, "inferred_target_elements"):
        raise TypeError
    return Upsert(clause, mapper)


class Upsert:
    """What an INSERT of SQLite or PostgreSQL does where a row is in its way."""

    def __init__(self, clause: Any, mapper: Mapper[Any]) -> None:
        table: Any = mapper.local_table
        updates = dict(getattr(clause, "update_values_to_set", ()))
        self.updates: frozenset[str] = frozenset(by_attribute(updates, mapper))
        """The attributes that it sets; none if it leaves the row alone."""
        columns: list[Any] = [
            # Before 2.0.37, ORM attributes come as they are: postgresql/dml.py, OnConflictClause.
            table.c[one] if isinstance(one, str) else getattr(one, "expression", one)
            for one in clause.inferred_target_elements or ()
        ]
        named = getattr(clause, "constraint_target", None)  # PostgreSQL's only
        for constraint in (*table.constraints, *table.indexes):
            if named is not None and constraint.name == named:
                columns = list(constraint.columns)
        self.target: list[str] = []
        if all(isinstance(column, Column) for column in columns):
            self.target = [mapper.get_property_by_column(column).key for column in columns]
        """The attributes that tell which row is in the way; none if the statement does not say."""


def matching(statement: Any, columns: Iterable[Column[Any]] = ()) -> Select[Any]:
    """The query for the rows that an UPDATE or DELETE would write now.

    As in the statement, nothing but its conditions joins the tables that they name, not even the
    table of a parent class.

    :param columns: what to select, of the table that the statement writes.
    """
    mapper, table = _dml_entity(statement).mapper, dml_table(statement)
    query: Any = select(*map(table.corresponding_column, columns)).select_from(table)
    criteria: dict[Any, Any] = {}
    for option in statement._with_options:
        if option._is_criteria_option:
            option.get_global_criteria(criteria)
    query = query.where(
        *statement._where_criteria,
        *_BulkUDCompileState._adjust_for_extra_criteria(criteria, mapper),
    )
    return as_core(query.options(*statement._with_options))


_BulkUDCompileState: Final = renamed(bulk_persistence, "BulkUDCompileState")


def as_core(query: Select[Any]) -> Select[Any]:
    """A query to which the ORM adds no conditions of its own.

    It would do so for each class that the query names: for single-table inheritance, and those of
    ``with_loader_criteria()``. For an UPDATE or DELETE it adds those of the written class alone.
    """
    query._propagate_attrs = immutabledict()
    return query


def without_where(statement: Any) -> Any:
    """The statement without its conditions."""
    statement = statement._generate()
    statement._where_criteria = ()
    return statement


def execute_last(
    context: ORMExecuteState, execute: Callable[[ORMExecuteState], Result[Any]]
) -> Result[Any]:
    """Call ``execute`` after all other listeners for ``do_orm_execute``.

    They may still restrict the statement, or choose its bind.
    """
    context._events_todo.append(execute)
    return context.invoke_statement()


def fetched(result: Result[Any]) -> int | None:
    """Fetch all rows from the driver into the result; return their number.

    No instance is made of a row before the caller reads it, as without signals. ``None`` if the
    rows come from several cursors.
    """
    rows_of: Any = result if isinstance(result, CursorResult) else getattr(result, "raw", None)
    if rows_of is None:
        return None
    # CursorResult._rewind() of engine/cursor.py does the same with rows that were processed.
    rows = rows_of.cursor_strategy.fetchall(rows_of, rows_of.cursor)
    rows_of.cursor_strategy = FullyBufferedCursorFetchStrategy(None, initial_buffer=rows)
    return len(rows)
