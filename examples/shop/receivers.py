"""The rules of the shop, each in one place, whoever changes the rows and from wherever.

Import this module where the application starts; a receiver is connected when its definition runs.
All of them run inside the transaction: what they write is committed with the change they react to,
or not at all.
"""

from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from examples.shop.models import AuditEntry, Counter, Customer, Order, OrderLine, Product
from sqla_signals import UNSET, Change, post_delete, post_save, pre_delete, pre_save, receiver


class OutOfStock(Exception):
    """There are not enough pieces left."""


class OrderIsPaid(Exception):
    """A paid order stays in the books."""


@receiver(pre_save, sender=Order)
def number_order(
    sender: type[Order], instance: Order, created: bool, session: Session, **kwargs: Any
) -> None:
    """Give a new order the next number, in the INSERT that creates it.

    The counter, a row that exists from the start, is locked until the transaction ends and goes out
    with the same flush.
    """
    if created and instance.number is None:
        counter = session.get(Counter, "orders", with_for_update=True)
        counter.last += 1
        instance.number = f"A-{counter.last:04d}"


@receiver(post_save, sender=OrderLine, fields={"product_id", "quantity"})
def take_from_stock(
    sender: type[OrderLine],
    instance: OrderLine,
    created: bool,
    changes: Mapping[str, Change],
    session: Session,
    **kwargs: Any,
) -> None:
    """Take what the line asks for, and put back what it asked for before.

    The flush is over and every foreign key is known. The products changed here go out with the next
    flush, at the latest with the commit. Raising rolls the transaction back, order line included.
    """
    taken = Tally({instance.product_id: instance.quantity})
    if not created:
        old = {name: change.old for name, change in changes.items()}
        product_id = old.get("product_id", instance.product_id)
        taken[product_id] -= old.get("quantity", instance.quantity)
    for product_id, quantity in taken.items():
        product = session.get(Product, product_id)
        if product.stock < quantity:
            raise OutOfStock(f"{quantity} × {product.name} wanted, {product.stock} left")
        product.stock -= quantity


@receiver(pre_delete, sender=OrderLine)
def put_back_in_stock(
    sender: type[OrderLine], instance: OrderLine, session: Session, **kwargs: Any
) -> None:
    """Put the pieces back, whether the line was deleted, orphaned, or went with its order.

    In `pre_delete` the row can still be read, and the row is what counts: something else may have
    been assigned to the instance since. The product goes out with the same flush.
    """
    columns = select(OrderLine.product_id, OrderLine.quantity)
    product_id, quantity = session.execute(columns.where(OrderLine.id == instance.id)).one()
    session.get(Product, product_id).stock += quantity


@receiver(pre_delete, sender=Order)
def keep_paid_orders(sender: type[Order], instance: Order, **kwargs: Any) -> None:
    """Refuse the deletion: nothing of the flush was written yet, and nothing will be.

    Whoever asked for it gets the exception, and rolls back to take the deletion itself back.
    """
    if instance.status == "paid":
        raise OrderIsPaid(f"order {instance.number} is paid")


@receiver(post_save, sender=[Customer, Product, Order, OrderLine])
def audit_save(
    sender: type[Any],
    instance: Any,
    created: bool,
    changes: Mapping[str, Change],
    session: Session,
    **kwargs: Any,
) -> None:
    """Write down which row was saved, and what changed from what to what."""
    difference = {
        name: [None if value is UNSET else value for value in (change.old, change.new)]
        for name, change in changes.items()
    }
    action = "created" if created else "updated"
    entry = AuditEntry(action=action, model=sender.__name__, row_id=instance.id, changes=difference)
    session.add(entry)


@receiver(post_delete, sender=[Customer, Product, Order, OrderLine])
def audit_delete(sender: type[Any], instance: Any, session: Session, **kwargs: Any) -> None:
    """Write down which row is gone."""
    session.add(AuditEntry(action="deleted", model=sender.__name__, row_id=instance.id, changes={}))
