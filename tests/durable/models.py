"""A shop that has an outbox: every kind of column value, a secret, inheritance, a ledger."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, Double, ForeignKey, Numeric, String, TypeDecorator
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from sqla_signals.durable import SECRET, outbox_table


class Base(DeclarativeBase):
    """The declarative base."""

    type_annotation_map = {str: String(100)}


outbox = outbox_table(Base.metadata, source="/shop")


class Color(enum.Enum):
    RED = "r"
    BLUE = "b"


class Point:
    """A value that only its column's type knows how to store."""

    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and (self.x, self.y) == (other.x, other.y)

    def __hash__(self) -> int:
        return hash((self.x, self.y))


class PointType(TypeDecorator[Point]):
    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: Point | None, dialect: Any) -> str | None:
        return None if value is None else f"{value.x},{value.y}"

    def process_result_value(self, value: str | None, dialect: Any) -> Point | None:
        return None if value is None else Point(*map(int, value.split(",")))


@dataclass(frozen=True)
class Money:
    """A value that is stored as a number."""

    amount: Decimal


class MoneyType(TypeDecorator[Money]):
    """As a ``Decimal``."""

    impl = Numeric(22, 4)
    cache_ok = True

    def process_bind_param(self, value: Money | None, dialect: Any) -> Decimal | None:
        return None if value is None else value.amount

    def process_result_value(self, value: Decimal | None, dialect: Any) -> Money | None:
        return None if value is None else Money(value)


class RatioType(TypeDecorator[Money]):
    """As a ``float``."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: Money | None, dialect: Any) -> float | None:
        return None if value is None else float(value.amount)

    def process_result_value(self, value: float | None, dialect: Any) -> Money | None:
        return None if value is None else Money(Decimal(str(value)))


class Order(Base):
    """What durable receivers are connected to."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str | None]
    card: Mapped[str | None] = mapped_column(info=SECRET)
    lines: Mapped[list[Line]] = relationship(back_populates="order", cascade="all, delete-orphan")


class Line(Base):
    """Goes with its order."""

    __tablename__ = "lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int | None] = mapped_column(ForeignKey("orders.id"))
    order: Mapped[Order | None] = relationship(back_populates="lines")


class Values(Base):
    """One column of each type."""

    __tablename__ = "values_of_types"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    number: Mapped[int | None]
    real: Mapped[float | None] = mapped_column(Double)
    yes: Mapped[bool | None]
    total: Mapped[Decimal | None] = mapped_column(Numeric(12, 4))
    at: Mapped[datetime | None]
    day: Mapped[date | None]
    hour: Mapped[time | None]
    span: Mapped[timedelta | None]
    blob: Mapped[bytes | None]
    color: Mapped[Color | None]
    point: Mapped[Point | None] = mapped_column(PointType)
    text: Mapped[str | None]
    price: Mapped[Money | None] = mapped_column(MoneyType)
    ratio: Mapped[Money | None] = mapped_column(RatioType)
    document: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(JSON))


class Seat(Base):
    """Known by two columns."""

    __tablename__ = "seats"
    row: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    taken_by: Mapped[str | None]


class Ledger(Base):
    """What receivers write: one row for each effect."""

    __tablename__ = "ledger"
    id: Mapped[int] = mapped_column(primary_key=True)
    entry: Mapped[str]
