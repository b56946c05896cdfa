"""``m2m_changed`` tells of just the association rows that were written, once and from one side."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from sqlalchemy import Column, Engine, ForeignKey, ForeignKeyConstraint, Integer, Table, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Session, aliased, relationship

import sqla_signals
from sqla_signals import (
    ReceiverOptionError,
    SessionInFlushError,
    m2m_changed,
    post_save,
    pre_save,
)
from sqla_signals._sqlalchemy.mappers import both_sides
from tests.contract.observing import asynchronous, rows

from .clubs import KINDS, LOADED, Clubs, Heard, create_triggers, make_clubs, witnessed


@pytest.fixture(params=LOADED)
def loaded(request: pytest.FixtureRequest, engine: Engine, installed: Any) -> Clubs:
    """Classes whose collections are loaded."""
    clubs = make_clubs(request.param)
    clubs.create(engine)
    return clubs


@pytest.fixture(params=KINDS)
def clubs(request: pytest.FixtureRequest, engine: Engine, installed: Any) -> Clubs:
    """Classes with a collection of each kind."""
    clubs = make_clubs(request.param)
    clubs.create(engine)
    return clubs


@pytest.fixture
def lists(engine: Engine, installed: Any) -> Clubs:
    """Classes with lists on both sides."""
    clubs = make_clubs("list")
    clubs.create(engine)
    return clubs


def told(session: Session, *heard: Heard) -> set[tuple[str, int, int]]:
    """What was told of since the last time, which must be what the triggers saw; before and after.

    Rows are ``("add", user, group)`` and ``("remove", user, group)``.
    """
    seen = witnessed(session)
    for one in heard:
        assert one.rows("post") == seen
        assert one.rows("pre") == seen
        one.clear()
    return seen


def filled(session: Session, clubs: Clubs, heard: Heard) -> tuple[list[Any], list[Any]]:
    """Users 1 and 2, groups 1 to 3; the first user is in groups 1 and 2."""
    users = [clubs.User(id=1), clubs.User(id=2)]
    groups = [clubs.Group(id=key) for key in (1, 2, 3)]
    session.add_all([*users, *groups])
    session.flush()
    for group in groups[:2]:
        clubs.add(users[0].groups, group)
    session.flush()
    assert told(session, heard) == {("add", 1, 1), ("add", 1, 2)}
    session.commit()
    return users, groups


# -- what is told --------------------------------------------------------------------------------


def test_adding_and_removing_single_members(clubs: Clubs, engine: Engine):
    """One row added and one removed are told, the members that stay are not."""
    heard = Heard(clubs.table)
    with Session(engine) as session:
        users, groups = filled(session, clubs, heard)
        clubs.add(users[0].groups, groups[2])
        clubs.remove(users[0].groups, groups[0])
        session.flush()
        assert told(session, heard) == {("add", 1, 3), ("remove", 1, 1)}
        assert rows(session, clubs.table) == [(1, 2), (1, 3)]


def test_changes_from_the_other_side(clubs: Clubs, engine: Engine):
    """A change through the backref is told just the same."""
    if clubs.kind == "one-sided":
        pytest.skip("there is no other side")
    heard = Heard(clubs.table)
    with Session(engine) as session:
        users, groups = filled(session, clubs, heard)
        clubs.add(groups[2].users, users[0])
        clubs.remove(groups[0].users, users[0])
        session.flush()
        assert told(session, heard) == {("add", 1, 3), ("remove", 1, 1)}


@pytest.mark.parametrize("side", ["user", "group"])
@pytest.mark.parametrize("operation", ["append", "remove", "clear", "slice", "replace"])
def test_each_change_from_each_side_with_rows_already_there(
    clubs: Clubs, engine: Engine, operation: str, side: str
):
    """The rows were inserted by other means, and the collection was not loaded when it began."""
    kind, unloaded = clubs.kind, clubs.kind in ("write_only", "dynamic")
    if (
        (kind == "one-sided" and side == "group")
        or (operation == "slice" and kind not in ("list", "one-sided"))
        or (operation == "clear" and unloaded)
        or (operation == "replace" and kind == "write_only")
    ):
        pytest.skip("there is no such operation")
    near, far = (clubs.User, clubs.Group) if side == "user" else (clubs.Group, clubs.User)

    def row(member: int) -> tuple[int, int]:
        return (1, member) if side == "user" else (member, 1)

    with Session(engine) as session:
        session.add_all(cls(id=key) for cls in (clubs.User, clubs.Group) for key in (1, 2, 3))
        session.flush()
        values = [dict(zip(("user_id", "group_id"), row(member), strict=True)) for member in (1, 2)]
        session.connection().execute(clubs.table.insert(), values)
        session.commit()
        witnessed(session)
        session.commit()
    senders = (one.class_attribute for one in both_sides(clubs.User.groups.prop))
    heard = [Heard(sender) for sender in (clubs.table, *senders)]
    with Session(engine) as session:
        one = session.get(near, 1)
        first, second, third = (session.get(far, key) for key in (1, 2, 3))
        name = "groups" if side == "user" else "users"
        if operation == "append":
            clubs.add(getattr(one, name), third)
        elif operation == "remove":
            clubs.remove(getattr(one, name), first)
        elif operation == "clear":
            getattr(one, name).clear()
        elif operation == "slice":
            getattr(one, name)[0:1] = [third]
        else:
            setattr(one, name, clubs.collection(second, third))
        session.flush()
        added, removed = {
            "append": ([3], []),
            "remove": ([], [1]),
            "clear": ([], [1, 2]),
        }.get(operation, ([3], [1]))
        expected = {("add", *row(key)) for key in added} | {("remove", *row(k)) for k in removed}
        assert told(session, *heard) == expected
        left = {1, 2}.union(added).difference(removed)
        assert rows(session, clubs.table) == sorted(row(key) for key in left)


def test_changes_from_both_sides_at_once(lists: Clubs, engine: Engine):
    """A row is told of once though both of its collections have changed."""
    heard = Heard(lists.table), Heard(lists.User.groups), Heard(lists.Group.users)
    with Session(engine) as session:
        users, groups = filled(session, lists, heard[0])
        for one in heard:
            one.clear()
        users[0].groups.remove(groups[0])
        groups[2].users.append(users[0])
        groups[2].users.append(users[1])
        session.flush()
        assert told(session, *heard) == {("remove", 1, 1), ("add", 1, 3), ("add", 2, 3)}


def test_clearing(loaded: Clubs, engine: Engine):
    """Emptied in place, a collection tells of each row that was there."""
    heard = Heard(loaded.table)
    with Session(engine) as session:
        users, _ = filled(session, loaded, heard)
        users[0].groups.clear()
        session.flush()
        assert told(session, heard) == {("remove", 1, 1), ("remove", 1, 2)}
        assert rows(session, loaded.table) == []


def test_replacing_the_whole_collection(loaded: Clubs, engine: Engine):
    """What is in both the old and the new collection is not told of."""
    heard = Heard(loaded.table)
    with Session(engine) as session:
        users, groups = filled(session, loaded, heard)
        users[0].groups = loaded.collection(groups[1], groups[2])
        session.flush()
        assert told(session, heard) == {("remove", 1, 1), ("add", 1, 3)}


def test_assigning_a_slice(lists: Clubs, engine: Engine):
    """A slice tells of what it takes out and puts in."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        users, groups = filled(session, lists, heard)
        users[0].groups[0:1] = [groups[2]]
        session.flush()
        assert told(session, heard) == {("remove", 1, 1), ("add", 1, 3)}
        users[0].groups[:] = []
        session.flush()
        assert told(session, heard) == {("remove", 1, 2), ("remove", 1, 3)}


