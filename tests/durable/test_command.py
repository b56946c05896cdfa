"""The commands for operators: what they say and do, and what is wrong where they cannot.

In this process; see ``test_processes`` for one of their own.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import sessionmaker

from sqla_signals import post_save, receiver
from sqla_signals.cli import main
from sqla_signals.durable import Relay

from .conftest import events, ledger, make_due
from .models import Base, Ledger, Order, outbox
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


def test_dead_letters_are_listed_retried_and_purged(shop, app, capsys):
    """With the last error; the status is 1 while there are any."""

    def run(*arguments: str) -> tuple[int, str]:
        return main([*arguments, "--app", "shop_app:relay"]), capsys.readouterr().out

    @receiver(post_save, sender=Order, durable=True, name="shop.poisoned")
    def poisoned(sender, session, **kwargs):
        session.add(Ledger(entry="poisoned"))
        session.flush()
        raise ValueError("poison")

    app.relay = Relay(shop)
    place(shop, "a")
    assert run("outbox", "list")[0] == 0
    for _ in range(10):
        make_due(shop)
        assert run("relay", "--once")[0] == 0
    assert (events(shop), ledger(shop)) == ([], [])
    status, listed = run("outbox", "list")
    assert status == 1
    assert "dead letters: 1" in listed
    assert "shop.poisoned: ValueError: poison" in listed
    assert "after 10 attempts" in listed

    assert run("outbox", "retry", "7")[0] == 1
    assert run("outbox", "retry", "1") == (0, "put back 1 dead letters\n")
    (row,) = events(shop)
    assert (row.attempts, row.sequence) == (0, 2)
    for _ in range(10):
        make_due(shop)
        run("relay", "--once")
    assert run("outbox", "purge", "--all") == (0, "deleted 1 dead letters\n")
    assert run("outbox", "list")[0] == 0
    assert events(shop) == []


def test_what_an_error_says_cannot_move_the_cursor_of_the_terminal(shop, app, capsys):
    """Whoever can make a receiver fail would write on the operator's screen."""

    @receiver(post_save, sender=Order, durable=True, name="shop.poisoned")
    def poisoned(sender, **kwargs):
        raise ValueError("\x1b[2Jall is well\nü")

    app.relay = Relay(shop, max_attempts=1)
    place(shop, "a")
    app.relay.run_once()
    assert main(["outbox", "list", "--app", "shop_app:relay"]) == 1
    listed = capsys.readouterr().out
    assert "\x1b" not in listed
    assert "      shop.poisoned: ValueError: \\x1b[2Jall is well\n      ü\n" in listed


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e300"])
def test_no_time_is_wrong_usage(shop, app, capsys, value):
    """``--inbox -1`` forgot what was done a moment ago, and the others ended in a traceback."""
    app.relay = Relay(shop)
    place(shop, "a")
    app.relay.run_once()
    for arguments in (["purge", "--inbox", value], ["list", "--max-age", value]):
        with pytest.raises(SystemExit) as stopped:
            main(["outbox", *arguments, "--app", "shop_app:relay"])
        assert stopped.value.code == 2
        assert f"invalid duration value: '{value}'" in capsys.readouterr().err
    with shop.connect() as connection:
        assert len(connection.execute(outbox.inbox.select()).all()) == 1
