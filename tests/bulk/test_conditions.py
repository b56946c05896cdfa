"""Which rows a statement with ``{"signals": "rows"}`` is about: those that it writes without it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import (
    Column,
    ForeignKey,
    Integer,
    String,
    Table,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, column_property, mapped_column
from sqlalchemy.orm import with_loader_criteria as criteria
from sqlalchemy.orm.exc import StaleDataError

from sqla_signals import BulkOptionError, Change, post_save
from tests.contract.observing import rows

from ..conftest import before_sqlalchemy
from .shop import (
    Clerk,
    Customer,
    Employee,
    Heard,
    Manager,
    Order,
    create_triggers,
    witnessed,
)
from .test_rows import ROWS, fill, on_an_alias, staff, told, updates, upsert

SKIP: Any = {"signals": "skip"}


def same_without_signals(session: Session, statement: Any, *tables: str, **options: Any) -> Any:
    """Execute it in a savepoint with signals and in one without, and compare what was written."""
    written = []
    for signals in (SKIP, ROWS):
        savepoint = session.begin_nested()
        result = session.execute(
            statement, execution_options={"synchronize_session": False, **options, **signals}
        )
        written.append((result.rowcount, witnessed(session, *tables)))
        savepoint.rollback()
    assert written[0] == written[1]
    return written[0][1]


@pytest.mark.filterwarnings("ignore:.*cartesian product:sqlalchemy.exc.SAWarning")
def test_a_condition_on_an_inherited_attribute(session: Session):
    """The UPDATE does not join the table of the parent class by itself."""
    staff(session)
    heard = Heard().connect(Manager)
    statement = update(Manager).where(Manager.name == "m").values(budget=9)
    assert same_without_signals(session, statement) == updates(2, 4)
    assert heard.rows("post") == heard.rows("pre") == updates(2, 4)
    heard.clear()
    joined = statement.where(Manager.id == Employee.id)
    assert same_without_signals(session, joined) == updates(2)
    assert heard.rows("post") == heard.rows("pre") == updates(2)


@on_an_alias
@pytest.mark.filterwarnings("ignore:.*cartesian product:sqlalchemy.exc.SAWarning")
def test_loader_criteria_of_another_class_and_of_an_alias(session: Session):
    """They restrict the class that is written, and what subqueries select."""
    fill(session)
    heard = Heard().connect(Order)
    of_bob = criteria(Customer, Customer.name == "bob", include_aliases=True)
    statement = update(Order).values(total=0).options(of_bob)
    beside = statement.where(Order.customer_id == Customer.id)
    assert same_without_signals(session, beside) == updates(1, 2, 3, 4, 5)
    assert heard.rows("post") == updates(1, 2, 3, 4, 5)
    heard.clear()
    inside = statement.where(Order.customer_id.in_(select(Customer.id)))
    assert same_without_signals(session, inside) == updates(1, 3, 5)
    assert heard.rows("post") == heard.rows("pre") == updates(1, 3, 5)
    heard.clear()
    other = aliased(Order)
    large = criteria(Order, Order.total > 3, include_aliases=True)
    of_alias = update(other).where(other.id > 2).values(total=0).options(large)
    seen = same_without_signals(session, of_alias)
    assert heard.rows("post") == heard.rows("pre") == seen


@on_an_alias
@pytest.mark.filterwarnings("ignore:.*cartesian product:sqlalchemy.exc.SAWarning")
def test_an_alias_of_a_subclass_in_the_same_table(session: Session):
    """SQLAlchemy writes rows of other classes too, which have no instance of this one."""
    staff(session)
    heard = Heard().connect()
    statement = update(aliased(Clerk)).values(name="x")
    options: Any = {"synchronize_session": False}
    with pytest.raises(BulkOptionError, match=r"no instance of Clerk for the row \(1,\)"):
        session.execute(statement, execution_options={**ROWS, **options})
    assert [call for call in heard.calls if "instance" in call] == witnessed(session) == []
    assert session.execute(statement, execution_options={**SKIP, **options}).rowcount == 4


@on_an_alias
@pytest.mark.parametrize("operation", ["update", "delete"])
def test_conditions_that_refer_to_the_row(session: Session, operation: str):
    """In a subquery, by the class or by an alias of it."""
    fill(session)
    heard = Heard().connect(Order)
    for entity in (Order, aliased(Order)):
        statement: Any = delete(entity)
        if operation == "update":
            statement = update(entity).values(status="x")
        bobs = exists().where(Customer.id == entity.customer_id, Customer.name == "bob")
        heard.clear()
        seen = same_without_signals(session, statement.where(bobs))
        assert seen == [(operation, key) for key in "135"]
        assert heard.rows("post") == heard.rows("pre") == seen


def test_a_common_table_expression(session: Session):
    """One that selects."""
    fill(session)
    heard = Heard().connect(Order)
    large = select(Order.id.label("key")).where(Order.total > 3).cte("large")
    by_subquery = update(Order).values(total=0).where(Order.id.in_(select(large.c.key)))
    session.execute(by_subquery, execution_options=ROWS)
    assert told(session, heard) == updates(4, 5)
    session.rollback()
    heard.clear()
    beside = update(Order).values(total=0).where(Order.id == large.c.key)
    session.execute(beside, execution_options={**ROWS, "synchronize_session": False})
    assert told(session, heard) == updates(4, 5)


@pytest.mark.parametrize("place", ["subquery", "beside"])
def test_a_common_table_expression_that_writes_is_refused(session: Session, place: str):
    """It would be executed to look the rows up, and then again."""
    if session.get_bind().dialect.name != "postgresql":
        pytest.skip("SQLite has none")
    fill(session)
    heard = Heard().connect(Order)
    removed = delete(Order).where(Order.id == 1).returning(Order.customer_id).cte()
    [column] = removed.c
    of_them = column == Order.customer_id
    if place == "subquery":
        of_them = Order.customer_id.in_(select(column))
    statement = update(Order).where(of_them).values(total=0)
    options: Any = {"synchronize_session": False}
    with pytest.raises(BulkOptionError, match=r"where\(\) contains a statement that writes"):
        session.execute(statement, execution_options={**ROWS, **options})
    assert heard.calls == witnessed(session) == []
    assert session.execute(statement, execution_options={**SKIP, **options}).rowcount == 2


def test_parameters_by_the_names_of_columns(session: Session):
    """As SQLAlchemy takes them for a statement with a condition; those of where() go there."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order).where(Order.id == bindparam("key")),
        {"key": 2, "state": "x"},
        execution_options=ROWS,
    )
    assert told(session, heard) == updates(2)
    for name in ("pre_save", "post_save"):
        assert heard.of(name)[0]["changes"] == {"status": Change("open", "x")}


