"""What the state machine found once, as plain tests."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, exc, func, inspect, select, text
from sqlalchemy.orm import Session, make_transient

import sqla_signals
from sqla_signals import UNSET, post_delete, post_save, pre_delete, pre_save
from sqla_signals._sqlalchemy.unit_of_work import in_order

from ..conftest import before_sqlalchemy
from . import models as m

Sent = list[tuple[str, Any, dict[str, Any]]]


@pytest.fixture
def session() -> Iterator[Session]:
    """A session with signals, on an empty database with the schema."""
    engine: Engine = create_engine("sqlite://")
    m.Base.metadata.create_all(engine)
    installation = sqla_signals.install()
    with Session(engine) as session:
        yield session
    installation.remove()
    engine.dispose()


@pytest.fixture
def sent() -> Iterator[Sent]:
    """The signals that were sent: name, instance, arguments."""
    sent: Sent = []

    def received(sender: type, **arguments: Any) -> None:
        sent.append((arguments["signal"].name, arguments["instance"], arguments))

    signals = (pre_save, post_save, pre_delete, post_delete)
    for signal in signals:
        signal.connect(received, weak=False)
    yield sent
    for signal in signals:
        signal.disconnect(received)


def names(sent: Sent) -> list[tuple[str, Any]]:
    """The names and the instances, without the arguments."""
    return [(name, instance) for name, instance, _ in sent]


def test_changes_of_a_new_row_have_the_onupdate_value_that_its_post_update_wrote(
    session: Session, sent: Sent
):
    """The UPDATE of a post_update fires onupdate, also for the row that was just inserted."""
    widget = m.Widget(favorite=m.Entry())
    session.add(widget)
    session.flush()
    (arguments,) = (a for name, i, a in sent if name == "post_save" and i is widget)
    assert arguments["created"]
    assert arguments["changes"]["changed"].new in (5, UNSET)
    assert widget.changed == 5


def test_changes_of_a_new_row_do_not_claim_null_for_an_sql_expression(session: Session, sent: Sent):
    """The database computes the value: it is not known, and it is not None."""
    order = m.Order(n=func.length("abc"))
    session.add(order)
    session.flush()
    assert sent[-1][2]["changes"]["n"].new is UNSET
    assert order.n == 3


def test_nothing_is_sent_for_a_pending_orphan_that_the_flush_expunges(session: Session, sent: Sent):
    """It left one parent before it came to the session with another: the flush drops it."""
    member, guild, membership = m.Member(), m.Guild(), m.Membership()
    member.memberships = [membership]
    member.memberships.remove(membership)
    guild.memberships = [membership]
    session.add_all([member, guild])
    with pytest.warns(match="not in session"):
        session.flush()
    assert membership not in session
    assert not [name for name, instance in names(sent) if instance is membership]
    assert session.scalar(select(func.count()).select_from(m.Membership)) == 0


def test_nothing_is_sent_for_a_child_removed_from_a_post_update_collection(
    session: Session, sent: Sent
):
    """SQLAlchemy leaves its foreign key as it is when the relationship has no other side."""
    pile = m.Pile(sheets=[sheet := m.Sheet()])
    session.add(pile)
    session.commit()
    sent.clear()
    pile.sheets.remove(sheet)
    session.flush()
    assert session.scalar(select(m.Sheet.pile_id)) == pile.id
    assert names(sent) == []


def test_a_partial_flush_announces_the_pending_children_it_takes_along(
    session: Session, sent: Sent
):
    """`flush([order])` inserts the new item too, and that is known before the first statement."""
    first_statement_after: list[int] = []
    event.listen(
        session.get_bind(),
        "before_cursor_execute",
        lambda *_: first_statement_after.append(len(sent)),
    )
    session.add(order := m.Order(items=[item := m.Item()]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `objects` parameter")
        session.flush([order])
    assert names(sent) == [
        ("pre_save", order),
        ("pre_save", item),
        ("post_save", order),
        ("post_save", item),
    ]
    assert first_statement_after[0] == 2


def test_nothing_is_sent_for_a_foreign_key_that_the_flush_sets_back(session: Session, sent: Sent):
    """The program sets the key to NULL; the parent's unflushed collection sets it as it was."""
    session.add_all([team := m.Team(), player := m.Player()])
    session.commit()
    player.team = team
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `objects` parameter")
        session.flush([player])
    sent.clear()
    player.team_id = None
    session.flush()
    assert session.scalar(select(m.Player.team_id)) == team.id
    assert names(sent) == []