def test_nothing_written_nothing_told(loaded: Clubs, engine: Engine):
    """Taken out and put in again, or assigned as it was, a collection writes no row."""
    heard = Heard(loaded.table)
    with Session(engine) as session:
        users, groups = filled(session, loaded, heard)
        loaded.remove(users[0].groups, groups[0])
        loaded.add(users[0].groups, groups[0])
        users[0].groups = loaded.collection(groups[0], groups[1])
        session.flush()
        assert told(session, heard) == set()
        assert heard.calls == []


@pytest.mark.parametrize("side", ["user", "group"])
def test_deleting_a_parent_tells_of_its_rows(clubs: Clubs, engine: Engine, side: str):
    """Rows that the unit of work removes along with either parent are told of."""
    if clubs.kind == "write_only" or (clubs.kind == "one-sided" and side == "group"):
        pytest.skip("these rows are left to the database")
    heard = Heard(clubs.table)
    with Session(engine) as session:
        users, groups = filled(session, clubs, heard)
        session.delete(users[0] if side == "user" else groups[0])
        session.flush()
        expected = {("remove", 1, 1), ("remove", 1, 2)} if side == "user" else {("remove", 1, 1)}
        assert told(session, heard) == expected


@pytest.mark.parametrize("side", ["user", "group"])
def test_deleting_a_parent_whose_collection_was_never_loaded(
    clubs: Clubs, engine: Engine, side: str
):
    """The members are loaded for the deletion alone; they are told of though nobody has them."""
    if clubs.kind == "write_only" or (clubs.kind == "one-sided" and side == "group"):
        pytest.skip("these rows are left to the database")
    heard = [Heard(clubs.table)]
    with Session(engine) as session:
        filled(session, clubs, heard[0])
    heard += [Heard(one.class_attribute) for one in both_sides(clubs.User.groups.prop)]
    with Session(engine) as session:
        session.delete(session.get(clubs.User if side == "user" else clubs.Group, 1))
        session.flush()
        expected = {("remove", 1, 1), ("remove", 1, 2)} if side == "user" else {("remove", 1, 1)}
        assert told(session, *heard) == expected
        assert rows(session, clubs.table) == [(1, 2)][: side == "group"]


