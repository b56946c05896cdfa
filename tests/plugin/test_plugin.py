"""The pytest plugin, in suites as users have them, each in a process of its own."""

from __future__ import annotations

import pytest

from .conftest import CONFTEST, Run, run_pytest


def test_everything_that_is_sent_is_seen_in_one_rolled_back_transaction(suite: Run):
    """Flush, commit, rollback, many-to-many and durable; commit receivers work, and stay in it."""
    suite(
        """
        from sqlalchemy import create_engine, func, select
        from sqlalchemy.orm import Session
        from sqla_signals import post_delete, post_save
        from sqla_signals.durable import Relay
        from shop import Base, Mail, Order, Tag

        def place(session, status="new", **kwargs):
            order = Order(status=status, **kwargs)
            session.add(order)
            session.commit()
            return order

        def test_placing(signals, session):
            order = place(session, tags=[Tag()])
            assert signals.lines == [
                "pre_save Order created",
                "m2m_changed tagged pre_add",
                "post_save Order created",
                "m2m_changed tagged post_add",
                "post_save Order created on commit",
            ]
            signals.expect(post_save, Order, on="commit", instance=order)
            assert session.scalars(select(Mail.text)).all() == [f"order {order.id} is new"]

        def test_the_test_before_has_left_nothing(signals, session):
            assert session.scalar(select(func.count()).select_from(Mail)) == 0
            assert session.scalar(select(func.count()).select_from(Order)) == 0
            assert signals.lines == []

        def test_undoing(signals, session):
            order = place(session)
            signals.clear()
            order.status = "paid"
            session.flush()
            session.rollback()
            signals.expect(post_save, on="rollback", changes={"status": "paid"})
            signals.expect_nothing(post_save, on="commit")
            session.delete(order)
            session.commit()
            signals.expect(post_delete, Order, instance=order)

        def test_durable(signals, tmp_path):
            engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
            Base.metadata.create_all(engine)
            with Session(engine) as session:
                place(session)
                place(session, "unknown")
            relay = Relay(engine)
            with signals.expect_failure(LookupError, receiver="shop.export"):
                relay.run_once()
            assert len(signals.sent(post_save, Order, on="durable", receiver="shop.export")) == 2
            sent = signals.expect(on="durable", changes={"status": "unknown"})
            assert sent.event.attempt == 1
            engine.dispose()
        """
    ).assert_outcomes(passed=4)


def test_a_failure_that_is_only_logged_fails_the_test(suite: Run):
    """The test, not its teardown; and not where it was expected, or nobody looks on."""
    result = suite(
        """
        import pytest
        from sqla_signals import on_commit, post_save
        from shop import Order, mail

        def place(session, status):
            session.add(Order(status=status))
            session.commit()

        def test_unexpected(signals, session):
            place(session, "bad address")

        def test_expected(signals, session):
            with signals.expect_failure(ConnectionError, receiver=mail):
                place(session, "bad address")

        def test_callback(signals, session):
            on_commit(session, lambda: 1 / 0)
            place(session, "new")

        def test_vetoed(signals, session):
            with pytest.raises(ValueError, match="no status"):
                place(session, "")
            signals.expect_nothing(post_save)

        def test_without(session):
            place(session, "bad address")

        @pytest.fixture
        def late(signals, session):
            yield
            place(session, "bad address")

        def test_in_a_teardown(late):
            pass
        """
    )
    result.assert_outcomes(passed=4, failed=2, errors=1)
    text = result.stdout.str()
    assert "post_save Order on commit: shop.mail raised ConnectionError('no such address')" in text
    assert "on commit: test_shop.test_callback.<locals>.<lambda> raised ZeroDivisionError" in text
    assert "with signals.expect_failure(...)" in text


def test_a_failed_test_shows_what_was_sent(suite: Run):
    """In the message of the expectation, else below the failure, unittest's too; never twice."""
    result = suite(
        """
        import unittest
        import pytest
        from sqla_signals import post_save
        from shop import Order

        def test_expectation(signals, session):
            session.add(Order(status="new"))
            session.commit()
            signals.expect(post_save, Order, created=False)

        def test_assertion(signals, session):
            session.add(Order(status="new"))
            session.commit()
            assert signals.lines == []

        class TestOrders(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def fixtures(self, signals, session):
                self.signals, self.session = signals, session

            def test_assertion_of_unittest(self):
                self.session.add(Order(status="new"))
                self.session.commit()
                self.assertEqual(self.signals.lines, [])
        """
    )
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(
        [
            "E       AssertionError: expected once: post_save Order with created=False",
            "E       it was not sent",
            "E       sent, in this order:",
            "E            1. pre_save Order created*to shop.check",
            "E            2. post_save Order created*to shop.audit",
            "E               but not with created=False",
            "* Captured signals call *",
            "sent, in this order:",
            "     1. pre_save Order created*to shop.check",
        ]
    )
    assert result.stdout.str().count("sent, in this order:") == 3


