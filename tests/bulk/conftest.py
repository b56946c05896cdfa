"""A shop whose tables have triggers, and what the tests of the flush have."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

import sqla_signals
from tests.contract.conftest import async_engine, statements

from ..conftest import create_tables
from .shop import Base, create_triggers

__all__ = ["async_engine", "statements"]


@pytest.fixture
def shop(engine: Engine) -> Engine:
    """The engine, with the tables of the shop and their triggers."""
    create_tables(
        engine,
        Base.metadata,
        also=lambda connection: create_triggers(connection, Base.metadata),
    )
    return engine


@pytest.fixture
def session(shop: Engine) -> Iterator[Session]:
    """A session on the shop, with signals installed."""
    installation = sqla_signals.install(bulk="raise")
    with Session(shop) as session:
        yield session
    installation.remove()
