"""A morning in the shop: `python -m examples.shop`.

Each step is ordinary application code, shown as it runs, and below it the signals that arrived.
"""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

import sqla_signals
from examples import show
from examples.shop import receivers
from examples.shop.models import AuditEntry, Base, Counter, Customer, Order, OrderLine, Product
from sqla_signals import UNSET, Change, Signal, post_delete, post_save, pre_delete, pre_save


def open_the_shop(session: Session) -> None:
    """The shop opens, with its first customer."""
    session.add_all([Product(name="mug", stock=10), Product(name="book", stock=5)])
    session.add_all([Customer(name="Ada"), Counter(name="orders")])
    session.commit()


def order_two_things(session: Session) -> None:
    """Ada orders: one receiver numbers the order, another takes from stock."""
    ada = session.scalars(select(Customer)).one()
    mug, book = session.scalars(select(Product).order_by(Product.id))
    lines = [OrderLine(product=p, quantity=n) for p, n in [(mug, 2), (book, 1)]]
    session.add(Order(customer=ada, lines=lines))
    session.commit()


def drop_the_book(session: Session) -> None:
    """A third mug, and no book: the orphaned line is deleted, the book put back."""
    order = session.scalars(select(Order)).one()
    order.lines[0].quantity = 3
    del order.lines[1]
    session.commit()


def want_too_many(session: Session) -> None:
    """99 mugs: a post_save receiver raises, and the transaction is rolled back."""
    session.scalars(select(OrderLine)).one().quantity = 99
    session.commit()


def pay(session: Session) -> None:
    """She pays."""
    session.scalars(select(Order)).one().status = "paid"
    session.commit()


def delete_the_order(session: Session) -> None:
    """Somebody deletes the paid order: a pre_delete receiver refuses."""
    session.delete(session.scalars(select(Order)).one())
    session.commit()


def go_on(session: Session) -> None:
    """The same session goes on."""
    session.scalars(select(Customer)).one().name = "Ada Lovelace"
    session.commit()


STEPS = (
    open_the_shop,
    order_two_things,
    drop_the_book,
    want_too_many,
    pay,
    delete_the_order,
    go_on,
)


@dataclass(slots=True)
class Event:
    """One row in one flush; `pre` and `post` say as which signal of the step they arrived."""

    model: str
    row: str
    pre: str
    post: str = "-"
    changes: str = ""


class Journal:
    """Hears every signal of the shop. The audit's own rows are left out, for brevity."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.announced: dict[int, Event] = {}
        self.count = 0

    def hear(
        self,
        sender: type[Any],
        instance: Any,
        signal: Signal,
        created: bool = False,
        changes: Mapping[str, Change] | None = None,
        **kwargs: Any,
    ) -> None:
        """Receive any of the four signals; `created` and `changes` come with the saves."""
        if sender is AuditEntry:
            return
        self.count += 1
        if signal in (pre_save, pre_delete):
            row = "deleted" if signal is pre_delete else "created" if created else "updated"
            event = self.announced[id(instance)] = Event(sender.__name__, row, f"#{self.count}")
            self.events.append(event)
        else:
            event = self.announced.pop(id(instance))
            event.post = f"#{self.count}"
        event.changes = describe(changes or {})

    def turn_page(self) -> list[Event]:
        """Return what was heard since the last call."""
        page, self.events, self.count = self.events, [], 0
        self.announced.clear()
        return page


def describe(changes: Mapping[str, Change]) -> str:
    """Say `name: old → new`, or `name=new` where there was no old value."""
    return ", ".join(
        f"{name}={change.new}" if change.old is UNSET else f"{name}: {change.old} → {change.new}"
        for name, change in changes.items()
    )


def source_of(step: Callable[[Session], None]) -> str:
    """The body of `step`, without its docstring."""
    lines, _ = inspect.getsourcelines(step)
    return textwrap.dedent("".join(lines[2:])).rstrip()


def main(url: str = "sqlite://") -> None:
    """Tell the story in the database at `url`, which is empty, and leave its rows there."""
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    journal = Journal()
    with ExitStack() as stack:
        stack.callback(engine.dispose)
        stack.callback(sqla_signals.install().remove)
        for signal in (pre_save, post_save, pre_delete, post_delete):
            stack.enter_context(signal.connected_to(journal.hear, sender=Base))
        session = stack.enter_context(Session(engine))
        show.line("Below each step: the rows it wrote, and when the signals of each arrived.")
        for number, step in enumerate(STEPS, start=1):
            show.heading(f"{number}. {inspect.getdoc(step)}")
            show.code(source_of(step))
            tell(session, step, journal)
        show_rows(session)


def tell(session: Session, step: Callable[[Session], None], journal: Journal) -> list[Event]:
    """Run `step`; show and return what arrived, and show the refusal if there was one."""
    try:
        step(session)
    except (receivers.OutOfStock, receivers.OrderIsPaid) as error:
        session.rollback()
        show.line("\n".join([f"{type(error).__name__}: {error}", *error.__notes__]), style="red")
    if events := journal.turn_page():
        rows = [(event.model, event.row, event.pre, event.post, event.changes) for event in events]
        show.table(["model", "row", "pre", "post", "changes"], rows)
    return events


def show_rows(session: Session) -> None:
    """Print what is in the tables now."""
    show.heading("What the database holds now")
    for product in session.scalars(select(Product).order_by(Product.id)):
        show.line(f"{product.stock} {product.name}s in stock")
    for order in session.scalars(select(Order)):
        lines = ", ".join(f"{line.quantity} × {line.product.name}" for line in order.lines)
        show.line(f"order {order.number} of {order.customer.name}, {order.status}: {lines}")
    entries = session.scalars(select(AuditEntry).order_by(AuditEntry.id)).all()
    show.line(f"{len(entries)} audit entries, the last of them:")
    rows = [(entry.id, entry.action, entry.model, entry.row_id, entry.changes) for entry in entries]
    show.table(["id", "action", "model", "row_id", "changes"], rows[-5:])


if __name__ == "__main__":
    main()
