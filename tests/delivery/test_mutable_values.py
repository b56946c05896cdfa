"""Values that are changed in place: users' own types of them, with receivers in any phase."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import JSON, Engine, Integer, String, TypeDecorator, event
from sqlalchemy.ext.mutable import Mutable, MutableComposite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, composite, mapped_column

from sqla_signals import UNSET, Change, post_delete, post_save, receiver

from ..contract.observing import rows

pytestmark = pytest.mark.usefixtures("installed")


class OwnDict(Mutable, dict):
    """As SQLAlchemy's manual has it, under "Establishing Mutability on Scalar Column Values"."""

    @classmethod
    def coerce(cls, key: str, value: Any) -> Any:
        return cls(value) if isinstance(value, dict) and not isinstance(value, cls) else value

    def __setitem__(self, key: str, value: Any) -> None:
        dict.__setitem__(self, key, value)
        self.changed()


class OwnList(Mutable, list):
    """Tells of ``append``."""

    @classmethod
    def coerce(cls, key: str, value: Any) -> Any:
        return cls(value) if isinstance(value, list) and not isinstance(value, cls) else value

    def append(self, value: Any) -> None:
        list.append(self, value)
        self.changed()


class OwnSet(Mutable, set):
    """Tells of ``add``."""

    @classmethod
    def coerce(cls, key: str, value: Any) -> Any:
        return cls(value) if isinstance(value, set) and not isinstance(value, cls) else value

    def add(self, value: Any) -> None:
        set.add(self, value)
        self.changed()


class Settings(Mutable):
    """A value object that tells of each attribute, and is equal to itself only."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        self.changed()

    @classmethod
    def coerce(cls, key: str, value: Any) -> Any:
        return value

    def dump(self) -> dict[str, Any]:
        """What is stored."""
        return {name: one for name, one in self.__dict__.items() if not name.startswith("_")}


class SettingsType(TypeDecorator[Settings]):
    """Settings as JSON."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value and value.dump()

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return value and Settings(**value)


class SetType(TypeDecorator[Any]):
    """A set as JSON."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value and sorted(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return value and set(value)


class Nested(Mutable, dict):
    """A dictionary whose dictionaries tell it of their changes."""

    parent: Nested | None = None

    @classmethod
    def coerce(cls, key: str, value: Any) -> Any:
        return value if value is None or isinstance(value, cls) else cls(value)

    def __init__(self, values: dict[str, Any], parent: Nested | None = None) -> None:
        self.parent = parent
        for key, value in values.items():
            dict.__setitem__(self, key, Nested(value, self) if type(value) is dict else value)

    def __setitem__(self, key: str, value: Any) -> None:
        dict.__setitem__(self, key, value)
        outermost = self
        while outermost.parent is not None:
            outermost = outermost.parent
        outermost.changed()


@dataclasses.dataclass
class Point(MutableComposite):
    """A composite that is changed in place."""

    x: int
    y: int

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        self.changed()

    def __deepcopy__(self, memo: Any) -> Point:
        raise AssertionError("composites are made of their columns")


class Plan:
    """One of a few, told apart by identity."""

    known: dict[str, Plan] = {}

    def __init__(self, code: str) -> None:
        self.code = code
        Plan.known[code] = self


FREE, PRO = Plan("free"), Plan("pro")


class PlanType(TypeDecorator[Plan]):
    """A plan by its code."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value and value.code

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return value and Plan.known[value]


class PlansType(TypeDecorator[Any]):
    """A list of plans."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value and [plan.code for plan in value]

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return value and [Plan.known[code] for code in value]


class FrozenJSON(TypeDecorator[Any]):
    """A mapping that cannot be changed, nor copied."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value and dict(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return value and types.MappingProxyType(value)


class Base(DeclarativeBase):
    """Its tables are made for each test."""


class Thing(Base):
    """One column of each kind."""

    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None]
    own_dict = mapped_column(OwnDict.as_mutable(JSON))
    own_list = mapped_column(OwnList.as_mutable(JSON))
    own_set = mapped_column(OwnSet.as_mutable(SetType))
    settings = mapped_column(Settings.as_mutable(SettingsType))
    nested = mapped_column(Nested.as_mutable(JSON))
    plan = mapped_column(PlanType)
    frozen = mapped_column(FrozenJSON)
    plans = mapped_column(PlansType)
    point: Mapped[Point | None] = composite(
        Point,
        mapped_column("x", Integer, nullable=True),
        mapped_column("y", Integer, nullable=True),
    )


