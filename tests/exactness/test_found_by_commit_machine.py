"""What the state machine for the end of a transaction found once, as plain tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, inspect, select
from sqlalchemy.orm import Session, make_transient
from sqlalchemy.orm.attributes import set_committed_value

import sqla_signals
from sqla_signals import UNSET, post_delete, post_save, receiver

from ..conftest import create_sqlite_engine
from . import models as m


@dataclass
class Told:
    """One call of an `on="commit"` receiver."""

    what: str
    key: tuple[Any, ...]
    values: dict[str, Any]
    """What was loaded."""
    changes: dict[str, Any]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An empty database with the schema."""
    engine = create_sqlite_engine(tmp_path / "test.db")
    m.Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session with signals."""
    installation = sqla_signals.install()
    with Session(engine) as session:
        yield session
    installation.remove()


@pytest.fixture
def told() -> Iterator[list[Told]]:
    """What `on="commit"` receivers were told."""
    told: list[Told] = []

    def received(sender: type, instance: Any, **arguments: Any) -> None:
        what = "deleted"
        if "created" in arguments:
            what = "created" if arguments["created"] else "updated"
        state = inspect(instance)
        values = {key: state.dict[key] for key in state.mapper.columns.keys() & state.dict.keys()}
        assert state.identity is not None
        changes = dict(arguments.get("changes", {}))
        told.append(Told(f"{what} {sender.__name__}", state.identity, values, changes))

    for signal in (post_save, post_delete):
        signal.connect(received, weak=False, on="commit")
    yield told
    for signal in (post_save, post_delete):
        signal.disconnect(received)


def written(session: Session, column: Any) -> Any:
    """The value of the column in the only row there is."""
    return session.scalars(select(column)).one()


def test_changes_of_a_row_created_and_updated_have_the_last_version(
    session: Session, told: list[Told]
):
    """The UPDATE writes the version along, and it is part of what is committed."""
    session.add(document := m.Document(title="a"))
    session.flush()
    document.n = 2
    session.commit()
    assert [one.what for one in told] == ["created Document"]
    assert told[0].changes["version"].new in (2, UNSET)
    assert told[0].values.get("version", 2) == written(session, m.Document.version) == 2


@pytest.mark.parametrize("cls", [m.Stamp, m.Gauge])
def test_changes_of_a_row_created_and_updated_have_no_value_that_the_update_overwrote(
    session: Session, told: list[Told], cls: type[m.Stamp | m.Gauge]
):
    """`onupdate` columns and computed ones are written by the UPDATE without being assigned."""
    session.add(one := cls(n=1, updated=7))
    session.flush()
    assert one.doubled == 2
    one.n = 3
    session.commit()
    assert [one.what for one in told] == [f"created {cls.__name__}"]
    for attribute in ("updated", "doubled"):
        in_database = written(session, getattr(cls, attribute))
        assert told[0].changes[attribute].new in (in_database, UNSET)
        assert told[0].values.get(attribute, in_database) == in_database


def test_old_of_a_column_written_along_before_is_not_what_was_written_along(
    session: Session, told: list[Told]
):
    """The first UPDATE fires `onupdate`, the second assigns: nobody has seen the value between."""
    session.add(widget := m.Widget(changed=1))
    session.commit()
    assert widget.changed == 1
    told.clear()
    widget.name = "a"
    session.flush()
    assert widget.changed == 5
    widget.changed = 3
    session.commit()
    assert [one.what for one in told] == ["updated Widget"]
    assert told[0].changes["changed"].old in (1, UNSET)
    assert told[0].changes["changed"].new == written(session, m.Widget.changed) == 3


def test_new_of_a_column_written_along_afterwards_is_not_what_was_assigned(
    session: Session, told: list[Told]
):
    """The first UPDATE assigns, the second fires `onupdate`."""
    session.add(widget := m.Widget(changed=1))
    session.commit()
    assert widget.changed == 1
    told.clear()
    widget.changed = 3
    session.flush()
    widget.name = "a"
    session.commit()
    assert [one.what for one in told] == ["updated Widget"]
    change = told[0].changes.get("changed")
    assert change is None or (change.old in (1, UNSET) and change.new in (5, UNSET))
    assert written(session, m.Widget.changed) == 5


def test_a_column_set_back_and_then_written_along_is_not_lost(session: Session, told: list[Told]):
    """The row differs by what `onupdate` wrote."""
    session.add(widget := m.Widget(changed=1))
    session.commit()
    assert widget.changed == 1
    told.clear()
    widget.name = "a"
    session.flush()
    widget.name, widget.changed = None, 1
    session.commit()
    assert written(session, m.Widget.changed) == 1
    for one in told:  # It need not be known that nothing has changed, but no change may be made up.
        assert one.changes.get("changed", (UNSET, 1)) in ((UNSET, 1), (1, UNSET), (UNSET, UNSET))


def test_changes_of_an_instance_that_takes_over_a_row_do_not_claim_null(
    session: Session, told: list[Told]
):
    """SQLAlchemy turns delete and add into an UPDATE, which leaves alone what was not assigned."""
    session.add(order := m.Order(id=1, status="paid", n=1))
    session.commit()
    told.clear()
    session.delete(order)
    session.add(m.Order(id=1, n=2))
    session.commit()
    assert [one.what for one in told] == ["deleted Order", "created Order"]
    assert written(session, m.Order.status) == "paid"
    assert told[1].changes["n"].new == 2
    assert told[1].changes.get("status", (UNSET, UNSET))[1] in ("paid", UNSET)


def test_post_save_of_an_instance_that_takes_over_a_row_does_not_claim_null(session: Session):
    """The same in the flush."""
    session.add(order := m.Order(id=1, status="paid", n=1))
    session.commit()
    changes: list[Any] = []

    def received(sender: type, **arguments: Any) -> None:
        changes.append(dict(arguments["changes"]))

    with post_save.connected_to(received):
        session.delete(order)
        session.add(m.Order(id=1, n=2))
        session.flush()
    assert written(session, m.Order.status) == "paid"
    assert changes[0].get("status", (UNSET, UNSET))[1] in ("paid", UNSET)


def test_an_instance_updated_and_deleted_has_the_values_that_others_knew(
    session: Session, told: list[Told]
):
    """What it was updated to in between was never committed."""
    session.add(order := m.Order(status="open", n=1))
    session.commit()
    assert (order.status, order.n) == ("open", 1)
    told.clear()
    order.status = "paid"
    session.flush()
    session.delete(order)
    session.commit()
    assert [one.what for one in told] == ["deleted Order"]
    assert told[0].values["n"] == 1
    assert told[0].values.get("status", "open") == "open"


def test_a_versioned_instance_updated_and_deleted_has_the_version_that_others_knew(
    session: Session, told: list[Told]
):
    """Or none, where it is not known."""
    session.add(document := m.Document(title="a"))
    session.commit()
    assert document.version == 1
    told.clear()
    document.title = "b"
    session.flush()
    session.delete(document)
    session.commit()
    assert [one.what for one in told] == ["deleted Document"]
    assert told[0].values.get("version", 1) == 1
    assert told[0].values.get("title", "a") == "a"


def test_an_instance_that_changed_its_key_and_was_deleted_has_the_key_that_others_knew(
    session: Session, told: list[Told]
):
    """The row that is gone is the one under the old key."""
    session.add(country := m.Country(code="k0"))
    session.commit()
    told.clear()
    country.code = "k1"
    session.flush()
    session.delete(country)
    session.commit()
    assert [one.what for one in told] == ["deleted Country"]
    assert told[0].key == ("k0",)
    assert told[0].values.get("code", "k0") == "k0"


def test_update_fields_have_no_computed_column(session: Session):
    """The UPDATE does not write it, also where a program has assigned the value that it had."""
    session.add(gauge := m.Gauge(n=1))
    session.commit()
    assert gauge.doubled == 2
    gauge.doubled = 2
    gauge.n = 2
    sent: list[Any] = []

    def received(sender: type, **arguments: Any) -> None:
        sent.append((set(arguments["changes"]), arguments["update_fields"]))

    with post_save.connected_to(received):
        session.flush()
    assert written(session, m.Gauge.doubled) == 4
    assert sent == [({"n"}, {"n", "updated"})]


def test_an_instance_expunged_in_a_savepoint_that_was_undone_has_what_was_committed(
    session: Session, told: list[Told]
):
    """SQLAlchemy sets back only what is still in the session."""
    session.add(order := m.Order(status="open", n=1))
    session.flush()
    savepoint = session.begin_nested()
    order.status = "paid"
    session.flush()
    session.expunge(order)
    savepoint.rollback()
    session.commit()
    assert [one.what for one in told] == ["created Order"]
    assert written(session, m.Order.status) == "open"
    assert told[0].values.get("status", "open") == "open"


def test_an_instance_lost_with_two_savepoints_at_once_has_what_was_committed(
    session: Session, told: list[Told]
):
    """Rolling back the outer one, SQLAlchemy keeps what the inner one has deleted out of the
    session, without setting it back."""
    session.add(order := m.Order(status="open", n=1))
    outer = session.begin_nested()
    session.begin_nested()
    order.status = "paid"
    session.flush()
    session.delete(order)
    session.flush()
    outer.rollback()
    assert order not in session
    session.commit()
    assert [one.what for one in told] == ["created Order"]
    assert written(session, m.Order.status) == "open"
    assert told[0].values.get("status", "open") == "open"


def test_an_instance_that_has_become_another_row_has_what_was_committed_of_the_first(
    session: Session, told: list[Told]
):
    """The way to copy a row: what was told of the first is not to have values of the second."""
    session.add(order := m.Order(status="open", n=1))
    session.flush()
    make_transient(order)
    order.id, order.status = 7, "copy"
    session.add(order)
    session.commit()
    assert [one.what for one in told] == ["created Order", "created Order"]
    assert [one.key for one in told] == [(1,), (7,)]
    assert told[0].values.get("status", "open") == "open"
    assert told[0].values.get("id", 1) == 1
    assert told[1].values["status"] == "copy"


def test_an_instance_that_went_to_another_session_has_what_was_committed_by_this_one(
    engine: Engine, session: Session, told: list[Told]
):
    """The other one's work is not committed."""
    session.add(order := m.Order(status="open", n=1))
    session.commit()
    told.clear()
    order.n = 2
    session.flush()
    session.expunge(order)
    with Session(engine, autoflush=False) as other:
        other.add(order)
        set_committed_value(order, "status", "of the other session")
        session.commit()
    assert [one.what for one in told] == ["updated Order"]
    assert told[0].values.get("status", "open") == "open"


