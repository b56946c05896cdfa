"""Signals from an application that nobody here wrote, held against what its database saw.

Triggers on every table that Optuna maps are the witness: they write down each row that a statement
inserts, updates or deletes, in the transaction that does it. The foreign keys of Optuna's schema
have no action, so the database deletes nothing by itself: every DELETE is one that the session
sent. Optuna's upserts bypass the unit of work; they are counted as they go to the driver, and set
apart.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, inspect

import sqla_signals
from sqla_signals import post_delete, post_save, pre_delete, pre_save
from tests.examples.running import connect_receivers, run_python

try:
    import optuna
    from optuna.storages._rdb.models import BaseModel
except ImportError:
    if os.environ.get("CI"):
        raise
    pytest.skip("Optuna is not installed", allow_module_level=True)

MODELS = {mapper.local_table.name: mapper.class_ for mapper in BaseModel.registry.mappers}
UPSERTED = {"trial_user_attributes", "trial_system_attributes"}


@dataclass(frozen=True)
class Write:
    """One row written: its table, its primary key, how, and for an update which columns changed."""

    table: str
    key: int
    kind: str
    columns: frozenset[str] = frozenset()


@dataclass
class Witness:
    """What the database saw."""

    path: Path
    upserts: Counter[str] = field(default_factory=Counter)

    def create_triggers(self) -> None:
        """Create the tables of Optuna and, on each of them, the triggers."""
        engine = create_engine(f"sqlite:///{self.path}")
        BaseModel.metadata.create_all(engine)
        engine.dispose()
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute(
                "CREATE TABLE witness"
                " (id INTEGER PRIMARY KEY, tab TEXT, key INT, kind TEXT, cols TEXT)"
            )
            for name, model in MODELS.items():
                columns = [column.name for column in model.__table__.columns]
                (key,) = [column.name for column in model.__table__.primary_key]
                changed = " || ".join(
                    f"CASE WHEN OLD.{column} IS NOT NEW.{column} THEN '{column} ' ELSE '' END"
                    for column in columns
                )
                for kind, row, listed in (
                    ("INSERT", "NEW", "''"),
                    ("UPDATE", "NEW", changed),
                    ("DELETE", "OLD", "''"),
                ):
                    connection.execute(
                        f"CREATE TRIGGER {name}_{kind} AFTER {kind} ON {name} BEGIN"
                        f" INSERT INTO witness (tab, key, kind, cols)"
                        f" VALUES ('{name}', {row}.{key}, '{kind}', {listed}); END"
                    )

    def notice_upserts(self, *event_arguments: Any) -> None:
        """Count by table the one statement of Optuna's that bypasses the unit of work."""
        statement = event_arguments[2]
        if "ON CONFLICT" in statement:
            table = re.match(r"INSERT INTO (\w+) ", statement)
            assert table
            self.upserts[table[1]] += 1

    def writes(self) -> list[Write]:
        """What was committed, in the order in which it was written."""
        with closing(sqlite3.connect(self.path)) as connection:
            rows = connection.execute("SELECT tab, key, kind, cols FROM witness ORDER BY id")
            return [Write(*row, frozenset(columns.split())) for *row, columns in rows]


@dataclass
class Heard:
    """What the signals said."""

    announced: list[tuple[str, str]] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)

    def pre(self, sender: type[Any], signal: Any, created: bool = False, **kwargs: Any) -> None:
        """Receive `pre_save` and `pre_delete`."""
        self.announced.append((sender.__table__.name, kind_of(signal, created)))

    def post(
        self,
        sender: type[Any],
        instance: Any,
        signal: Any,
        created: bool = False,
        changes: Any = None,
        **kwargs: Any,
    ) -> None:
        """Receive `post_save` and `post_delete`."""
        assert type(instance) is sender
        kind, columns = kind_of(signal, created), frozenset()
        if kind == "UPDATE":
            properties = inspect(sender).column_attrs
            columns = frozenset(properties[name].columns[0].name for name in changes)
        (key,) = inspect(instance).identity
        self.writes.append(Write(sender.__table__.name, key, kind, columns))


def kind_of(signal: Any, created: bool) -> str:
    """The statement that a signal stands for."""
    return "DELETE" if signal in (pre_delete, post_delete) else "INSERT" if created else "UPDATE"


def small_study(storage: optuna.storages.RDBStorage) -> None:
    """The study of the example."""
    from examples.optuna_watch import __main__ as example

    example.run_study(storage)