VALUES = {
    "own_dict": (lambda: OwnDict(a=1), lambda value: value.__setitem__("b", 2)),
    "own_list": (lambda: OwnList([1]), lambda value: value.append(2)),
    "own_set": (lambda: OwnSet({1}), lambda value: value.add(2)),
    "settings": (lambda: Settings(a=1), lambda value: setattr(value, "b", 2)),
    "nested": (lambda: Nested({"a": {"b": 1}}), lambda value: value["a"].__setitem__("b", 2)),
    "point": (lambda: Point(1, 1), lambda value: setattr(value, "y", 2)),
}
"""By attribute: how a value is made, and how it is changed in place."""

STORED = {
    "own_dict": ({"a": 1}, {"a": 1, "b": 2}),
    "own_list": ([1], [1, 2]),
    "own_set": ({1}, {1, 2}),
    "settings": ({"a": 1}, {"a": 1, "b": 2}),
    "nested": ({"a": {"b": 1}}, {"a": {"b": 2}}),
    "point": ((1, 1), (1, 2)),
}
"""What the row holds before and after that."""


@pytest.fixture
def things(library: Engine) -> Iterator[Engine]:
    """The engine, with the table."""
    Base.metadata.create_all(library)
    yield library
    Base.metadata.drop_all(library)


@pytest.fixture
def writes(things: Engine) -> list[str]:
    """The statements that write, as they come."""
    found: list[str] = []

    @event.listens_for(things, "before_cursor_execute")
    def _execute(connection, cursor, statement, parameters, context, executemany) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            found.append(statement[:6])

    return found


def stored(engine: Engine, attribute: str) -> Any:
    """What the only row holds."""
    if attribute == "point":
        (row,) = rows(engine, Thing.__table__.c.x, Thing.__table__.c.y)
        return tuple(row)
    (value,) = rows(engine, getattr(Thing, attribute))
    return value.dump() if isinstance(value, Settings) else value


def look(sender: type, instance: Any, changes: Any = None, **kwargs: Any) -> None:
    """Read all there is."""
    [getattr(instance, name) for name in VALUES]
    dict(changes or {})


@pytest.mark.parametrize("expire", [True, False], ids=["expiring", "not expiring"])
@pytest.mark.parametrize("attribute", VALUES)
@pytest.mark.parametrize("phase", ["flush", "commit", "rollback"])
def test_a_value_changed_in_place_is_written_once_and_the_instance_is_clean_after_it(
    things: Engine, writes: list[str], phase: str, attribute: str, expire: bool
):
    """A receiver that looks at it, in whichever phase, makes no difference."""
    for signal in (post_save, post_delete):
        signal.connect(look, on=phase)
    make, change = VALUES[attribute]
    with Session(things, expire_on_commit=expire) as session:
        thing = Thing(**{attribute: make()})
        session.add(thing)
        session.commit()
        assert (writes, list(session.dirty)) == (["INSERT"], [])
        assert stored(things, attribute) == STORED[attribute][0]
        value = getattr(thing, attribute)
        thing.note = "x"
        session.flush()
        change(value)
        session.commit()
        assert (writes, list(session.dirty)) == (["INSERT", "UPDATE", "UPDATE"], [])
        assert stored(things, attribute) == STORED[attribute][1]
        session.commit()
        assert expire or attribute == "point" or getattr(thing, attribute) is value
        change(getattr(thing, attribute))
        assert list(session.dirty) == [thing]
        session.rollback()
        assert stored(things, attribute) == STORED[attribute][1]
        session.delete(thing)
        session.commit()
    assert writes == ["INSERT", "UPDATE", "UPDATE", "DELETE"]
    assert rows(things, Thing.id) == []


@pytest.mark.parametrize("expire", [True, False], ids=["expiring", "not expiring"])
@pytest.mark.parametrize("attribute", VALUES)
def test_what_a_commit_receiver_changes_in_place_is_saved_and_is_its_own(
    things: Engine, writes: list[str], attribute: str, expire: bool
):
    """Neither the caller's value nor that of the next receiver changes with it."""
    make, change = VALUES[attribute]
    seen: list[Any] = []

    @receiver(post_save, sender=Thing, on="commit")
    def first(sender, instance, created, **kwargs):
        if created:
            change(getattr(instance, attribute))

    @receiver(post_save, sender=Thing, on="commit")
    def second(sender, instance, created, changes, **kwargs):
        if created:
            seen.append(getattr(instance, attribute))

    value = make()
    with Session(things, expire_on_commit=expire) as session:
        thing = Thing(**{attribute: value})
        session.add(thing)
        session.commit()
        assert list(session.dirty) == []
        assert writes == ["INSERT", "UPDATE"]
        assert stored(things, attribute) == STORED[attribute][1]
        (other,) = seen
        for unchanged in (value, other):
            with Session(things) as another:
                another.add(copied := Thing(**{attribute: unchanged}))
                another.flush()
                another.expire(copied, [attribute] if attribute != "point" else ["x", "y"])
                loaded = getattr(copied, attribute)
                loaded = (loaded.x, loaded.y) if attribute == "point" else loaded
                loaded = loaded.dump() if attribute == "settings" else loaded
                assert loaded == STORED[attribute][0]
                another.rollback()
        thing.note = "next"
        session.commit()
    assert stored(things, attribute) == STORED[attribute][1]
    assert rows(things, Thing.note) == ["next"]


