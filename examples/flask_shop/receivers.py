"""What follows from an order, whichever request places it; importing this module connects it."""

from typing import Any

from examples.flask_shop import mail
from examples.flask_shop.database import Order
from sqla_signals import post_save, receiver


@receiver(post_save, sender=Order, on="commit")
def confirm_order(sender: type[Order], instance: Order, created: bool, **kwargs: Any) -> None:
    """Confirm a new order: after the commit, or not at all.

    A request that fails is rolled back when Flask-SQLAlchemy removes its session, and nobody gets
    a mail about an order that is not there.
    """
    if created:
        text = f"{instance.quantity} × {instance.product}"
        mail.send(instance.email, f"Your order {instance.id}", text)
