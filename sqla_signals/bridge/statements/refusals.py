"""What ``execution_options={"signals": "rows"}`` cannot do, with the reason and the remedy.

These checks look at the statement alone. They are made before anything is read or written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Table
from sqlalchemy.orm import FromStatement
from sqlalchemy.sql.expression import BindParameter
from sqlalchemy.sql.visitors import iterate

from ..._sqlalchemy.statements import (
    dml_of,
    dml_operation,
    execution_options_of,
    is_replacing,
    matching,
)
from ...errors import BulkOptionError
from ..calling.calls import is_sharded

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper, ORMExecuteState


def refusal(reason: str, kind: type[Exception] = BulkOptionError) -> Exception:
    """The error for a statement that the option cannot be used with."""
    return kind(f'execution option signals="rows": {reason}')


def check_rows(context: ORMExecuteState, mapper: Mapper[Any], operation: str) -> None:
    """Refuse a statement on a class if the signals of its rows cannot be sent."""
    if isinstance(context.statement, FromStatement):
        raise refusal(
            "it does not work with from_statement(): execute the statement itself, with returning()"
        )
    if is_replacing(context.statement):
        raise refusal(
            f"which rows {operation.upper()} OR REPLACE deletes is not known. Use "
            f"on_conflict_do_update(), or delete them before"
        )
    if not isinstance(mapper.local_table, Table):
        raise refusal(
            f"it does not work with {mapper.class_.__name__}, which is mapped to several tables at "
            f"once. Name the class of the table that is written"
        )
    if is_sharded(context.session):
        raise refusal(
            f"it does not work with {type(context.session).__name__}: rows of several shards may "
            f"have the same primary key. Execute the {operation}() in a Session on the "
            f"engine of one shard, or connect to post_bulk"
        )


def check_table(context: ORMExecuteState) -> None:
    """Refuse the signals of rows for a statement on a ``Table``, which has no instances."""
    if execution_options_of(context).get("signals") != "rows":
        return
    # From SQLAlchemy 2.1 on, a session may ask so for whatever it executes.
    if getattr(context.session, "execution_options", {}).get("signals") == "rows":
        return
    operation, table = dml_operation(context.statement), str(dml_of(context.statement).table)
    raise refusal(
        f"{operation}() of the Table {table!r} has no instances; name the class, "
        f"{operation}(Order). For the rows of a secondary table, m2m_changed is sent when the "
        f"relationship is changed"
    )


def check_condition(context: ORMExecuteState, *, by_key: bool) -> None:
    """Refuse an UPDATE or DELETE whose condition cannot be used to look its rows up before."""
    parts = list(iterate(matching(context.statement)))
    if isinstance(context.parameters, list) and not (
        by_key and all(one.unique for one in parts if isinstance(one, BindParameter))
    ):
        raise refusal(
            "it takes a list of parameters for an UPDATE by primary key only, and without "
            "bindparam() in its where(). Execute the statement for one after the other, or connect "
            "to post_bulk"
        )
    if any(getattr(one, "is_dml", False) for one in parts):
        raise refusal(
            "the where() contains a statement that writes, which would be executed to look the "
            "rows up, too. Execute it before"
        )
