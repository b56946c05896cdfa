"""Mistakes that type checkers must report, each exactly where the comment expects it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import Any

from sqla_signals import post_delete, post_save, receiver

from .models import Base, Customer, Order, RushOrder, shipped


@receiver(post_save, sender=Order)  # type: ignore[arg-type]
def other_class(sender: type[Order], instance: Customer, **kwargs: Any) -> None: ...


@receiver(post_save, sender=Order)  # type: ignore[arg-type]
async def other_class_async(
    sender: Any, *, created: bool, instance: Customer, **kwargs: Any
) -> None: ...


@receiver([post_save, post_delete], sender=Order)  # type: ignore[arg-type]
def other_class_of_several(sender: Any, instance: Customer, **kwargs: Any) -> None: ...


@receiver(post_save, sender=Order)  # type: ignore[arg-type]
def subclass(sender: Any, instance: RushOrder, **kwargs: Any) -> None: ...


@receiver(post_save, sender=Base)  # type: ignore[arg-type]
def one_model_of_many(sender: Any, instance: Order, **kwargs: Any) -> None: ...


@receiver(post_save, sender=Order)  # type: ignore[arg-type]
def never_sent(sender: Any, instance: Order, carrier: str, **kwargs: Any) -> None: ...


class Journal:
    @receiver(post_save, sender=Order)  # type: ignore[arg-type]
    def unbound(self, sender: type[Order], instance: Order, **kwargs: Any) -> None: ...

    def bound(self, sender: type[Order], instance: Order, **kwargs: Any) -> None: ...


post_save.connect(Journal().bound, sender=Customer)  # type: ignore[misc]
post_save.connect(Journal().bound, Order, on="later")  # type: ignore[arg-type]
receiver(shipped, sender=Order, colour="red")  # type: ignore[call-overload]


@receiver(post_save, sender=Order)
def kept(sender: type[Order], instance: Order, **kwargs: Any) -> None: ...


kept(Order, instance=Customer())  # type: ignore[arg-type]
