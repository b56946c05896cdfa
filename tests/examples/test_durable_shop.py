"""The durable shop: its migrations are its models, its receivers work once, its demo ends well."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, inspect, select
from sqlalchemy.orm import Session

import sqla_signals
from sqla_signals.durable import Relay
from tests.conftest import clear_postgresql
from tests.examples.running import ROOT, connect_receivers

REDIS_URL = os.environ.get("SQLA_SIGNALS_REDIS_URL")


def run(*arguments: str, **environment: str) -> str:
    """Run Python to its good end."""
    done = subprocess.run(
        [sys.executable, "-X", "utf8", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)]
)
def test_the_migrations_are_the_models(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Autogenerate finds no difference after them, and nothing is left when they are undone."""
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    if database == "postgresql":
        url = request.getfixturevalue("postgresql_url")
    environment = {
        "SHOP_DATABASE_URL": url,
        "SHOP_BROKER_URL": f"filesystem://{tmp_path / 'queue'}",
    }
    alembic = ["-m", "alembic", "-c", "examples/durable_shop/alembic.ini"]
    run(*alembic, "upgrade", "head", **environment)
    assert "No new upgrade operations" in run(*alembic, "check", **environment)
    run(*alembic, "downgrade", "base", **environment)
    engine = create_engine(url)
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()
    if database == "postgresql":
        clear_postgresql(url)


@pytest.fixture
def shop(tmp_path: Path, installed: sqla_signals.Installation) -> Iterator[Engine]:
    """A shop whose receivers are connected."""
    connect_receivers("examples.durable_shop.receivers")
    from examples.durable_shop.models import Base

    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_an_order_is_confirmed_charged_and_packed_once(shop: Engine) -> None:
    """By any publisher: here by the one that needs no broker."""
    from examples.durable_shop.models import Mail, Order, Parcel, Payment, outbox

    with Session(shop) as session:
        session.add(Order(customer="Ada", mugs=3, card="4000-1"))
        session.commit()
    relay = Relay(shop, outbox=outbox)
    assert [relay.run_once(), relay.run_once(), relay.run_once()] == [1, 1, 0]
    with Session(shop) as session:
        assert session.scalars(select(Order.status)).all() == ["paid"]
        assert session.scalars(select(Mail.text)).all() == ["Thank you, Ada: 3 mugs"]
        assert session.execute(select(Payment.amount, Payment.attempt)).all() == [(21, 1)]
        assert session.scalars(select(Parcel.mugs)).all() == [3]


def test_the_number_of_a_card_is_in_no_message(shop: Engine) -> None:
    """The receiver reads it from the row."""
    from examples.durable_shop.models import Order, outbox

    with Session(shop) as session:
        session.add(Order(customer="Ada", mugs=3, card="4000-1"))
        session.commit()
        (event,) = session.execute(select(outbox.table)).all()
    assert "4000-1" not in str(event)


def check_story(output: str) -> None:
    """What the demo must have come to, wherever it ran."""
    assert "killed before COMMIT" in output
    assert "killed right after COMMIT" in output
    assert "dead letters: 1" in output
    assert "put back 1 dead letters" in output
    table = output.partition("What the database holds in the end")[2].splitlines()
    rows = [" ".join(line.split()) for line in table]
    assert rows[2:] == [
        "Ada paid 1 1 1 21 at attempt 1",
        "Grace paid 1 1 1 14 at attempt 2",
        "Alan paid 1 1 1 7 at attempt 1",
        "Mallory paid 1 1 1 35 at attempt 1",
    ]
    assert "Charlie" not in output.partition("What the database holds now")[2]


def test_the_demo_runs_as_a_user_runs_it() -> None:
    """On SQLite and files, with nothing to install, to its end."""
    check_story(run("-m", "examples.durable_shop"))


@pytest.mark.postgresql
@pytest.mark.redis
def test_the_demo_runs_on_postgresql_and_redis(postgresql_url: str) -> None:
    """The same code, by two environment variables."""
    if REDIS_URL is None:
        reason = "no Redis server: SQLA_SIGNALS_REDIS_URL is not set"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    check_story(
        run(
            "-m",
            "examples.durable_shop",
            SHOP_DATABASE_URL=postgresql_url,
            SHOP_BROKER_URL=REDIS_URL,
        )
    )
    clear_postgresql(postgresql_url)