@pytest.mark.parametrize("strategy", ["raw", "orm"])
@pytest.mark.parametrize("many", [False, True], ids=["one", "list"])
def test_an_insert_that_the_orm_leaves_to_core(session: Session, strategy: str, many: bool):
    """Its parameters have the names of columns, and receivers may assign to them."""
    heard = Heard().connect(Order)

    def assign(sender: Any, signal: Any, **kwargs: Any) -> None:
        if signal.name == "pre_save":
            assert kwargs["instance"].status == "a"
            kwargs["instance"].status = "b"

    heard.meddle = assign
    given: Any = [{"id": 1, "state": "a"}, {"id": 2, "state": "a"}]
    options: Any = {**ROWS, "dml_strategy": strategy}
    session.execute(insert(Order), given if many else given[0], execution_options=options)
    assert told(session, heard) == [("insert", "1"), ("insert", "2")][: 1 + many]
    assert rows(session, Order.status) == ["b"] * (1 + many)


@pytest.mark.parametrize("operation", ["insert", "insert list", "update", "delete", "upsert"])
def test_pending_changes_are_flushed_before(session: Session, operation: str):
    """Of other classes, too: the statement may need them."""
    heard = Heard().connect(Order)
    session.add(Customer(id=9, name="new"))
    new = {"id": 1, "customer_id": 9}
    if operation in ("update", "delete"):
        session.add(Order(id=1))
    dialect = upsert(session)
    statement, parameters = {
        "insert": (insert(Order).values(new), None),
        "insert list": (insert(Order), [new]),
        "update": (update(Order).values(customer_id=9), None),
        "delete": (delete(Order).where(exists().where(Customer.id == 9)), None),
        "upsert": (
            dialect.values(new).on_conflict_do_update(index_elements=["id"], set_={"total": 1}),
            None,
        ),
    }[operation]
    session.execute(statement, parameters, execution_options=ROWS)
    seen = witnessed(session, "orders")
    assert heard.rows("post") == heard.rows("pre") == seen
    assert rows(session, Customer.id) == [9]


