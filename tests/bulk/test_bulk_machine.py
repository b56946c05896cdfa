"""Random statements with the signals of their rows, beside a twin that knows nothing of signals.

Each program runs in two worlds, one with ``{"signals": "rows"}`` and one without any. What the
statements do must be the same in both, and what is told of in the first must be what its triggers
and its tables say.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    Engine,
    Index,
    Select,
    StaticPool,
    String,
    TypeDecorator,
    and_,
    bindparam,
    create_engine,
    delete,
    event,
    exists,
    func,
    insert,
    inspect,
    literal,
    null,
    or_,
    select,
    text,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import CompileError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

import sqla_signals
from sqla_signals import BulkOptionError, post_delete, post_save, pre_delete, pre_save

from ..conftest import before_sqlalchemy
from .shop import Base as ShopBase
from .shop import (
    Clerk,
    Customer,
    Director,
    Employee,
    Heard,
    Manager,
    Order,
    Seat,
    Stamped,
    create_triggers,
    witnessed,
)

pytestmark = pytest.mark.timeout(3600)

EXAMPLES = int(os.environ.get("BULK_EXAMPLES", "20"))
STEPS: Counter[str] = Counter()
"""What was executed, for who runs the machine for long."""


class Base(DeclarativeBase):
    """The declarative base of tables that the shop has no use for."""


class Lower(TypeDecorator[str]):
    """What is written is not what was given."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.lower()


class Tag(Base):
    """With a key whose type changes what it is given."""

    __tablename__ = "tags"
    id: Mapped[str] = mapped_column(Lower, primary_key=True)
    number: Mapped[int | None]


class Spot(Base):
    """With a key of which one column may be NULL, on SQLite."""

    __tablename__ = "spots"
    x: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    y: Mapped[int | None] = mapped_column(primary_key=True, autoincrement=False, nullable=True)
    number: Mapped[int | None]
    # Two rows of one key are one instance for the ORM.
    __table_args__ = (Index("one_row", "x", func.coalesce(y.column, -1), unique=True),)


TABLES = [*ShopBase.metadata.sorted_tables, *Base.metadata.sorted_tables]
NAMES = ["a", "B", "c", "D"]

TARGETS: dict[str, tuple[Any, str, str]] = {
    "order": (Order, "id", "total"),
    "seat": (Seat, "number", "taken"),
    "spot": (Spot, "x", "number"),
    "tag": (Tag, "id", "number"),
    "stamped": (Stamped, "id", "name"),
    "employee": (Employee, "id", "name"),
    "clerk": (Clerk, "id", "name"),
    "manager": (Manager, "id", "budget"),
    "director": (Director, "id", "title"),
}
"""By name: the class, an attribute of its key, and one that is set."""

STYLES = ["plain", "plain", "alias", "join", "bound"]
"""How a statement names what it changes."""
if before_sqlalchemy("2.0.21"):
    # SQLAlchemy names the table beside its alias: each row of the one is changed for any of the
    # other, or the statement cannot be compiled.
    STYLES.remove("alias")


def key_of(cls: Any, number: int, other: int) -> dict[str, Any]:
    """The primary key of a row, by attribute."""
    if cls is Seat:
        return {"row": other % 2, "number": number}
    if cls is Spot:
        return {"x": number, "y": [None, 1][other % 2]}
    if cls is Tag:
        return {"id": NAMES[number % 4]}
    return {"id": number}


def value_of(cls: Any, attribute: str, number: int) -> Any:
    """A value for an attribute."""
    value = None if number == 0 else number
    is_text = attribute in ("name", "taken", "title", "status")
    return str(value) if is_text and value is not None else value


class Routed(Session):
    """What is written goes to the first bind, and what is read to the second."""

    home: Any = None
    away: Any = None
    reads_home = True

    def get_bind(self, mapper: Any = None, clause: Any = None) -> Any:  # type: ignore[override]
        return self.away if isinstance(clause, Select) and not self.reads_home else self.home


class World:
    """Databases, a session, and what is known in it."""

    def __init__(self, engine: Engine, away: Engine, signals: bool) -> None:
        self.engine = engine
        self.signals = signals
        self.heard = Heard()
        self.cls = type("Told" if signals else "Untold", (Routed,), {"home": engine, "away": away})
        for metadata in (ShopBase.metadata, Base.metadata):
            metadata.create_all(engine)
        with engine.begin() as connection:
            create_triggers(connection, ShopBase.metadata, Base.metadata)
        self.session: Any = None

    def open(self, autoflush: bool) -> None:
        """Begin anew, with empty tables."""
        self.heard.clear()
        with self.engine.begin() as connection:
            for table in reversed(TABLES):
                connection.execute(table.delete())
            connection.execute(text("DELETE FROM witness"))
        self.session = self.cls(autoflush=autoflush)

    def rows(self) -> dict[str, dict[Any, Any]]:
        """All that is in the tables, by table and key."""
        connection = self.session.connection(bind_arguments={})
        return {
            table.name: {
                tuple(row._mapping[column] for column in table.primary_key): dict(row._mapping)
                for row in connection.execute(select(table))
            }
            for table in TABLES
        }


