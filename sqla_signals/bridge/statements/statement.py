"""Statements about many rows: ``pre_bulk`` and ``post_bulk``, or a warning that rows are bypassed.

ORM-enabled ``insert()``, ``update()`` and ``delete()`` come to ``do_orm_execute``, those of
``Query`` too. The signals of their rows are in :mod:`.rows`.
"""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from ..._sqlalchemy.sessions import frames_outwards
from ..._sqlalchemy.statements import (
    SEEN_OPTION,
    dml_mapper,
    dml_operation,
    execute_last,
    execution_options_of,
    fetched,
    may_skip_rows,
    returns_rows,
)
from ..._sqlalchemy.transactions import fail_transaction
from ...changes.effects import Executed
from ...errors import BulkBypassError, BulkBypassWarning, BulkOptionError
from ...receivers.dispatch import active_mutes, audible
from ...receivers.receiver import PHASES
from ...signals.builtin import post_bulk, post_delete, post_save, pre_bulk, pre_delete, pre_save
from ..calling.calls import Calls, is_sharded
from ..calling.guard import IN_STATEMENT, guarded
from ..transaction import frames
from .binds import bind_of, own_choice_of_bind
from .changes import changed_rows
from .inserts import inserted_rows
from .refusals import check_rows, check_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.engine import Result
    from sqlalchemy.orm import Mapper, ORMExecuteState, Session

    from ...signals.signal import Signal

Policy = Literal["warn", "ignore", "raise"]
POLICIES: Final[tuple[Policy, ...]] = ("warn", "ignore", "raise")

_ROW_SIGNALS: Final = {
    "insert": (pre_save, post_save),
    "update": (pre_save, post_save),
    "delete": (pre_delete, post_delete),
}
SIGNALS: Final = (pre_bulk, post_bulk, pre_save, post_save, pre_delete, post_delete)
"""The signals for whose receivers an installation listens to statements."""


def do_orm_execute(
    context: ORMExecuteState, policy_for: Callable[[Session], Policy]
) -> Result[Any] | None:
    """Execute a statement that inserts, updates or deletes instances; ``None`` for any other."""
    mapper = dml_mapper(context.statement)
    if mapper is None:
        check_table(context)
        return None
    options = execution_options_of(context)
    if SEEN_OPTION in options:
        return None
    context.update_execution_options(**{SEEN_OPTION: True})
    mode = options.get("signals")
    if mode not in (None, "rows", "skip"):
        raise BulkOptionError(
            f'execution option signals={mode!r}: give "rows" for the signals of each row, or '
            f'"skip" for none'
        )
    if mode == "skip":
        return None
    if mode is None and not _has_bulk(mapper):
        operation = dml_operation(context.statement)
        _bypassed(context, mapper, operation, policy_for(context.session))
        return None
    execute = partial(_execute, sends_rows=mode == "rows")
    # A ShardedSession executes the statement from a listener, once for each shard.
    return execute(context) if is_sharded(context.session) else execute_last(context, execute)


def _has_bulk(mapper: Mapper[Any]) -> bool:
    return any(signal.has_receivers_for(mapper.class_) for signal in (pre_bulk, post_bulk))


def _execute(context: ORMExecuteState, *, sends_rows: bool) -> Result[Any]:
    session, calls = context.session, Calls(context.session)
    # Another listener may have put a statement of its own in place of the first.
    mapper = dml_mapper(context.statement)
    if mapper is None:
        return _invoke(context)
    cls, operation, rows = mapper.class_, dml_operation(context.statement), None
    if sends_rows and _row_receivers(mapper, operation):
        check_rows(context, mapper, operation)
        rows = (inserted_rows if context.is_insert else changed_rows)(context, mapper, calls)
    elif not _has_bulk(mapper):
        return _invoke(context)
    arguments: dict[str, Any] = {
        "operation": operation,
        "statement": context.statement,
        "parameters": context.parameters,
        "using": None if is_sharded(session) else bind_of(context, mapper),
    }
    _send(pre_bulk, calls, cls, arguments)
    try:
        result, arguments["rowcount"] = rows.execute() if rows else _counted(context, operation)
    except BaseException:
        if rows and rows.are_written:
            fail_transaction(session)
        raise
    try:
        if any(post_bulk.table.lookup(cls, on) for on in PHASES if on != "flush"):
            frames.frame_of(session).add_executed(Executed(cls, arguments, active_mutes()))
        if rows:
            rows.send_post()
        _send(post_bulk, calls, cls, arguments)
    except BaseException:
        # As after a flush whose post_* receivers raise: what was written must not be committed.
        fail_transaction(session)
        raise
    return result


