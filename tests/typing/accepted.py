"""Receivers that type checkers must accept, and what they know of them afterwards."""

# pyright: strict

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type

from blinker import ANY
from sqlalchemy import Connection, Engine, Table
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqla_signals import (
    Change,
    Signal,
    m2m_changed,
    on_commit,
    on_rollback,
    post_delete,
    post_save,
    pre_save,
    raw,
    receiver,
)

from .models import AnyModel, Base, Customer, HasTotal, Order, RushOrder, shipped

# -- The decorated function keeps its own type -----------------------------------------------------


@receiver(post_save, sender=Order)
def plain(sender: type[Order], instance: Order, **kwargs: Any) -> int:
    return instance.total


assert_type(plain(Order, instance=Order(), created=True), int)
assert_type(plain(Order, Order()), int)
assert plain.__name__ == "plain"


@receiver(post_save, sender=Order, on="commit", fields={"total"})
async def coroutine(sender: type[Order], instance: Order, **kwargs: Any) -> str:
    return f"{instance.total}"


async def awaits() -> None:
    assert_type(await coroutine(Order, instance=Order()), str)


# -- Which parameters it names ---------------------------------------------------------------------


@receiver(post_save, sender=Order)
def everything(
    sender: type[Order],
    instance: Order,
    created: bool,
    changes: Mapping[str, Change],
    update_fields: frozenset[str] | None,
    raw: bool,
    using: Engine | Connection,
    session: Session,
    signal: Signal,
    **kwargs: Any,
) -> None: ...


@receiver(post_delete, sender=Order, on="commit")
async def keyword_only(
    sender: Any, *, session: AsyncSession, origin: object, instance: Order, **kwargs: object
) -> None: ...


@receiver(post_save, sender=Order)
def in_any_order(sender: object, raw: bool, instance: Order, using: Any, **kwargs: Any) -> None: ...


@receiver(post_save, sender=Order)
def no_instance(sender: type[Order], /, created: bool = False, **kwargs: Any) -> None: ...


@receiver(post_save, sender=Order)
def nothing(*args: Any, **kwargs: Any) -> None: ...


@receiver(post_save, sender=Order)
def any_instance(sender: Any, instance: Any, **kwargs: Any) -> None: ...


@receiver(post_save, sender=RushOrder)
def base_of_sender(sender: type[Order], instance: Order, **kwargs: Any) -> None: ...


@receiver(post_save, sender=Order)
@receiver(post_save, sender=Customer)
def stacked(sender: Any, instance: Order | Customer, **kwargs: Any) -> bool:
    return True


assert_type(stacked(Order, instance=Customer()), bool)


# -- Senders that do not say which class the instance has ------------------------------------------


@receiver(post_save)
def every_model(sender: Any, instance: Customer, **kwargs: Any) -> int:
    return instance.id


assert_type(every_model(Customer, instance=Customer()), int)


@receiver(post_save, sender=ANY)
def any_model(sender: Any, instance: Customer, **kwargs: Any) -> None: ...


@receiver(post_save, sender="Order")
def by_name(sender: Any, instance: Order, **kwargs: Any) -> None: ...


@receiver(post_save, sender=[Order, "Invoice"])
def several(sender: Any, instance: Order, **kwargs: Any) -> None: ...


@receiver([post_save, post_delete], sender=AnyModel)
def untyped_model(sender: Any, instance: Order, **kwargs: Any) -> None: ...


# -- Senders that stand for many models ------------------------------------------------------------


@receiver([pre_save, post_delete], sender=Base)
def declarative_base(sender: type[Base], instance: Base, **kwargs: Any) -> None: ...


@receiver(post_save, sender=HasTotal)
def mixin(sender: type[HasTotal], instance: HasTotal, **kwargs: Any) -> None: ...


def each(*models: type[Base]) -> None:
    for model in models:
        post_save.connect(declarative_base, sender=model)


# -- Signals of one's own --------------------------------------------------------------------------


@receiver(shipped, sender=Order)
def custom_signal(sender: Any, carrier: str, instance: Customer, **kwargs: Any) -> None: ...


@receiver(shipped, sender=object())
def custom_sender(sender: Any, carrier: str, **kwargs: Any) -> None: ...


@receiver([post_save, shipped], sender=Order)
def mixed_signals(sender: Any, instance: Order, carrier: str = "", **kwargs: Any) -> None: ...


@receiver([post_save, shipped], sender=AnyModel)
def mixed_untyped(sender: Any, instance: Order, carrier: str = "", **kwargs: Any) -> None: ...


# -- Methods, objects, connect() -------------------------------------------------------------------


class Journal:
    @staticmethod
    @receiver(post_save, sender=Order)
    def static(sender: type[Order], instance: Order, **kwargs: Any) -> int:
        return instance.total

    def method(self, sender: type[Order], instance: Order, **kwargs: Any) -> int:
        return instance.total

    def __call__(self, sender: type[Order], instance: Order, **kwargs: Any) -> int:
        return instance.total


journal = Journal()
assert_type(journal.static(Order, instance=Order()), int)
assert_type(post_save.connect(journal.method, sender=Order)(Order, instance=Order()), int)
assert_type(post_save.connect(journal, Order)(Order, instance=Order()), int)
assert_type(post_save.connect(plain, Order, weak=False, on="commit")(Order, Order()), int)
assert_type(post_save.connect(plain)(Order, Order()), int)
post_save.connect(stacked, sender=Order)
post_save.connect(any_instance, sender=[Order, "Invoice"])
post_save.connect(no_instance, sender="Order")
post_save.connect(plain, sender=None)
post_save.connect(plain, sender=AnyModel)
shipped.connect(custom_signal, sender=Order)
shipped.connect(custom_sender, sender=object())


# -- Associations ----------------------------------------------------------------------------------


links = Table("links", Base.metadata)


@receiver(m2m_changed, sender=links)
def linked(sender: Any, instance: Order, action: str, pk_set: frozenset[Any], **kw: Any) -> int:
    return len(pk_set)


assert_type(linked(None, Order(), "pre_add", frozenset()), int)


# -- Sessions of all kinds -------------------------------------------------------------------------

registry = scoped_session(sessionmaker())
async_registry = async_scoped_session(async_sessionmaker(), scopefunc=lambda: 1)

for any_session in (Session(), AsyncSession(), registry, async_registry):
    on_commit(any_session, lambda: None)
    on_rollback(any_session, lambda: None)
    raw(any_session)
