"""``pre_migrate`` and ``post_migrate``, sent by real Alembic commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.runtime.migration import MigrationContext, MigrationInfo
from sqlalchemy import (
    Connection,
    Engine,
    MetaData,
    create_engine,
    event,
    insert,
    inspect,
    text,
)
from sqlalchemy.exc import IntegrityError, OperationalError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_signals import (
    AsyncReceiverError,
    SignalsError,
    mute,
    on_commit,
    post_migrate,
    post_save,
    pre_migrate,
    receiver,
)
from sqla_signals.alembic import migration_signals

from .project import Project, async_url, has_table, names, versions


class Base(DeclarativeBase):
    """What the revisions below build up to."""


class Role(Base):
    __tablename__ = "roles"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


CREATE = "CREATE TABLE roles (id SERIAL PRIMARY KEY, name VARCHAR NOT NULL)"
METADATA = "from tests.migrations.test_migrations import Base\ntarget_metadata = Base.metadata"


def create_roles(engine: Engine) -> str:
    return CREATE.replace("SERIAL", "INTEGER") if engine.dialect.name == "sqlite" else CREATE


@pytest.fixture
def project(engine: Engine, tmp_path: Path) -> Project:
    """Three revisions: a table, a row in it, another table."""
    project = Project(tmp_path / "project", "generic", engine.url)
    project.edit_env("target_metadata = None", METADATA)
    add_revisions(project, engine)
    return project


def add_revisions(project: Project, engine: Engine) -> None:
    project.revision("1", None, create_roles(engine), "DROP TABLE roles")
    project.revision("2", "1", "INSERT INTO roles (name) VALUES ('two')", "DELETE FROM roles")
    project.revision("3", "2", "CREATE TABLE three (name VARCHAR)", "DROP TABLE three")


class Runs:
    """A receiver of both signals that writes down every call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, sender: Any, **arguments: Any) -> None:
        has_roles = inspect(arguments["connection"]).has_table("roles")
        self.calls.append({"sender": sender, "has_roles": has_roles, **arguments})

    @property
    def lines(self) -> list[str]:
        found = []
        for call in self.calls:
            steps = ",".join(
                "+".join(step.up_revision_ids) if step.is_upgrade else f"-{step.up_revision_id}"
                for step in call["plan"]
            )
            heads = ",".join(sorted(call["heads"])) or "base"
            found.append(f"{call['signal'].name} {call['direction']} {steps} at {heads}")
        return found


@pytest.fixture
def runs() -> Runs:
    """Every signal of every run."""
    runs = Runs()
    for signal in (pre_migrate, post_migrate):
        signal.connect(runs, weak=False)
    return runs


def add_default_role(name: str = "admin", **options: Any) -> Callable[..., None]:
    """Connect the example: a receiver of ``post_migrate`` that fills in a default row."""

    @receiver(post_migrate, **options)
    def fill(sender, session, **kwargs):
        session.add(Role(name=name))

    return fill


# -- commands --------------------------------------------------------------------------------------


def test_an_upgrade_sends_each_signal_once_however_many_steps_it_takes(
    project: Project, engine: Engine, runs: Runs
):
    """With the steps, and with where the database was and where it is."""
    project.upgrade("head")
    assert runs.lines == ["pre_migrate upgrade 1,2,3 at base", "post_migrate upgrade 1,2,3 at 3"]
    before, after = runs.calls
    assert (before["has_roles"], after["has_roles"]) == (False, True)
    assert versions(engine) == {"3"}
    assert names(engine) == ["two"]


def test_the_arguments_are_those_of_the_contract(project: Project, engine: Engine, runs: Runs):
    """``connection, plan, direction, heads, using, session`` and the signal."""
    project.upgrade("1")
    for call in runs.calls:
        assert call.keys() - {"sender", "has_roles"} == {
            *("connection", "plan", "direction", "heads", "using", "session", "signal")
        }
        assert isinstance(call["connection"], Connection)
        assert call["using"] is call["connection"].engine
        assert call["using"].url == engine.url
        assert isinstance(call["session"], Session)
        assert [type(step) for step in call["plan"]] == [MigrationInfo]
        assert isinstance(call["plan"], tuple)
        assert isinstance(call["heads"], frozenset)


