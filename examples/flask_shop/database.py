"""The `db` object of Flask-SQLAlchemy, and the tables: nothing here knows about signals."""

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)


class Product(db.Model):
    """Something to sell, and how many of it are left."""

    name: Mapped[str] = mapped_column(primary_key=True)
    stock: Mapped[int]


class Order(db.Model):
    """So many pieces of one product."""

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    product: Mapped[str]
    quantity: Mapped[int]