@pytest.mark.parametrize("by_key", [False, True], ids=["where", "by key"])
def test_a_subclass_whose_key_is_another_attribute(session: Session, by_key: bool):
    """What is written is its own table, by its own key, with the defaults of each table."""

    class OwnBase(DeclarativeBase):
        pass

    class Plant(OwnBase):
        __tablename__ = "plants"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        name: Mapped[str | None]
        writes: Mapped[int] = mapped_column(default=0, onupdate=8)
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "plant"}

    class Tree(Plant):
        __tablename__ = "trees"
        plant_id: Mapped[int] = mapped_column(ForeignKey("plants.id"), primary_key=True)
        height: Mapped[int | None]
        cuts: Mapped[int] = mapped_column(default=0, onupdate=9)
        __mapper_args__ = {"polymorphic_identity": "tree"}

    connection = session.connection()
    OwnBase.metadata.create_all(connection)
    session.add_all([Plant(id=1), Tree(id=2, height=1), Tree(id=3, height=2)])
    session.commit()
    heard = Heard().connect(Tree)
    statement: Any = update(Tree).where(Tree.height == 2).values(height=5)
    parameters = None
    changes = {"height": Change(2, 5), "cuts": Change(0, 9)}
    if by_key:
        statement, parameters = update(Tree), [{"id": 3, "plant_id": 3, "name": "oak", "height": 5}]
        changes |= {"name": Change(None, "oak"), "writes": Change(0, 8)}
    session.execute(statement, parameters, execution_options=ROWS)
    assert heard.rows("post") == heard.rows("pre") == updates(3)
    (call,) = heard.of("post_save")
    assert call["changes"] == changes
    assert call["update_fields"] == set(changes)
    table: Any = Tree.__table__
    assert rows(session, table.c.height, table.c.cuts) == [(1, 0), (5, 9)]


def test_updates_by_key_with_values_of_the_statement(session: Session):
    """They are set in each row, besides its own."""
    fill(session)
    heard = Heard().connect(Order)
    session.execute(
        update(Order).values(status="x"), [{"id": 1}, {"id": 2, "total": 7}], execution_options=ROWS
    )
    assert told(session, heard) == updates(1, 2)
    assert [call["changes"] for call in heard.of("post_save")] == [
        {"status": Change("open", "x")},
        {"status": Change("open", "x"), "total": Change(2, 7)},
    ]


def test_updates_by_key_of_a_hierarchy_in_one_table(session: Session):
    """SQLAlchemy does not look at the kind; what is no clerk is not written as one."""
    staff(session)
    heard = Heard().connect()
    session.execute(update(Clerk), [{"id": 3, "name": "x"}], execution_options=ROWS)
    assert told(session, heard) == updates(3)
    heard.clear()
    with pytest.raises(BulkOptionError, match=r"no instance of Clerk for the row \(1,\)"):
        session.execute(update(Clerk), [{"id": 1, "name": "x"}], execution_options=ROWS)
    assert [call for call in heard.calls if "instance" in call] == witnessed(session) == []


