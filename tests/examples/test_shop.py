"""The example shop keeps its rules, and its demo tells the truth."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session

import sqla_signals
from examples.shop.models import AuditEntry, Base, Counter, Customer, Order, OrderLine, Product
from sqla_signals import post_delete, post_save, pre_delete, pre_save
from tests.examples.running import connect_receivers, run_python


@pytest.fixture
def rules() -> Any:
    """The shop's receivers, connected."""
    return connect_receivers("examples.shop.receivers")


@pytest.fixture
def session(rules: Any, installed: sqla_signals.Installation) -> Iterator[Session]:
    """A session on a shop with Ada, ten mugs and five books."""
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Product(name="mug", stock=10), Product(name="book", stock=5)])
        session.add_all([Customer(name="Ada"), Counter(name="orders")])
        session.commit()
        yield session
    engine.dispose()


def ordered(session: Session, **quantities: int) -> Order:
    """Commit an order of Ada's with a line for each product named."""
    ada = session.scalars(select(Customer)).one()
    products = {product.name: product for product in session.scalars(select(Product))}
    lines = [OrderLine(product=products[name], quantity=n) for name, n in quantities.items()]
    order = Order(customer=ada, lines=lines)
    session.add(order)
    session.commit()
    return order


def stock(session: Session) -> dict[str, int]:
    """The rows of the stock, as another session would see them after a commit."""
    return {name: left for name, left in session.execute(select(Product.name, Product.stock))}


def audited(session: Session) -> list[tuple[str, str, dict[str, list[object]]]]:
    """The audit's rows in the order in which they were written."""
    entries = select(AuditEntry.action, AuditEntry.model, AuditEntry.changes)
    return [tuple(row) for row in session.execute(entries.order_by(AuditEntry.id))]


def count(session: Session, model: type[Base]) -> int | None:
    """The number of rows of `model`."""
    return session.scalar(select(func.count()).select_from(model))


def test_orders_of_one_flush_get_consecutive_numbers(session: Session) -> None:
    """The counter is one row, and what one receiver call does to it the next one sees."""
    ada = session.scalars(select(Customer)).one()
    session.add_all([Order(customer=ada), Order(customer=ada)])
    session.commit()
    numbers = session.scalars(select(Order.number).order_by(Order.id)).all()
    assert numbers == ["A-0001", "A-0002"]


def test_an_order_that_has_a_number_keeps_it(session: Session) -> None:
    """The receiver fills what is empty only."""
    ada = session.scalars(select(Customer)).one()
    session.add_all([Order(customer=ada, number="B-7"), Order(customer=ada)])
    session.commit()
    assert set(session.scalars(select(Order.number))) == {"B-7", "A-0001"}


def test_the_number_of_an_order_that_was_rolled_back_is_given_again(session: Session) -> None:
    """What a receiver writes is rolled back with the change it reacts to."""
    session.add(Order(customer=session.scalars(select(Customer)).one()))
    session.flush()
    session.rollback()
    assert ordered(session, mug=1).number == "A-0001"


def test_a_line_takes_from_stock(session: Session) -> None:
    """Committing writes what post_save receivers changed, too."""
    ordered(session, mug=2, book=1)
    assert stock(session) == {"mug": 8, "book": 4}


def test_a_new_quantity_takes_the_difference_even_if_the_line_was_not_loaded(
    session: Session,
) -> None:
    """The old quantity is known because the column has active_history."""
    line = ordered(session, mug=2).lines[0]
    session.commit()
    assert "quantity" not in vars(line)
    line.quantity = 5
    session.commit()
    assert stock(session) == {"mug": 5, "book": 5}


def test_another_product_on_a_line_puts_back_the_old_one(session: Session) -> None:
    """The foreign key that the flush sets is in the changes of post_save."""
    line = ordered(session, mug=2).lines[0]
    line.product = session.scalars(select(Product).filter_by(name="book")).one()
    line.quantity = 3
    session.commit()
    assert stock(session) == {"mug": 10, "book": 2}


def test_a_save_that_changes_neither_product_nor_quantity_moves_no_stock(session: Session) -> None:
    """The receiver's fields= lets other changes pass it by."""
    first, second = ordered(session, mug=2), ordered(session, book=1)
    second.lines.append(first.lines[0])
    session.commit()
    assert stock(session) == {"mug": 8, "book": 4}
    assert audited(session)[-1][:2] == ("updated", "OrderLine")


def test_a_removed_line_puts_its_pieces_back(session: Session) -> None:
    """A line that left its order is an orphan, which the flush deletes."""
    order = ordered(session, mug=2, book=1)
    del order.lines[1]
    session.commit()
    assert stock(session) == {"mug": 8, "book": 5}
    assert count(session, OrderLine) == 1


def test_a_deleted_line_puts_back_what_its_row_said(session: Session) -> None:
    """A quantity that was assigned and never flushed was never taken."""
    line = ordered(session, mug=2).lines[0]
    line.quantity = 5
    line.order.lines.remove(line)
    session.commit()
    assert stock(session) == {"mug": 10, "book": 5}


