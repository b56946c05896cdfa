"""Suites of users, run by pytest in processes of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

SHOP = """
from sqlalchemy import Column, ForeignKey, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

import sqla_signals
from sqla_signals import m2m_changed, post_delete, post_save, pre_save, receiver
from sqla_signals.durable import outbox_table


class Base(DeclarativeBase):
    pass


outbox_table(Base.metadata)
tagged = Table(
    "tagged",
    Base.metadata,
    Column("order_id", ForeignKey("orders.id"), primary_key=True),
    Column("tag_id", ForeignKey("tags.id"), primary_key=True),
)


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    tags: Mapped[list["Tag"]] = relationship(secondary=tagged)


class Tag(Base):
    __tablename__ = "tags"
    id: Mapped[int] = mapped_column(primary_key=True)


class Mail(Base):
    __tablename__ = "mails"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@receiver(pre_save, sender=Order)
def check(sender, instance, **kwargs):
    if not instance.status:
        raise ValueError("no status")


@receiver([post_save, post_delete], sender=Order)
def audit(sender, instance, **kwargs): ...


@receiver(post_save, sender=Order, on="commit", fields={"status"})
def mail(sender, instance, session, **kwargs):
    if instance.status == "bad address":
        raise ConnectionError("no such address")
    session.add(Mail(text=f"order {instance.id} is {instance.status}"))


@receiver(post_save, sender=Order, on="rollback")
def undone(sender, **kwargs): ...


@receiver(post_save, sender=Order, durable=True, name="shop.export")
def export(sender, instance, **kwargs):
    if instance.status == "unknown":
        raise LookupError(instance.status)


@receiver(m2m_changed, sender=Order.tags)
def tag(sender, **kwargs): ...


installation = sqla_signals.install()
"""

CONFTEST = '''
import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from shop import Base


@pytest.fixture(scope="session")
def engine():
    engine = create_engine("sqlite://", poolclass=StaticPool)

    @event.listens_for(engine, "connect")
    def _on_connect(dbapi_connection, connection_record):
        dbapi_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _on_begin(connection):
        connection.exec_driver_sql("BEGIN")

    Base.metadata.create_all(engine, checkfirst=False)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine):
    """One outer transaction for each test, rolled back at the end."""
    with engine.connect() as connection:
        transaction = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()
'''

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run tests of the shop, given as their source; more arguments are for pytest."""
    for name in ("CI", "BUILD_NUMBER"):  # where pytest repeats whole messages in its summary
        monkeypatch.delenv(name, raising=False)

    def run(
        source: str, *arguments: str, conftest: str = CONFTEST, without: str = "asyncio"
    ) -> pytest.RunResult:
        pytester.makepyfile(shop=SHOP, test_shop=source)
        pytester.makeconftest(conftest)
        return run_pytest(pytester, *arguments, without=without)

    return run


def run_pytest(
    pytester: pytest.Pytester, *arguments: str, without: str = "asyncio"
) -> pytest.RunResult:
    """Run what is there in a process of its own, where warnings are errors.

    :param without: a plugin that is left out. That for asyncio warns where it is not configured.
    """
    # What has nothing to do with it, and takes as long to import as the rest together.
    others = ["cacheprovider", "faker", "hypothesispytest", "platformdirs"]
    left_out = [option for name in [*others, without] for option in ("-p", f"no:{name}")]
    return pytester.runpytest_subprocess(*left_out, "-W", "error", *arguments, timeout=120)