@pytest.mark.parametrize("sender", ["groups", "users"])
def test_members_loaded_for_a_deletion_live_until_post_remove(
    lists: Clubs, engine: Engine, sender: str
):
    """Though only the flush has them: from either side there is an instance to be told of."""
    with Session(engine) as session:
        filled(session, lists, Heard(lists.table))
    m2m_changed._clear_state()
    found = []

    def removed(sender: Any, instance: Any, action: str, pk_set: Any, **kwargs: Any) -> None:
        if action == "post_remove":
            gc.collect()
            found.append((instance.id, set(pk_set)))

    m2m_changed.connect(removed, lists.User.groups if sender == "groups" else lists.Group.users)
    with Session(engine) as session:
        session.delete(session.get(lists.User, 1))
        session.flush()
        assert rows(session, lists.table) == []
    assert sorted(found) == ([(1, {1, 2})] if sender == "groups" else [(1, {1}), (2, {1})])


@pytest.mark.parametrize("deleted", ["user", "group"])
def test_a_member_added_once_more_and_deleted_with_its_parent(engine: Engine, installed, deleted):
    """A dynamic collection takes a member that it has; just the row that goes is told of."""
    clubs = make_clubs("dynamic")
    clubs.create(engine)
    heard = Heard(clubs.table), Heard(clubs.User.groups), Heard(clubs.Group.users)
    with Session(engine) as session:
        users, groups = filled(session, clubs, heard[0])
        for one in heard:
            one.clear()
        users[0].groups.add(groups[0])
        users[0].groups.add(groups[0])
        session.delete(users[0] if deleted == "user" else groups[0])
        session.flush()
        expected = {("remove", 1, 1), ("remove", 1, 2)}
        assert told(session, *heard) == (expected if deleted == "user" else {("remove", 1, 1)})
        assert rows(session, clubs.table) == [(1, 2)][: deleted == "group"]


@pytest.mark.parametrize("kind", ["dynamic", "write_only"])
def test_taken_out_and_put_in_again_unloaded_is_two_rows(engine: Engine, installed: Any, kind: str):
    """With no loaded collection to compare with, it is deleted and inserted; both are told."""
    clubs = make_clubs(kind)
    clubs.create(engine)
    heard = Heard(clubs.table), Heard(clubs.User.groups), Heard(clubs.Group.users)
    with Session(engine) as session:
        users, groups = filled(session, clubs, heard[0])
        for one in heard:
            one.clear()
        users[0].groups.remove(groups[0])
        users[0].groups.add(groups[0])
        session.flush()
        assert told(session, *heard) == {("remove", 1, 1), ("add", 1, 1)}
        assert rows(session, clubs.table) == [(1, 1), (1, 2)]


