"""An order that was committed has its one e-mail, any other has none, whatever the requests do.

Rows and e-mails are looked at from outside: the rows over a connection of the test's own.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text

import sqla_signals
from sqla_signals import receiver_failed
from tests.conftest import clear_postgresql
from tests.examples.running import ROOT, connect_receivers, run_python

try:
    import fastapi  # noqa: F401
    from httpx import ASGITransport, AsyncClient, Response
except ImportError:
    if os.environ.get("CI"):
        raise
    pytest.skip("FastAPI or httpx is not installed", allow_module_level=True)

from examples.fastapi_orders import emails
from examples.fastapi_orders.app import create_app
from examples.fastapi_orders.models import Product

MUG, BOOK = 1, 2


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def outside(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """An engine of the test's own on the database that the application is going to open."""
    if request.param == "sqlite":
        # SQLite lets one transaction write at a time; the others wait for so many seconds.
        url = make_url(f"sqlite:///{tmp_path / 'orders.db'}?timeout=60")
        driver = "sqlite+aiosqlite"
    else:
        url = make_url(request.getfixturevalue("postgresql_url"))
        driver = "postgresql+asyncpg"
    address = url.set(drivername=driver).render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", address)
    engine = create_engine(url)
    yield engine
    engine.dispose()
    if request.param == "postgresql":
        clear_postgresql(url.render_as_string(hide_password=False))


@pytest.fixture(autouse=True)
def mail(monkeypatch: pytest.MonkeyPatch) -> list[emails.Email]:
    """The e-mails that are waiting; none to begin with."""
    waiting: list[emails.Email] = []
    monkeypatch.setattr(emails.queue, "waiting", waiting)
    return waiting


@pytest.fixture
def receivers(installed: sqla_signals.Installation) -> Any:
    """The application's receivers, connected, and signals installed: what `main.py` does."""
    return connect_receivers("examples.fastapi_orders.receivers")


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Let pytest run an async test."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@asynccontextmanager
async def serving() -> AsyncIterator[AsyncClient]:
    """A client of the running application, which sells ten mugs and five books."""
    app = create_app()
    async with app.router.lifespan_context(app):
        async with app.state.session_factory.begin() as session:
            session.add(Product(id=MUG, name="mug", price=800, stock=10))
            session.add(Product(id=BOOK, name="book", price=2500, stock=5))
        # A server would answer 500, too, and log the exception.
        transport = ASGITransport(app, raise_app_exceptions=False)
        async with AsyncClient(transport=transport, base_url="http://shop") as client:
            yield client


async def ordering(
    client: AsyncClient, *lines: tuple[int, int], card: str = "good", email: str = "ada@x.org"
) -> Response:
    """Send a request to order so many of each product."""
    wanted = [{"product_id": product, "quantity": quantity} for product, quantity in lines]
    return await client.post("/orders", json={"email": email, "card": card, "lines": wanted})


def rows(outside: Engine, query: str) -> list[tuple[Any, ...]]:
    """What another connection sees."""
    with outside.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def stock(outside: Engine) -> dict[str, int]:
    """The pieces left."""
    return dict(rows(outside, "SELECT name, stock FROM products"))  # type: ignore[arg-type]


def nothing_was_ordered(outside: Engine, mail: list[emails.Email]) -> bool:
    """Whether there is neither a row nor an e-mail of any order."""
    written = rows(outside, "SELECT id FROM orders UNION ALL SELECT id FROM order_lines")
    return not written and not mail and stock(outside) == {"mug": 10, "book": 5}


@asynchronous
async def test_an_order_has_one_confirmation(
    outside: Engine, receivers: Any, mail: list[emails.Email]
) -> None:
    """Though its row was inserted and then updated, in one transaction."""
    async with serving() as client:
        response = await ordering(client, (MUG, 2), (BOOK, 1))
    assert (response.status_code, response.json()["total"]) == (201, 4100)
    assert rows(outside, "SELECT id, email, total FROM orders") == [(1, "ada@x.org", 4100)]
    assert stock(outside) == {"mug": 8, "book": 4}
    assert mail == [emails.Email("ada@x.org", "Your order 1", "2 × mug\n1 × book")]