@pytest.fixture
def Versioned(session: Session) -> Any:
    """A class with a version, two rows of it, and its triggers."""

    class OwnBase(DeclarativeBase):
        pass

    class Page(OwnBase):
        __tablename__ = "pages"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str | None]
        version: Mapped[int] = mapped_column()
        __mapper_args__ = {"version_id_col": version}

    connection = session.connection()
    OwnBase.metadata.create_all(connection)
    connection.exec_driver_sql("DROP TABLE witness")
    create_triggers(connection, OwnBase.metadata)
    session.add_all([Page(id=1), Page(id=2)])
    session.commit()
    witnessed(session)
    return Page


def test_updates_by_key_with_a_version(session: Session, Versioned: Any):
    """The new version is among the changes."""
    heard = Heard().connect(Versioned)
    given = [{"id": key, "text": "x", "version": 1} for key in (1, 2)]
    session.execute(update(Versioned), given, execution_options=ROWS)
    assert told(session, heard) == updates(1, 2)
    for call in heard.of("post_save"):
        assert call["changes"] == {"text": Change(None, "x"), "version": Change(1, 2)}
    assert [call["changes"] for call in heard.of("pre_save")] == [{"text": Change(None, "x")}] * 2


def test_updates_by_key_with_an_old_version(session: Session, Versioned: Any):
    """Refused as without signals; with a condition SQLAlchemy passes such a row over."""
    heard = Heard().connect(Versioned)
    given = [{"id": key, "text": "x", "version": key} for key in (1, 2)]
    with pytest.raises(StaleDataError, match=r"expected to update 2 row\(s\); 1 were matched"):
        session.execute(update(Versioned), given, execution_options=ROWS)
    assert heard.rows("pre") == witnessed(session) == []
    options: Any = {**ROWS, "synchronize_session": None}
    session.execute(
        update(Versioned).where(Versioned.text.is_(None)), given, execution_options=options
    )
    assert told(session, heard) == updates(1)
    assert rows(session, Versioned.id, Versioned.text) == [(1, "x"), (2, None)]


def test_updates_by_key_with_a_condition_that_changes_its_mind(session: Session):
    """It is asked once: what it has matched is locked and written."""
    if session.get_bind().dialect.name != "sqlite":
        pytest.skip("the function is SQLite's")
    fill(session)
    lucky = {1, 3}

    def is_lucky(key: int) -> bool:
        answer = key in lucky
        lucky.discard(key)
        return answer

    driver: Any = session.connection().connection.driver_connection
    driver.create_function("is_lucky", 1, is_lucky)
    heard = Heard()
    post_save.connect(heard, Order)  # after a pre_ receiver it would be asked once more
    session.execute(
        update(Order).where(func.is_lucky(Order.id) == 1),
        [{"id": key, "total": 9} for key in (1, 2, 3)],
        execution_options={**ROWS, "synchronize_session": None},
    )
    assert heard.rows("post") == witnessed(session) == updates(1, 3)


@pytest.mark.skipif(before_sqlalchemy("2.1"), reason="statements have no extensions there")
@pytest.mark.parametrize("statement", [update(Order).values(total=7), delete(Order)], ids=str)
def test_what_follows_the_condition_is_refused(session: Session, statement: Any):
    """A LIMIT chooses among the rows, and who knows what an extension of somebody else does."""
    fill(session)
    heard = Heard().connect(Order)
    with pytest.raises(BulkOptionError, match=r"Say in where\(\) which rows"):
        session.execute(statement.ext(mysql.limit(1)), execution_options=ROWS)
    assert heard.calls == []
    assert rows(session, Order.total) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("prefix", ["OR REPLACE", "or replace", text("OR  REPLACE")], ids=str)
