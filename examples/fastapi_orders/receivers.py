"""The e-mails of the application, whichever request causes them.

`on="commit"`: a request that fails rolls back, and nobody gets an e-mail about an order that is not
there. Importing this module connects the receivers.
"""

from typing import Any

from examples.fastapi_orders.emails import Email, queue
from examples.fastapi_orders.models import Order
from sqla_signals import post_save, receiver


@receiver(post_save, sender=Order, on="commit")
async def confirm_order(sender: type[Order], instance: Order, created: bool, **kwargs: Any) -> None:
    """Confirm a new order.

    The instance lives in a session of the receiver's own, which reads what was committed: lines
    that were given up are not there. An exception here is logged; the order stays, and so does the
    answer to the request.
    """
    if not created:
        return
    lines = await instance.awaitable_attrs.lines
    text = "\n".join(f"{line.quantity} × {line.product.name}" for line in lines)
    await queue.put(Email(instance.email, f"Your order {instance.id}", text))


@receiver(post_save, sender=Order, on="commit", fields={"status"})
async def announce_shipment(sender: type[Order], instance: Order, **kwargs: Any) -> None:
    """Tell the customer that the order is on its way.

    Called for new orders and where the status changed in the end: a second request to ship an order
    changes nothing, so nobody gets a second e-mail.
    """
    if instance.status == "shipped":
        await queue.put(Email(instance.email, f"Order {instance.id} is on its way", ""))
