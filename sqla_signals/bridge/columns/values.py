"""What becomes of one column, and of one value of it, in an INSERT or UPDATE."""

from __future__ import annotations

import re
from collections.abc import Iterable
from operator import eq
from typing import Any

from sqlalchemy.orm import LoaderCallableStatus
from sqlalchemy.schema import Column
from sqlalchemy.sql import ClauseElement
from sqlalchemy.types import TypeDecorator, TypeEngine

from ...changes.change import UNSET
from .copies import IMMUTABLE


def equality(equal: Any) -> Any:
    """``equal``, or the operator where that is all it does, which is quicker by a call."""
    plain = getattr(equal, "__func__", None) is TypeEngine.compare_values
    return eq if plain else equal


def is_expression(value: Any) -> bool:
    """Whether a value is SQL, to be computed by the database."""
    if type(value) in IMMUTABLE:
        return False
    return isinstance(value, ClauseElement) or hasattr(value, "__clause_element__")


def is_mutable(sql_type: Any) -> bool:
    """Whether the values of a column may be changed in place: its type does not exclude it."""
    try:
        return isinstance(sql_type, TypeDecorator) or sql_type.python_type not in IMMUTABLE
    except NotImplementedError:
        return True


def differs(equal: Any, new: Any, old: Any) -> bool:
    """Whether SQLAlchemy would put ``new`` into the SET clause."""
    # A comparison may give something that is neither True nor False, such as an array.
    return is_expression(new) or equal(new, old) is not True


def known(value: Any) -> Any:
    """``value``, or ``UNSET`` for SQLAlchemy's symbols of a value that was never loaded."""
    return UNSET if isinstance(value, LoaderCallableStatus) else value


def absent_value(columns: Iterable[Any]) -> Any:
    """What a column holds after an INSERT that was given no value for it: NULL or unknown."""
    for column in columns:
        if (
            column.server_default is not None
            or column.default is not None
            or column.computed is not None
            or column.identity is not None
            or column.primary_key
        ):
            return UNSET
    return None


def table_of(column: Any) -> Any:
    """The table that an UPDATE of the column writes, also where a SELECT of it is mapped."""
    bases = [one for one in column.base_columns if isinstance(one, Column)]
    return (bases[0] if bases else column).table


def words(text: str) -> set[str]:
    """The words of a SQL expression."""
    return set(re.findall(r"\w+", text.lower()))
