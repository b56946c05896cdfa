"""A few requests, and the e-mails they cause: `python -m examples.fastapi_orders`.

The requests go to the application as a server would pass them on, without a network in between.
"""

import asyncio
import inspect
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from httpx import ASGITransport, AsyncClient, Response

from examples import show
from examples.fastapi_orders.emails import queue
from examples.fastapi_orders.main import app
from examples.fastapi_orders.models import Product

MUG, BOOK = 1, 2


def order(card: str = "good", **body: Any) -> dict[str, Any]:
    """The body of a request for two mugs, with `body` on top."""
    lines = [{"product_id": MUG, "quantity": 2}]
    return {"email": "ada@example.org", "card": card, "lines": lines, **body}


async def place_an_order(client: AsyncClient) -> Response:
    """Ada orders two mugs."""
    return await client.post("/orders", json=order())


async def have_a_card_declined(client: AsyncClient) -> Response:
    """The bank declines her card, after the order was flushed: it is rolled back."""
    return await client.post("/orders", json=order(card="declined"))


async def forget_the_address(client: AsyncClient) -> Response:
    """A request that is refused before it reaches the database."""
    return await client.post("/orders", json=order(email="nowhere"))


async def want_too_many(client: AsyncClient) -> Response:
    """99 books are too many: a savepoint gives up that line, and the order stands."""
    lines = [{"product_id": MUG, "quantity": 1}, {"product_id": BOOK, "quantity": 99}]
    return await client.post("/orders", json=order(lines=lines))


async def ship(client: AsyncClient) -> Response:
    """The first order is shipped: the row has a new status."""
    return await client.post("/orders/1/shipment")


async def ship_again(client: AsyncClient) -> Response:
    """Somebody says so again: nothing changes."""
    return await client.post("/orders/1/shipment")


STEPS = (
    place_an_order,
    have_a_card_declined,
    forget_the_address,
    want_too_many,
    ship,
    ship_again,
)


async def main(url: str) -> None:
    """Run the application on the empty database at `url`, and leave its rows there."""
    os.environ["DATABASE_URL"] = url
    # A server does this when it starts and stops.
    async with app.router.lifespan_context(app):
        async with app.state.session_factory.begin() as session:
            session.add(Product(id=MUG, name="mug", price=800, stock=10))
            session.add(Product(id=BOOK, name="book", price=2500, stock=5))
        async with AsyncClient(transport=ASGITransport(app), base_url="http://shop") as client:
            for number, step in enumerate(STEPS, start=1):
                show.heading(f"{number}. {inspect.getdoc(step)}")
                await tell(client, step)


async def tell(client: AsyncClient, step: Callable[[AsyncClient], Awaitable[Response]]) -> None:
    """Run `step`; show the answer, and the e-mails that were queued meanwhile."""
    before = len(queue.waiting)
    response = await step(client)
    request = response.request
    status = f"{request.method} {request.url.path}: {response.status_code}"
    show.line(f"{status} {answer(response)}".rstrip())
    for email in queue.waiting[before:]:
        about = email.text.replace("\n", ", ")
        show.line(f"e-mail to {email.to}: {email.subject}. {about}".rstrip(), style="green")
    if len(queue.waiting) == before:
        show.line("no e-mail", style="dim")


def answer(response: Response) -> str:
    """The body of a response, in short."""
    if not response.content:
        return ""
    body = response.json()
    if response.status_code == 422:
        return "; ".join(error["msg"] for error in body["detail"])
    return str(body.get("detail", body))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(f"sqlite+aiosqlite:///{Path(directory, 'orders.db')}"))