def test_deleting_both_parents_tells_of_each_row_once(lists: Clubs, engine: Engine):
    """The row between two deleted instances is removed once and told of once."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        users, groups = filled(session, lists, heard)
        session.delete(groups[0])
        session.delete(users[0])
        session.flush()
        assert told(session, heard) == {("remove", 1, 1), ("remove", 1, 2)}


def test_rows_left_to_the_database_are_not_told(engine: Engine, installed: Any):
    """With passive_deletes the rows of an unloaded collection go by ON DELETE CASCADE, unheard."""

    class Base(DeclarativeBase):
        pass

    table = Table(
        "memberships",
        Base.metadata,
        Column("user_id", ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
        Column("group_id", ForeignKey("groups.id"), primary_key=True),
    )

    class User(Base):
        __tablename__ = "users"
        id = Column(Integer, primary_key=True)
        groups = relationship("Group", secondary=table, passive_deletes=True)

    class Group(Base):
        __tablename__ = "groups"
        id = Column(Integer, primary_key=True)

    Base.metadata.create_all(engine)
    heard = Heard(table)
    with Session(engine) as session:
        user = User(id=1, groups=[Group(id=1)])
        session.add(user)
        session.commit()
        heard.clear()
        session.delete(user)
        session.flush()
        assert heard.calls == []
        assert rows(session, table) == []


def test_rows_that_were_there_already(lists: Clubs, engine: Engine):
    """Rows that another connection has added since the collection was loaded are not told of."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        users, _ = filled(session, lists, heard)
        assert len(users[0].groups) == 2
        session.connection().execute(lists.table.insert(), [{"user_id": 1, "group_id": 3}])
        witnessed(session)
        users[0].groups.clear()
        session.flush()
        assert told(session, heard) == {("remove", 1, 1), ("remove", 1, 2)}
        assert rows(session, lists.table) == [(1, 3)]


def test_a_failed_flush_tells_nothing_after_it(lists: Clubs, engine: Engine):
    """A row that was there already fails the INSERT: there was a pre_add and no post_add."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        users, groups = filled(session, lists, heard)
        assert len(users[0].groups) == 2
        users[0].groups.append(groups[2])
        session.connection().execute(lists.table.insert(), [{"user_id": 1, "group_id": 3}])
        heard.clear()
        with pytest.raises(IntegrityError):
            session.flush()
        session.rollback()
        assert heard.lines == ["pre_add User.groups of 1: [3]"]


def test_a_row_switch_tells_of_the_old_and_the_new_rows(lists: Clubs, engine: Engine):
    """A deleted instance's rows go and those of the one that takes its key come."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        users, groups = filled(session, lists, heard)
        session.delete(users[0])
        session.add(lists.User(id=1, groups=[groups[2]]))
        session.flush()
        assert told(session, heard) == {("remove", 1, 1), ("remove", 1, 2), ("add", 1, 3)}


def test_a_many_to_many_scalar(engine: Engine, installed: Any):
    """With uselist=False a replaced member is one row less and one more."""

    class Base(DeclarativeBase):
        pass

    table = Table(
        "memberships",
        Base.metadata,
        Column("user_id", ForeignKey("users.id"), primary_key=True),
        Column("group_id", ForeignKey("groups.id"), primary_key=True),
    )

    class User(Base):
        __tablename__ = "users"
        id = Column(Integer, primary_key=True)
        groups = relationship("Group", secondary=table, uselist=False)

    class Group(Base):
        __tablename__ = "groups"
        id = Column(Integer, primary_key=True)

    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        create_triggers(connection, table)
    heard = Heard(table)
    with Session(engine) as session:
        user = User(id=1, groups=Group(id=1))
        session.add(user)
        session.flush()
        assert told(session, heard) == {("add", 1, 1)}
        user.groups = Group(id=2)
        session.flush()
        assert told(session, heard) == {("remove", 1, 1), ("add", 1, 2)}
        user.groups = None
        session.flush()
        assert told(session, heard) == {("remove", 1, 2)}