def every_write(storage: optuna.storages.RDBStorage) -> None:
    """Every write that the storage has, also those that a study in a single process never makes."""
    study = optuna.create_study(
        storage=storage, study_name="two aims", directions=["minimize", "maximize"]
    )
    for owner in ("Ada", "Grace", "Grace"):
        study.set_user_attr("owner", owner)
        storage.set_study_system_attr(study._study_id, "owner", owner)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.suggest_categorical("y", ["a", "b"])
    for value in (1.0, 2.0, 2.0, float("nan")):
        storage.set_trial_intermediate_value(trial._trial_id, 0, value)
        trial.set_user_attr("value", value)
        storage.set_trial_system_attr(trial._trial_id, "value", value)
    storage.record_heartbeat(trial._trial_id)
    storage.record_heartbeat(trial._trial_id)
    storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.RUNNING, [0.5, 0.5])
    study.tell(trial, [float("inf"), 0.5])
    study.add_trial(
        optuna.trial.create_trial(
            values=[1.0, 2.0],
            params={"x": 0.5},
            distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
            user_attrs={"by": "hand"},
            system_attrs={"by": "hand"},
            intermediate_values={0: 1.0, 1: 2.0},
        )
    )
    study.enqueue_trial({"x": 0.25})
    optuna.create_study(storage=storage, study_name="left alone")
    optuna.delete_study(storage=storage, study_name="two aims")


@contextmanager
def watched(path: Path) -> Iterator[tuple[optuna.storages.RDBStorage, Witness, Heard]]:
    """An Optuna storage at `path`, which writes its first row after the witness has arrived."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    witness, heard = Witness(path), Heard()
    with ExitStack() as stack:
        stack.callback(sqla_signals.install(bulk="ignore").remove)
        for signal, hear in (
            (pre_save, heard.pre),
            (pre_delete, heard.pre),
            (post_save, heard.post),
            (post_delete, heard.post),
        ):
            stack.enter_context(signal.connected_to(hear, sender=BaseModel))
        witness.create_triggers()
        event.listen(Engine, "before_cursor_execute", witness.notice_upserts)
        stack.callback(event.remove, Engine, "before_cursor_execute", witness.notice_upserts)
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        stack.callback(storage.engine.dispose)
        stack.callback(storage.remove_session)
        yield storage, witness, heard


@dataclass(frozen=True)
class Run:
    """A finished application of Optuna: what the database saw, and what the signals said."""

    work: Callable[[optuna.storages.RDBStorage], None]
    written: Sequence[Write]
    heard: Sequence[Write]
    announced: Sequence[tuple[str, str]]
    upserts: Counter[str]

    @property
    def by_unit_of_work(self) -> list[Write]:
        """What was written, less what upserts wrote.

        Optuna writes the attributes of trials by upserts alone, and deletes them by the unit of
        work alone.
        """
        return [w for w in self.written if w.kind == "DELETE" or w.table not in UPSERTED]


@pytest.fixture(scope="module", params=[small_study, every_write], ids=lambda work: work.__name__)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One of the two applications, run to its end under the eyes of the witness."""
    with watched(tmp_path_factory.mktemp("optuna") / "optuna.db") as (storage, witness, heard):
        request.param(storage)
    return Run(request.param, witness.writes(), heard.writes, heard.announced, witness.upserts)


def test_each_row_the_unit_of_work_wrote_has_one_signal_and_no_other_has(run: Run) -> None:
    """Table by table: class, primary key and kind agree one to one."""

    def counted(writes: Sequence[Write]) -> dict[str, Counter[tuple[int, str]]]:
        tables: dict[str, Counter[tuple[int, str]]] = {table: Counter() for table in MODELS}
        for write in writes:
            tables[write.table][write.key, write.kind] += 1
        return tables

    assert counted(run.heard) == counted(run.by_unit_of_work)


def test_the_signals_of_a_row_come_in_the_order_in_which_it_was_written(run: Run) -> None:
    """And an update names the columns whose stored value changed, no more and no fewer."""

    def by_row(writes: Sequence[Write]) -> dict[tuple[str, int], list[tuple[str, frozenset[str]]]]:
        rows = defaultdict(list)
        for write in writes:
            rows[write.table, write.key].append((write.kind, write.columns))
        return dict(rows)

    assert by_row(run.heard) == by_row(run.by_unit_of_work)


def test_each_write_was_announced(run: Run) -> None:
    """One `pre_` for each `post_`, by table and kind."""
    assert Counter(run.announced) == Counter((write.table, write.kind) for write in run.heard)


