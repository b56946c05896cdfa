"""Flask-SQLAlchemy 3: its sessions have an ``__init__`` and binds of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Mapped, mapped_column

import sqla_signals
from sqla_signals import post_save, receiver

from ..contract.observing import rows
from .observing import deliveries

flask = pytest.importorskip("flask")
flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")


def test_flask_sqlalchemys_sessions_deliver(tmp_path: Path):
    """Each receiver gets one of their class, on the bind of the model, apart from the scope's."""
    app = flask.Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'main.db'}"
    app.config["SQLALCHEMY_BINDS"] = {"other": f"sqlite:///{tmp_path / 'other.db'}"}
    db: Any = flask_sqlalchemy.SQLAlchemy(app)

    class Order(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Entry(db.Model):
        __bind_key__ = "other"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    sqla_signals.install(db)
    log = deliveries()
    found = []

    @receiver(post_save, sender=Order, on="commit")
    def fn(sender, instance, session, created, using, **kwargs):
        found.append((type(session) is type(db.session()), session is db.session(), using))
        if created:
            session.add(Entry(name=f"for {instance.name}"))
            instance.name += "!"

    with app.app_context():
        db.create_all()
        main, other = db.engine, db.engines["other"]
        db.session.add(Order(name="a"))
        db.session.commit()
        db.session.add(Order(name="b"))
        db.session.flush()
        db.session.remove()
        assert found == [(True, False, main)] * 2
        assert log.lines[0] == "commit created Order(a)"
        assert sorted(log.lines[1:3]) == [
            "commit created Entry(for a)",
            "commit updated Order(a!)",
        ]
        assert log.lines[3:] == ["rollback created Order(b)"]
        assert (main.pool.checkedout(), other.pool.checkedout()) == (0, 0)
        for engine in (main, other):
            engine.dispose()

    def committed(name: str, column: Any) -> list[Any]:
        engine: Engine = create_engine(f"sqlite:///{tmp_path / name}")
        try:
            return rows(engine, column)
        finally:
            engine.dispose()

    assert committed("main.db", Order.name) == ["a!"]
    assert committed("other.db", Entry.name) == ["for a"]