def test_upgrading_in_steps_sends_them_for_each_run(project: Project, runs: Runs):
    """What a run starts from are the heads that the one before came to."""
    project.upgrade("1")
    project.upgrade("+2")
    assert runs.lines == [
        "pre_migrate upgrade 1 at base",
        "post_migrate upgrade 1 at 1",
        "pre_migrate upgrade 2,3 at 1",
        "post_migrate upgrade 2,3 at 3",
    ]


def test_a_downgrade_sends_them(project: Project, engine: Engine, runs: Runs):
    """With its steps in the order in which they are taken."""
    project.upgrade("head")
    runs.calls.clear()
    project.downgrade("1")
    project.downgrade("base")
    assert runs.lines == [
        "pre_migrate downgrade -3,-2 at 3",
        "post_migrate downgrade -3,-2 at 1",
        "pre_migrate downgrade -1 at 1",
        "post_migrate downgrade -1 at base",
    ]
    assert [call["has_roles"] for call in runs.calls] == [True, True, True, False]
    assert versions(engine) == set()


def test_a_stamp_sends_them_with_a_direction_of_its_own(
    project: Project, engine: Engine, runs: Runs
):
    """No step does anything to the tables, and a receiver can tell."""
    project.stamp("head")
    assert versions(engine) == {"3"}
    assert runs.lines == ["pre_migrate stamp 3 at base", "post_migrate stamp 3 at 3"]
    assert all(step.is_stamp for call in runs.calls for step in call["plan"])
    assert not has_table(engine, "roles")


def test_a_stamp_that_purges_starts_from_nothing(project: Project, engine: Engine, runs: Runs):
    """And what a receiver of ``pre_migrate`` does is committed with it."""
    project.upgrade("2")
    runs.calls.clear()

    @receiver(pre_migrate)
    def fill(sender, session, **kwargs):
        session.add(Role(name="purged"))

    project.stamp("1", purge=True)
    assert runs.lines == ["pre_migrate stamp 1 at base", "post_migrate stamp 1 at 1"]
    assert versions(engine) == {"1"}
    assert names(engine) == ["purged", "two"]


def test_nothing_to_migrate_sends_nothing(project: Project, runs: Runs):
    """An upgrade, a downgrade or a stamp to where the database is."""
    project.downgrade("base")
    assert runs.lines == []
    project.upgrade("head")
    runs.calls.clear()
    project.upgrade("head")
    project.stamp("head")
    project.downgrade("3")
    assert runs.lines == []


def test_commands_that_only_look_send_nothing(project: Project, runs: Runs):
    """They run ``env.py`` as well."""
    project.upgrade("head")
    runs.calls.clear()
    assert "3 (head)" in project.current()
    project.ensure_version()
    project.history(indicate_current=True)
    assert "three" in project_revision(project)
    assert runs.lines == []


def project_revision(project: Project) -> str:
    """Let Alembic generate a revision, and return what it wrote."""
    (project.path / "script.py.mako").write_text(
        "down_revision = ${repr(down_revision)}\n"
        "revision = ${repr(up_revision)}\n"
        "def upgrade():\n    ${upgrades}\n"
    )
    command.revision(project.config, autogenerate=True, message="generated", rev_id="4")
    (written,) = project.path.glob("versions/4_*.py")
    return written.read_text()


def test_offline_mode_sends_nothing(project: Project, engine: Engine, runs: Runs):
    """There is no database; the script is the one that comes out without the line."""
    script = project.upgrade("head", sql=True)
    assert "INSERT INTO roles" in script
    project.downgrade("3:1", sql=True)
    project.stamp("head", sql=True)
    assert runs.lines == []
    assert not has_table(engine, "roles")
    project.edit_env("with migration_signals(context):", "if True:")
    assert project.upgrade("head", sql=True) == script


def test_branches_are_one_run(project: Project, engine: Engine, runs: Runs):
    """``upgrade heads`` comes to several heads, a merge brings them together."""
    project.revision("x", "1", "CREATE TABLE x (name VARCHAR)", "DROP TABLE x")
    project.upgrade("heads")
    assert {runs.calls[0]["direction"], runs.calls[1]["direction"]} == {"upgrade"}
    assert [len(call["plan"]) for call in runs.calls] == [4, 4]
    assert [call["heads"] for call in runs.calls] == [frozenset(), {"3", "x"}]
    assert versions(engine) == {"3", "x"}
    runs.calls.clear()
    project.revision("y", ("3", "x"))
    project.upgrade("head")
    assert runs.lines == ["pre_migrate upgrade y at 3,x", "post_migrate upgrade y at y"]
    assert versions(engine) == {"y"}
    runs.calls.clear()
    project.downgrade("3")
    assert [call["heads"] for call in runs.calls] == [{"y"}, {"3", "x"}]
    assert versions(engine) == {"3", "x"}