ASYNC = """
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import StaticPool

from sqla_signals import post_save, receiver
from shop import Base, Mail, Order

{mark}

@receiver(post_save, sender=Order, on="commit", name="shop.index")
async def index(sender, instance, session, **kwargs):
    await session.execute(select(Order.id))

@{fixture}
async def session():
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
    async with engine.connect() as connection:
        await connection.run_sync(Base.metadata.create_all)
        transaction = connection.get_transaction()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        await transaction.rollback()
    await engine.dispose()

async def test_placing(signals, session):
    session.add(Order(status="new"))
    await session.commit()
    sent = signals.expect(post_save, Order, on="commit", created=True)
    assert sent.receivers == ["shop.mail", "shop.index"]
    assert (await session.scalars(select(Mail.text))).all() == ["order 1 is new"]

async def test_failing(signals, session):
    with signals.expect_failure(ConnectionError):
        session.add(Order(status="bad address"))
        await session.commit()
    signals.expect(post_save, Order, on="commit", receiver=index)

async def test_failing_unexpectedly(signals, session):
    session.add(Order(status="bad address"))
    await session.commit()
"""


@pytest.mark.parametrize("plugin", ["asyncio", "anyio"])
def test_asynchronous_tests_are_like_others(suite: Run, plugin: str):
    """With pytest-asyncio and with anyio's plugin; the fixture itself is synchronous."""
    pytest.importorskip("aiosqlite")
    if plugin == "asyncio":
        pytest.importorskip("pytest_asyncio")
        source = ASYNC.format(
            mark="import pytest_asyncio\npytestmark = pytest.mark.asyncio",
            fixture="pytest_asyncio.fixture",
        )
        options = ["-o", "asyncio_default_fixture_loop_scope=function"]
    else:
        source = ASYNC.format(
            mark="pytestmark = pytest.mark.anyio\n\n@pytest.fixture\ndef anyio_backend():\n"
            "    return 'asyncio'\n",
            fixture="pytest.fixture",
        )
        options = []
    other = "anyio" if plugin == "asyncio" else "asyncio"
    result = suite(source, *options, conftest="", without=other)
    result.assert_outcomes(passed=2, failed=1)
    assert "shop.mail raised ConnectionError" in result.stdout.str()


def test_it_works_in_the_workers_of_xdist(suite: Run):
    """Each sees what its own tests send."""
    pytest.importorskip("xdist")
    suite(
        """
        import pytest
        from sqla_signals import post_save
        from shop import Order

        @pytest.mark.parametrize("number", range(6))
        def test_placing(signals, session, number):
            session.add(Order(status=str(number)))
            session.commit()
            signals.expect(post_save, Order, on="commit", changes={"status": str(number)})
        """,
        "-n",
        "2",
    ).assert_outcomes(passed=6)


def test_what_threads_send_is_seen(suite: Run):
    """A test client of a web framework runs the application in another thread."""
    suite(
        """
        from threading import Thread
        from sqla_signals import post_save
        from shop import Order

        def test_placing(signals, session):
            def place():
                session.add(Order(status="new"))
                session.commit()

            thread = Thread(target=place)
            thread.start()
            thread.join()
            signals.expect(post_save, Order, on="commit")
        """,
        conftest=CONFTEST.replace(
            'create_engine("sqlite://", ',
            'create_engine("sqlite://", connect_args={"check_same_thread": False}, ',
        ),
    ).assert_outcomes(passed=1)