def test_a_deleted_instance_refreshed_from_the_row_of_its_successor_has_its_own_values(
    session: Session, told: list[Told]
):
    """A row switch leaves a row under the key, and SQLAlchemy loads it into the old instance."""
    session.add(m.Team(players=[player := m.Player(name="a")]))
    session.commit()
    told.clear()
    session.delete(player)
    session.add(successor := m.Player(id=1, name="c"))
    session.refresh(player)  # flushes first
    assert player.name == successor.name == "c"
    session.commit()
    assert [one.what for one in told] == ["deleted Player", "created Player"]
    assert told[0].values.get("name", "a") == "a"
    assert told[1].values["name"] == written(session, m.Player.name) == "c"


@pytest.mark.parametrize("was_there", [True, False])
def test_changes_of_work_undone_are_what_was_written_not_what_was_changed_in_place_later(
    session: Session, was_there: bool
):
    """The dictionary given to the flush lives on in the instance."""
    config = m.Config(options={"a": 1})
    if was_there:
        session.add(config)
        session.commit()
    changes: list[Any] = []

    def received(sender: type, **arguments: Any) -> None:
        changes.append(arguments["changes"]["options"].new)

    with post_save.connected_to(received, on="rollback"):
        config.options = {"b": 2}
        session.add(config)
        session.flush()
        assert config.options is not None
        config.options["b"] = 3
        session.rollback()
    assert changes == [{"b": 2}]


