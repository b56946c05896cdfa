"""``{"signals": "rows"}`` for many rows, and for keys of any columns and types."""

from __future__ import annotations

import datetime
import decimal
import sqlite3
import sys
import uuid
from typing import Any

import pytest
from sqlalchemy import (
    CHAR,
    JSON,
    Date,
    Engine,
    Float,
    Integer,
    LargeBinary,
    Numeric,
    String,
    TypeDecorator,
    Uuid,
    delete,
    event,
    func,
    insert,
    select,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import StaleDataError

import sqla_signals
from sqla_signals import BulkOptionError, Change, post_delete, post_save
from tests.contract.observing import asynchronous, rows

from .shop import Heard
from .test_rows import ROWS, upsert


class Compared(int):
    """A number that counts how often it is compared."""

    count = 0
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        Compared.count += 1
        return int.__eq__(self, other)  # type: ignore[arg-type]


class CountedType(TypeDecorator[int]):
    """Whose values count how often they are compared."""

    impl = Integer
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else Compared(value)


class Lower(TypeDecorator[str]):
    """Changes what it is given."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.lower()


class Odd:
    """A value that is equal to no other one, not even to itself when it is loaded again."""

    def __init__(self, number: int) -> None:
        self.number = number


class OddType(TypeDecorator[Odd]):
    """Its values have no equality."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.number

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else Odd(value)


class Wrapped(TypeDecorator[str]):
    """Puts SQL around parameters, and around results."""

    impl = String
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return func.upper(type_coerce(bindvalue, String))

    def column_expression(self, column: Any) -> Any:
        return func.lower(column)


def day(number: int) -> datetime.date:
    return datetime.date(2000, 1, 1) + datetime.timedelta(days=number)


TYPES: dict[str, tuple[Any, Any]] = {
    "integer": (Integer, int),
    "text": (String, lambda number: f"'\"\\{number}é"),
    "uuid": (Uuid, lambda number: uuid.UUID(int=number)),
    "uuid as text": (Uuid(as_uuid=False), lambda number: str(uuid.UUID(int=number))),
    "decimal": (Numeric(10, 2), lambda number: decimal.Decimal(number) / 4),
    "float": (Float, lambda number: number / 3),
    "date": (Date, day),
    "bytes": (LargeBinary, lambda number: number.to_bytes(4, "big")),
    "changed": (Lower, lambda number: f"ABC{number}"),
    "equal to nothing": (OddType, Odd),
    "wrapped in SQL": (Wrapped, lambda number: f"k{number}"),
    "collation": (String(collation="NOCASE"), lambda number: f"Key{number}"),
    "array": (postgresql.ARRAY(Integer, as_tuple=True), lambda number: (number, number)),
    "address": (postgresql.INET, lambda number: f"10.0.{number // 250}.{number % 250}"),
    "padded": (CHAR(9), lambda number: f"c{number}"),
    "range": (postgresql.INT4RANGE, lambda number: postgresql.Range(number, number + 1)),
}
ONLY = {"collation": "sqlite"} | dict.fromkeys(
    ("array", "address", "padded", "range"), "postgresql"
)


def mapped(engine: Engine, composite: bool, sql_type: Any = Integer) -> Any:
    """A class with a table, with one or three columns in its key."""

    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "items"
        key: Mapped[Any] = mapped_column(sql_type, primary_key=True, autoincrement=False)
        if composite:
            shelf: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
            box: Mapped[str] = mapped_column(primary_key=True)
        number: Mapped[int | None]

    Base.metadata.create_all(engine)
    return Item


def key(make: Any, number: int, composite: bool) -> dict[str, Any]:
    """The key of a row, by attribute."""
    more = {"shelf": number % 3, "box": str(number)} if composite else {}
    return {"key": make(number), **more}


STATEMENTS = ["insert", "update", "by key", "upsert", "delete"]


def parameter_counts(engine: Engine) -> list[int]:
    """How many parameters each statement has from now on, lists of them and INSERTs aside."""
    found: list[int] = []

    @event.listens_for(engine, "before_cursor_execute")
    def count(connection: Any, cursor: Any, statement: str, parameters: Any, *more: Any) -> None:
        if not isinstance(parameters, list) and not statement.startswith("INSERT"):
            found.append(len(parameters))

    return found


def execute(
    session: Session, cls: Any, what: str, keys: list[dict[str, Any]], **options: Any
) -> None:
    """Execute a statement about all of them."""
    many = [{**one, "number": 7} for one in keys]
    new = upsert(session, cls)
    names = [column.name for column in cls.__table__.primary_key]
    statement, parameters = {
        "insert": (insert(cls), many),
        "update": (update(cls).values(number=7), None),
        "by key": (update(cls), many),
        "upsert": (
            new.on_conflict_do_update(index_elements=names, set_={"number": new.excluded.number}),
            many,
        ),
        "delete": (delete(cls), None),
    }[what]
    session.execute(statement, parameters, execution_options={**ROWS, **options})


@pytest.mark.parametrize(
    ("composite", "number"),
    [(False, 3), (False, 501), (True, 3), (True, 168)],
    ids=["few", "many", "few of three columns", "many of three columns"],
)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.filterwarnings("ignore:Dialect sqlite.*Decimal:sqlalchemy.exc.SAWarning")
def test_keys_of_any_type(engine: Engine, installed: Any, name: str, composite: bool, number: int):
    """What the database takes for the same key is the same row; many have over 500 parameters."""
    if ONLY.get(name, engine.dialect.name) != engine.dialect.name:
        pytest.skip("the other database has that type")
    if composite and number > 3 and name not in ("integer", "text", "wrapped in SQL", "array"):
        pytest.skip("a type that is looked up in the same way as these")
    sql_type, make = TYPES[name]
    cls = mapped(engine, composite, sql_type)
    numbers = select(cls.__table__.c.number)
    keys = [key(make, one, composite) for one in range(number)]
    heard = Heard().connect(cls)
    bound = parameter_counts(engine)
    with Session(engine) as session:
        for what in STATEMENTS:
            if what != "insert":
                session.connection().execute(update(cls.__table__).values(number=1))
            if what in ("by key", "upsert") and name == "collation":
                keys = [{**one, "key": one["key"].swapcase()} for one in keys]
            heard.clear()
            execute(session, cls, what, keys)
            kind, created = ("delete", None) if what == "delete" else ("save", what == "insert")
            for when in ("pre", "post"):
                calls = heard.of(f"{when}_{kind}")
                assert len(calls) == number
                assert {call.get("created") for call in calls} == {created}
            if created is False:
                changes = [call["changes"] for call in heard.of("post_save")]
                assert changes == [{"number": Change(1, 7)}] * number
            present = session.connection().execute(numbers).scalars().all()
            assert present == ([] if what == "delete" else [7] * number)
    assert max(bound) <= 510 or name == "array"


def takes_parameters(engine: Engine) -> int:
    """Return how many parameters a statement may have; on SQLite that is made few, for speed."""
    if engine.dialect.name == "postgresql":
        return 65_535

    @event.listens_for(engine, "connect")
    def lower(connection: Any, record: Any) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)

    engine.dispose()
    engine.dialect.insertmanyvalues_max_parameters = 999
    return 999