class Statement(NamedTuple):
    """A statement of a program."""

    what: str
    target: str
    first: int
    second: int
    third: int
    synchronize: Any
    returning: bool
    style: str

    def build(self, dialect: str) -> tuple[Any, Any]:
        """What is executed, and its parameters."""
        cls, _, attribute = TARGETS[self.target]
        value = value_of(cls, attribute, self.second)
        kind = {"kind": inspect(cls).polymorphic_identity} if cls in (Employee, Clerk) else {}
        keys = key_of(cls, self.first, self.third)
        many = [
            {
                **key_of(cls, self.first + place, self.third + place),
                attribute: value_of(cls, attribute, place),
            }
            for place in range(1 + self.third % 3)
        ]
        if self.what == "by key":
            return update(cls), many
        if self.what == "insert":
            return insert(cls).values({**keys, **kind, attribute: value}), None
        if self.what == "insert list":
            return insert(cls), many
        if self.what == "from select":
            given = {**keys, **kind, attribute: value}
            columns = [inspect(cls).attrs[name].columns[0] for name in given]
            one = select(*map(literal, given.values(), (column.type for column in columns)))
            one = one.where(exists().where(Customer.id == self.first))
            return insert(cls).from_select([column.name for column in columns], one), None
        if self.what == "upsert":
            return self._upsert(sqlite if dialect == "sqlite" else postgresql), many
        return self._change()

    def _upsert(self, dialect: Any) -> Any:
        cls, _, attribute = TARGETS[self.target]
        new = dialect.insert(cls)
        keys = [column.name for column in inspect(cls).local_table.primary_key]
        if self.first % 3 == 0:
            return new.on_conflict_do_nothing(index_elements=keys)
        name = inspect(cls).attrs[attribute].columns[0].name
        return new.on_conflict_do_update(index_elements=keys, set_={name: new.excluded[name]})

    def _change(self) -> tuple[Any, Any]:
        cls, key, attribute = TARGETS[self.target]
        entity: Any = aliased(cls) if self.style == "alias" else cls
        column, to = getattr(entity, key), getattr(entity, attribute)
        one: Any = NAMES[self.first % 4] if cls is Tag else self.first
        others = select(literal("c") if cls is Tag else Customer.id)
        other = aliased(Customer)
        parameters = {"one": one} if self.style == "bound" else None
        where = [
            true(),
            column == one,
            column > one,
            or_(column == one, column.in_([one, one])),
            exists().where(other.id > self.first),
            column.in_(others.where(Customer.id > self.third)),
            tuple_(column, column).in_([(one, one)]),
        ][(self.first + 2 * self.third) % 7]
        if parameters is not None:
            where = column == bindparam("one")
        if self.what == "delete":
            return delete(entity).where(where), parameters
        if self.style == "join":
            where = and_(where, Customer.id > self.first)
        value = value_of(cls, attribute, self.second)
        computed = to + value if isinstance(value, int) else func.coalesce(to, value)
        new = [value, value, to, computed, null()][self.third]
        return update(entity).where(where).values({to: new}), parameters


number = st.integers(0, 4)
target = st.sampled_from(list(TARGETS))
statements = st.builds(
    Statement,
    st.sampled_from(
        ["update", "update", "delete", "by key", "insert", "insert list", "upsert", "from select"]
    ),
    target,
    number,
    number,
    number,
    st.sampled_from(["auto", "fetch", False]),
    st.booleans(),
    st.sampled_from(STYLES),
)
changes = st.tuples(
    st.sampled_from(["add", "set", "set", "remove", "get", "expire", "expunge"]),
    target,
    number,
    number,
    number,
)
ends = st.tuples(st.sampled_from(["flush", "begin", "release", "undo", "commit", "rollback"]))
programs = st.lists(st.one_of(statements, statements, changes, ends), min_size=8, max_size=40)