def test_what_one_receiver_does_to_changes_nobody_else_sees(session: Session):
    """A receiver may keep and change what it was given."""
    session.expire_on_commit = False
    given: list[Any] = []

    def received(sender: type, **arguments: Any) -> None:
        given.append(dict(new := arguments["changes"]["options"].new))
        new["a"] = 2

    def received_next(sender: type, **arguments: Any) -> None:
        received(sender, **arguments)

    with (
        post_save.connected_to(received, on="commit"),
        post_save.connected_to(received_next, on="commit"),
    ):
        session.add(config := m.Config(options={"a": 1}))
        session.commit()
    assert given == [{"a": 1}, {"a": 1}]
    assert config.options == {"a": 1}
    assert not session.dirty


def test_an_instance_that_was_expunged_in_between_is_delivered_with_the_values_of_its_row(
    session: Session,
):
    """It is loaded when it is read, because the session does not know it any more."""
    told = []

    @receiver(post_save, sender=m.Course, on="commit")
    def fn(sender, instance, created, **kwargs):
        told.append((created, instance.id, instance.name))

    session.add(course := m.Course())
    session.begin_nested()
    again = session.scalars(select(m.Course)).one()
    again.name = "a"
    session.begin_nested()
    session.expunge_all()
    other = session.scalars(select(m.Course)).one()
    assert other is not course
    other.name = None
    session.commit()
    assert told == [(True, 1, None)]
    assert written(session, m.Course.name) is None