def test_a_self_referential_relationship(engine: Engine, installed: Any):
    """Parents and children of one class: each side has its own end of the row."""

    class Base(DeclarativeBase):
        pass

    table = Table(
        "edges",
        Base.metadata,
        Column("parent_id", ForeignKey("nodes.id"), primary_key=True),
        Column("child_id", ForeignKey("nodes.id"), primary_key=True),
    )

    class Node(Base):
        __tablename__ = "nodes"
        id = Column(Integer, primary_key=True)
        children = relationship(
            "Node",
            secondary=table,
            primaryjoin=lambda: Node.id == table.c.parent_id,
            secondaryjoin=lambda: Node.id == table.c.child_id,
            back_populates="parents",
        )
        parents = relationship(
            "Node",
            secondary=table,
            primaryjoin=lambda: Node.id == table.c.child_id,
            secondaryjoin=lambda: Node.id == table.c.parent_id,
            back_populates="children",
        )

    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        create_triggers(connection, table)
    heard = Heard(table), Heard(Node.children), Heard(Node.parents)
    with Session(engine) as session:
        nodes = [Node(id=key) for key in range(4)]
        session.add_all(nodes)
        nodes[0].children.append(nodes[1])
        nodes[2].parents.append(nodes[0])
        nodes[3].children.append(nodes[3])
        session.flush()
        assert told(session, *heard) == {("add", 0, 1), ("add", 0, 2), ("add", 3, 3)}
        session.delete(nodes[0])
        session.flush()
        assert told(session, *heard) == {("remove", 0, 1), ("remove", 0, 2)}


def test_keys_of_several_columns(engine: Engine, installed: Any):
    """The key of an instance with several key columns is a tuple."""

    class Base(DeclarativeBase):
        pass

    table = Table(
        "seats",
        Base.metadata,
        Column("user_id", ForeignKey("users.id"), primary_key=True),
        Column("row", Integer, primary_key=True),
        Column("number", Integer, primary_key=True),
        ForeignKeyConstraint(["row", "number"], ["chairs.row", "chairs.number"]),
    )

    class User(Base):
        __tablename__ = "users"
        id = Column(Integer, primary_key=True)
        chairs = relationship("Chair", secondary=table, back_populates="users")

    class Chair(Base):
        __tablename__ = "chairs"
        row = Column(Integer, primary_key=True)
        number = Column(Integer, primary_key=True)
        users = relationship("User", secondary=table, back_populates="chairs")

    Base.metadata.create_all(engine)
    chairs, users = Heard(User.chairs), Heard(Chair.users)
    with Session(engine) as session:
        session.add(User(id=1, chairs=[Chair(row=1, number=2), Chair(row=1, number=3)]))
        session.flush()
        assert [call["pk_set"] for call in chairs.calls] == [frozenset({(1, 2), (1, 3)})] * 2
        assert [call["pk_set"] for call in users.calls] == [frozenset({1})] * 4
        assert len(rows(session, table)) == 2


# -- who is told, from which side ----------------------------------------------------------------


def test_the_sender_and_the_arguments(lists: Clubs, engine: Engine):
    """The sender is the table; the arguments are those of the side that is told from."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        user = lists.User(id=1, groups=[lists.Group(id=7)])
        session.add(user)
        session.flush()
        assert heard.lines == ["pre_add User.groups of 1: [7]", "post_add User.groups of 1: [7]"]
        for call in heard.calls:
            assert call["sender"] is lists.table
            assert call["instance"] is user
            assert call["relationship"] is lists.User.groups
            assert call["model"] is lists.Group
            assert call["raw"] is False
            assert call["using"] is engine
            assert call["session"] is session
            assert call["signal"] is m2m_changed


def test_a_table_tells_from_the_side_whose_foreign_key_is_first(lists: Clubs, engine: Engine):
    """Whichever side the change came from, a receiver of the table hears it from one."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        group = lists.Group(id=7, users=[lists.User(id=1), lists.User(id=2)])
        session.add(group)
        session.flush()
        assert heard.lines[2:] == [
            "post_add User.groups of 1: [7]",
            "post_add User.groups of 2: [7]",
        ]