def _send(signal: Signal, calls: Calls, cls: type, arguments: Mapping[str, Any]) -> None:
    receivers = audible(signal, cls, signal.table.lookup(cls))
    if receivers:
        with guarded(calls.session, IN_STATEMENT):
            for receiver in receivers:
                calls.call(signal, receiver, cls, **arguments)


def _invoke(context: ORMExecuteState, **options: Any) -> Result[Any]:
    with own_choice_of_bind(context.session):
        return context.invoke_statement(execution_options=options)


def _counted(context: ORMExecuteState, operation: str) -> tuple[Result[Any], int]:
    """Execute a statement; its result, and how many rows it has changed, -1 if that is unknown."""
    # SQLAlchemy keeps the count of an INSERT only with this option.
    options = {"preserve_rowcount": True} if operation == "insert" else {}
    result = _invoke(context, **options)
    if returns_rows(context.statement):
        # Some databases count the rows only once all were fetched.
        rowcount = fetched(result)
        if rowcount is None:
            frozen = result.freeze()
            result, rowcount = frozen(), len(frozen.data)
        return result, rowcount
    rowcount = getattr(result, "rowcount", None)
    if rowcount is not None:
        return result, rowcount
    parameters = context.parameters
    many = parameters if isinstance(parameters, list) else [parameters]
    return result, -1 if may_skip_rows(context.statement) else len(many)


def _row_receivers(mapper: Mapper[Any], operation: str) -> list[Any]:
    """The receivers that a flush would call for such rows, without the muted ones."""
    mappers = [mapper] if operation == "insert" else mapper.self_and_descendants
    return [
        receiver
        for one in mappers
        for signal in _ROW_SIGNALS[operation]
        for on in PHASES
        for receiver in audible(signal, one.class_, signal.table.lookup(one.class_, on))
    ]


def _bypassed(
    context: ORMExecuteState, mapper: Mapper[Any], operation: str, policy: Policy
) -> None:
    if policy == "ignore":
        return
    receivers = _row_receivers(mapper, operation)
    if not receivers:
        return
    names = ", ".join(dict.fromkeys(str(receiver) for receiver in receivers[:3]))
    more = f" and {len(receivers) - 3} more" if len(receivers) > 3 else ""
    message = (
        f"{operation}({mapper.class_.__name__}) bypasses the unit of work, so "
        f"{'/'.join(signal.name for signal in _ROW_SIGNALS[operation])} are not sent to "
        f'{names}{more}. Execute it with execution_options={{"signals": "rows"}} to send them for '
        f'each row, with {{"signals": "skip"}} if it is meant to be silent, or connect a receiver '
        f'to post_bulk. install(bulk="ignore") turns this off.'
    )
    if policy == "raise":
        raise BulkBypassError(message)
    for frame in frames_outwards(inspect.currentframe()):
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in ("sqlalchemy", "sqla_signals"):
            warnings.warn_explicit(
                message,
                BulkBypassWarning,
                frame.f_code.co_filename,
                frame.f_lineno,
                module,
                frame.f_globals.setdefault("__warningregistry__", {}),
            )
            return
    warnings.warn(message, BulkBypassWarning, stacklevel=2)