class Program:
    """One run in the two worlds, or in the first alone where receivers meddle."""

    def __init__(self, worlds: list[World], kind: str) -> None:
        self.worlds = worlds
        self.routed = kind == "routed"
        self.meddling = kind == "meddling"
        worlds[0].heard.meddle = meddle if self.meddling else None
        if self.meddling:
            self.worlds = worlds[:1]

    def run(self, step: tuple[Any, ...]) -> None:
        """Do one step in each world, which comes to the same."""
        STEPS[step[0]] += 1
        found = []
        for world in self.worlds:
            world.heard.clear()
            try:
                found.append((None, self.do(world, step)))
            except BulkOptionError as error:
                self.refused(world, error)
                return
            except (SQLAlchemyError, NotImplementedError) as error:
                found.append((failure(error), None))
            world.session.reads_home = True
        assert all(one == found[0] for one in found), (step, found)
        if found[0][0] is not None:
            STEPS["failed"] += 1
            for world in self.worlds:
                assert not world.heard.rows("post"), (step, found)
                world.session.rollback()

    def refused(self, world: World, error: BulkOptionError) -> None:
        """Nothing was done, because of a row of another class in the same table."""
        assert "loads no instance of" in str(error)
        assert not world.heard.calls
        assert not witnessed(world.session)
        STEPS["refused"] += 1
        for each in self.worlds:
            each.session.reads_home = True
            each.session.rollback()

    def do(self, world: World, step: tuple[Any, ...]) -> Any:
        """Do one step in one world; what it comes to."""
        if isinstance(step, Statement):
            return self.execute(world, step)
        what, *arguments = step
        session = world.session
        if arguments:
            return self.change(session, what, *arguments)
        nested = session.get_nested_transaction()
        if what == "begin":
            session.begin_nested()
        elif what in ("release", "undo"):
            if nested is not None:
                (nested.commit if what == "release" else nested.rollback)()
        elif what == "flush" or nested is None:
            getattr(session, what)()
        return None

    def change(self, session: Any, what: str, name: str, first: int, second: int, to: int) -> None:
        """Do something about one instance."""
        cls, _, attribute = TARGETS[name]
        key, value = key_of(cls, first, second), value_of(cls, attribute, to)
        if what == "add":
            session.add(cls(**key, **{attribute: value}))
            return
        with session.no_autoflush:
            instance = session.get(cls, tuple(key.values()))
        if instance is None:
            return
        if what == "set":
            setattr(instance, attribute, value)
        elif what == "remove":
            session.delete(instance)
        elif what in ("expire", "expunge"):
            getattr(session, what)(instance)

    def execute(self, world: World, step: Statement) -> Any:
        """Execute a statement, and check what was told of it."""
        session, mapper = world.session, inspect(TARGETS[step.target][0])
        statement, parameters = step.build(world.engine.dialect.name)
        options: dict[str, Any] = {}
        is_joined = len(mapper.tables) > 1
        if is_joined and step.what in ("insert", "upsert", "from select", "delete"):
            return None  # of one table alone, which leaves a part of a row
        returning = step.returning and step.what != "by key" and step.style != "alias"
        returning = returning and not (is_joined and step.what == "insert list")
        if returning:
            statement = statement.returning(*mapper.local_table.primary_key)
        if step.what in ("update", "delete"):
            # With both, SQLAlchemy returns a column of another table.
            cannot_fetch = (is_joined and returning) or step.style in ("alias", "join")
            no_fetch = step.synchronize == "fetch" and cannot_fetch
            options["synchronize_session"] = False if no_fetch else step.synchronize
        session.flush()
        before = world.rows()
        witnessed(session)
        world.heard.clear()
        session.reads_home = not self.routed
        if world.signals:
            options["signals"] = "rows"
        result = session.execute(statement, parameters, execution_options=options)
        found: Any = None
        if returning:
            found = sorted(map(repr, result.all()))
        elif step.what in ("update", "delete"):
            found = result.rowcount
        session.reads_home = True
        if world.signals:
            self.check(world, mapper, before)
        else:
            for instance in list(session.identity_map.values()):
                session.expire(instance)
        STEPS["statements"] += 1
        return found, world.rows() if len(self.worlds) > 1 else None

    def check(self, world: World, mapper: Any, before: dict[str, dict[Any, Any]]) -> None:
        """What was told is what was written, with the values before and after it."""
        session, heard = world.session, world.heard
        after = world.rows()
        with session.no_autoflush:
            seen = witnessed(session, *(table.name for table in mapper.tables))
        post = heard.rows("post")
        assert set(post) == set(seen), (post, seen)
        # A statement writes several tables, or a row twice, and is told of once.
        assert Counter(post) <= Counter(seen), (post, seen)
        if not self.meddling:
            assert len(set(post)) == len(post), post
            for call in heard.calls:
                if call["signal"] is post_save and not call["created"]:
                    assert call["changes"] == difference(call["instance"], before, after)
        for instance in session.identity_map.values():
            held_is_stored(instance, after)


