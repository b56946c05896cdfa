"""The schema of the proof: every shape of mapping whose rows a flush writes in a way of its own.

The classes come in small clusters, and a program draws its objects from a few of them. All columns
but the keys are nullable, and no constructor requires anything but a natural key, so that a program
may leave anything out.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Column, Computed, ForeignKey, Table, func, text
from sqlalchemy.ext.mutable import Mutable
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    MappedAsDataclass,
    WriteOnlyMapped,
    column_property,
    mapped_column,
    relationship,
)


class Base(DeclarativeBase):
    """The declarative base of the schema."""


Number = Mapped[int | None]
Words = Mapped[str | None]


def key() -> Mapped[int]:
    """A surrogate integer key."""
    return mapped_column(primary_key=True)


# One-to-many with delete-orphan and a backref; the orphan takes its own children along.


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = key()
    status: Words
    n: Number
    items: Mapped[list[Item]] = relationship(cascade="all, delete-orphan", backref="order")


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = key()
    order_id: Mapped[int | None] = mapped_column(ForeignKey("orders.id"))
    name: Words
    n: Number
    notes: Mapped[list[Note]] = relationship(cascade="all, delete-orphan", back_populates="item")


class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = key()
    item_id: Mapped[int | None] = mapped_column(ForeignKey("items.id"))
    name: Words
    item: Mapped[Item | None] = relationship(back_populates="notes")


# One-to-many with delete-orphan, no backref.


class Basket(Base):
    __tablename__ = "baskets"
    id: Mapped[int] = key()
    name: Words
    lines: Mapped[list[Line]] = relationship(cascade="all, delete-orphan")


class Line(Base):
    __tablename__ = "lines"
    id: Mapped[int] = key()
    basket_id: Mapped[int | None] = mapped_column(ForeignKey("baskets.id"))
    n: Number
    crumbs: Mapped[list[Crumb]] = relationship(cascade="all, delete")


class Crumb(Base):
    __tablename__ = "crumbs"
    id: Mapped[int] = key()
    line_id: Mapped[int | None] = mapped_column(ForeignKey("lines.id"))
    n: Number


# One-to-many whose children stay and lose their foreign key: with a backref, and as a set without.


class Team(Base):
    __tablename__ = "teams"
    id: Mapped[int] = key()
    name: Words
    players: Mapped[list[Player]] = relationship(back_populates="team")


class Player(Base):
    __tablename__ = "players"
    id: Mapped[int] = key()
    team_id: Mapped[int | None] = mapped_column(ForeignKey("teams.id"))
    name: Words
    n: Number
    team: Mapped[Team | None] = relationship(back_populates="players")


class Shelf(Base):
    __tablename__ = "shelves"
    id: Mapped[int] = key()
    name: Words
    books: Mapped[set[Book]] = relationship()


class Book(Base):
    __tablename__ = "books"
    id: Mapped[int] = key()
    shelf_id: Mapped[int | None] = mapped_column(ForeignKey("shelves.id"))
    name: Words


# Children that the database itself deletes or sets to NULL.


class Folder(Base):
    __tablename__ = "folders"
    id: Mapped[int] = key()
    name: Words
    files: Mapped[list[File]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True, back_populates="folder"
    )
    labels: Mapped[list[Label]] = relationship(passive_deletes=True)
    links: Mapped[list[Link]] = relationship(passive_deletes="all", back_populates="folder")


class File(Base):
    __tablename__ = "files"
    id: Mapped[int] = key()
    folder_id: Mapped[int | None] = mapped_column(ForeignKey("folders.id", ondelete="CASCADE"))
    name: Words
    folder: Mapped[Folder | None] = relationship(back_populates="files")


class Label(Base):
    __tablename__ = "labels"
    id: Mapped[int] = key()
    folder_id: Mapped[int | None] = mapped_column(ForeignKey("folders.id", ondelete="SET NULL"))
    name: Words


class Link(Base):
    __tablename__ = "links"
    id: Mapped[int] = key()
    folder_id: Mapped[int | None] = mapped_column(ForeignKey("folders.id", ondelete="CASCADE"))
    name: Words
    folder: Mapped[Folder | None] = relationship(back_populates="links")


# One-to-one, and a many-to-one that owns its target.


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = key()
    name: Words
    profile: Mapped[Profile | None] = relationship(
        cascade="all, delete-orphan", back_populates="account"
    )
    badge: Mapped[Badge | None] = relationship(back_populates="account")


class Profile(Base):
    __tablename__ = "profiles"
    id: Mapped[int] = key()
    account_id: Mapped[int | None] = mapped_column(ForeignKey("accounts.id"))
    name: Words
    account: Mapped[Account | None] = relationship(back_populates="profile")


class Badge(Base):
    __tablename__ = "badges"
    id: Mapped[int] = key()
    account_id: Mapped[int | None] = mapped_column(ForeignKey("accounts.id"))
    name: Words
    account: Mapped[Account | None] = relationship(back_populates="badge")


class Truck(Base):
    __tablename__ = "trucks"
    id: Mapped[int] = key()
    motor_id: Mapped[int | None] = mapped_column(ForeignKey("motors.id"))
    name: Words
    motor: Mapped[Motor | None] = relationship(cascade="all, delete-orphan", single_parent=True)


class Motor(Base):
    __tablename__ = "motors"
    id: Mapped[int] = key()
    n: Number


# Many-to-one without a backref.


class Agent(Base):
    __tablename__ = "agents"
    id: Mapped[int] = key()
    name: Words


class Ticket(Base):
    __tablename__ = "tickets"
    id: Mapped[int] = key()
    agent_id: Mapped[int | None] = mapped_column(ForeignKey("agents.id"))
    deputy_id: Mapped[int | None] = mapped_column(ForeignKey("agents.id"))
    name: Words
    agent: Mapped[Agent | None] = relationship(foreign_keys=[agent_id])
    deputy: Mapped[Agent | None] = relationship(
        foreign_keys=[deputy_id], cascade="save-update, merge, delete"
    )


# Many-to-many with a backref and without; an association object with a composite key.

student_courses = Table(
    "student_courses",
    Base.metadata,
    Column("student_id", ForeignKey("students.id"), primary_key=True),
    Column("course_id", ForeignKey("courses.id"), primary_key=True),
)
student_clubs = Table(
    "student_clubs",
    Base.metadata,
    Column("student_id", ForeignKey("students.id"), primary_key=True),
    Column("club_id", ForeignKey("clubs.id"), primary_key=True),
)


class Student(Base):
    __tablename__ = "students"
    id: Mapped[int] = key()
    name: Words
    courses: Mapped[list[Course]] = relationship(
        secondary=student_courses, back_populates="students"
    )
    clubs: Mapped[list[Club]] = relationship(secondary=student_clubs, cascade="all, delete")


class Course(Base):
    __tablename__ = "courses"
    id: Mapped[int] = key()
    name: Words
    students: Mapped[list[Student]] = relationship(
        secondary=student_courses, back_populates="courses"
    )


class Club(Base):
    __tablename__ = "clubs"
    id: Mapped[int] = key()
    name: Words


class Member(Base):
    __tablename__ = "members"
    id: Mapped[int] = key()
    name: Words
    memberships: Mapped[list[Membership]] = relationship(
        cascade="all, delete-orphan", back_populates="member"
    )


class Guild(Base):
    __tablename__ = "guilds"
    id: Mapped[int] = key()
    name: Words
    memberships: Mapped[list[Membership]] = relationship(back_populates="guild")


class Membership(Base):
    __tablename__ = "memberships"
    member_id: Mapped[int] = mapped_column(ForeignKey("members.id"), primary_key=True)
    guild_id: Mapped[int] = mapped_column(ForeignKey("guilds.id"), primary_key=True)
    role: Words
    member: Mapped[Member | None] = relationship(back_populates="memberships")
    guild: Mapped[Guild | None] = relationship(back_populates="memberships")


# Trees: one whose children stay, one that deletes them.


class Node(Base):
    __tablename__ = "nodes"
    id: Mapped[int] = key()
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("nodes.id"))
    name: Words
    children: Mapped[list[Node]] = relationship(back_populates="parent")
    parent: Mapped[Node | None] = relationship(back_populates="children", remote_side=[id])


class Directory(Base):
    __tablename__ = "directories"
    id: Mapped[int] = key()
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("directories.id"))
    name: Words
    children: Mapped[list[Directory]] = relationship(
        cascade="all, delete-orphan", back_populates="parent"
    )
    parent: Mapped[Directory | None] = relationship(back_populates="children", remote_side=[id])


# post_update: within one table, and between two tables that need each other.


class Step(Base):
    __tablename__ = "steps"
    id: Mapped[int] = key()
    next_id: Mapped[int | None] = mapped_column(ForeignKey("steps.id"))
    name: Words
    next: Mapped[Step | None] = relationship(remote_side=[id], post_update=True)


class Stop(Base):
    __tablename__ = "stops"
    id: Mapped[int] = key()
    line_id: Mapped[int | None] = mapped_column(ForeignKey("stops.id"))
    name: Words
    stops: Mapped[list[Stop]] = relationship(post_update=True, back_populates="line")
    line: Mapped[Stop | None] = relationship(
        remote_side=[id], back_populates="stops", post_update=True
    )


class Pile(Base):
    __tablename__ = "piles"
    id: Mapped[int] = key()
    name: Words
    sheets: Mapped[list[Sheet]] = relationship(post_update=True)


class Sheet(Base):
    __tablename__ = "sheets"
    id: Mapped[int] = key()
    pile_id: Mapped[int | None] = mapped_column(ForeignKey("piles.id"))
    name: Words


class Widget(Base):
    __tablename__ = "widgets"
    id: Mapped[int] = key()
    favorite_id: Mapped[int | None] = mapped_column(
        ForeignKey("entries.id", use_alter=True, name="fk_favorite")
    )
    name: Words
    changed: Mapped[int | None] = mapped_column(default=0, onupdate=5)
    entries: Mapped[list[Entry]] = relationship(
        foreign_keys="Entry.widget_id", cascade="all, delete-orphan"
    )
    favorite: Mapped[Entry | None] = relationship(foreign_keys=[favorite_id], post_update=True)


class Entry(Base):
    __tablename__ = "entries"
    id: Mapped[int] = key()
    widget_id: Mapped[int | None] = mapped_column(ForeignKey("widgets.id"))
    name: Words


# Joined inheritance of three levels with a single-table leaf, a version counter and relationships.


class Company(Base):
    __tablename__ = "companies"
    id: Mapped[int] = key()
    name: Words
    people: Mapped[list[Person]] = relationship(back_populates="company")


class Person(Base):
    __tablename__ = "people"
    id: Mapped[int] = key()
    kind: Mapped[str]
    version: Mapped[int] = mapped_column()
    company_id: Mapped[int | None] = mapped_column(ForeignKey("companies.id"))
    mentor_id: Mapped[int | None] = mapped_column(ForeignKey("people.id"))
    name: Words
    company: Mapped[Company | None] = relationship(back_populates="people")
    mentees: Mapped[list[Person]] = relationship(back_populates="mentor")
    mentor: Mapped[Person | None] = relationship(back_populates="mentees", remote_side=[id])
    __mapper_args__ = {
        "polymorphic_on": "kind",
        "polymorphic_identity": "person",
        "version_id_col": version,
    }


class Employee(Person):
    __tablename__ = "employees"
    id: Mapped[int] = mapped_column(ForeignKey("people.id"), primary_key=True)
    salary: Number
    grade: Mapped[int | None] = mapped_column(onupdate=9)
    desks: Mapped[list[Desk]] = relationship(cascade="all, delete-orphan")
    __mapper_args__ = {"polymorphic_identity": "employee"}


class Manager(Employee):
    __tablename__ = "managers"
    id: Mapped[int] = mapped_column(ForeignKey("employees.id"), primary_key=True)
    title: Words
    desk_id: Mapped[int | None] = mapped_column(
        ForeignKey("desks.id", use_alter=True, name="fk_desk")
    )
    spare: Mapped[Desk | None] = relationship(foreign_keys=[desk_id], post_update=True)
    __mapper_args__ = {"polymorphic_identity": "manager"}


class Engineer(Employee):
    language: Words
    __mapper_args__ = {"polymorphic_identity": "engineer"}


class Desk(Base):
    __tablename__ = "desks"
    id: Mapped[int] = key()
    employee_id: Mapped[int | None] = mapped_column(ForeignKey("employees.id"))
    name: Words


# Single-table inheritance.


class Kennel(Base):
    __tablename__ = "kennels"
    id: Mapped[int] = key()
    name: Words
    dogs: Mapped[list[Dog]] = relationship(back_populates="kennel")


class Animal(Base):
    __tablename__ = "animals"
    id: Mapped[int] = key()
    kind: Mapped[str]
    name: Words
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    kennel_id: Mapped[int | None] = mapped_column(ForeignKey("kennels.id"))
    tricks: Number
    kennel: Mapped[Kennel | None] = relationship(back_populates="dogs")
    __mapper_args__ = {"polymorphic_identity": "dog"}


class Cat(Animal):
    lives: Mapped[int | None] = mapped_column(default=9)
    __mapper_args__ = {"polymorphic_identity": "cat"}


# A version counter, a column that is not named like its attribute, a deferred one, an expression.


class Document(Base):
    __tablename__ = "documents"
    id: Mapped[int] = key()
    version: Mapped[int] = mapped_column()
    title: Mapped[str | None] = mapped_column("ttl")
    body: Mapped[str | None] = mapped_column(deferred=True)
    n: Number
    clauses: Mapped[list[Clause]] = relationship(back_populates="document")
    __mapper_args__ = {"version_id_col": version}


Document.shout = column_property(func.upper(Document.title))


class Clause(Base):
    __tablename__ = "clauses"
    id: Mapped[int] = key()
    document_id: Mapped[int | None] = mapped_column(ForeignKey("documents.id"))
    name: Words
    document: Mapped[Document | None] = relationship(back_populates="clauses")


# Values that come from defaults, onupdate, the server; with RETURNING and without.


class Stamp(Base):
    __tablename__ = "stamps"
    id: Mapped[int] = key()
    name: Words
    n: Number
    created: Mapped[int | None] = mapped_column(default=lambda: 1)
    updated: Mapped[int | None] = mapped_column(onupdate=lambda: 2)
    measured: Mapped[int | None] = mapped_column(onupdate=func.length("abc"))
    origin: Mapped[str | None] = mapped_column(server_default=text("'here'"))
    doubled: Mapped[int | None] = mapped_column(Computed("n * 2", persisted=True))


class Gauge(Base):
    __tablename__ = "gauges"
    id: Mapped[int] = key()
    name: Words
    n: Number
    updated: Mapped[int | None] = mapped_column(onupdate=func.length("abcd"))
    origin: Mapped[str | None] = mapped_column(server_default=text("'there'"))
    doubled: Mapped[int | None] = mapped_column(Computed("n * 2", persisted=True))
    __mapper_args__ = {"eager_defaults": True}


# Dataclasses: not hashable, and equal when their values are.


class Polygon(MappedAsDataclass, Base):
    __tablename__ = "polygons"
    id: Mapped[int] = mapped_column(primary_key=True, init=False, compare=False)
    name: Mapped[str | None] = mapped_column(default=None)
    corners: Mapped[list[Corner]] = relationship(
        cascade="all, delete-orphan", default_factory=list, compare=False
    )


class Corner(MappedAsDataclass, Base):
    __tablename__ = "corners"
    id: Mapped[int] = mapped_column(primary_key=True, init=False, compare=False)
    polygon_id: Mapped[int | None] = mapped_column(
        ForeignKey("polygons.id"), init=False, compare=False
    )
    x: Mapped[int | None] = mapped_column(default=None)
    y: Mapped[int | None] = mapped_column(default=None)


# Natural keys: updated by the database, and by the unit of work.


class Country(Base):
    __tablename__ = "countries"
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Words
    cities: Mapped[list[City]] = relationship(back_populates="country")


class City(Base):
    __tablename__ = "cities"
    id: Mapped[int] = key()
    country_code: Mapped[str | None] = mapped_column(
        ForeignKey("countries.code", onupdate="CASCADE")
    )
    name: Words
    country: Mapped[Country | None] = relationship(back_populates="cities")


class Region(Base):
    __tablename__ = "regions"
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Words
    towns: Mapped[list[Town]] = relationship(passive_updates=False, back_populates="region")


class Town(Base):
    __tablename__ = "towns"
    id: Mapped[int] = key()
    region_code: Mapped[str | None] = mapped_column(
        ForeignKey("regions.code", deferrable=True, initially="DEFERRED")
    )
    name: Words
    region: Mapped[Region | None] = relationship(passive_updates=False, back_populates="towns")


# JSON, replaced and changed in place.


class Options(Mutable, dict[str, Any]):
    """A mutable dictionary as users write it, from SQLAlchemy's manual."""

    @classmethod
    def coerce(cls, key: str, value: Any) -> Any:
        return cls(value) if isinstance(value, dict) and not isinstance(value, cls) else value

    def __setitem__(self, key: str, value: Any) -> None:
        dict.__setitem__(self, key, value)
        self.changed()

    def __delitem__(self, key: str) -> None:
        dict.__delitem__(self, key)
        self.changed()