@pytest.mark.parametrize("name", ["array", "wrapped in SQL"])
def test_an_address_beside_a_column_whose_values_are_compared_one_by_one(
    engine: Engine, installed: Any, name: str
):
    """Each parameter has the type of its column."""
    if engine.dialect.name != "postgresql":
        pytest.skip("the other database has that type")

    class Base(DeclarativeBase):
        pass

    sql_type, make = TYPES[name]

    class Host(Base):
        __tablename__ = "hosts"
        address: Mapped[str] = mapped_column(postgresql.INET, primary_key=True)
        other: Mapped[Any] = mapped_column(sql_type, primary_key=True)
        number: Mapped[int | None]

    Base.metadata.create_all(engine)
    keys = [{"address": f"10.0.0.{one}", "other": make(one)} for one in range(3)]
    heard = Heard().connect(Host)
    with Session(engine) as session:
        for what in STATEMENTS:
            heard.clear()
            execute(session, Host, what, keys)
            assert len(heard.of("post_delete" if what == "delete" else "post_save")) == 3
            present = session.connection().execute(select(Host.__table__.c.number)).all()
            assert present == ([] if what == "delete" else [(7,)] * 3)


@pytest.mark.parametrize(
    ("what", "composite", "loaded"),
    [
        ("update", False, False),
        ("by key", False, False),
        ("update", True, True),
        *[(what, True, False) for what in STATEMENTS],
    ],
)
def test_more_rows_than_a_statement_takes_parameters(
    engine: Engine, installed: Any, what: str, composite: bool, loaded: bool
):
    """One statement each to look them up, to load them, to change and to read them."""
    if engine.dialect.name == "postgresql" and (not composite or what in ("insert", "delete")):
        pytest.skip("so many rows take seconds there, and the others show the same")
    cls = mapped(engine, composite)
    number = takes_parameters(engine) // (3 if composite else 1) + 1
    keys = [key(int, one, composite) for one in range(number)]
    heard = 0

    def count(sender: Any, **kwargs: Any) -> None:
        nonlocal heard
        heard += 1

    post_save.connect(count, cls)
    post_delete.connect(count, cls)
    with Session(engine) as session:
        if what != "insert":
            session.connection().execute(
                insert(cls.__table__), [{**one, "number": 1} for one in keys]
            )
        held = session.scalars(select(cls)).all() if loaded else []
        bound = parameter_counts(engine)
        execute(session, cls, what, keys)
        assert heard == number
        assert max(bound) < 100
        assert len(bound) <= 6
        if what != "delete":
            assert session.scalar(select(func.sum(cls.number))) == 7 * number
            assert {one.number for one in held} <= {7}
        else:
            assert session.scalar(select(func.count()).select_from(cls)) == 0