def failure(error: Exception) -> str:
    """The kind of an error.

    For a statement of several tables that SQLite does not have, it is the one or the other: a
    CompileError where SQLAlchemy would have it return rows, to synchronize the session.
    """
    is_compiling = isinstance(error, CompileError | NotImplementedError)
    return "not compiled" if is_compiling else type(error).__name__


def meddle(sender: Any, **arguments: Any) -> None:
    """What a receiver assigns in time is written as well."""
    if arguments["signal"] is pre_save:
        instance = arguments["instance"]
        state = inspect(instance).dict
        if sender is Order and (state.get("id") or 0) % 2:
            instance.customer_id = None
            instance.status = "meddled"
        elif sender is Seat and (state.get("number") or 0) % 2:
            instance.taken = "meddled"


def stored(instance: Any, tables: dict[str, dict[Any, Any]]) -> dict[str, Any] | None:
    """What the tables hold of an instance, by attribute; ``None`` if a row is missing."""
    mapper = inspect(type(instance))
    identity = inspect(instance).key[1]
    found: dict[str, Any] = {}
    for table in mapper.tables:
        row = tables[table.name].get(tuple(identity))
        if row is None:
            return None
        for prop in mapper.column_attrs:
            for column in prop.columns:
                if column.table is table:
                    found[prop.key] = row[column.name]
    return found


def difference(instance: Any, before: Any, after: Any) -> dict[str, Any]:
    """Which attributes of an instance have other values in the tables now."""
    old, new = stored(instance, before), stored(instance, after)
    assert old is not None
    assert new is not None
    return {key: (old[key], new[key]) for key in old if old[key] != new[key]}


def held_is_stored(instance: Any, tables: Any) -> None:
    """An instance holds what the tables hold, but for what was assigned and not flushed."""
    state = inspect(instance)
    values = stored(instance, tables)
    if values is None:
        return
    for key, value in values.items():
        if key in state.dict and key not in state.committed_state:
            assert state.dict[key] == value, (instance, key)


@pytest.fixture(scope="module")
def sqlite_worlds() -> Iterator[list[World]]:
    """Two worlds in memory."""
    engines = [create_engine("sqlite://", poolclass=StaticPool) for _ in range(3)]
    for engine in engines:
        event.listen(engine, "connect", lambda dbapi, _: dbapi.execute("PRAGMA foreign_keys = 1"))
    yield from make_worlds(engines)


@pytest.fixture(scope="module")
def postgresql_worlds(postgresql_url: str) -> Iterator[list[World]]:
    """Two worlds in schemas of their own."""
    engines = []
    for name in ("told", "untold", "away"):
        options = {"options": f"-csearch_path={name}"}
        engine = create_engine(postgresql_url, connect_args=options, poolclass=StaticPool)
        with engine.begin() as connection:
            connection.execute(text(f"DROP SCHEMA IF EXISTS {name} CASCADE"))
            connection.execute(text(f"CREATE SCHEMA {name}"))
        engines.append(engine)
    yield from make_worlds(engines)


def make_worlds(engines: list[Engine]) -> Iterator[list[World]]:
    told, untold, away = engines

    @event.listens_for(away, "before_cursor_execute")
    def refuse(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        raise AssertionError(f"executed on the bind that is read: {statement}")

    yield [World(told, away, True), World(untold, away, False)]
    for engine in engines:
        engine.dispose()


@pytest.mark.parametrize("kind", ["plain", "routed", "meddling"])
@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)]
)
@settings(
    max_examples=EXAMPLES,
    derandomize="BULK_SEED" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(program=programs, autoflush=st.booleans())
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_random_statements(
    request: pytest.FixtureRequest,
    database: str,
    kind: str,
    program: list[tuple[Any, ...]],
    autoflush: bool,
):
    """With flushes and savepoints in between: exactly, and as without signals."""
    worlds = request.getfixturevalue(f"{database}_worlds")
    told = worlds[0]
    installation = sqla_signals.install(told.cls, bulk="ignore")
    for signal in (pre_save, post_save, pre_delete, post_delete):
        signal.connect(told.heard, weak=False)
    for world in worlds:
        world.open(autoflush)
        world.session.add_all([Customer(id=1, name="ada"), Customer(id=3, name="bob")])
        world.session.commit()
    run = Program(worlds, kind)
    try:
        for step in program:
            run.run(step)
    finally:
        for world in worlds:
            world.session.close()
        installation.remove()
        for signal in (pre_save, post_save, pre_delete, post_delete):
            signal._clear_state()