# -- transactions ----------------------------------------------------------------------------------

PER_MIGRATION = "transaction_per_migration=True, target_metadata=target_metadata"


def use_transaction_per_migration(project: Project) -> None:
    project.edit_env("target_metadata=target_metadata", PER_MIGRATION)


def test_the_default_rows_of_a_post_migrate_receiver_are_committed(
    project: Project, engine: Engine
):
    """The example. The receiver neither flushes nor commits."""
    add_default_role(sender=Base.metadata)
    project.upgrade("head")
    assert names(engine) == ["admin", "two"]


def test_what_a_pre_migrate_receiver_does_is_committed_with_the_first_step(
    project: Project, engine: Engine
):
    """It is in that step's transaction: another connection sees both or neither."""
    project.upgrade("1")
    seen = []

    @receiver(pre_migrate)
    def fill(sender, session, **kwargs):
        session.add(Role(name="before"))

    @receiver(post_migrate)
    def look(sender, connection, session, **kwargs):
        seen.append(names(connection))
        if engine.dialect.name == "postgresql":  # a writer of SQLite locks out the others
            seen.append(names(engine))

    project.upgrade("2")
    assert seen[0] == ["before", "two"]
    assert seen[1:] in ([], [[]])
    assert names(engine) == ["before", "two"]


@pytest.mark.parametrize("per_migration", [False, True])
def test_a_failing_step_sends_no_post_migrate(
    per_migration: bool, project: Project, engine: Engine, runs: Runs
):
    """And undoes what ``pre_migrate`` did if that is in the same transaction."""
    if per_migration:
        use_transaction_per_migration(project)
    project.revision("4", "3", "python:raise ZeroDivisionError")
    project.upgrade("1")
    runs.calls.clear()

    @receiver(pre_migrate)
    def fill(sender, session, **kwargs):
        session.add(Role(name="before"))

    with pytest.raises(ZeroDivisionError):
        project.upgrade("head")
    assert runs.lines == ["pre_migrate upgrade 2,3,4 at 1"]
    if engine.dialect.name == "postgresql" and not per_migration:
        assert (versions(engine), names(engine)) == ({"1"}, [])
    else:
        assert (versions(engine), names(engine)) == ({"3"}, ["before", "two"])
    runs.calls.clear()
    project.revision("4", "3")
    project.upgrade("head")
    assert runs.lines[-1].startswith("post_migrate upgrade")
    assert versions(engine) == {"4"}


@pytest.mark.parametrize("per_migration", [False, True])
def test_a_failing_first_step_undoes_what_pre_migrate_did(
    per_migration: bool, project: Project, engine: Engine
):
    """They are one transaction, whatever kind of transactions the project has."""
    if per_migration:
        use_transaction_per_migration(project)
    project.revision("2", "1", "python:raise ZeroDivisionError")
    project.upgrade("1")

    @receiver(pre_migrate)
    def fill(sender, session, **kwargs):
        session.add(Role(name="before"))

    with pytest.raises(ZeroDivisionError):
        project.upgrade("head")
    assert (versions(engine), names(engine)) == ({"1"}, [])


@pytest.mark.parametrize("per_migration", [False, True])
def test_an_exception_in_post_migrate_undoes_the_last_step(
    per_migration: bool, project: Project, engine: Engine, runs: Runs
):
    """With its note. The next upgrade takes the step again and sends the signals again."""
    if per_migration:
        use_transaction_per_migration(project)
    project.upgrade("1")
    fill = add_default_role()

    @receiver(post_migrate)
    def refuse(sender, session, **kwargs):
        session.flush()
        raise ZeroDivisionError("no")

    project.revision("3", "2", "INSERT INTO roles (name) VALUES ('three')")
    with pytest.raises(ZeroDivisionError, match="no") as caught:
        project.upgrade("head")
    (note,) = caught.value.__notes__
    assert "refuse" in note
    assert "post_migrate" in note
    if engine.dialect.name == "postgresql" and not per_migration:
        assert (versions(engine), names(engine)) == ({"1"}, [])
    else:
        assert (versions(engine), names(engine)) == ({"2"}, ["two"])
    post_migrate.disconnect(refuse)
    runs.calls.clear()
    project.upgrade("head")
    assert runs.lines[-1].endswith("at 3")
    assert versions(engine) == {"3"}
    assert names(engine) == ["admin", "three", "two"]
    assert post_migrate.disconnect(fill)