@asynchronous
async def test_the_order_is_committed_when_its_confirmation_is_queued(
    outside: Engine, receivers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another connection sees it, and the e-mail is queued before the request is answered."""
    seen = []

    async def put(email: emails.Email) -> None:
        seen.append(rows(outside, "SELECT id, total FROM orders"))

    monkeypatch.setattr(emails.queue, "put", put)
    async with serving() as client:
        await ordering(client, (MUG, 1))
        assert seen == [[(1, 800)]]


@asynchronous
async def test_a_later_step_that_fails_takes_order_and_confirmation_along(
    outside: Engine, receivers: Any, mail: list[emails.Email]
) -> None:
    """The card is declined, or a product does not exist, after the order was flushed."""
    async with serving() as client:
        declined = await ordering(client, (MUG, 1), card="declined")
        unknown = await ordering(client, (MUG, 1), (99, 1))
    assert (declined.status_code, unknown.status_code) == (402, 404)
    assert nothing_was_ordered(outside, mail)


@asynchronous
async def test_a_request_that_crashes_sends_nothing(
    outside: Engine, receivers: Any, mail: list[emails.Email], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that nobody expected; the next request is served as ever."""
    from examples.fastapi_orders import router

    async def crash(card: str, amount: int) -> None:
        raise RuntimeError("the payment service is gone")

    async with serving() as client:
        with monkeypatch.context() as patch:
            patch.setattr(router, "authorize", crash)
            assert (await ordering(client, (MUG, 1))).status_code == 500
        assert nothing_was_ordered(outside, mail)
        assert (await ordering(client, (MUG, 1))).status_code == 201
    assert len(mail) == len(rows(outside, "SELECT id FROM orders")) == 1


@asynchronous
async def test_a_request_that_is_cancelled_sends_nothing(
    outside: Engine, receivers: Any, mail: list[emails.Email], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client hangs up while the payment service is thinking."""
    from examples.fastapi_orders import router

    thinking = asyncio.Event()

    async def think(card: str, amount: int) -> None:
        thinking.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(router, "authorize", think)
    async with serving() as client:
        request = asyncio.create_task(ordering(client, (MUG, 1)))
        await thinking.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert nothing_was_ordered(outside, mail)


@asynchronous
async def test_a_commit_that_fails_sends_nothing(
    outside: Engine, receivers: Any, mail: list[emails.Email]
) -> None:
    """Everything went well until the database was asked to commit."""

    def fail(connection: Any) -> None:
        raise RuntimeError("the database is gone")

    async with serving() as client:
        event.listen(Engine, "commit", fail)
        try:
            assert (await ordering(client, (MUG, 1))).status_code == 500
        finally:
            event.remove(Engine, "commit", fail)
    assert nothing_was_ordered(outside, mail)


@asynchronous
async def test_an_invalid_request_sends_nothing(
    outside: Engine, receivers: Any, mail: list[emails.Email]
) -> None:
    """It is refused before it reaches the database."""
    async with serving() as client:
        for response in (
            await ordering(client, (MUG, 1), email="nowhere"),
            await ordering(client, (MUG, 0)),
            await ordering(client),
        ):
            assert response.status_code == 422
    assert nothing_was_ordered(outside, mail)


@asynchronous
async def test_a_line_given_up_in_a_savepoint_is_not_in_the_confirmation(
    outside: Engine, receivers: Any, mail: list[emails.Email]
) -> None:
    """The order and its other lines are kept."""
    async with serving() as client:
        response = await ordering(client, (MUG, 1), (BOOK, 6))
    assert response.json() == {"id": 1, "total": 800, "unavailable": [BOOK]}
    assert rows(outside, "SELECT product_id, quantity FROM order_lines") == [(MUG, 1)]
    assert stock(outside) == {"mug": 9, "book": 5}
    assert mail == [emails.Email("ada@x.org", "Your order 1", "1 × mug")]


@asynchronous
async def test_an_order_without_a_line_left_is_no_order(
    outside: Engine, receivers: Any, mail: list[emails.Email]
) -> None:
    """All its savepoints were rolled back, then the request was."""
    async with serving() as client:
        assert (await ordering(client, (MUG, 11), (BOOK, 6))).status_code == 409
    assert nothing_was_ordered(outside, mail)


@asynchronous
async def test_an_order_is_announced_as_shipped_once(
    outside: Engine, receivers: Any, mail: list[emails.Email]
) -> None:
    """The second request writes no row."""
    async with serving() as client:
        await ordering(client, (MUG, 1))
        for _ in range(2):
            assert (await client.post("/orders/1/shipment")).status_code == 204
        assert (await client.post("/orders/2/shipment")).status_code == 404
        shown = (await client.get("/orders/1")).json()
    assert shown == {"status": "shipped", "total": 800, "lines": {"mug": 1}}
    assert [email.subject for email in mail] == ["Your order 1", "Order 1 is on its way"]


@asynchronous
async def test_an_order_stands_if_its_confirmation_cannot_be_queued(
    outside: Engine,
    receivers: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The customer is told of the order; the failure is logged and signalled."""
    failures = []

    def notice(sender: type[Any], instance: Any, exception: Exception, **kwargs: Any) -> None:
        failures.append((sender.__name__, instance.id, str(exception)))

    async def put(email: emails.Email) -> None:
        raise ConnectionError("no queue")

    monkeypatch.setattr(emails.queue, "put", put)
    with receiver_failed.connected_to(notice), caplog.at_level(logging.ERROR, "sqla_signals"):
        async with serving() as client:
            assert (await ordering(client, (MUG, 1))).status_code == 201
    assert rows(outside, "SELECT id, total FROM orders") == [(1, 800)]
    assert failures == [("Order", 1, "no queue")]
    assert "confirm_order" in caplog.text


@asynchronous
async def test_of_many_requests_at_once_each_order_has_its_one_confirmation(
    outside: Engine, receivers: Any, mail: list[emails.Email]
) -> None:
    """Ten mugs, and twenty at once who want two and a book; every fourth of them cannot pay."""
    async with serving() as client:
        responses = await asyncio.gather(
            *(
                ordering(
                    client,
                    (MUG, 2),
                    (BOOK, 1),
                    card="declined" if number % 4 == 3 else "good",
                    email=f"{number}@x.org",
                )
                for number in range(20)
            )
        )
    placed = {
        f"Your order {response.json()['id']}": f"{number}@x.org"
        for number, response in enumerate(responses)
        if response.status_code == 201
    }
    assert Counter(response.status_code for response in responses).keys() <= {201, 402, 409}
    assert stock(outside) == {"mug": 0, "book": 0}
    assert rows(outside, "SELECT count(*), sum(total) FROM orders") == [(5, 5 * 4100)]
    assert rows(outside, "SELECT count(*), sum(quantity) FROM order_lines") == [(10, 15)]
    assert len(mail) == 5
    assert {email.subject: email.to for email in mail} == placed
    assert {email.text for email in mail} == {"2 × mug\n1 × book"}


@asynchronous
async def test_without_receivers_the_application_is_the_same_but_for_the_emails(
    outside: Engine, mail: list[emails.Email]
) -> None:
    """Nothing installed, nothing connected: the same answers, the same rows."""
    async with serving() as client:
        assert (await ordering(client, (MUG, 1), (BOOK, 6))).status_code == 201
        assert (await ordering(client, (MUG, 1), card="declined")).status_code == 402
    assert rows(outside, "SELECT id, total FROM orders") == [(1, 800)]
    assert stock(outside) == {"mug": 9, "book": 5}
    assert mail == []


def test_only_the_receivers_and_two_lines_of_main_know_of_signals() -> None:
    """The rest is a FastAPI application like any other."""
    package = ROOT / "examples" / "fastapi_orders"
    knowing = {
        path.name: [line for line in path.read_text("utf-8").splitlines() if "sqla_signals" in line]
        for path in package.glob("*.py")
    }
    assert knowing.pop("receivers.py") == ["from sqla_signals import post_save, receiver"]
    assert knowing.pop("main.py") == ["import sqla_signals", "sqla_signals.install()"]
    assert not any(knowing.values())


def test_the_demo_runs_as_a_user_runs_it() -> None:
    """Nothing on stderr, no warning; three e-mails, each below the request that caused it."""
    output = run_python("-m", "examples.fastapi_orders")
    told = [line for line in output.splitlines() if line and not line[0].isdigit()]
    told = [line for line in told if set(line) != {"-"}]
    assert told == [
        "POST /orders: 201 {'id': 1, 'total': 1600, 'unavailable': []}",
        "e-mail to ada@example.org: Your order 1. 2 × mug",
        "POST /orders: 402 16.00 declined",
        "no e-mail",
        "POST /orders: 422 String should match pattern '^[^@\\s]+@[^@\\s]+$'",
        "no e-mail",
        "POST /orders: 201 {'id': 2, 'total': 800, 'unavailable': [2]}",
        "e-mail to ada@example.org: Your order 2. 1 × mug",
        "POST /orders/1/shipment: 204",
        "e-mail to ada@example.org: Order 1 is on its way.",
        "POST /orders/1/shipment: 204",
        "no e-mail",
    ]