@pytest.mark.parametrize("synchronize", ["auto", "fetch", False])
@pytest.mark.parametrize("loaded", [False, True], ids=["unloaded", "loaded"])
@pytest.mark.parametrize("what", STATEMENTS)
def test_the_cost_of_a_row_does_not_grow_with_their_number(
    engine: Engine, installed: Any, what: str, loaded: bool, synchronize: Any
):
    """Neither the calls of functions nor the comparisons of keys; eight times as many rows."""
    if synchronize != "auto" and what not in ("update", "delete"):
        pytest.skip("there is no such choice")
    cls = mapped(engine, False, CountedType)
    post_save.connect(lambda *args, **kwargs: None, cls, weak=False)
    costs = []
    for number in (100, 100, 800):  # the first time caches are filled
        keys = [key(int, one, False) for one in range(number)]
        with Session(engine) as session:
            if what != "insert":
                session.connection().execute(
                    insert(cls.__table__), [{**one, "number": 1} for one in keys]
                )
            held = session.scalars(select(cls)).all() if loaded else []
            Compared.count = calls = 0

            def profile(frame: Any, what: str, argument: Any) -> None:
                nonlocal calls
                calls += what in ("call", "c_call")

            sys.setprofile(profile)
            try:
                execute(session, cls, what, keys, synchronize_session=synchronize)
            finally:
                sys.setprofile(None)
            costs.append((calls, Compared.count))
            del held
    (_, (calls, compared), (more_calls, more_compared)) = costs
    assert more_calls < 9 * calls
    assert more_compared < 9 * compared + 100


@asynchronous
async def test_many_rows_of_an_async_session(
    engine: Engine, async_engine: AsyncEngine, installed: Any
):
    """Its drivers take no more parameters."""
    if engine.dialect.name == "sqlite":
        pytest.skip("the driver is the one of a plain session, in a thread")
    cls = mapped(engine, True)
    heard = Heard().connect(cls)
    keys = [key(int, one, True) for one in range(22_000)]  # three times as many parameters
    async with AsyncSession(async_engine) as session:
        await session.execute(insert(cls), keys, execution_options={"signals": "skip"})
        await session.execute(update(cls).values(number=7), execution_options=ROWS)
        assert len(heard.of("post_save")) == len(keys)
        assert await session.scalar(select(func.sum(cls.number))) == 7 * len(keys)


@pytest.mark.parametrize("number", [2, 600], ids=["few", "many"])
@pytest.mark.parametrize("what", ["update", "delete", "insert"])
@pytest.mark.filterwarnings("ignore:.*primary key:sqlalchemy.exc.SAWarning")
def test_a_part_of_the_key_that_is_null(engine: Engine, installed: Any, what: str, number: int):
    """SQLAlchemy loads such a row, so it is found again although NULL is equal to nothing."""
    if engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL has no NULL in a primary key")

    class Base(DeclarativeBase):
        pass

    class Spot(Base):
        __tablename__ = "spots"
        x: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        y: Mapped[int | None] = mapped_column(primary_key=True, autoincrement=False, nullable=True)
        z: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        number: Mapped[int | None]

    Base.metadata.create_all(engine)
    keys = [{"x": x, "y": [None, 1][x % 2], "z": x} for x in range(number)]
    heard = Heard().connect(Spot)
    with Session(engine) as session:
        if what != "insert":
            session.connection().execute(insert(Spot.__table__), keys)
        statement: Any = {
            "update": update(Spot).values(number=7),
            "delete": delete(Spot),
            "insert": insert(Spot),
        }[what]
        parameters = keys if what == "insert" else None
        session.execute(statement, parameters, execution_options=ROWS)
        expected = sorted((what, f"{one['x']} {one['y']} {one['z']}") for one in keys)
        assert heard.rows("post") == heard.rows("pre") == expected
        present = session.connection().execute(select(Spot.__table__.c.number)).scalars().all()
        assert present == ([] if what == "delete" else [7 * (what == "update") or None] * number)