def test_a_relationship_as_sender_is_told_from_its_side(lists: Clubs, engine: Engine):
    """Connected to Group.users, the instance is a group, however the change was made."""
    heard = Heard(lists.Group.users)
    with Session(engine) as session:
        group = lists.Group(id=7)
        session.add_all([lists.User(id=1, groups=[group]), lists.User(id=2, groups=[group])])
        session.flush()
        assert heard.lines == [
            "pre_add Group.users of 7: [1, 2]",
            "post_add Group.users of 7: [1, 2]",
        ]
        assert heard.calls[0]["model"] is lists.User


def test_a_function_connected_to_both_sides_hears_of_a_row_once(lists: Clubs, engine: Engine):
    """The first of its connections that matches says from which side."""
    heard = Heard([lists.Group.users, lists.User.groups, lists.table])
    with Session(engine) as session:
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        session.flush()
        assert heard.lines == ["pre_add Group.users of 7: [1]", "post_add Group.users of 7: [1]"]


def test_any_sender(lists: Clubs, engine: Engine):
    """Without a sender a receiver hears of every secondary table."""
    heard = Heard(None)
    with Session(engine) as session:
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        session.flush()
        assert [call["sender"] for call in heard.calls] == [lists.table] * 2


def test_another_relationship_and_another_table_are_not_told(lists: Clubs, engine: Engine):
    """A receiver of one table hears nothing of another one."""
    other = make_clubs("list")
    heard = Heard([other.table, other.User.groups])
    with Session(engine) as session:
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        session.flush()
        assert heard.calls == []
        assert rows(session, lists.table) == [(1, 7)]


def test_one_call_per_instance_and_action_removals_first(lists: Clubs, engine: Engine):
    """Rows of one instance come together; what is removed before what is added."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        users, groups = filled(session, lists, heard)
        assert [len(user.groups) for user in users] == [2, 0]  # loading them later would flush
        users[0].groups = [groups[2]]
        users[1].groups = groups[:2]
        session.flush()
        lines = [
            "remove User.groups of 1: [1, 2]",
            "add User.groups of 1: [3]",
            "add User.groups of 2: [1, 2]",
        ]
        assert heard.lines == [f"pre_{line}" for line in lines] + [f"post_{line}" for line in lines]


def test_keys_that_the_database_generates_are_not_in_pre_add(lists: Clubs, engine: Engine):
    """Before the flush a new member has no key; after it, the set is complete."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        known = lists.Group(id=7)
        session.add_all([known, user := lists.User(groups=[known, lists.Group()])])
        session.flush()
        before, after = heard.calls
        assert before["pk_set"] == {7}
        assert after["pk_set"] == {group.id for group in user.groups}
        assert len(after["pk_set"]) == 2


def test_raw(lists: Clubs, engine: Engine):
    """Inside raw() the signals say so."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        with sqla_signals.raw(session):
            session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        assert [call["raw"] for call in heard.calls] == [True, True]


def test_mute(lists: Clubs, engine: Engine):
    """Muted by the table or by a relationship of it, nothing is told."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        session.add(user := lists.User(id=1))
        for sender in (lists.table, lists.User.groups, lists.Group.users, None):
            with sqla_signals.mute(m2m_changed, sender=sender):
                user.groups.append(lists.Group())
                session.flush()
        assert heard.calls == []
        assert len(rows(session, lists.table)) == 4


def test_overlapping_installations_send_once(lists: Clubs, engine: Engine):
    """Installed for all sessions and for this one, a row is told of once."""
    heard = Heard(lists.table)
    with Session(engine) as session:
        installation = sqla_signals.install(session)
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        session.flush()
        installation.remove()
        assert told(session, heard) == {("add", 1, 7)}


# -- when ----------------------------------------------------------------------------------------


