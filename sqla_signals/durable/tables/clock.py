"""The database's clock: the only one that durable delivery compares anything with.

The clocks of the machines may be wrong, each in its own way.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import DateTime, Float, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeEngine


class database_time(FunctionElement[Any]):
    """The time in UTC, as a column of the outbox holds it.

    :param seconds: later than now, or earlier.
    """

    inherit_cache: bool | None = True
    name = "database_time"
    type: TypeEngine[Any] = DateTime(timezone=True)

    def __init__(self, seconds: float = 0.0) -> None:
        later = [bindparam(None, float(seconds), Float(), unique=True)] if seconds else []
        super().__init__(*later)


@compiles(database_time, "postgresql")
def _postgresql(element: database_time, compiler: SQLCompiler, **kwargs: Any) -> str:
    # Not now(), which is when the transaction began.
    now = "statement_timestamp()"
    if not len(element.clauses):
        return now
    seconds = compiler.process(element.clauses, **kwargs)
    return f"({now} + make_interval(secs => {seconds}))"


@compiles(database_time, "mysql")
@compiles(database_time, "mariadb")
def _mysql(element: database_time, compiler: SQLCompiler, **kwargs: Any) -> str:
    seconds = compiler.process(element.clauses, **kwargs) or "0"
    return f"timestampadd(MICROSECOND, {seconds} * 1000000, utc_timestamp(6))"


@compiles(database_time, "sqlite")
def _sqlite(element: database_time, compiler: SQLCompiler, **kwargs: Any) -> str:
    seconds = compiler.process(element.clauses, **kwargs) or "0"
    # Six digits, as SQLAlchemy stores them: as text, 0.5 and 0.50 would not be the same.
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {seconds} || ' seconds') || '000')"
