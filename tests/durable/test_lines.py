"""What is odd about a value arrives in the outbox as it is, whatever the INSERT is made of."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from sqlalchemy import JSON, Engine, create_engine, event, exc, func, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.schema import CreateSchema, DropSchema

from sqla_signals import post_save, receiver
from sqla_signals.durable import outbox_table
from sqla_signals.durable.lines import _json_lines

from ..conftest import clear_postgresql

ODD = [
    "plain",
    "",
    "\\",
    "\\N",
    "\\n is no line break, \n is one, \r\n are two",
    "a tab\tand a \v and a \f",
    "100 % of %s and %(id)s and %% and :id",
    "'quoted' \"twice\" E'\\n' $$",
    '{1,NULL,"a"}',
    '","',
    "null",
    "[1]",
    "ß Ω 中 🦊 \u2028 \x1e \x7f",
]


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON}


SCHEMA = 'a "schema" of 5%'

outbox = outbox_table(Base.metadata, schema=SCHEMA, prefix="It's")


class Coupon(Base):
    """Known by a text."""

    __tablename__ = "coupons"
    code: Mapped[str] = mapped_column(primary_key=True)
    note: Mapped[str | None]
    terms: Mapped[dict[str, Any] | None]


@pytest.fixture
def coupons(postgresql_url: str, installed: object) -> Any:
    """An engine on a database with an outbox in a schema that has to be quoted."""

    @receiver(post_save, sender=Coupon, durable=True, name='shop."coupons"\n')
    def fn(sender, **kwargs): ...

    engine = create_engine(postgresql_url)
    schemas = (SCHEMA, "tenant")
    with engine.begin() as connection:
        for schema in schemas:
            connection.execute(CreateSchema(schema))
        Base.metadata.create_all(connection)
    yield engine
    with engine.begin() as connection:
        for schema in schemas:
            connection.execute(DropSchema(schema, cascade=True))
    engine.dispose()
    clear_postgresql(postgresql_url)


def written(engine: Engine) -> list[Any]:
    """The rows of the outbox, in order."""
    with engine.connect() as connection:
        return list(connection.execute(select(outbox.table).order_by(outbox.table.c.sequence)))


def odd_coupons() -> list[Coupon]:
    return [
        Coupon(code=odd, note=None if odd == "plain" else odd, terms={odd: [odd, None]})
        for odd in ODD
    ]


def assert_odd(rows: list[Any]) -> None:
    """Each of the events is that of its coupon."""
    by_key = {row.aggregate_id: row for row in rows}
    assert len(rows) == len(ODD)
    assert [*by_key] == [row.aggregate_id for row in rows]
    assert sorted(by_key) == sorted(ODD)
    for odd in ODD:
        row = by_key[odd]
        assert row.payload["key"] == [odd]
        assert row.payload["snapshot"] == {
            "code": odd,
            "note": None if odd == "plain" else odd,
            "terms": {odd: [odd, None]},
        }
        assert row.receivers == ['shop."coupons"\n']
        assert row.aggregate_type.endswith("Coupon")
        assert (row.event_type, row.headers, row.attempts) == ("created", {}, 0)
        assert row.occurred_at == row.available_at
    assert len({row.id for row in rows}) == len(ODD)


@pytest.mark.postgresql
def test_odd_texts_arrive_as_they_are(coupons: Engine):
    """In values, keys and names, through backslashes, line breaks, quotes and percent signs."""
    with Session(coupons) as session:
        session.add_all(odd_coupons())
        session.commit()
    assert_odd(written(coupons))


@pytest.mark.postgresql
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_odd_texts_arrive_with_each_asynchronous_driver(coupons: Engine, driver: str):
    """As parameters of one ordinary statement."""
    engine = create_async_engine(coupons.url.set(drivername=f"postgresql+{driver}"))

    async def work() -> None:
        async with AsyncSession(engine) as session:
            session.add_all(odd_coupons())
            await session.commit()
            session.add(Coupon(code="undone"))
            await session.flush()
            await session.rollback()
        await engine.dispose()

    asyncio.run(work())
    assert_odd(written(coupons))


@pytest.mark.postgresql
def test_many_events_are_one_statement_in_the_order_of_the_rows(coupons: Engine):
    """Those of a savepoint that was undone are not among them."""
    statements = []

    @event.listens_for(coupons, "before_cursor_execute")
    def _execute(connection, cursor, statement, parameters, context, executemany) -> None:
        if "outbox" in statement:
            statements.append(executemany)

    with Session(coupons) as session:
        for n in range(250):
            session.add(Coupon(code=f"{n:03}"))
        session.flush()
        with pytest.raises(ZeroDivisionError), session.begin_nested():
            session.add(Coupon(code="undone"))
            session.flush()
            1 / 0
        with session.begin_nested():
            session.add(Coupon(code="kept"))
        session.commit()
    assert statements == [False]
    rows = written(coupons)
    assert [row.aggregate_id for row in rows] == [*(f"{n:03}" for n in range(250)), "kept"]
    assert [row.id for row in rows] == sorted(row.id for row in rows)


@pytest.mark.postgresql
def test_the_time_is_that_of_the_statement(coupons: Engine):
    """Of the database's clock, and not when the transaction began."""
    with Session(coupons) as session:
        began = session.scalar(select(func.now()))
        before = session.scalar(select(func.clock_timestamp()))
        session.add(Coupon(code="a"))
        session.commit()
        after = session.scalar(select(func.clock_timestamp()))
    (row,) = written(coupons)
    assert began < before < row.occurred_at == row.available_at < after


@pytest.mark.postgresql
def test_a_schema_is_translated_for_the_events_too(coupons: Engine):
    """Where the rows of a tenant go, its events go."""
    tenant = coupons.execution_options(schema_translate_map={SCHEMA: "tenant"})
    with tenant.begin() as connection:
        Base.metadata.create_all(connection)
    with Session(tenant) as session:
        session.add(Coupon(code="a"))
        session.commit()
    assert written(coupons) == []
    assert [row.aggregate_id for row in written(tenant)] == ["a"]


@pytest.mark.postgresql
@pytest.mark.parametrize("odd", ["\0", "\ud800", 1e17, [[1e400]]], ids=repr)
def test_what_a_column_of_json_takes_the_message_takes(coupons: Engine, odd: Any):
    """Also what JSONB would refuse or write as something else; NaN and the like no column takes."""
    with Session(coupons) as session:
        session.add(Coupon(code="a", terms={"odd": odd}))
        if odd == [[1e400]]:
            with pytest.raises(exc.DataError, match="Infinity"):
                session.commit()
            return
        session.commit()
    (row,) = written(coupons)
    assert repr(row.payload["snapshot"]["terms"]) == repr({"odd": odd})


def test_each_value_is_json_on_a_line_of_its_own():
    """Whatever is in it."""
    values = [*ODD, {"a": ODD}, [], {}, None, 1, True, 1.5, [None, "\n"]]
    for some in (values, values[:1], [""]):
        lines = _json_lines(some).split("\n")
        assert [json.loads(line) for line in lines] == some