def test_before_the_first_statement_and_after_the_last(lists: Clubs, engine: Engine, statements):
    """pre_add comes after the pre_ signals of rows, post_add after their post_ signals."""
    order: list[str] = []

    def note(sender, signal, **kwargs):
        order.append(f"{kwargs.get('action', signal.name)} {len(statements)}")

    pre_save.connect(note)
    post_save.connect(note)
    m2m_changed.connect(note)
    with Session(engine) as session:
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        session.flush()
    last = len(statements)
    assert order == [
        *("pre_save 0", "pre_save 0", "pre_add 0"),
        *(f"post_save {last}", f"post_save {last}", f"post_add {last}"),
    ]


def test_raising_in_pre_vetoes_the_flush(lists: Clubs, engine: Engine, statements):
    """Nothing was written, and the session goes on."""

    def refuse(sender, action, **kwargs):
        if action == "pre_add":
            raise ValueError("no")

    m2m_changed.connect(refuse, lists.User.groups)
    with Session(engine) as session:
        session.add(user := lists.User(id=1))
        session.flush()
        assert user.groups == []
        del statements[:]
        user.groups.append(lists.Group(id=7))
        with pytest.raises(ValueError, match="no") as caught:
            session.flush()
        assert "of m2m_changed, sender memberships" in caught.value.__notes__[0]
        assert statements == []
        user.groups.clear()
        session.commit()
        assert rows(session, lists.table) == []
        assert rows(session, lists.User.id) == [1]


def test_raising_in_post_rolls_back(lists: Clubs, engine: Engine):
    """The transaction is rolled back, as by any error of a flush."""

    def refuse(sender, action, **kwargs):
        if action == "post_add":
            raise ValueError("no")

    m2m_changed.connect(refuse, lists.User.groups)
    with Session(engine) as session:
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        with pytest.raises(ValueError, match="no"):
            session.commit()
    assert rows(engine, lists.table) == []


def test_a_pre_receiver_may_change_the_collection(lists: Clubs, engine: Engine):
    """What it adds is announced and written; what it takes out is not."""
    heard = Heard(lists.table)

    def meddle(sender, instance, action, session, **kwargs):
        if action == "pre_add" and instance.id == 1:
            other = session.get(lists.User, 2)
            other.groups.clear()
            if len(instance.groups) == 1:
                instance.groups.append(session.get(lists.Group, 3))

    with Session(engine) as session:
        users, groups = filled(session, lists, heard)
        users[0].groups.clear()
        session.flush()
        told(session, heard)
        m2m_changed.connect(meddle, lists.table)
        assert [user.groups for user in users] == [[], []]  # loading them later would flush
        users[0].groups.append(groups[0])
        users[1].groups.append(groups[1])
        session.flush()
        assert heard.rows("pre") == heard.rows("post") == witnessed(session)
        assert rows(session, lists.table) == [(1, 1), (1, 3)]


def test_a_pre_receiver_may_save_other_instances(lists: Clubs, engine: Engine):
    """What it adds to the session gets its own signals in the same flush."""
    saved: list[Any] = []

    def on_save(sender, instance, **kwargs):
        saved.append(instance)

    def meddle(sender, action, session, **kwargs):
        if action == "pre_add":
            session.add(lists.Group(id=99))

    pre_save.connect(on_save, lists.Group)
    m2m_changed.connect(meddle, lists.table)
    with Session(engine) as session:
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        session.flush()
        assert [one.id for one in saved] == [7, 99]
        assert rows(session, lists.Group.id) == [7, 99]


def test_ending_the_session_in_a_receiver_is_an_error(lists: Clubs, engine: Engine):
    """As in every receiver of a flush."""

    def impatient(sender, session, **kwargs):
        session.commit()

    m2m_changed.connect(impatient, lists.table)
    with Session(engine) as session:
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        with pytest.raises(SessionInFlushError):
            session.flush()
    assert rows(engine, lists.User.id) == []