def test_an_exception_in_pre_migrate_prevents_the_run(project: Project, engine: Engine, runs: Runs):
    """Nothing was migrated, and the receivers behind it are not called."""

    @receiver(pre_migrate)
    def refuse(sender, **kwargs):
        raise ZeroDivisionError("no")

    late = Runs()
    pre_migrate.connect(late)
    with pytest.raises(ZeroDivisionError, match="no") as caught:
        project.upgrade("head")
    assert "refuse" in caught.value.__notes__[0]
    assert runs.lines == ["pre_migrate upgrade 1,2,3 at base"]
    assert late.lines == []
    assert versions(engine) == set()
    assert not has_table(engine, "roles")


def test_a_receiver_that_commits_leaves_the_transaction_to_alembic(
    project: Project, engine: Engine
):
    """``session.commit()`` writes its work, and the migration still decides about it."""
    project.upgrade("1")

    @receiver(post_migrate)
    def fill(sender, session, **kwargs):
        for name in "ab":
            session.add(Role(name=name))
            session.commit()
            assert name in names(session.connection())

    @receiver(post_migrate)
    def refuse(sender, **kwargs):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        project.upgrade("2")
    assert (versions(engine), names(engine)) == ({"1"}, [])
    post_migrate.disconnect(refuse)
    project.upgrade("2")
    assert (versions(engine), names(engine)) == ({"2"}, ["a", "b", "two"])


@pytest.mark.parametrize(
    "end",
    [
        lambda session, connection: session.rollback(),
        lambda session, connection: connection.rollback(),
    ],
    ids=["session", "connection"],
)
def test_a_rollback_in_a_receiver_fails_the_run(
    end: Callable[[Session, Connection], None], project: Project, engine: Engine
):
    """The run must not look as if it had succeeded; the message has the remedy."""
    project.upgrade("1")

    @receiver(post_migrate)
    def undo(sender, session, connection, **kwargs):
        session.add(Role(name="a"))
        session.flush()
        end(session, connection)

    with pytest.raises(SignalsError, match=r"undo.*raise an exception"):
        project.upgrade("2")
    assert (versions(engine), names(engine)) == ({"1"}, [])


def test_a_failed_flush_that_a_receiver_swallows_fails_the_run(project: Project, engine: Engine):
    """The database has undone more than that."""
    project.upgrade("1")

    @receiver(post_migrate)
    def fill(sender, session, **kwargs):
        session.add(Role(name=None))
        with suppress(IntegrityError):
            session.flush()

    with pytest.raises((SignalsError, PendingRollbackError)):
        project.upgrade("2")
    assert (versions(engine), names(engine)) == ({"1"}, [])


def test_the_session_sends_its_own_signals(project: Project, engine: Engine, installed):
    """``post_save`` for the default rows, and the ends of the session's own transaction."""
    seen = []

    @receiver(post_save, sender=Role)
    def saved(sender, instance, created, **kwargs):
        seen.append(f"flush {instance.name}")

    @receiver(post_save, sender=Role, on="commit")
    def committed(sender, instance, session, **kwargs):
        seen.append(f"commit {instance.name}")
        session.add(Role(name=instance.name + "'") if "'" not in instance.name else instance)

    @receiver(post_migrate)
    def fill(sender, session, **kwargs):
        session.add(Role(name="admin"))
        on_commit(session, lambda: seen.append("callback"))

    project.upgrade("head")
    assert seen[:4] == ["flush admin", "commit admin", "flush admin'", "callback"]
    assert names(engine) == ["admin", "admin'", "two"]


def test_a_step_that_ends_in_autocommit_is_no_obstacle(project: Project, engine: Engine):
    """What comes behind it is a transaction again."""
    project.revision(
        "4",
        "3",
        "python:with op.get_context().autocommit_block():\n"
        "    op.execute(\"INSERT INTO roles (name) VALUES ('auto')\")",
    )
    add_default_role()
    project.upgrade("head")
    assert names(engine) == ["admin", "auto", "two"]
    assert versions(engine) == {"4"}


