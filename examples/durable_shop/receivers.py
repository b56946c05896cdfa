"""What has to happen once an order is committed, whatever dies: each receiver is a task of Celery.

What they add to the session is committed together with the note that they are done, so it is there
once, however often the message comes.
"""

from typing import Any

from sqlalchemy.orm import Session

from examples.durable_shop.models import Mail, Order, Parcel, Payment
from sqla_signals import post_save, receiver
from sqla_signals.durable import Event

PRICE = 7


class BankError(Exception):
    """The bank did not take the money."""


@receiver(post_save, sender=Order, durable=True, name="shop.confirm")
def confirm(
    sender: type[Order], instance: Order, created: bool, session: Session, **kwargs: Any
) -> None:
    """Thank for the order."""
    if created:
        text = f"Thank you, {instance.customer}: {instance.mugs} mugs"
        session.add(Mail(order_id=instance.id, text=text))


@receiver(post_save, sender=Order, durable=True, name="shop.charge")
def charge(
    sender: type[Order],
    instance: Order,
    created: bool,
    session: Session,
    event: Event,
    **kwargs: Any,
) -> None:
    """Take the money, and mark the order as paid, which is the next event.

    The card is not in the message: reading it loads it from the row.
    """
    if created:
        ask_the_bank(instance.card, event.attempt)
        amount = PRICE * instance.mugs
        session.add(Payment(order_id=instance.id, amount=amount, attempt=event.attempt))
        instance.status = "paid"


@receiver(post_save, sender=Order, durable=True, fields={"status"}, name="shop.pack")
def pack(sender: type[Order], instance: Order, session: Session, **kwargs: Any) -> None:
    """Send the mugs when they are paid for."""
    if instance.status == "paid":
        session.add(Parcel(order_id=instance.id, mugs=instance.mugs))


def ask_the_bank(card: str, attempt: int) -> None:
    """A bank as banks are: busy at first for cards that end in 0, and sure about expired ones."""
    if card == "expired":
        raise BankError("the card has expired")
    if card.endswith("0") and attempt == 1:
        raise BankError("the bank is busy, try again")