class Config(Base):
    __tablename__ = "configs"
    id: Mapped[int] = key()
    options: Mapped[dict[str, Any] | None] = mapped_column(
        Options.as_mutable(JSON(none_as_null=True))
    )
    extra: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    name: Words


# Collections that are never loaded whole.


class Channel(Base):
    __tablename__ = "channels"
    id: Mapped[int] = key()
    name: Words
    messages: WriteOnlyMapped[Message] = relationship(
        cascade="all, delete-orphan", passive_deletes=True
    )


class Message(Base):
    __tablename__ = "messages"
    id: Mapped[int] = key()
    channel_id: Mapped[int | None] = mapped_column(ForeignKey("channels.id", ondelete="CASCADE"))
    name: Words


class Forum(Base):
    __tablename__ = "forums"
    id: Mapped[int] = key()
    name: Words
    posts: DynamicMapped[Post] = relationship(back_populates="forum")


class Post(Base):
    __tablename__ = "posts"
    id: Mapped[int] = key()
    forum_id: Mapped[int | None] = mapped_column(ForeignKey("forums.id"))
    name: Words
    forum: Mapped[Forum | None] = relationship(back_populates="posts")


class Audit(Base):
    """What receivers write about other rows. No program makes one itself."""

    __tablename__ = "audits"
    id: Mapped[int] = key()
    name: Words


Base.registry.configure()

CLUSTERS: tuple[tuple[type[Base], ...], ...] = (
    (Order, Item, Note),
    (Basket, Line, Crumb),
    (Team, Player),
    (Shelf, Book),
    (Folder, File, Label, Link),
    (Account, Profile, Badge),
    (Truck, Motor),
    (Agent, Ticket),
    (Student, Course, Club),
    (Member, Guild, Membership),
    (Node,),
    (Directory,),
    (Step,),
    (Stop,),
    (Pile, Sheet),
    (Widget, Entry),
    (Company, Person, Employee, Manager, Engineer, Desk),
    (Kennel, Animal, Dog, Cat),
    (Document, Clause),
    (Stamp, Gauge),
    (Polygon, Corner),
    (Country, City),
    (Region, Town),
    (Config,),
    (Channel, Message),
    (Forum, Post),
)