@pytest.mark.parametrize("attribute", [name for name in VALUES if name != "point"])
def test_changes_hold_what_was_written_although_the_value_was_changed_afterwards(
    things: Engine, attribute: str
):
    """In place, and before the commit: that is the next UPDATE's."""
    make, change = VALUES[attribute]
    found = []

    @receiver(post_save, sender=Thing, on="rollback")
    def undone(sender, changes, **kwargs):
        found.append(changes[attribute].new)

    with Session(things) as session:
        session.add(Thing(**{attribute: (value := make())}))
        session.flush()
        change(value)
        session.rollback()
    (new,) = found
    assert (new.dump() if isinstance(new, Settings) else new) == STORED[attribute][0]
    assert rows(things, Thing.id) == []


def test_a_value_that_compares_by_identity_stays_what_it_is(things: Engine):
    """Also inside of a container, which is copied."""
    found = []

    @receiver([post_save, post_delete], sender=Thing, on="commit")
    def fn(sender, instance, changes=(), **kwargs):
        found.append((instance.plan, instance.plans, dict(changes)))

    with Session(things) as session:
        thing = Thing(plan=FREE, plans=(plans := [FREE, PRO]))
        session.add(thing)
        session.commit()
        thing.plan, thing.plans = PRO, [PRO]
        session.commit()
        session.delete(thing)
        session.commit()
    (plan, listed, created), (_, _, updated), (deleted, _, _) = found
    assert plan is FREE
    assert created["plan"] == Change(UNSET, FREE)
    assert listed is not plans
    assert [*map(id, listed)] == [id(FREE), id(PRO)]
    assert updated["plan"].new is PRO
    assert deleted is PRO
    assert rows(things, Thing.id) == []


@pytest.mark.parametrize(
    ("attribute", "first", "second"),
    [
        ("plan", FREE, PRO),
        ("frozen", types.MappingProxyType({"a": 1}), types.MappingProxyType({"a": 2})),
        ("settings", Settings(a=1), Settings(a=2)),
        ("own_dict", OwnDict(a=1), OwnDict(a=2)),
        ("own_set", OwnSet({1}), OwnSet({2})),
    ],
    ids=["plan", "frozen", "settings", "own_dict", "own_set"],
)
def test_a_value_that_is_set_back_to_what_it_was_is_no_change(
    things: Engine, writes: list[str], attribute: str, first: Any, second: Any
):
    """In one transaction, whether or not its class can be copied or compared."""
    found = []

    @receiver(post_save, sender=Thing, on="commit")
    def fn(sender, changes, **kwargs):
        found.append(set(changes))

    with Session(things) as session:
        thing = Thing(**{attribute: first})
        session.add(thing)
        session.commit()
        before = getattr(thing, attribute)
        setattr(thing, attribute, second)
        session.flush()
        setattr(thing, attribute, before)
        session.commit()
        assert len(found) == 1
        getattr(thing, attribute)
        setattr(thing, attribute, second)
        session.commit()
    assert found[1:] == [{attribute}]
    assert writes == ["INSERT", "UPDATE", "UPDATE", "UPDATE"]


def test_a_value_that_cannot_be_copied_is_shown_itself(things: Engine):
    """In ``changes``, and by the instance, of a deleted row too."""
    found = []

    @receiver([post_save, post_delete], sender=Thing, on="commit")
    def fn(sender, instance, changes=None, **kwargs):
        found.append((instance.frozen, changes["frozen"].new if changes else None))

    frozen = types.MappingProxyType({"a": 1})
    with Session(things) as session:
        thing = Thing(frozen=frozen)
        session.add(thing)
        session.commit()
        assert found.pop() == (frozen, frozen)
        session.delete(thing)
        session.commit()
    assert found == [({"a": 1}, None)]
    assert rows(things, Thing.id) == []
