"""Placing orders: `python -m examples.durable_shop.place Ada 3 4000-1`.

One transaction; with SHOP_DIES=before or SHOP_DIES=after the process dies as if by `kill -9`, right
before the COMMIT or right after it.
"""

import os
import signal
import sys
from collections.abc import Sequence

from sqlalchemy import event

from examples.durable_shop.app import SessionLocal
from examples.durable_shop.models import Order


def place(orders: Sequence[Order], dies: str = "") -> None:
    """Commit orders. Who places them knows nothing of mails, payments and parcels."""
    with SessionLocal() as session:
        session.add_all(orders)
        if dies == "before":
            event.listen(session.connection(), "commit", die)
        if dies == "after":
            event.listen(session, "after_commit", die)
        session.commit()


def die(_: object) -> None:
    """End this process where it stands."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    """Take customer, number of mugs and card, as often as they come."""
    parts = iter(arguments)
    orders = [
        Order(customer=customer, mugs=int(mugs), card=card)
        for customer, mugs, card in zip(parts, parts, parts, strict=True)
    ]
    place(orders, os.environ.get("SHOP_DIES", ""))


if __name__ == "__main__":
    main(sys.argv[1:])
