"""What the demo looks at: rows of the database, and nothing else."""

from typing import Any

from sqlalchemy import func, inspect, select

from examples.durable_shop.app import SessionLocal, engine
from examples.durable_shop.models import Mail, Order, Parcel, Payment, outbox

Table = tuple[list[str], list[tuple[Any, ...]]]


def tables() -> list[str]:
    """The names of all tables."""
    return sorted(inspect(engine).get_table_names())


def parcels() -> int:
    """How many parcels there are."""
    return _count(Parcel)


def waiting() -> int:
    """How many events are in the outbox."""
    return _count(outbox.table)


def dead_letters() -> int:
    """How many events were given up."""
    return _count(outbox.dead_letters)


def _count(table: Any) -> int:
    with SessionLocal() as session:
        return session.scalars(select(func.count()).select_from(table)).one()


def new_card(customer: str, card: str) -> None:
    """Give a customer's orders another card."""
    with SessionLocal() as session:
        for order in session.scalars(select(Order).filter_by(customer=customer)):
            order.card = card
        session.commit()


def orders() -> Table:
    """The orders, and how many events each has in the outbox."""
    events = outbox.table.c
    with SessionLocal() as session:
        rows = []
        for order in session.scalars(select(Order).order_by(Order.id)):
            count = select(func.count()).where(events.aggregate_id == str(order.id))
            rows.append((order.customer, order.mugs, order.status, session.scalar(count)))
    return ["customer", "mugs", "status", "events in the outbox"], rows


def everything() -> Table:
    """The orders, and what came of them."""
    with SessionLocal() as session:
        rows = []
        for order in session.scalars(select(Order).order_by(Order.id)):
            mails, payments, sent = (
                session.scalars(select(model).filter_by(order_id=order.id)).all()
                for model in (Mail, Payment, Parcel)
            )
            rows.append(
                (
                    order.customer,
                    order.status,
                    len(mails),
                    len(sent),
                    len(payments),
                    "; ".join(f"{one.amount} at attempt {one.attempt}" for one in payments),
                )
            )
    return ["customer", "status", "mails", "parcels", "payments", "paid"], rows