def test_nothing_is_sent_for_the_children_of_a_switched_row_with_post_update(
    session: Session, sent: Sent
):
    """The parent is deleted and its key added again: SQLAlchemy leaves the children alone.

    Before 2.0.58 it takes their foreign key away, and that is what is sent then.
    """
    pile = m.Pile(id=1, sheets=[sheet := m.Sheet()])
    session.add(pile)
    session.commit()
    sent.clear()
    session.delete(pile)
    session.add(m.Pile(id=1, name="new"))
    session.flush()
    taken_away = before_sqlalchemy("2.0.58")
    assert session.scalar(select(m.Sheet.pile_id)) == (None if taken_away else 1)
    saved = [name for name, instance in names(sent) if instance is sheet]
    assert saved == (["pre_save", "post_save"] if taken_away else [])


def test_a_partial_flush_that_leaves_the_new_parent_out_sends_nothing_for_its_child(
    session: Session, sent: Sent
):
    """The parent has no key yet, so the foreign key stays as it is and nothing is written."""
    session.add(child := m.Node())
    session.commit()
    child.parent_id
    sent.clear()
    session.add(parent := m.Node())
    child.parent = parent
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `objects` parameter")
        session.flush([child])
    assert names(sent) == []
    assert parent in session.new
    with session.no_autoflush:
        assert session.scalars(select(m.Node.parent_id)).all() == [None]


def test_a_partial_flush_announces_a_child_that_is_marked_as_deleted_but_not_flushed(
    session: Session, sent: Sent
):
    """`flush([team])` sets the player's foreign key to NULL; the player's DELETE comes later."""
    team = m.Team(players=[player := m.Player()])
    session.add(team)
    session.flush()
    sent.clear()
    team.players.remove(player)
    session.delete(player)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `objects` parameter")
        session.flush([team])
    assert names(sent) == [("pre_save", player), ("post_save", player)]
    sent.clear()
    session.flush()
    assert names(sent) == [("pre_delete", player), ("post_delete", player)]


def test_receivers_are_not_blamed_for_a_pending_instance_that_a_deletion_cascades_to(
    session: Session, sent: Sent
):
    """SQLAlchemy both adds and deletes it, and fails: that error comes through, unchanged."""
    ticket, agent = m.Ticket(), m.Agent()
    session.add(ticket)
    session.flush()
    sent.clear()
    session.add(agent)
    session.delete(ticket)
    ticket.deputy = agent
    with pytest.raises(exc.SQLAlchemyError):
        session.flush()
    assert len(sent) <= 3