@asynchronous
async def test_an_async_receiver_is_awaited(
    engine: Engine,
    async_engine: AsyncEngine,
    installed: Any,
):
    """Behind an AsyncSession, which it gets."""
    clubs = make_clubs("list")
    clubs.create(engine)
    found: list[str] = []

    async def count(sender, action, session, **kwargs):
        assert isinstance(session, AsyncSession)
        number = len((await session.execute(select(clubs.table))).all())
        found.append(f"{action} {number}")

    m2m_changed.connect(count, clubs.User.groups)
    async with AsyncSession(async_engine) as session:
        session.add(clubs.User(id=1, groups=[clubs.Group(id=7)]))
        await session.commit()
    assert found == ["pre_add 0", "post_add 1"]


# -- connecting ----------------------------------------------------------------------------------


def test_a_relationship_that_is_not_configured_yet_can_be_a_sender(engine: Engine, installed: Any):
    """Classes that it names may come later; nothing is configured by connecting."""

    class Base(DeclarativeBase):
        pass

    table = Table(
        "memberships",
        Base.metadata,
        Column("user_id", ForeignKey("users.id"), primary_key=True),
        Column("group_id", ForeignKey("groups.id"), primary_key=True),
    )

    class User(Base):
        __tablename__ = "users"
        id = Column(Integer, primary_key=True)
        groups = relationship("Group", secondary="memberships")

    heard = Heard(User.groups)

    class Group(Base):
        __tablename__ = "groups"
        id = Column(Integer, primary_key=True)

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(User(id=1, groups=[Group(id=7)]))
        session.flush()
        assert len(heard.calls) == 2
        assert rows(session, table) == [(1, 7)]


def test_disconnecting_from_a_relationship(lists: Clubs, engine: Engine):
    """By the same sender that it was connected with."""
    heard = Heard(lists.User.groups)
    assert m2m_changed.has_receivers_for(lists.User.groups)
    assert not m2m_changed.disconnect(heard, sender=lists.Group.users)
    assert m2m_changed.disconnect(heard, sender=lists.User.groups)
    with Session(engine) as session:
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        session.flush()
        assert heard.calls == []
        assert rows(session, lists.table) == [(1, 7)]


def receiver(sender, **kwargs):
    """A receiver that is not called."""


@pytest.mark.parametrize(
    ("sender", "named"),
    [
        (lambda clubs: clubs.User, "User"),
        (lambda clubs: clubs.User.id, "User.id"),
        (lambda clubs: "memberships", "'memberships'"),
        (lambda clubs: aliased(clubs.User), "Aliased"),
    ],
    ids=["class", "column", "name", "alias"],
)
def test_what_is_no_association_is_refused(lists: Clubs, sender, named: str):
    """A class, a column and a name are no senders; the message says what is one."""
    with pytest.raises(ReceiverOptionError, match=r"User\.groups") as caught:
        m2m_changed.connect(receiver, sender(lists))
    assert named in str(caught.value)
    assert "test_m2m_changed.receiver" in str(caught.value)


def test_options_that_make_no_sense_are_refused(lists: Clubs):
    """The phases after the transaction and fields= are errors when connecting."""
    with pytest.raises(ReceiverOptionError, match=r"'commit'.*'flush'"):
        m2m_changed.connect(receiver, lists.table, on="commit")
    with pytest.raises(ReceiverOptionError, match="fields"):
        m2m_changed.connect(receiver, lists.table, fields={"id"})


def test_installation_forgotten(lists: Clubs, installed: sqla_signals.Installation, engine: Engine):
    """A receiver of m2m_changed that is never called is warned of, as any other."""
    installed.remove()
    m2m_changed.connect(receiver, lists.User.groups)
    with Session(engine) as session:
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        with pytest.warns(sqla_signals.SignalsNotInstalledWarning, match="receiver"):
            session.flush()


# -- what it costs -------------------------------------------------------------------------------


def test_without_receivers_nothing_is_looked_at(lists: Clubs, engine: Engine, monkeypatch):
    """Receivers of saves alone do not make a flush look into secondary tables."""
    from sqla_signals.bridge.flush import m2m

    def called(*args):
        raise AssertionError("looked")

    monkeypatch.setattr(m2m, "association_changes", called)
    post_save.connect(receiver)
    with Session(engine) as session:
        session.add(lists.User(id=1, groups=[lists.Group(id=7)]))
        session.flush()
        assert rows(session, lists.table) == [(1, 7)]