def test_flask_sqlalchemys_recipe(pytester: pytest.Pytester):
    """Its engine is replaced by a connection for the length of a test, as its users do."""
    pytest.importorskip("flask_sqlalchemy")
    pytester.makepyfile(
        """
        import pytest
        from flask import Flask
        from flask_sqlalchemy import SQLAlchemy
        from sqlalchemy import event
        from sqlalchemy.orm import Mapped, mapped_column

        import sqla_signals
        from sqla_signals import post_save, receiver

        db = SQLAlchemy(session_options={"join_transaction_mode": "create_savepoint"})

        class Order(db.Model):
            id: Mapped[int] = mapped_column(primary_key=True)

        class Mail(db.Model):
            id: Mapped[int] = mapped_column(primary_key=True)

        @receiver(post_save, sender=Order, on="commit")
        def mail(sender, instance, session, **kwargs):
            session.add(Mail(id=instance.id))

        sqla_signals.install(db)

        @pytest.fixture(scope="session")
        def app(tmp_path_factory):
            app = Flask("shop")
            path = tmp_path_factory.mktemp("shop") / "shop.db"
            app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{path}"
            db.init_app(app)
            with app.app_context():
                # SQLite's driver begins transactions too late for savepoints.
                event.listen(db.engine, "connect", lambda c, _: setattr(c, "isolation_level", None))
                event.listen(db.engine, "begin", lambda c: c.exec_driver_sql("BEGIN") and None)
                db.create_all()
            yield app
            with app.app_context():
                db.engine.dispose()

        @pytest.fixture
        def rolled_back(app):
            with app.app_context():
                engines = db.engines
                engine = engines[None]
                with engine.connect() as connection:
                    transaction = connection.begin()
                    engines[None] = connection
                    try:
                        yield
                    finally:
                        db.session.remove()
                        engines[None] = engine
                        transaction.rollback()

        @pytest.mark.parametrize("time", [1, 2])
        def test_placing(signals, rolled_back, time):
            db.session.add(Order())
            db.session.commit()
            signals.expect(post_save, Order, on="commit", created=True)
            assert db.session.query(Order).count() == 1
            assert db.session.query(Mail).count() == 1
        """
    )
    result = run_pytest(pytester)
    result.assert_outcomes(passed=2)


def test_sqlmodels_recipe(pytester: pytest.Pytester):
    """A database in memory for each test."""
    pytest.importorskip("sqlmodel")
    pytester.makepyfile(
        """
        import pytest
        from sqlmodel import Field, Session, SQLModel, create_engine, select
        from sqlmodel.pool import StaticPool

        import sqla_signals
        from sqla_signals import post_save, receiver

        class Hero(SQLModel, table=True):
            id: int | None = Field(default=None, primary_key=True)
            name: str

        class Mail(SQLModel, table=True):
            id: int | None = Field(default=None, primary_key=True)

        @receiver(post_save, sender=Hero, on="commit")
        def mail(sender, instance, session, **kwargs):
            session.add(Mail())

        sqla_signals.install()

        @pytest.fixture(name="session")
        def session_fixture():
            engine = create_engine(
                "sqlite://", connect_args={"check_same_thread": False}, poolclass=StaticPool
            )
            SQLModel.metadata.create_all(engine)
            with Session(engine) as session:
                yield session
            engine.dispose()

        def test_create_hero(signals, session):
            session.add(Hero(name="Deadpond"))
            session.commit()
            sent = signals.expect(post_save, Hero, on="commit", changes={"name": "Deadpond"})
            assert sent.instance.name == "Deadpond"
            assert len(session.exec(select(Mail)).all()) == 1
        """
    )
    result = run_pytest(pytester)
    result.assert_outcomes(passed=1)


def test_a_suite_that_does_not_use_it_does_not_notice_it(pytester: pytest.Pytester):
    """Nothing is installed, listened to or looked on at, and other fixtures may have its name."""
    pytester.makepyfile(
        test_one="""
        import sys

        def test_nothing_is_touched():
            from sqlalchemy import event
            from sqlalchemy.orm import Mapper, Session
            from sqla_signals.receivers import installations, mapped, observing

            assert not installations.installations
            assert not event.contains(Mapper, "after_configured", mapped._after_configured)
            assert not observing.observers
            assert not Session().dispatch.before_flush
            assert "sqla_signals.testing" not in sys.modules
        """,
        test_two="""
        import pytest

        @pytest.fixture
        def signals():
            return "mine"

        def test_mine(signals):
            assert signals == "mine"
        """,
    )
    result = run_pytest(pytester)
    result.assert_outcomes(passed=2)


def test_it_can_be_left_out(pytester: pytest.Pytester):
    """By the name that pytest lists it under."""
    pytester.makepyfile("def test_it(signals): pass")
    result = run_pytest(pytester, "-p", "no:sqla_signals")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'signals' not found*"])
