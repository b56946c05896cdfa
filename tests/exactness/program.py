"""Programs of Session operations, one line of Python each: run, recorded, printed.

What is run is the text that is printed, so a printed program can be pasted into a test.
"""

from __future__ import annotations

import gc
import os
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from sqlalchemy import exc, func, inspect, select
from sqlalchemy.orm import Session

import sqla_signals
from sqla_signals import post_delete, post_save, pre_delete, pre_save

from . import models
from .comparison import late, mismatches
from .meddling import Meddler, Veto
from .order import Order
from .recorder import Database, Recorder, SignallingSession, key_of
from .witness import Key

MODELS = {name: value for name, value in vars(models).items() if hasattr(value, "__table__")}
PROGRAM_ERRORS = (ValueError, IndexError, KeyError, TypeError, AttributeError, NameError)
"""What a line may raise that asks for something impossible, such as removing what is not there."""


class Mismatch(AssertionError):
    """The library and the witness disagree; the message has the program and what happened."""

    def __init__(self, found: Sequence[str], lines: Sequence[str], happened: str) -> None:
        program = "\n".join(f"    {line}" for line in lines)
        super().__init__("\n".join([*found, "in the program", program, "where", happened]))
        self.kind = re.sub(r"[(\d{].*", "", found[0])
        """What it is about, without numbers and instances."""


class Tally:
    """What was done and found, over many programs."""

    def __init__(self, tolerated: re.Pattern[str] | None = None) -> None:
        self.steps = self.programs = self.flushes = self.failed = self.pre = 0
        self.undecided = 0
        """Programs that SQLAlchemy itself does not carry out in one way only."""
        self.rows: Counter[str] = Counter()
        self.late: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.tolerated = tolerated
        """Mismatches that are not reported, since they are known."""

    def tolerates(self, mismatch: str) -> bool:
        """Whether the mismatch is a known one."""
        return self.tolerated is not None and self.tolerated.search(mismatch) is not None


@contextmanager
def signals_received() -> Iterator[None]:
    """Install the library on `SignallingSession`; its signals go to the session's recorder."""

    def received(sender: Any, **arguments: Any) -> None:
        arguments["session"].info["recorder"].receive(sender, arguments)

    installation = sqla_signals.install(SignallingSession)
    signals = (pre_save, post_save, pre_delete, post_delete)
    for signal in signals:
        signal.connect(received, sender=None, weak=False)
    try:
        yield
    finally:
        for signal in signals:
            signal.disconnect(received, sender=None)
        installation.remove()


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Ignore what SQLAlchemy warns of in random programs; where rows are lost, raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exc.SAWarning)
        warnings.filterwarnings("error", "DELETE statement on table", exc.SAWarning)
        warnings.filterwarnings("error", "New instance", exc.SAWarning)
        warnings.filterwarnings("error", "Identity map already had", exc.SAWarning)
        warnings.filterwarnings("ignore", "The `objects` parameter of `Session.flush`")
        yield


def run_programs(machine: type[RuleBasedStateMachine], number: int) -> None:
    """Run so many programs of a state machine, the same in every run."""
    spare_the_collector()
    with expected_warnings():
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=number,
                stateful_step_count=30,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],  # Programs are made short by the machine itself.
                suppress_health_check=list(HealthCheck),
            ),
        )


def spare_the_collector() -> None:
    """Keep it from looking at what is here already: each program ends with a collection."""
    gc.collect()
    gc.freeze()


