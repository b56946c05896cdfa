"""A session that a call has not used serves the next call, where nobody can tell."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, inspect, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_object_session
from sqlalchemy.orm import Session, object_session

import sqla_signals
from sqla_signals import (
    SignalsError,
    install,
    on_commit,
    post_delete,
    post_init,
    post_save,
    receiver,
    receiver_failed,
)

from ..contract.models import Author, Tag
from ..contract.observing import rows
from .observing import asynchronous


def names(session: Session) -> list[str]:
    return sorted(rows(session.get_bind(), Author.name))


def test_calls_that_use_no_session_share_one(session: Session):
    """Opening one costs more than all the rest of a call."""
    keys = []

    @receiver([post_save, post_delete], sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        assert instance.name
        keys.append(session.hash_key)

    session.add_all([Author(name=name) for name in "abcd"])
    session.commit()
    assert len(keys) == 4
    assert len(set(keys)) == 1
    assert names(session) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("use", ["statement", "change", "add", "get", "begin"])
def test_calls_that_use_their_session_have_each_another(session: Session, use: str):
    """One that began a transaction, even if it has ended it."""
    keys = []

    @receiver(post_save, sender=Author, on="commit", fields={"name"})
    def fn(sender, instance, created, session, **kwargs):
        if not created or len(instance.name) > 1:
            return
        keys.append(session.hash_key)
        if use == "statement":
            session.execute(text("SELECT 1"))
        elif use == "change":
            instance.name += "!"
        elif use == "add":
            session.add(Author(name=instance.name + "?"))
        elif use == "get":
            session.scalars(select(Author)).all()
        else:
            session.begin()

    session.add_all([Author(name=name) for name in "abc"])
    session.commit()
    assert len(keys) == len(set(keys)) == 3
    expected = {"change": ["a!", "b!", "c!"], "add": ["a", "a?", "b", "b?", "c", "c?"]}
    assert names(session) == expected.get(use, ["a", "b", "c"])


kept: list[Any] = []
weakly: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def heard(*_: Any) -> None:
    kept.append("heard")


@pytest.mark.parametrize(
    "leave",
    [
        lambda session, arguments: session.info.update(left=True),
        lambda session, arguments: setattr(session, "autoflush", False),
        lambda session, arguments: setattr(session, "left", True),
        lambda session, arguments: event.listen(session, "after_begin", heard),
        lambda session, arguments: kept.append(session),
        lambda session, arguments: kept.append(arguments),
        lambda session, arguments: kept.append(lambda: session),
        lambda session, arguments: kept.append(session.execute),
        lambda session, arguments: weakly.update({session: "left"}),
        lambda session, arguments: kept.append(session.identity_map),
    ],
    ids=[
        "info",
        "option",
        "attribute",
        "listener",
        "kept",
        "arguments",
        "closure",
        "method",
        "weakly",
        "identity_map_kept",
    ],
)
def test_a_session_with_a_trace_of_the_call_serves_no_other(
    session: Session, leave: Callable[[Session, dict[str, Any]], Any]
):
    """Nothing that one receiver leaves there reaches the next."""
    kept.clear()
    weakly.clear()
    found: list[Any] = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, **kwargs):
        session = kwargs["session"]
        found.append(
            (
                session.hash_key,
                dict(session.info),
                session.autoflush,
                hasattr(session, "left"),
                session in weakly,
                len(session.identity_map),
            )
        )
        if len(found) == 1:
            leave(session, kwargs)

    session.add_all([Author(name=name) for name in "abc"])
    session.commit()
    first, *others = found
    assert first[0] not in {other[0] for other in others}
    assert [other[1:] for other in others] == [first[1:]] * 2
    assert "heard" not in kept
    assert names(session) == ["a", "b", "c"]


@asynchronous
async def test_behind_an_async_session_calls_that_use_none_share_one_too(
    async_engine: AsyncEngine, witness: Engine
):
    """Async receivers and plain ones in turn, each with the session of its kind."""
    found: list[tuple[str, Any]] = []

    @receiver(post_save, sender=Author, on="commit")
    async def awaited(sender, instance, session, **kwargs):
        assert async_object_session(instance) is session
        found.append(("async", session.sync_session.hash_key))
        await asyncio.sleep(0)

    @receiver(post_save, sender=Author, on="commit")
    def plain(sender, instance, session, **kwargs):
        assert object_session(instance) is session
        found.append(("plain", session.hash_key))

    async with AsyncSession(async_engine) as session:
        session.add_all([Author(name=name) for name in "abc"])
        await session.commit()
    assert [kind for kind, _ in found] == ["async", "plain"] * 3
    assert len({key for _, key in found}) == 1
    assert sorted(rows(witness, Author.name)) == ["a", "b", "c"]


async def reading(session: AsyncSession) -> None:
    await session.scalars(select(Author))


async def doing_nothing(session: AsyncSession) -> None: ...


@pytest.mark.parametrize(
    "leave",
    [
        lambda session: session.info.update(left=True),
        lambda session: setattr(session, "left", True),
        lambda session: setattr(session.sync_session, "left", True),
        lambda session: kept.append(session),
        lambda session: kept.append(session.sync_session),
        lambda session: kept.append(session.execute),
        lambda session: kept.append(asyncio.ensure_future(doing_nothing(session))),
        lambda session: weakly.update({session: "left"}),
        reading,
    ],
    ids=[
        "info",
        "attribute",
        "sync_attribute",
        "kept",
        "sync_kept",
        "method",
        "task",
        "weakly",
        "statement",
    ],
)
@asynchronous
async def test_an_async_session_with_a_trace_of_the_call_serves_no_other(
    async_engine: AsyncEngine, witness: Engine, leave: Callable[[AsyncSession], Any]
):
    """Nothing that one receiver leaves there reaches the next."""
    kept.clear()
    weakly.clear()
    found: list[Any] = []

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, session, **kwargs):
        found.append(
            (
                session.sync_session.hash_key,
                dict(session.info),
                hasattr(session, "left") or hasattr(session.sync_session, "left"),
                session in weakly,
                len(session.sync_session.identity_map),
            )
        )
        if len(found) == 1 and (left := leave(session)) is not None:
            await left

    async with AsyncSession(async_engine) as session:
        session.add_all([Author(name=name) for name in "abc"])
        await session.commit()
    first, *others = found
    assert first[0] not in {other[0] for other in others}
    assert [other[1:] for other in others] == [first[1:]] * 2
    assert sorted(rows(witness, Author.name)) == ["a", "b", "c"]


def test_what_a_receiver_has_kept_of_the_session_is_not_that_of_the_next(session: Session):
    """A thread or a task of its own may go on with it."""
    kept.clear()
    found: list[dict[Any, Any]] = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        for info in kept:
            info["left"] = True
        found.append(dict(session.info))
        kept.append(session.info)

    session.info["mine"] = True
    session.add_all([Author(name=name) for name in "abc"])
    session.commit()
    assert found == [{"mine": True}] * 3
    assert session.info == {"mine": True}
    assert names(session) == ["a", "b", "c"]


@pytest.mark.parametrize("how", ["load", "post_init"])
def test_a_session_kept_by_who_hears_of_the_loaded_instance_serves_no_other(
    session: Session, how: str
):
    """They hear of it before the receiver is called."""
    kept.clear()
    keys: list[int] = []

    def keep(instance: Author) -> None:
        own = object_session(instance)
        if own is not None:
            kept.append(own)

    if how == "load":
        event.listen(Author, "load", loaded := lambda instance, context: keep(instance))
    else:

        @receiver(post_init, sender=Author)
        def initialized(sender, instance, **kwargs):
            keep(instance)

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        assert session in kept
        keys.append(session.hash_key)

    session.add_all([Author(name=name) for name in "abc"])
    session.commit()
    if how == "load":
        event.remove(Author, "load", loaded)
    assert len(kept) == len(set(keys)) == 3
    assert names(session) == ["a", "b", "c"]


def test_what_a_receiver_binds_its_session_to_is_for_that_session_alone(session: Session):
    """Neither the next call nor the session that did the work is sent elsewhere."""
    elsewhere = create_engine("sqlite://")
    found: list[Any] = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        found.append(session.get_bind(Author))
        session.bind_mapper(Author, elsewhere)
        assert session.get_bind(Author) is elsewhere

    session.bind_mapper(Tag, session.get_bind())
    session.add_all([Author(name=name) for name in "ab"])
    session.commit()
    assert found == [session.get_bind()] * 2
    assert session.get_bind(Author) is session.get_bind()
    assert names(session) == ["a", "b"]
    elsewhere.dispose()


class WithSlots(Session):
    """Has an attribute outside of its ``__dict__``."""

    __slots__ = ("tenant",)


class AsyncWithSlots(AsyncSession):
    """The same in front."""

    __slots__ = ("tenant",)


def test_attributes_in_slots_are_the_sessions_own(
    library: Engine, installed: sqla_signals.Installation
):
    """They come along, and what a receiver makes of them does not reach the next."""
    found: list[str] = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        found.append(session.tenant)
        session.tenant = instance.name

    with WithSlots(library) as session:
        session.tenant = "mine"
        session.add_all([Author(name=name) for name in "ab"])
        session.commit()
        assert session.tenant == "mine"
        assert found == ["mine", "mine"]
        assert names(session) == ["a", "b"]


@asynchronous
async def test_attributes_in_slots_of_an_async_session_are_its_own(
    async_engine: AsyncEngine, witness: Engine
):
    """They come along, and what a receiver makes of them does not reach the next."""
    found: list[str] = []

    @receiver(post_save, sender=Author, on="commit")
    async def fn(sender, instance, session, **kwargs):
        found.append(session.tenant)
        session.tenant = instance.name

    async with AsyncWithSlots(async_engine) as session:
        session.tenant = "mine"
        session.add_all([Author(name=name) for name in "ab"])
        await session.commit()
        assert session.tenant == "mine"
    assert found == ["mine", "mine"]
    assert sorted(rows(witness, Author.name)) == ["a", "b"]


def test_an_instance_that_outlives_its_call_is_detached(session: Session):
    """As if its session were gone, though that serves the next call; what was loaded stays."""
    instances: list[Author] = []

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        for earlier in instances:
            assert inspect(earlier).detached
            assert object_session(earlier) is None
            assert earlier not in session
        assert inspect(instance).persistent
        instances.append(instance)

    session.add_all([Author(name=name) for name in "abc"])
    session.commit()
    assert [inspect(one).detached for one in instances] == [True] * 3
    assert [one.name for one in instances] == ["a", "b", "c"]
    with Session(session.get_bind()) as another:
        another.add(instances[0])
        instances[0].name = "A"
        another.commit()
    assert names(session) == ["A", "b", "c"]


def test_a_row_told_to_two_receivers_is_another_instance_each_time(session: Session):
    """Both under one key, one after the other, in a session that served both."""
    found: list[Any] = []

    @receiver(post_save, sender=Author, on="commit")
    def one(sender, instance, session, **kwargs):
        found.append((session.hash_key, instance))

    @receiver(post_save, sender=Author, on="commit")
    def two(sender, instance, session, **kwargs):
        assert session.identity_map.values() == [instance]
        found.append((session.hash_key, instance))

    session.add(Author(name="a"))
    session.commit()
    (key, first), (other_key, second) = found
    assert key == other_key
    assert first is not second
    assert first.name == second.name == "a"
    assert names(session) == ["a"]


def test_calls_for_deleted_rows_share_a_session_too(session: Session):
    """Their instances live in none."""
    found: list[Any] = []

    def failed(sender, exception, **kwargs):
        found.append(exception)

    @receiver(post_delete, sender=Author, on="commit")
    def fn(sender, instance, session, **kwargs):
        assert inspect(instance).detached
        found.append((instance.name, session.hash_key))

    session.add_all(authors := [Author(name=name) for name in "abc"])
    session.commit()
    for author in authors[:2]:
        session.delete(author)
    with receiver_failed.connected_to(failed):
        session.commit()
    assert [name for name, _ in found] == ["a", "b"]
    assert len({key for _, key in found}) == 1
    assert names(session) == ["c"]


def test_a_session_with_listeners_of_its_own_serves_one_call(library: Engine):
    """What a receiver adds to those that it has from the start could not be seen."""
    heard_by: list[int] = []
    with Session(library) as session:
        session_alone = install(session)

        @receiver(post_save, sender=Author, on="commit")
        def fn(sender, session, **kwargs):
            heard_by.append(len(list(session.dispatch.before_commit)))
            event.listen(session, "before_commit", heard)

        session.add_all([Author(name=name) for name in "abc"])
        session.commit()
        assert heard_by == [1, 1, 1]
        assert names(session) == ["a", "b", "c"]
        session_alone.remove()


@pytest.mark.parametrize("where", ["attribute", "info"])
def test_what_a_receiver_leaves_there_need_not_be_comparable(session: Session, where: str):
    """An array, or SQL: the receiver was told to have failed."""

    class Incomparable:
        def __eq__(self, other: object) -> bool:
            raise TypeError

        __hash__ = object.__hash__

    found, failures = [], []
    session.left = session.info["left"] = original = Incomparable()

    @receiver(post_save, sender=Author, on="commit")
    def fn(sender, session, **kwargs):
        found.append((session.left, session.info["left"]))
        if where == "info":
            session.info["left"] = Incomparable()
        else:
            session.left = Incomparable()

    @receiver(receiver_failed)
    def failed(sender, exception, **kwargs):
        failures.append(exception)

    session.add_all([Author(name=name) for name in "ab"])
    session.commit()
    assert failures == []
    assert found == [(original, original)] * 2
    assert names(session) == ["a", "b"]


def test_callbacks_of_the_own_session_where_one_session_alone_is_listened_to(
    library: Engine,
):
    """They were refused, though the signals of its work were sent."""
    called: list[str] = []
    with Session(library) as session:
        session_alone = install(session)

        @receiver(post_save, sender=Author, on="commit")
        def fn(sender, instance, session, **kwargs):
            name = instance.name
            on_commit(session, lambda: called.append(name))

        session.add_all([Author(name=name) for name in "ab"])
        session.commit()
        assert called == ["a", "b"]
        with Session(library) as other, pytest.raises(SignalsError):
            on_commit(other, lambda: None)
        assert names(session) == ["a", "b"]
        session_alone.remove()