def test_without_receivers_there_is_no_session_and_no_statement(project: Project, engine: Engine):
    """What Alembic sends is what it sends without the line."""

    def statements() -> list[str]:
        found: list[str] = []

        def on_execute(connection, cursor, statement, parameters, context, executemany) -> None:
            if connection.engine is not engine:
                found.append(statement)

        event.listen(Engine, "before_cursor_execute", on_execute)
        try:
            project.upgrade("head")
            project.downgrade("base")
        finally:
            event.remove(Engine, "before_cursor_execute", on_execute)
        return found

    project.upgrade("1")
    project.downgrade("base")
    with_the_line = statements()
    project.edit_env("with migration_signals(context):", "if True:")
    assert with_the_line == statements()


# -- receivers -------------------------------------------------------------------------------------


def test_the_sender_is_the_target_metadata(project: Project):
    """A receiver of another ``MetaData`` is not called, one of a list is called once."""
    called = []

    def make(name: str) -> Callable[..., None]:
        return lambda sender, **kwargs: called.append((name, sender))

    other = MetaData()
    for name, sender in (
        ("mine", Base.metadata),
        ("other", other),
        ("any", None),
        ("list", [other, Base.metadata]),
    ):
        post_migrate.connect(make(name), sender=sender, weak=False)
    project.upgrade("1")
    assert called == [(name, Base.metadata) for name in ("mine", "any", "list")]


def test_several_target_metadata_are_one_run(project: Project):
    """Each receiver is called once, in the order of connection, for the first one it is for."""
    project.edit_env(
        "target_metadata = Base.metadata",
        "from tests.migrations import test_migrations\n"
        "target_metadata = [Base.metadata, test_migrations.other_metadata]",
    )
    called = []
    for name, sender in (
        ("other", other_metadata),
        ("both", [other_metadata, Base.metadata]),
        ("any", None),
    ):

        def fn(sender: Any, name: str = name, **kwargs: Any) -> None:
            called.append((name, sender))

        post_migrate.connect(fn, sender=sender, weak=False)
    project.upgrade("1")
    assert called == [
        ("other", other_metadata),
        ("both", Base.metadata),
        ("any", Base.metadata),
    ]


other_metadata = MetaData()


def test_without_a_target_metadata_the_sender_is_none(project: Project, runs: Runs):
    """As in a template that nobody has filled in; receivers for any sender are called."""
    project.edit_env(METADATA, "target_metadata = None")
    post_migrate.connect(lambda sender, **kwargs: 1 / 0, sender=Base.metadata, weak=False)
    project.upgrade("1")
    assert [call["sender"] for call in runs.calls] == [None, None]


def test_mute_silences_them(project: Project, runs: Runs):
    """Those of one signal, or all."""
    with mute(pre_migrate):
        project.upgrade("1")
    with mute():
        project.upgrade("2")
    assert runs.lines == ["post_migrate upgrade 1 at 1"]


def test_an_async_receiver_is_an_error_behind_a_synchronous_engine(
    project: Project, engine: Engine
):
    """Before anything was migrated, if it is one of ``pre_migrate``; with the remedy."""

    @receiver(pre_migrate)
    async def wait(sender, **kwargs): ...

    with pytest.raises(AsyncReceiverError, match=r"wait.*plain function.*'async'"):
        project.upgrade("head")
    assert not has_table(engine, "roles")


def test_other_callbacks_of_env_py_are_called_as_before(project: Project, engine: Engine):
    """``on_version_apply``; and what the block changed in Alembic's context, it puts back."""
    project.edit_env(
        "target_metadata=target_metadata",
        "target_metadata=target_metadata, on_version_apply=test_migrations.applied",
    )
    project.edit_env(
        "target_metadata = Base.metadata",
        "from tests.migrations import test_migrations\ntarget_metadata = Base.metadata",
    )
    calls.clear()
    post_migrate.connect(lambda sender, **kwargs: calls.append("post_migrate"), weak=False)
    project.upgrade("2")
    assert calls == ["1", "2", "post_migrate"]
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"fn": lambda heads, context: []})

        class Environment:
            @staticmethod
            def get_context() -> MigrationContext:
                return context

        before = context._migrations_fn, context.on_version_apply_callbacks
        with migration_signals(Environment):
            assert (context._migrations_fn, context.on_version_apply_callbacks) != before
            context.run_migrations()
        assert (context._migrations_fn, context.on_version_apply_callbacks) == before