def test_a_deleted_order_puts_back_the_pieces_of_all_its_lines(session: Session) -> None:
    """The lines go with the order, by the cascade of the relationship."""
    session.delete(ordered(session, mug=2, book=1))
    session.commit()
    assert stock(session) == {"mug": 10, "book": 5}
    assert count(session, OrderLine) == 0


def test_too_large_a_quantity_rolls_back_all_that_the_transaction_did(
    session: Session, rules: Any
) -> None:
    """The exception of a post_save receiver reaches the caller; not even the audit remembers."""
    before = audited(session)
    with pytest.raises(rules.OutOfStock, match="11 × mug wanted, 10 left"):
        ordered(session, book=1, mug=11)
    session.rollback()
    assert stock(session) == {"mug": 10, "book": 5}
    assert count(session, Order) == 0
    assert audited(session) == before


def test_a_paid_order_is_not_deleted(session: Session, rules: Any) -> None:
    """A pre_delete receiver refuses before anything is written, and the session can go on."""
    order = ordered(session, mug=2)
    order.status = "paid"
    session.commit()
    session.delete(order)
    with pytest.raises(rules.OrderIsPaid, match="A-0001"):
        session.flush()
    with session.no_autoflush:
        assert (count(session, Order), count(session, OrderLine)) == (1, 1)
    session.rollback()
    assert stock(session) == {"mug": 8, "book": 5}
    session.scalars(select(Customer)).one().name = "Ada Lovelace"
    session.commit()
    assert audited(session)[-1] == ("updated", "Customer", {"name": ["Ada", "Ada Lovelace"]})


def test_the_audit_has_a_row_for_each_row_that_was_written(session: Session) -> None:
    """Also for rows that other receivers wrote; not for its own, nor for the counter."""
    start = len(audited(session))
    order = ordered(session, mug=2)
    session.delete(order)
    session.commit()
    actions = [(action, model) for action, model, _ in audited(session)[start:]]
    assert sorted(actions) == [
        ("created", "Order"),
        ("created", "OrderLine"),
        ("deleted", "Order"),
        ("deleted", "OrderLine"),
        ("updated", "Product"),
        ("updated", "Product"),
    ]
    moves = [row for action, model, row in audited(session)[start:] if model == "Product"]
    assert moves == [{"stock": [10, 8]}, {"stock": [8, 10]}]


def test_the_demo_leaves_the_rows_that_its_story_tells(tmp_path: Path, rules: Any) -> None:
    """Seen with the driver alone, after the demo is over."""
    from examples.shop import __main__ as demo

    path = tmp_path / "shop.db"
    demo.main(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name, stock, version FROM products ORDER BY id")
        assert rows.fetchall() == [("mug", 7, 3), ("book", 5, 3)]
        rows = connection.execute(
            "SELECT number, status, name FROM orders JOIN customers ON customers.id = customer_id"
        )
        assert rows.fetchall() == [("A-0001", "paid", "Ada Lovelace")]
        rows = connection.execute("SELECT product_id, quantity FROM order_lines")
        assert rows.fetchall() == [(1, 3)]
        rows = connection.execute("SELECT action, count(*) FROM audit_entries GROUP BY action")
        assert sorted(rows) == [("created", 6), ("deleted", 1), ("updated", 7)]


def test_the_demo_hears_one_pre_and_one_post_for_each_row(tmp_path: Path, rules: Any) -> None:
    """Step by step, as the journal of the demo has it."""
    from examples.shop import __main__ as demo

    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    Base.metadata.create_all(engine)
    installation = sqla_signals.install()
    journal = demo.Journal()
    for signal in (pre_save, post_save, pre_delete, post_delete):
        signal.connect(journal.hear, sender=Base, weak=False)
    with Session(engine) as session:
        pages = [demo.tell(session, step, journal) for step in demo.STEPS]
    installation.remove()
    engine.dispose()
    assert [sorted((e.model, e.row) for e in page if e.post != "-") for page in pages] == [
        [
            ("Counter", "created"),
            ("Customer", "created"),
            ("Product", "created"),
            ("Product", "created"),
        ],
        [
            ("Counter", "updated"),
            ("Order", "created"),
            ("OrderLine", "created"),
            ("OrderLine", "created"),
            ("Product", "updated"),
            ("Product", "updated"),
        ],
        [
            ("OrderLine", "deleted"),
            ("OrderLine", "updated"),
            ("Product", "updated"),
            ("Product", "updated"),
        ],
        [],
        [("Order", "updated")],
        [],
        [("Customer", "updated")],
    ]


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_the_demo_runs_as_a_user_runs_it(rich: bool) -> None:
    """Nothing on stderr, no warning, two screens of output, with and without Rich."""
    hide = "" if rich else "sys.modules['rich'] = None; "
    run = "runpy.run_module('examples.shop', run_name='__main__')"
    output = run_python("-c", f"import runpy, sys; {hide}{run}")
    assert "OutOfStock: 96 × mug wanted, 7 left" in output
    assert "OrderIsPaid: order A-0001 is paid" in output
    assert "status: open → paid" in output
    assert "order A-0001 of Ada Lovelace, paid: 3 × mug" in output
    assert len(output.splitlines()) < 100