def test_upserted_attributes_are_heard_when_they_are_deleted_and_not_before(run: Run) -> None:
    """An upsert bypasses the unit of work; the witness saw one row for each."""
    saved = Counter(w.table for w in run.written if w.table in UPSERTED and w.kind != "DELETE")
    assert saved == run.upserts
    assert saved.keys() <= UPSERTED
    assert {w.kind for w in run.heard if w.table in UPSERTED} == {"DELETE"}


def test_every_table_was_written_in_every_way_it_can_be(run: Run) -> None:
    """The agreement above is about something."""
    seen = {(write.table, write.kind) for write in run.written}
    updated = {"trials", "trial_values", "trial_intermediate_values"}
    updated |= {"study_user_attributes", "study_system_attributes"} | UPSERTED
    if run.work is small_study:
        assert {("studies", "DELETE"), ("trials", "UPDATE"), ("trial_values", "INSERT")} <= seen
    else:
        assert {table for table, kind in seen if kind == "INSERT"} == set(MODELS)
        assert {table for table, kind in seen if kind == "UPDATE"} >= updated
        assert {table for table, kind in seen if kind == "DELETE"} == set(MODELS) - {"version_info"}


def test_the_database_deletes_nothing_by_itself(tmp_path: Path) -> None:
    """No foreign key of Optuna's has an action, so that cascades are the ORM's and are heard."""
    witness = Witness(tmp_path / "optuna.db")
    witness.create_triggers()
    with closing(sqlite3.connect(witness.path)) as connection:
        actions = {
            tuple(key[5:7])
            for table in MODELS
            for key in connection.execute(f"PRAGMA foreign_key_list({table})")
        }
    assert actions == {("NO ACTION", "NO ACTION")}


def test_a_row_that_the_database_refuses_is_announced_and_never_confirmed(tmp_path: Path) -> None:
    """A second study of the same name breaks a unique constraint inside Optuna's flush."""
    with watched(tmp_path / "optuna.db") as (storage, witness, heard):
        optuna.create_study(storage=storage, study_name="twice")
        written, announced = witness.writes(), len(heard.announced)
        with pytest.raises(optuna.exceptions.DuplicatedStudyError):
            optuna.create_study(storage=storage, study_name="twice")
        assert ("studies", "INSERT") in heard.announced[announced:]
        assert witness.writes() == written
        assert Counter(heard.writes) == Counter(written)


def test_optuna_writes_the_same_with_and_without_receivers(tmp_path: Path) -> None:
    """Watching changes nothing: same rows, same keys, same order."""
    with watched(tmp_path / "watched.db") as (storage, watching, _):
        small_study(storage)
    alone = Witness(tmp_path / "alone.db")
    alone.create_triggers()
    storage = optuna.storages.RDBStorage(f"sqlite:///{alone.path}")
    small_study(storage)
    storage.remove_session()
    storage.engine.dispose()
    assert watching.writes() == alone.writes()


REPORT = """\
study 'parabola' created
trial id 1 created as RUNNING
trial id 1 RUNNING → WAITING
trial id 2 created as RUNNING
trial id 2 RUNNING → WAITING
trial id 3 created as RUNNING
trial id 3 RUNNING → WAITING
trial id 1 WAITING → RUNNING
trial id 1 RUNNING → COMPLETE, value 0.25
trial id 2 WAITING → RUNNING
trial id 2 RUNNING → PRUNED, value 6.0
trial id 3 WAITING → RUNNING
trial id 3 RUNNING → FAIL
trial id 4 created as RUNNING
trial id 4 RUNNING → COMPLETE, value 13.392
trial id 5 created as RUNNING
trial id 5 RUNNING → COMPLETE, value 5.791
"""


def test_the_example_reports_each_study_and_trial_from_its_creation_to_its_deletion() -> None:
    """As a user runs it; nothing on stderr, no warning."""
    output = run_python("-m", "examples.optuna_watch")
    assert REPORT in output
    assert "study 'parabola' deleted" in output
    for trial in range(1, 6):
        assert f"trial id {trial} deleted with study 'parabola'" in output


def test_the_example_counts_what_the_witness_saw(tmp_path: Path) -> None:
    """The numbers of its closing table come from receivers whose sender is the declarative base."""
    watch = connect_receivers("examples.optuna_watch.watch")
    from examples.optuna_watch import __main__ as example

    witness = Witness(tmp_path / "optuna.db")
    witness.create_triggers()
    example.main(witness.path)
    action = {"INSERT": "created", "UPDATE": "updated", "DELETE": "deleted"}
    assert watch.heard == Counter(
        (write.table, action[write.kind])
        for write in witness.writes()
        if write.kind == "DELETE" or write.table not in UPSERTED
    )