calls: list[str] = []


def applied(*, ctx: MigrationContext, step: MigrationInfo, **kwargs: Any) -> None:
    """A callback of the application's own."""
    calls.append(step.up_revision_id)


# -- templates -------------------------------------------------------------------------------------


@pytest.fixture
def async_project(engine: Engine, tmp_path: Path) -> Project:
    """The same revisions, with Alembic's template for an asynchronous engine."""
    project = Project(tmp_path / "project", "async", async_url(engine))
    project.edit_env("target_metadata = None", METADATA)
    add_revisions(project, engine)
    return project


def test_the_async_template_awaits_async_receivers(
    async_project: Project, engine: Engine, runs: Runs
):
    """In the order of connection, with an ``AsyncSession`` in the migration's transaction."""
    order = []

    @receiver([pre_migrate, post_migrate], sender=Base.metadata)
    async def fill(sender, session, signal, direction, **kwargs):
        assert isinstance(session, AsyncSession)
        if signal is post_migrate and direction == "upgrade":
            session.add(Role(name="async"))
            await session.flush()
            order.append((await session.execute(text("SELECT count(*) FROM roles"))).scalar_one())

    @receiver(post_migrate)
    def plain(sender, session, direction, **kwargs):
        assert isinstance(session, Session)
        if direction == "upgrade":
            session.add(Role(name="plain"))
            order.append("plain")

    async_project.upgrade("head")
    assert order == [2, "plain"]
    assert runs.lines == ["pre_migrate upgrade 1,2,3 at base", "post_migrate upgrade 1,2,3 at 3"]
    assert names(engine) == ["async", "plain", "two"]
    async_project.downgrade("base")
    async_project.stamp("head")
    async_project.upgrade("head")
    assert len(runs.calls) == 6
    async_project.upgrade("head", sql=True)
    assert len(runs.calls) == 6


def test_an_exception_in_an_async_receiver_undoes_the_migration(
    async_project: Project, engine: Engine
):
    """As that of a plain one does."""
    async_project.upgrade("1")

    @receiver(post_migrate)
    async def refuse(sender, session, **kwargs):
        session.add(Role(name="async"))
        await session.flush()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        async_project.upgrade("2")
    assert "refuse" in caught.value.__notes__[0]
    assert (versions(engine), names(engine)) == ({"1"}, [])


def test_the_multidb_template_sends_them_for_each_database(
    engine: Engine, tmp_path: Path, runs: Runs
):
    """``using`` tells which one; each has its own ``MetaData`` and its own session."""
    second = create_engine(f"sqlite:///{tmp_path / 'second.db'}")
    project = Project(tmp_path / "project", "multidb", engine.url, second.url)
    project.edit_env(
        "target_metadata = {}",
        METADATA.replace("= Base.metadata", "= {'engine1': Base.metadata}"),
    )
    project.revision(
        "1",
        None,
        f"python:op.execute({create_roles(engine)!r} if engine_name == 'engine1' else "
        f"{create_roles(second)!r})",
        "DROP TABLE roles",
        arguments="engine_name",
    )
    project.revision("2", "1", arguments="engine_name")

    @receiver(post_migrate)
    def fill(sender, session, using, direction, **kwargs):
        if direction == "upgrade":
            session.add(Role(name=using.url.database))

    project.upgrade("head")
    assert (
        runs.lines
        == [
            "pre_migrate upgrade 1,2 at base",
            "post_migrate upgrade 1,2 at 2",
        ]
        * 2
    )
    assert [call["using"].url for call in runs.calls] == [engine.url] * 2 + [second.url] * 2
    assert [call["sender"] for call in runs.calls] == [Base.metadata] * 2 + [None] * 2
    for database in (engine, second):
        assert names(database) == [database.url.database]
        assert versions(database) == {"2"}
    runs.calls.clear()
    project.upgrade("head")
    assert runs.calls == []
    project.downgrade("base")
    assert len(runs.calls) == 4
    second.dispose()


def test_a_failing_database_of_several_undoes_them_all(engine: Engine, tmp_path: Path):
    """The template commits all of them at the end, and the receivers' work with them."""
    second = create_engine(f"sqlite:///{tmp_path / 'second.db'}")
    project = Project(tmp_path / "project", "multidb", engine.url, second.url)
    with engine.begin() as connection:
        connection.exec_driver_sql(create_roles(engine))
    project.revision("1", None, arguments="engine_name")

    @receiver(post_migrate)
    def fill(sender, session, using, **kwargs):
        session.execute(insert(Role.__table__), [{"name": "a"}])  # the second has no such table

    with pytest.raises(Exception, match="no such table: roles"):
        project.upgrade("head")
    assert names(engine) == []
    assert versions(engine) == set()
    second.dispose()