def test_a_key_that_is_null(engine: Engine):
    """The ORM makes no instance of such a row; nothing is executed."""
    if engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL has no NULL in a primary key")
    sqla_signals.install()
    cls = mapped_nullable(engine, String)
    heard = Heard().connect(cls)
    with Session(engine) as session:
        session.connection().execute(insert(cls.__table__), [{"key": "a"}, {"key": None}])
        with pytest.raises(BulkOptionError, match=r"no instance of Item for the row \(None,\)"):
            session.execute(update(cls).values(number=7), execution_options=ROWS)
        assert [call for call in heard.calls if "instance" in call] == []
        session.execute(update(cls).where(cls.key == "a").values(number=7), execution_options=ROWS)
        assert heard.rows("post") == [("update", "a")]
        assert rows(session, cls.__table__.c.number) == [7, None]


def mapped_nullable(engine: Engine, sql_type: Any) -> Any:
    """A class whose key may be NULL."""

    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "items"
        key: Mapped[Any] = mapped_column(sql_type, primary_key=True, nullable=True)
        number: Mapped[int | None]

    Base.metadata.create_all(engine)
    return Item


def test_a_key_that_cannot_be_hashed(engine: Engine, installed: Any):
    """The ORM loads no such instance; nothing is executed."""
    is_sqlite = engine.dialect.name == "sqlite"
    cls = mapped(engine, False, JSON if is_sqlite else postgresql.ARRAY(Integer))
    heard = Heard().connect(cls)
    with Session(engine) as session:
        session.connection().execute(insert(cls.__table__), [{"key": [1], "number": 1}])
        with pytest.raises(BulkOptionError, match=r"not hashable.*post_bulk"):
            session.execute(update(cls).values(number=7), execution_options=ROWS)
        assert [call for call in heard.calls if "instance" in call] == []
        assert rows(session, cls.__table__.c.number) == [1]


@pytest.mark.parametrize("number", [1, 600], ids=["few", "many"])
def test_an_upsert_that_meets_rows_by_values_that_cannot_be_hashed(
    engine: Engine, installed: Any, number: int
):
    """They are told from new ones all the same."""

    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "items"
        id: Mapped[int] = mapped_column(primary_key=True)
        tags: Mapped[Any] = mapped_column(
            JSON().with_variant(postgresql.ARRAY(Integer), "postgresql"), unique=True
        )
        number: Mapped[int | None]

    Base.metadata.create_all(engine)
    heard = Heard().connect(Item)
    with Session(engine) as session:
        old = [{"id": one, "tags": [one, 1], "number": 1} for one in range(number)]
        session.connection().execute(insert(Item.__table__), old)
        new = upsert(session, Item)
        new = new.on_conflict_do_update(
            index_elements=["tags"], set_={"number": new.excluded.number}
        )
        given = [{"tags": [one, 1], "number": 7, "id": 9999 + one} for one in range(number + 1)]
        session.execute(new, given, execution_options=ROWS)
        expected = [("update", str(one)) for one in range(number)]
        expected = sorted([*expected, ("insert", str(9999 + number))])
        assert heard.rows("post") == heard.rows("pre") == expected
        assert set(rows(session, Item.number)) == {7}


def test_a_list_of_parameters_with_a_key_that_no_row_has(engine: Engine, installed: Any):
    """Among keys that the database compares in its own way: the error is SQLAlchemy's."""
    if engine.dialect.name != "sqlite":
        pytest.skip("the collation is SQLite's")
    cls = mapped(engine, False, String(collation="NOCASE"))
    heard = Heard().connect(cls)
    with Session(engine) as session:
        session.connection().execute(insert(cls.__table__), [{"key": "a"}, {"key": "b"}])
        given = [{"key": "A", "number": 1}, {"key": "C", "number": 2}]
        with pytest.raises(StaleDataError, match=r"expected to update 2 row\(s\); 1 were matched"):
            session.execute(update(cls), given, execution_options=ROWS)
        assert [call for call in heard.calls if "instance" in call] == []
        assert rows(session, cls.number) == [None, None]
        options: Any = {**ROWS, "synchronize_session": None}
        session.execute(update(cls).where(cls.number.is_(None)), given, execution_options=options)
        assert heard.rows("post") == [("update", "a")]
        assert rows(session, cls.number) == [1, None]
