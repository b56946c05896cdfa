"""What is committed, and what comes of it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_signals.durable import outbox_table


class Base(DeclarativeBase):
    """The declarative base."""


outbox = outbox_table(Base.metadata, prefix="faults")


class Order(Base):
    """What is committed, or not."""

    __tablename__ = "faults_orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(String(2000))
    document: Mapped[Any] = mapped_column(JSON, nullable=True)


class Effect(Base):
    """What the receiver does to the database: once for each order, if all is well."""

    __tablename__ = "faults_effects"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
