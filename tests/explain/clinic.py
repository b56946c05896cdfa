"""A clinic: a hierarchy, and a many-to-many."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """The declarative base."""


class Named:
    """A mixin of models with a name."""

    name: Mapped[str]


class Forgotten:
    """A mixin that no model has."""


treats = Table(
    "treats",
    Base.metadata,
    Column("doctor_id", ForeignKey("people.id"), primary_key=True),
    Column("patient_id", ForeignKey("patients.id"), primary_key=True),
)
unused = Table("unused", Base.metadata, Column("id", ForeignKey("people.id"), primary_key=True))


class Person(Named, Base):
    """Whoever works here; always one of the subclasses."""

    __tablename__ = "people"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_abstract": True}
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]


class Doctor(Person):
    """Has patients."""

    __mapper_args__ = {"polymorphic_identity": "doctor"}
    patients: Mapped[list[Patient]] = relationship(secondary=treats, back_populates="doctors")


class Patient(Named, Base):
    """Is weighed."""

    __tablename__ = "patients"
    id: Mapped[int] = mapped_column(primary_key=True)
    weight: Mapped[float]
    doctors: Mapped[list[Doctor]] = relationship(secondary=treats, back_populates="patients")
