"""The least rights of an application, a relay and a worker, with real roles of PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from sqla_signals import post_save, receiver
from sqla_signals.durable import LocalPublisher, Relay, Worker

from .conftest import drain, events, make_due
from .models import Ledger, Order, outbox
from .test_running import messages

RIGHTS = {
    "application": [
        "INSERT ON sqla_signals_outbox",
        "USAGE ON SEQUENCE sqla_signals_outbox_sequence_seq",
    ],
    "relay": [
        "SELECT, UPDATE, DELETE ON sqla_signals_outbox",
        "SELECT, INSERT, UPDATE, DELETE ON sqla_signals_started",
        "SELECT ON sqla_signals_inbox",
        "INSERT ON sqla_signals_dead_letters",
        "USAGE ON SEQUENCE sqla_signals_dead_letters_sequence_seq",
    ],
    "worker": ["INSERT ON sqla_signals_inbox"],
}
"""Besides what the application and the receivers do to their own tables."""

pytestmark = pytest.mark.parametrize(
    "url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)


@pytest.fixture
def roles(shop: Engine) -> Iterator[dict[str, Engine]]:
    """An engine for each role. Roles belong to the whole server, so each test has its own names."""
    engines = {}
    names = {role: f"{role}_{uuid4().hex}" for role in RIGHTS}
    with shop.begin() as connection:
        for role, rights in RIGHTS.items():
            name = names[role]
            connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN PASSWORD '{name}'")
            for right in [*rights, "USAGE ON SCHEMA public"]:
                connection.exec_driver_sql(f"GRANT {right} TO {name}")
            if role != "relay":
                connection.exec_driver_sql(
                    f"GRANT SELECT, INSERT, UPDATE ON orders, ledger TO {name}"
                )
                connection.exec_driver_sql(
                    f"GRANT USAGE ON SEQUENCE orders_id_seq, ledger_id_seq TO {name}"
                )
            engines[role] = create_engine(shop.url.set(username=name, password=name))
    yield engines
    for engine in engines.values():
        engine.dispose()
    with shop.begin() as connection:
        for name in names.values():
            connection.exec_driver_sql(f"DROP OWNED BY {name}")
            connection.exec_driver_sql(f"DROP ROLE {name}")


@pytest.fixture(autouse=True)
def connected() -> None:
    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, instance, session, **kwargs):
        session.add(Ledger(entry=instance.status))
        if instance.status == "bad":
            session.flush()
            raise ValueError("no")


def test_each_does_its_part(shop: Engine, roles: dict[str, Engine]):
    """What is good is done, and what is bad is put off and given up."""
    with Session(roles["application"]) as session:
        session.add_all([Order(status="good"), Order(status="bad")])
        session.commit()
    relay = Relay(roles["relay"], LocalPublisher(roles["worker"]), outbox=outbox, max_attempts=2)
    assert drain(relay) == 2
    make_due(shop)
    assert drain(relay) == 1
    assert events(shop) == []
    with shop.connect() as connection:
        assert connection.scalars(select(Ledger.entry)).all() == ["good"]
        (dead,) = connection.execute(select(outbox.dead_letters)).all()
    assert dead.last_error == "shop.fn: ValueError: no"


def test_none_can_do_what_is_anothers(shop: Engine, roles: dict[str, Engine]):
    """An application cannot read what others wrote; a relay writes none, and no row of a model."""
    with Session(roles["application"]) as session:
        session.add(Order(status="good"))
        session.commit()
    (message,) = messages(shop)
    assert Worker(roles["worker"]).run(message) is True
    for role, statement in (
        ("application", "SELECT * FROM sqla_signals_outbox"),
        ("application", "DELETE FROM sqla_signals_inbox"),
        ("relay", "INSERT INTO sqla_signals_outbox DEFAULT VALUES"),
        ("relay", "UPDATE orders SET status = 'x'"),
        ("worker", "INSERT INTO sqla_signals_outbox DEFAULT VALUES"),
        ("worker", "DELETE FROM sqla_signals_inbox"),
    ):
        with roles[role].connect() as connection, pytest.raises(ProgrammingError, match="denied"):
            connection.exec_driver_sql(statement)
