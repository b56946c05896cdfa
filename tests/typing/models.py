"""Models and signals for the files that are only type-checked."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_signals import Signal


class Base(DeclarativeBase):
    id: Mapped[int] = mapped_column(primary_key=True)


class HasTotal:
    total: Mapped[int]


class Order(HasTotal, Base):
    __tablename__ = "order"


class RushOrder(Order):
    pass


class Customer(Base):
    __tablename__ = "customer"


# What SQLAlchemy's automap and untyped packages give.
AnyModel: Any = Order

# Sent by whatever its owner likes, with whatever arguments.
shipped = Signal("shipped")