def test_a_partial_flush_announces_the_target_that_a_deletion_takes_along(
    session: Session, sent: Sent
):
    """`session.delete(truck)` marks the motor it owns; `flush([truck])` deletes both."""
    session.add(truck := m.Truck(motor=(motor := m.Motor())))
    session.flush()
    session.delete(truck)
    sent.clear()
    sent_before_a_statement: list[int] = []
    event.listen(
        session.get_bind(),
        "before_cursor_execute",
        lambda *_: sent_before_a_statement.append(len(sent)),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `objects` parameter")
        session.flush([truck])
    assert sorted(names(sent), key=str) == sorted(
        [(name, i) for name in ("pre_delete", "post_delete") for i in (truck, motor)], key=str
    )
    assert sent_before_a_statement == [2, 2]


def test_update_fields_of_a_post_update_lack_the_version_of_another_table(
    session: Session, sent: Sent
):
    """In a joined hierarchy, post_update writes the table of the key; the version is the base's."""
    manager = m.Manager(spare=m.Desk())
    session.add(manager)
    session.commit()
    assert (manager.version, manager.desk_id) == (1, 1)
    sent.clear()
    manager.spare = None
    session.flush()
    assert [name for name, _ in names(sent)] == ["pre_save", "post_save"]
    assert sent[-1][2]["update_fields"] == {"desk_id"}
    assert session.execute(text("SELECT version FROM people")).scalar() == 1


def test_nothing_is_sent_for_an_expired_key_that_post_update_has_no_reason_to_write(
    session: Session, sent: Sent
):
    """A merge expires the foreign key of a step; that is not an expression assigned to it."""
    expunged = m.Step()
    session.add(step := m.Step(next=expunged))
    session.expunge(expunged)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not in session")
        session.flush()
        sent.clear()
        session.merge(m.Step(id=step.id))
        session.flush()
    assert names(sent) == []


def test_a_child_that_leaves_a_post_update_collection_is_announced_if_its_parent_is_loaded(
    session: Session, sent: Sent
):
    """The other side's post_update writes the key that this side sets to NULL."""
    session.add(stop := m.Stop(id=1))
    session.flush()
    session.delete(stop)
    session.add(new := m.Stop(id=1, line=stop))
    session.flush()
    assert new.stops == [new]
    sent.clear()
    new.stops.pop()
    session.flush()
    assert names(sent) == [("pre_save", new), ("post_save", new)]
    assert session.scalars(select(m.Stop.line_id)).all() == [None]


def test_nothing_is_sent_for_a_pending_instance_that_the_unit_of_work_deletes(
    session: Session, sent: Sent
):
    """SQLAlchemy emits a DELETE that matches nothing, and an INSERT in the flush after that."""
    account = m.Account(profile=(profile := m.Profile()))
    session.add(account)
    session.flush()
    session.rollback()
    profile.account = None
    session.add(account)
    assert profile in session.new
    sent.clear()
    with pytest.warns(exc.SAWarning, match="0 were matched"):
        session.flush()
    assert names(sent) == [("pre_save", account), ("post_save", account)]
    with session.no_autoflush:
        assert session.scalar(text("SELECT count(*) FROM profiles")) == 0
    session.flush()
    assert names(sent)[2:] == [("pre_save", profile), ("post_save", profile)]
    assert session.scalar(text("SELECT count(*) FROM profiles")) == 1


def test_nothing_is_sent_for_a_pending_instance_removed_from_a_write_only_collection(
    session: Session, sent: Sent
):
    """It never was in the collection. SQLAlchemy deletes it all the same, and fails."""
    session.add(channel := m.Channel())
    channel.messages.remove(message := m.Message())
    session.add(message)
    with pytest.raises(exc.SQLAlchemyError):
        session.flush()
    assert names(sent) == [("pre_save", channel)]
    session.rollback()
    assert session.scalar(select(func.count()).select_from(m.Channel)) == 0


def test_merging_a_deleted_instance_inserts_no_more_than_without_signals(
    session: Session, sent: Sent
):
    """What was expired when it was deleted is not merged, though receivers could read it."""
    session.add(message := m.Message(name="a"))
    session.flush()
    session.expire(message, ["name"])
    session.delete(message)
    session.flush()
    assert "name" in inspect(message).unloaded
    merged = session.merge(message)
    session.flush()
    assert session.execute(select(m.Message.id, m.Message.name)).all() == [(merged.id, None)]
    assert names(sent)[-4:] == [
        ("pre_delete", message),
        ("post_delete", message),
        ("pre_save", merged),
        ("post_save", merged),
    ]


def test_a_deleted_instance_made_transient_is_what_it_is_without_signals(
    session: Session, sent: Sent
):
    """Added again, its row gets NULL for what was expired when it was deleted."""
    session.add(message := m.Message(name="a"))
    session.flush()
    session.expire(message, ["name"])
    session.delete(message)
    session.flush()
    make_transient(message)
    session.add(message)
    session.flush()
    assert session.scalars(select(m.Message.name)).all() == [None]
    assert names(sent)[-2:] == [("pre_save", message), ("post_save", message)]


def test_what_was_expired_when_it_was_deleted_is_readable_then_and_later(
    session: Session, sent: Sent
):
    """In receivers, after the flush, after the commit, and pickled; without another statement."""
    read: list[str | None] = []

    def reads(sender: type, instance: Any, **arguments: Any) -> None:
        read.append(instance.name)

    session.add_all([m.Message(name="a"), m.Message(name="b")])
    session.commit()
    first, second = session.scalars(select(m.Message).order_by(m.Message.id))
    session.expire(first, ["name", "channel_id"])
    session.expire(second, ["name"])
    session.delete(first)
    session.delete(second)
    with post_delete.connected_to(reads, sender=m.Message):
        session.flush()
    assert read == ["a", "b"]
    assert first.channel_id is None
    session.expire_all()
    third = m.Message(name="c")
    session.add(third)
    session.commit()
    session.expire(third, ["name"])
    session.delete(third)
    session.commit()
    assert pickle.loads(pickle.dumps(third)).name == third.name == "c"
    assert names(sent)[-2:] == [("pre_delete", third), ("post_delete", third)]
    assert session.scalar(select(func.count()).select_from(m.Message)) == 0


def test_a_deletion_that_is_rolled_back_leaves_expired_what_was_expired(
    session: Session, sent: Sent
):
    """What was read for the DELETE inside the savepoint is not what the row has after it."""
    session.add(message := m.Message(name="a"))
    session.commit()
    message.id
    session.expire(message, ["name"])
    savepoint = session.begin_nested()
    session.execute(text("UPDATE messages SET name = 'b'"))
    session.delete(message)
    session.flush()
    savepoint.rollback()
    assert message in session
    assert message.name == "a"
    assert names(sent)[-2:] == [("pre_delete", message), ("post_delete", message)]
    assert session.scalar(text("SELECT name FROM messages")) == "a"


def test_nothing_is_sent_for_a_pending_instance_whose_delete_hits_the_row_of_another(
    session: Session, sent: Sent
):
    """It had the key before a rollback, and the flush that deletes it gives the key away again."""
    account = m.Account(profile=(old := m.Profile()))
    session.add(account)
    session.flush()
    session.rollback()
    session.add(new := m.Profile(account=account))
    assert old in session.new
    sent.clear()
    session.flush()
    assert old.id == new.id
    assert [(name, instance) for name, instance in names(sent) if instance is old] == []
    assert [(name, instance) for name, instance in names(sent) if instance is new] == [
        ("pre_save", new),
        ("post_save", new),
    ]
    with session.no_autoflush:
        assert session.scalar(text("SELECT count(*) FROM profiles")) == 0


def test_a_changed_state_that_a_rollback_left_without_a_key_has_a_place_in_the_order(
    session: Session,
):
    """SQLAlchemy may keep a pending instance that was undone among the changed ones."""
    session.add_all(orders := [m.Order(), m.Order()])
    session.flush()
    left = m.Order()
    states = [inspect(order) for order in (*reversed(orders), left)]
    assert in_order(states) == [inspect(order) for order in (left, *orders)]


def test_one_that_was_deleted_and_then_kept_is_nobodys_origin(session: Session, sent: Sent):
    """Added to a collection again it stays in this flush; what its cascade has marked does not."""
    child, grandchild = m.Directory(), m.Directory()
    child.children.append(grandchild)
    root = m.Directory(children=[kept := m.Directory(children=[child])])
    root.children.append(other := m.Directory())
    session.add(root)
    session.flush()
    session.delete(kept)
    with session.no_autoflush:
        other.children.append(kept)
    sent.clear()
    session.flush()
    origins = {i: a["origin"] for name, i, a in sent if name == "post_delete"}
    assert origins == {i: a["origin"] for name, i, a in sent if name == "pre_delete"}
    assert origins == {child: None, grandchild: child}
    remaining = session.connection().scalars(text("SELECT id FROM directories")).all()
    assert set(remaining) == {root.id, kept.id, other.id}


@pytest.mark.parametrize("partial", [True, False])
def test_what_hangs_on_a_new_orphan_is_not_foreseen_with_it(
    session: Session, sent: Sent, partial: bool
):
    """SQLAlchemy forgets the orphan when the flush begins, though a collection still has it."""
    session.add(old := m.Note(name="a"))
    session.flush()
    item, order = m.Item(), m.Order()
    order.items = [item]
    order.items.append(item)
    order.items.remove(item)  # the second one is still there
    session.add(order)
    item.notes += [old, new := m.Note(name="b")]
    sent.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not in session; objects= is deprecated
        session.flush([item, order] if partial else None)
    expected = [order] if partial else [order, new]
    for name in ("pre_save", "post_save"):
        assert [one for what, one in names(sent) if what == name] == expected
    assert len(sent) == 2 * len(expected)
    found = session.connection().execute(text("SELECT item_id FROM notes")).scalars().all()
    assert found == [None] * (1 if partial else 2)