class Program:
    """A session, its variables, and the lines that were run on them."""

    def __init__(
        self,
        database: Database,
        session_class: type[Session],
        tally: Tally,
        *,
        meddling: bool = False,
        order: int = 0,
        **session_options: Any,
    ) -> None:
        self.order = Order(order, session_class.__name__)
        self.database = database
        self.recorder = Recorder(database)
        self.tally = tally
        self.meddling = meddling
        self.lines: list[str] = []
        self.compares = issubclass(session_class, SignallingSession)
        self.stale: set[Key] = set()
        """Rows of which the session may have other values than the database: of instances that
        came back from being detached, and of row switches."""

        def new_session() -> Session:
            return session_class(
                database.engine, info={"recorder": self.recorder}, **session_options
            )

        self.namespace: dict[str, Any] = {
            **MODELS,
            "new_session": new_session,
            "session": new_session(),
            "savepoints": [],
            "inspect": inspect,
            "select": select,
            "func": func,
            "meddle": self._meddle,
            "gc": gc,
        }
        self._own = set(self.namespace)
        self.statements: list[list[str]] = []
        """Those of each flush of the last line, sorted."""
        self._broken = False

    @property
    def session(self) -> Session:
        """The current session."""
        session: Session = self.namespace["session"]
        return session

    @property
    def variables(self) -> dict[str, Any]:
        """The instances that the program holds, by name."""
        return {
            name: value
            for name, value in self.namespace.items()
            if name not in self._own and isinstance(value, models.Base)
        }

    def new_name(self, cls: type) -> str:
        """A name for a further instance of `cls`."""
        n = 1
        while f"{cls.__name__.lower()}{n}" in self.namespace:
            n += 1
        return f"{cls.__name__.lower()}{n}"

    def run(self, line: str) -> BaseException | None:
        """Run one line and compare its flushes; the result is the legal error it ended with."""
        self.lines.append(line)
        Order.current = self.order
        error: BaseException | None = None
        before = {k for v in self.variables.values() if inspect(v).detached and (k := key_of(v))}
        try:
            exec(compile(line, "<program>", "exec"), self.namespace)
        except Exception as raised:
            error = raised
            self.lines[-1] += f"  # {type(raised).__name__}"
        attached = {k for v in self.variables.values() if v in self.session and (k := key_of(v))}
        self.stale |= before & attached
        finished, self.recorder.finished = self.recorder.finished, []
        self._broken = isinstance(error, exc.DBAPIError)
        self.statements = [
            sorted(s.sql for s in flush.statements.values())
            for flush in finished
            if flush.statements
        ]
        if self.compares:
            self._compare(finished, error)
        return error

    @property
    def must_roll_back(self) -> bool:
        """Whether the last line has left a transaction that can only be rolled back."""
        return self._broken or not self.session.is_active

    def _compare(self, finished: list[Any], error: BaseException | None) -> None:
        if self.recorder.stray:
            self._mismatch("signals outside of a flush", [str(s) for s in self.recorder.stray])
        for flush in finished:
            stale = self.stale | self.recorder.cascaded_to
            late_ones = late(flush)
            found = list(mismatches(flush, stale=stale, meddling=self.meddling))
            is_veto = isinstance(flush.error, Veto) and str(flush.error).startswith("pre_")
            if is_veto and (flush.statements or not self.session.is_active):
                found.append("the veto came too late")
            if not self.meddling and flush.error is None:
                found += [f"late: {sent}" for sent in late_ones]
            found = [mismatch for mismatch in found if not self.tally.tolerates(mismatch)]
            if found:
                self._mismatch(str(flush), found)
            self._count(flush, late_ones)
            # After a row switch with post_update, the session may hold what was not written.
            self.stale |= {key for _, key in flush.born} & {key for _, key in flush.died}
        if error is None:
            return
        self.tally.errors[type(error).__name__] += 1
        if not _is_legal(error, in_flush=any(flush.error is not None for flush in finished)):
            found = f"no program should see {type(error).__name__}"
            if not self.tally.tolerates(f"{found}: {error}"):
                self._mismatch(_traceback(error), [found])

    def _count(self, flush: Any, late_ones: list[Any]) -> None:
        if not (flush.sent or flush.statements or flush.error):
            return  # There was nothing to do.
        self.tally.flushes += 1
        self.tally.failed += flush.error is not None
        self.tally.pre += sum(sent.signal.startswith("pre_") for sent in flush.sent)
        for sent in late_ones:
            self.tally.late[f"{type(sent.instance).__name__} {sent.kind}"] += 1
        if flush.error is None:
            self.tally.rows.update(fate.kind for fate in flush.fates)

    def _mismatch(self, happened: str, found: list[str]) -> None:
        raise Mismatch(found, self.lines, happened)

    def _meddle(self, signal: str, sender: type, action: str, target: type) -> None:
        self.recorder.meddlers.append(Meddler(signal, sender, action, target, self))

    def end(self) -> None:
        """Close the session and empty the database."""
        if not self.namespace:
            return
        self.session.close()
        self.recorder.finished.clear()
        self.namespace.clear()
        self.database.clear()


def _is_legal(error: BaseException, *, in_flush: bool) -> bool:
    """Whether a program may end a line with `error`, the library being right."""
    if isinstance(error, sqla_signals.SignalsError):
        return False
    if isinstance(error, (exc.SQLAlchemyError, exc.SAWarning, Veto)):
        return True
    if in_flush or isinstance(error, AssertionError):
        # SQLAlchemy's own, such as "Dependency rule ... tried to blank-out primary key column", or
        # an assertion of its rollback after a flush that has failed between two statements.
        # That it comes without the library too is for the control to tell.
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        return os.path.dirname(sqlalchemy.__file__) in raised_in
    return isinstance(error, PROGRAM_ERRORS) and "sqla_signals" not in _traceback(error)


def _traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    return re.sub(r"(?m)^  File .*site-packages.*\n(?:    .*\n)*", "", text)