@pytest.mark.parametrize("operation", ["insert", "inserts", "update"])
def test_or_replace_is_refused(session: Session, operation: str, prefix: Any):
    """SQLite deletes the rows that are in the way and says nothing about them."""
    if session.get_bind().dialect.name != "sqlite":
        pytest.skip("only SQLite has it")
    fill(session)
    heard = Heard().connect(Order)
    statement, parameters = {
        "insert": (insert(Order).values(number=10), None),
        "inserts": (insert(Order), [{"number": 10}]),
        "update": (update(Order).where(Order.id == 2).values(number=10), None),
    }[operation]
    with pytest.raises(BulkOptionError, match=r"OR REPLACE.*on_conflict_do_update"):
        session.execute(statement.prefix_with(prefix), parameters, execution_options=ROWS)
    assert heard.calls == []
    assert rows(session, Order.id) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("operation", ["insert", "update", "by key"])
def test_or_ignore_tells_of_the_rows_that_it_wrote(session: Session, operation: str):
    """RETURNING names them."""
    if session.get_bind().dialect.name != "sqlite":
        pytest.skip("only SQLite has it")
    fill(session)
    heard = Heard().connect(Order)
    statement, parameters, changed = {
        "insert": (insert(Order), [{"id": 7, "number": 10}, {"id": 8}], [("insert", "8")]),
        "update": (
            update(Order).where(Order.id < 3).values(number=Order.number + 40),
            None,
            updates(2),
        ),
        "by key": (update(Order), [{"id": 1, "number": 10}], updates(1)),
    }[operation]
    options = {**ROWS, "synchronize_session": False}
    session.execute(statement.prefix_with("OR IGNORE"), parameters, execution_options=options)
    assert heard.rows("post") == witnessed(session) == changed


def test_a_table_without_a_primary_key(session: Session):
    """The mapper says which columns are the key."""

    class OwnBase(DeclarativeBase):
        pass

    class Log(OwnBase):
        __table__ = Table(
            "log", OwnBase.metadata, Column("id", Integer), Column("text", String(10))
        )
        __mapper_args__: Any = {"primary_key": [__table__.c.id]}

    OwnBase.metadata.create_all(session.connection())
    heard = Heard().connect(Log)
    session.execute(insert(Log), [{"id": 1, "text": "a"}, {"id": 2}], execution_options=ROWS)
    session.execute(update(Log).where(Log.id == 1).values(text="b"), execution_options=ROWS)
    session.execute(update(Log), [{"id": 2, "text": "c"}], execution_options=ROWS)
    assert rows(session, Log.id, Log.text) == [(1, "b"), (2, "c")]
    session.execute(delete(Log), execution_options=ROWS)
    changed = [("delete", "1"), ("delete", "2"), ("insert", "1"), ("insert", "2"), *updates(1, 2)]
    assert heard.rows("post") == heard.rows("pre") == changed


@pytest.mark.parametrize("operation", ["insert", "update", "by key", "delete"])
def test_a_class_that_is_mapped_to_a_join_is_refused(session: Session, operation: str):
    """SQLAlchemy itself can do little with it, and returns nothing."""

    class OwnBase(DeclarativeBase):
        pass

    class Left(OwnBase):
        __tablename__ = "lefts"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Right(OwnBase):
        __tablename__ = "rights"
        id: Mapped[int] = mapped_column(ForeignKey("lefts.id"), primary_key=True)
        size: Mapped[int | None]

    left, right = Left.__table__, Right.__table__

    class Both(OwnBase):
        __table__ = left.join(right)
        id = column_property(left.c.id, right.c.id)

    OwnBase.metadata.create_all(session.connection())
    heard = Heard().connect(Both)
    statement, parameters = {
        "insert": (insert(Both), [{"id": 1, "size": 1}]),
        "update": (update(Both).values(size=1), None),
        "by key": (update(Both), [{"id": 1, "size": 1}]),
        "delete": (delete(Both), None),
    }[operation]
    with pytest.raises(BulkOptionError, match="Both, which is mapped to several tables"):
        session.execute(statement, parameters, execution_options=ROWS)
    assert heard.calls == rows(session, left.c.id) == []
