"""SQLModel's models and sessions send signals like any others: the notes keep their rules."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import sqla_signals
from sqla_signals import post_save
from tests.examples.running import connect_receivers, run_python

try:
    import sqlmodel
except ImportError:
    if os.environ.get("CI"):
        raise
    pytest.skip("SQLModel is not installed", allow_module_level=True)

from examples.sqlmodel_notes.models import Note


@pytest.fixture
def session(tmp_path: Path, installed: sqla_signals.Installation) -> Iterator[sqlmodel.Session]:
    """SQLModel's own session on an empty database."""
    connect_receivers("examples.sqlmodel_notes.receivers")
    engine = sqlmodel.create_engine(f"sqlite:///{tmp_path / 'notes.db'}")
    sqlmodel.SQLModel.metadata.create_all(
        engine, tables=[sqlmodel.SQLModel.metadata.tables[name] for name in ("note", "oldtext")]
    )
    with sqlmodel.Session(engine) as session:
        yield session
    engine.dispose()


def rows(tmp_path: Path, query: str) -> list[tuple[Any, ...]]:
    """What is committed, seen with the driver alone."""
    with closing(sqlite3.connect(tmp_path / "notes.db")) as connection:
        return connection.execute(query).fetchall()


def written(session: sqlmodel.Session, **values: str) -> Note:
    """Commit a note."""
    note = Note(**values)
    session.add(note)
    session.commit()
    return note


def test_a_new_note_gets_the_slug_of_its_title(session: sqlmodel.Session, tmp_path: Path) -> None:
    """The slug is part of the INSERT; a new title does not change it."""
    note = written(session, title="Signals & SQLModel!")
    note.title = "Another title"
    session.commit()
    assert rows(tmp_path, "SELECT title, slug FROM note") == [("Another title", "signals-sqlmodel")]


def test_a_note_without_a_title_is_refused_and_the_session_goes_on(
    session: sqlmodel.Session, tmp_path: Path
) -> None:
    """The exception reaches the caller unchanged."""
    empty = Note(title=" ")
    session.add(empty)
    with pytest.raises(ValueError, match="a note needs a title"):
        session.commit()
    session.expunge(empty)
    written(session, title="a")
    assert rows(tmp_path, "SELECT title FROM note") == [("a",)]


@pytest.mark.parametrize("loaded", [True, False])
def test_a_new_text_keeps_the_old_one(
    session: sqlmodel.Session, tmp_path: Path, loaded: bool
) -> None:
    """Also where the attribute was assigned without having been loaded."""
    note = written(session, title="a", text="first")
    if loaded:
        assert note.text == "first"
    assert ("text" in vars(note)) is loaded
    note.text = "second"
    session.commit()
    note.title = "b"
    session.commit()
    assert rows(tmp_path, "SELECT note_id, text FROM oldtext") == [(1, "first")]
    assert rows(tmp_path, "SELECT title, text FROM note") == [("b", "second")]


def test_what_is_rolled_back_leaves_no_old_text(session: sqlmodel.Session, tmp_path: Path) -> None:
    """The receiver writes in the transaction of the change."""
    note = written(session, title="a", text="first")
    note.text = "second"
    session.flush()
    session.rollback()
    assert rows(tmp_path, "SELECT text FROM note") == [("first",)]
    assert rows(tmp_path, "SELECT text FROM oldtext") == []


def test_a_deleted_note_takes_its_old_texts_along(
    session: sqlmodel.Session, tmp_path: Path
) -> None:
    """By the cascade of SQLModel's own Relationship."""
    note = written(session, title="a", text="first")
    note.text = "second"
    session.commit()
    session.delete(note)
    session.commit()
    assert rows(tmp_path, "SELECT * FROM note UNION ALL SELECT *, '' FROM oldtext") == []


def test_the_class_sqlmodel_stands_for_every_table(session: sqlmodel.Session) -> None:
    """It is an unmapped base class, as a declarative base is."""
    heard = []

    def hear(sender: type[sqlmodel.SQLModel], created: bool, **kwargs: Any) -> None:
        heard.append((sender.__name__, created))

    with post_save.connected_to(hear, sender=sqlmodel.SQLModel):
        note = written(session, title="a", text="first")
        note.text = "second"
        session.commit()
    assert sorted(heard) == [("Note", False), ("Note", True), ("OldText", True)]


def test_the_example_runs_as_a_user_runs_it() -> None:
    """No warning, nothing on stderr."""
    output = run_python("-m", "examples.sqlmodel_notes")
    assert "signals-sqlmodel" in output
    assert "First draft" in output
    assert "ValueError: a note needs a title" in output
