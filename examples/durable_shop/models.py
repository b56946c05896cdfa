"""The shop's tables. The outbox is one call; what it adds is migrated like everything else."""

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_signals.durable import SECRET, outbox_table


class Base(DeclarativeBase):
    """The base of every model of the shop."""

    type_annotation_map = {str: String(100)}


outbox = outbox_table(Base.metadata, source="/durable-shop")


class Order(Base):
    """What somebody buys. The number of the card travels in no message."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    mugs: Mapped[int]
    status: Mapped[str] = mapped_column(default="open")
    card: Mapped[str] = mapped_column(info=SECRET)


class Mail(Base):
    """A mail that was sent."""

    __tablename__ = "mails"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))
    text: Mapped[str]


class Payment(Base):
    """Money that was taken, and at which attempt."""

    __tablename__ = "payments"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))
    amount: Mapped[int]
    attempt: Mapped[int]


class Parcel(Base):
    """Mugs on their way."""

    __tablename__ = "parcels"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))
    mugs: Mapped[int]
