"""An order that was committed has its one mail, a request that fails has none."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import sqla_signals
from tests.examples.running import connect_receivers, run_python

try:
    import flask
    import flask_sqlalchemy  # noqa: F401
except ImportError:
    if os.environ.get("CI"):
        raise
    pytest.skip("Flask-SQLAlchemy is not installed", allow_module_level=True)

from examples.flask_shop import mail
from examples.flask_shop.app import create_app
from examples.flask_shop.database import Product, db


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[flask.Flask]:
    """The application with ten mugs on sale, and no mail sent yet."""
    monkeypatch.setattr(mail, "sent", [])
    connect_receivers("examples.flask_shop.receivers")
    sqla_signals.install(db)  # with the line above, what `main.py` does
    app = create_app(f"sqlite:///{tmp_path / 'shop.db'}")
    with app.app_context():
        db.session.add(Product(name="mug", stock=10))
        db.session.commit()
    yield app
    with app.app_context():
        db.engine.dispose()


def order(app: flask.Flask, quantity: int, product: str = "mug") -> Any:
    """Order so many pieces, as Ada."""
    body = {"email": "ada@example.org", "product": product, "quantity": quantity}
    return app.test_client().post("/orders", json=body)


def rows(tmp_path: Path, query: str) -> list[tuple[Any, ...]]:
    """What is committed, seen with the driver alone."""
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        return connection.execute(query).fetchall()


def mails() -> list[tuple[str, str, str]]:
    """Who was sent what."""
    return [(m["To"], m["Subject"], m.get_content().strip()) for m in mail.sent]


def test_an_order_is_confirmed_by_one_mail(app: flask.Flask, tmp_path: Path) -> None:
    """The request flushes twice and commits once."""
    response = order(app, 2)
    assert (response.status_code, response.json) == (201, {"id": 1})
    assert mails() == [("ada@example.org", "Your order 1", "2 × mug")]
    assert rows(tmp_path, 'SELECT product, quantity FROM "order"') == [("mug", 2)]
    assert rows(tmp_path, "SELECT stock FROM product") == [(8,)]


def test_the_mail_is_sent_when_the_order_is_committed(
    app: flask.Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another connection sees the row by then."""
    seen = []
    query = 'SELECT product, quantity FROM "order"'
    monkeypatch.setattr(mail, "send", lambda *about: seen.append(rows(tmp_path, query)))
    order(app, 2)
    assert seen == [[("mug", 2)]]


@pytest.mark.parametrize(("quantity", "product", "status"), [(99, "mug", 409), (1, "hat", 404)])
def test_a_request_that_is_refused_after_its_flush_sends_nothing(
    app: flask.Flask, tmp_path: Path, quantity: int, product: str, status: int
) -> None:
    """The order was in the database for a moment; the end of the request rolled it back."""
    assert order(app, quantity, product).status_code == status
    assert mails() == []
    assert rows(tmp_path, 'SELECT * FROM "order"') == []
    assert rows(tmp_path, "SELECT stock FROM product") == [(10,)]


def test_a_request_that_crashes_sends_nothing_and_the_next_one_is_served(
    app: flask.Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session is removed, and what waited for its commit with it."""
    with monkeypatch.context() as broken:
        broken.setattr(db.session, "commit", lambda: 1 / 0)
        assert order(app, 2).status_code == 500
    assert (mails(), rows(tmp_path, 'SELECT * FROM "order"')) == ([], [])
    assert order(app, 3).status_code == 201
    assert mails() == [("ada@example.org", "Your order 1", "3 × mug")]
    assert rows(tmp_path, "SELECT stock FROM product") == [(7,)]


def test_a_mail_server_that_is_down_does_not_undo_the_order(
    app: flask.Flask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The order is committed, so the answer says so; the failure is in the log."""

    def refuse(*about: str) -> None:
        raise ConnectionRefusedError("no mail today")

    monkeypatch.setattr(mail, "send", refuse)
    assert order(app, 2).status_code == 201
    assert rows(tmp_path, 'SELECT quantity FROM "order"') == [(2,)]
    (record,) = [record for record in caplog.records if record.name == "sqla_signals"]
    assert "confirm_order" in record.getMessage()


def test_the_example_runs_as_a_user_runs_it() -> None:
    """Installed by its own `main.py`; no warning, nothing on stderr."""
    output = run_python("-m", "examples.flask_shop")
    assert output.count("mail to ada@example.org: Your order 1, 2 × mug") == 1
    assert output.count("no mail") == 1
    assert "409 CONFLICT" in output