@pytest.mark.parametrize("template", ["generic", "async", "multidb"])
def test_each_command_with_each_template(
    template: str, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
):
    """Upgrade, nothing to do, downgrade, ``--sql``, stamp and a step that fails."""
    monkeypatch.chdir(tmp_path)  # where multidb writes its scripts
    numbers = "12" if template == "multidb" else "1"
    engines = [create_engine(f"sqlite:///{tmp_path / number}.db") for number in numbers]
    urls = [async_url(one) if template == "async" else one.url for one in engines]
    project = Project(tmp_path / "project", template, *urls)
    arguments = {"arguments": "engine_name"} if template == "multidb" else {}
    project.revision("1", None, create_roles(engines[0]), "DROP TABLE roles", **arguments)
    project.revision("2", "1", "INSERT INTO roles (name) VALUES ('two')", **arguments)

    def told(*lines: str) -> None:
        assert runs.lines == [*lines] * len(engines)
        databases = [call["using"].url.database for call in runs.calls]
        assert databases == [one.url.database for one in engines for _ in lines]
        runs.calls.clear()

    project.upgrade("head")
    told("pre_migrate upgrade 1,2 at base", "post_migrate upgrade 1,2 at 2")
    assert [names(one) for one in engines] == [["two"]] * len(engines)
    project.upgrade("head")
    told()
    project.downgrade("base")
    told("pre_migrate downgrade -2,-1 at 2", "post_migrate downgrade -2,-1 at base")
    assert not any(has_table(one, "roles") for one in engines)
    project.upgrade("head", sql=True)
    told()
    project.stamp("head")
    told("pre_migrate stamp 2 at base", "post_migrate stamp 2 at 2")
    project.revision("3", "2", "INSERT INTO missing VALUES (1)", **arguments)
    with pytest.raises(OperationalError, match="missing"):
        project.upgrade("head")
    assert runs.lines == ["pre_migrate upgrade 3 at 2"]
    assert [versions(one) for one in engines] == [{"2"}] * len(engines)
    for one in engines:
        one.dispose()


@pytest.mark.parametrize("template", ["generic", "async", "multidb"])
def test_the_command_line_sends_them(template: str, tmp_path: Path):
    """``alembic init``, the one line, ``alembic upgrade``: in a process of its own."""

    def alembic(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "alembic", *arguments],
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    alembic("init", "-t", template, "migrations")
    env = tmp_path / "migrations" / "env.py"
    driver = "sqlite+aiosqlite" if template == "async" else "sqlite"
    ini = tmp_path / "alembic.ini"
    lines = ini.read_text().splitlines()
    numbers = iter("12")
    ini.write_text(
        "\n".join(
            f"sqlalchemy.url = {driver}:///{next(numbers)}.db"
            if line.startswith("sqlalchemy.url")
            else line
            for line in lines
        )
    )
    written = env.read_text()
    before, line, after = written.rpartition("context.run_migrations(")
    indent = before[before.rindex("\n") + 1 :]
    written = f"{before}with migration_signals(context):\n{indent}    {line}{after}"
    env.write_text(
        written.replace(
            "from alembic import context",
            "from alembic import context\n"
            "from sqla_signals.alembic import migration_signals\n"
            "import receivers",
            1,
        )
    )
    (tmp_path / "receivers.py").write_text(
        "from sqla_signals import pre_migrate, post_migrate, receiver\n"
        "@receiver([pre_migrate, post_migrate])\n"
        "def show(sender, signal, plan, direction, using, **kwargs):\n"
        "    print(signal.name, direction, len(plan), using.url.database)\n"
    )
    alembic("revision", "-m", "first")
    printed = alembic("upgrade", "head").splitlines()
    databases = ["1.db", "2.db"] if template == "multidb" else ["1.db"]
    assert printed == [
        f"{signal} upgrade 1 {database}"
        for database in databases
        for signal in ("pre_migrate", "post_migrate")
    ]
    assert alembic("upgrade", "head") == ""
    assert len(alembic("downgrade", "base").splitlines()) == 2 * len(databases)
