"""Beside what others offer for the same: the same rows, and a receiver that does the same work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import django
import flask
import flask_sqlalchemy
import pytest
import sqlalchemy_continuum as continuum
from django.conf import settings
from fastapi_toolsets.models import EventSession, ModelEvent, listens_for
from flask_sqlalchemy.track_modifications import models_committed
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Mapper,
    Session,
    configure_mappers,
    mapped_column,
)
from sqlalchemy.pool import StaticPool

from sqla_signals import post_save, pre_save

from .bench_commit import CASE, reads_two
from .bench_flush import after, before
from .conftest import Report
from .models import Base, Kind, Thing, clear, installed, plain, side, writing
from .pairs import Side, Work, alternate, figure

each_kind = pytest.mark.parametrize("kind", get_args(Kind))


# --- Flask-SQLAlchemy ----------------------------------------------------------------------------


def flask_side(kind: Kind, rows: int, *, tracking: bool) -> Side:
    """An application of one table; it tracks modifications, or ours are installed."""
    db = flask_sqlalchemy.SQLAlchemy(session_options={"expire_on_commit": False})

    class FlaskThing(db.Model):  # type: ignore[name-defined,misc]
        __tablename__ = "thing"

        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[int]
        b: Mapped[str]

    app = flask.Flask("performance")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    app.config["SQLALCHEMY_TRACK_MODIFICATIONS"] = tracking
    db.init_app(app)

    def committed(sender: Any, changes: list[tuple[Any, str]]) -> None:
        for instance, _ in changes:
            reads_two(type(instance), instance)

    ours = installed((post_save, reads_two, {"sender": FlaskThing, "on": "commit"}))

    @contextmanager
    def program() -> Iterator[Work]:
        with app.app_context():
            db.create_all()
            empty = partial(clear, db.engine, db)
            with (
                models_committed.connected_to(committed, sender=app) if tracking else ours(),
                writing(
                    kind, rows, FlaskThing, commit=True, sessions=lambda: db.session(), clear=empty
                ) as work,
            ):
                yield work
            db.session.remove()

    return program


@each_kind
def bench_flask_sqlalchemy(
    benchmark: Any, report: Report, rows: int, blocks: int, kind: Kind
) -> None:
    """Its ``models_committed`` names the instances of the session that was committed."""
    sides = [flask_side(kind, rows, tracking=tracking) for tracking in (False, True)]
    times = alternate(benchmark, *sides, blocks=blocks)
    against = "Flask-SQLAlchemy's `models_committed`, reading the same"
    report.compare(f"{CASE}: {kind}", against, times, below=1.0)


# --- SQLAlchemy-Continuum ------------------------------------------------------------------------


class VersionedSession(Session):
    """The sessions that SQLAlchemy-Continuum listens to."""


@pytest.fixture(scope="module")  # it defines its own class of transactions once
def versioned() -> Iterator[Any]:
    """A model with versions, and nobody listening."""
    continuum.make_versioned(session=VersionedSession, user_cls=None)

    class Base(DeclarativeBase):
        pass

    class Versioned(Base):
        __tablename__ = "thing"
        __versioned__: dict[str, Any] = {}

        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[int]
        b: Mapped[str]

    configure_mappers()
    # Its mapper listeners would also be called for our side.
    continuum.versioning_manager.remove_operations_tracking(Mapper)
    yield Versioned
    continuum.versioning_manager.track_operations(Mapper)
    continuum.remove_versioning(session=VersionedSession)


def adds_history(sender: Any, instance: Any, created: bool, session: Any, **kwargs: Any) -> None:
    session.add(History(of=instance.id, a=instance.a, b=instance.b, created=created))


class HistoryBase(DeclarativeBase):
    pass


class History(HistoryBase):
    __tablename__ = "history"

    id: Mapped[int] = mapped_column(primary_key=True)
    of: Mapped[int]
    a: Mapped[int]
    b: Mapped[str]
    created: Mapped[bool]


@contextmanager
def new_engine(*bases: Any) -> Iterator[Engine]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    for base in bases:
        base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@each_kind
def bench_continuum(
    benchmark: Any, report: Report, rows: int, blocks: int, kind: Kind, versioned: Any
) -> None:
    """It has no receivers: it writes history in the same transaction, and so does ours."""
    ours = installed((post_save, adds_history, {"sender": Thing}))

    @contextmanager
    def by_receiver() -> Iterator[Work]:
        with new_engine(Base, HistoryBase) as engine, ours():
            sessions = partial(Session, engine, expire_on_commit=False)
            with writing(kind, rows, commit=True, sessions=sessions, clear=int) as work:
                yield work

    @contextmanager
    def by_continuum() -> Iterator[Work]:
        with new_engine(versioned) as engine:
            sessions = partial(VersionedSession, engine, expire_on_commit=False)
            continuum.versioning_manager.track_operations(Mapper)
            try:
                program = writing(kind, rows, versioned, commit=True, sessions=sessions, clear=int)
                with program as work:
                    yield work
            finally:
                continuum.versioning_manager.remove_operations_tracking(Mapper)

    times = alternate(benchmark, by_receiver, by_continuum, blocks=max(1, blocks // 2))
    report.compare(
        f"`post_save` that adds a row of history: {kind}",
        "SQLAlchemy-Continuum, which writes such rows",
        times,
        below=1.0,
    )


# --- fastapi-toolsets ----------------------------------------------------------------------------


class AsyncBase(DeclarativeBase):
    pass


class AsyncThing(AsyncBase):
    __tablename__ = "thing"

    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[int]
    b: Mapped[str]


@listens_for(AsyncThing, [ModelEvent.CREATE, ModelEvent.UPDATE])
async def listens_and_reads(instance: AsyncThing, event_type: Any, changes: Any) -> None:
    reads_two(AsyncThing, instance)


async def async_reads_two(sender: Any, instance: Any, **kwargs: Any) -> None:
    instance.a
    instance.b


def async_side(kind: Kind, rows: int, sessions: Callable[..., AsyncSession]) -> Side:
    """One commit of an ``AsyncSession``."""

    @contextmanager
    def program() -> Iterator[Work]:
        async def prepare(session: AsyncSession) -> None:
            async with engine.begin() as connection:
                await connection.run_sync(AsyncBase.metadata.create_all)
            session.add(AsyncThing(a=0, b="first"))
            await session.commit()
            things = [AsyncThing(a=i, b="x") for i in range(rows)]
            session.add_all(things)
            if kind == "update":
                await session.commit()
                await session.connection()
                for i, thing in enumerate(things):
                    thing.a = -i - 1
                    thing.b = "y"

        engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
        session = sessions(engine, expire_on_commit=False)
        with asyncio.Runner() as runner:
            runner.run(prepare(session))
            yield lambda: runner.run(session.commit())
            runner.run(session.close())
            runner.run(engine.dispose())

    return program


@each_kind
def bench_fastapi_toolsets(
    benchmark: Any, report: Report, rows: int, blocks: int, kind: Kind
) -> None:
    """Its callbacks are awaited one by one, with the instances of the committed session."""
    ours = installed((post_save, async_reads_two, {"sender": AsyncThing, "on": "commit"}))
    times = alternate(
        benchmark,
        side(ours, async_side(kind, rows, AsyncSession)),
        async_side(kind, rows, EventSession),
        blocks=blocks,
    )
    report.compare(
        f"an async {CASE}: {kind}",
        "fastapi-toolsets' `EventSession`, reading the same",
        times,
        below=1.0,
    )


# --- Django --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def django_thing() -> Iterator[Any]:
    """A Django model of the same table."""
    settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    )
    django.setup()
    from django.db import connection, models

    class DjangoThing(models.Model):
        a = models.IntegerField()
        b = models.TextField()

        class Meta:
            app_label = "performance"
            db_table = "thing"

    with connection.schema_editor() as editor:
        editor.create_model(DjangoThing)
    yield DjangoThing
    connection.close()


def django_side(kind: Kind, rows: int, model: Any, *, receivers: bool) -> Side:
    """Saving instances one by one, in one transaction."""
    from django.db import transaction
    from django.db.models import signals

    @contextmanager
    def program() -> Iterator[Work]:
        things = [model(a=i, b="x") for i in range(rows)]
        if kind == "update":
            with transaction.atomic():
                for thing in things:
                    thing.save()
            for thing in things:
                thing.a, thing.b = -thing.a - 1, "y"

        def work() -> None:
            with transaction.atomic():
                for thing in things:
                    thing.save()

        if receivers:
            signals.pre_save.connect(before, sender=model)
            signals.post_save.connect(after, sender=model)
        try:
            yield work
        finally:
            signals.pre_save.disconnect(before, sender=model)
            signals.post_save.disconnect(after, sender=model)
            model.objects.all().delete()

    return program


@each_kind
def bench_django(
    benchmark: Any, report: Report, rows: int, blocks: int, kind: Kind, django_thing: Any
) -> None:
    """What ``pre_save`` and ``post_save`` receivers add to a row, here and there."""
    ours = installed((pre_save, before, {"sender": Thing}), (post_save, after, {"sender": Thing}))
    program = partial(writing, kind, rows)
    times = alternate(
        benchmark,
        side(ours, program),
        side(plain, program),
        django_side(kind, rows, django_thing, receivers=True),
        django_side(kind, rows, django_thing, receivers=False),
        blocks=blocks,
    )
    added = [
        figure(times, of).value / rows * 1e6
        for of in (lambda a, b, c, d: a - b, lambda a, b, c, d: c - d)
    ]
    report.add(
        f"added by `pre_save` and `post_save`, per row: {kind}",
        "added by Django's to a `save()`",
        figure(times, lambda ours, plain, theirs, bare: (ours - plain) / (theirs - bare)),
        below=1.0,
        micros=" ÷ ".join(f"{value:.2f}" for value in added),
    )
