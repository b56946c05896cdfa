"""A small application for tests that kill its processes: a database, an outbox, a receiver.

The URL of the database is in the environment; so is where to die.
"""

from __future__ import annotations

import os
import signal
import sys

from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session, sessionmaker

import sqla_signals
from sqla_signals import post_save, receiver
from sqla_signals.durable import Relay

from .models import Base, Ledger, Order

engine = create_engine(os.environ["SHOP_URL"])
SessionLocal = sessionmaker(engine)
DIE = os.environ.get("SHOP_DIES", "")
sqla_signals.install()


def die() -> None:
    """As kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


@receiver(post_save, sender=Order, durable=True, name="shop.order_saved")
def order_saved(sender, instance, session, event, **kwargs):
    session.add(Ledger(entry=f"{instance.status}"))
    session.flush()
    print("called", instance.status, event.attempt, flush=True)
    if f"in receiver {instance.status}" == DIE:
        die()
    if instance.status == "poison":
        raise ValueError("poison")


def place(*statuses: str) -> None:
    """Commit orders."""
    with SessionLocal() as session:
        session.add_all([Order(status=status) for status in statuses])
        if DIE == "before commit":
            event.listen(session.connection(), "commit", lambda _: die())
        if DIE == "after commit":
            event.listen(session, "after_commit", lambda _: die())
        session.commit()


relay = Relay(SessionLocal)

if __name__ == "__main__":
    Base.metadata.create_all(engine)
    place(*sys.argv[1:])
    engine.dispose()

assert Session
