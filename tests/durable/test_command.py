"""What ``sqla-signals`` says to operators whose command cannot work: what is wrong, in one line."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import sessionmaker

from sqla_signals import post_save, receiver
from sqla_signals.cli import main

from .conftest import events
from .models import Base, Order
from .test_relay import place


@pytest.fixture
def app(shop: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the module ``shop_app`` has in it."""

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, **kwargs): ...

    app = SimpleNamespace(sessions=sessionmaker(shop), add=lambda left, right: left + right)
    monkeypatch.setitem(sys.modules, "shop_app", app)
    return app


@pytest.mark.parametrize("action", [["list"], ["retry", "--all"], ["purge", "--inbox", "7"]])
def test_an_outbox_without_tables_is_named_with_its_database(shop, app, action, capsys):
    """It may be another database than was meant, or one that nobody has migrated."""
    Base.metadata.drop_all(shop)
    assert main(["outbox", *action, "--app", "shop_app:sessions"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sqla-signals: {shop.url.render_as_string()}: ")
    assert "sqla_signals_" in said
    assert "Alembic or Base.metadata.create_all() creates them" in said
    assert f":{shop.url.password}@" not in said


def test_what_makes_no_sessions_is_refused(shop, app, capsys):
    """With what it was taken for."""
    place(shop, "a")
    assert main(["relay", "--once", "--app", "shop_app:add"]) == 2
    assert "makes no sessions: " in capsys.readouterr().err
    assert len(events(shop)) == 1
