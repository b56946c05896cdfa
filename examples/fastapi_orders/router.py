"""The requests: place an order, read it, ship it."""

from typing import Annotated

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from examples.fastapi_orders.database import RequestSession
from examples.fastapi_orders.models import Order, OrderLine, Product
from examples.fastapi_orders.payments import CardDeclined, authorize

router = APIRouter(prefix="/orders")


class NewLine(BaseModel):
    """So many pieces of one product, please."""

    product_id: int
    quantity: Annotated[int, Field(gt=0, le=1000)]


class NewOrder(BaseModel):
    """The body of a request to place an order."""

    email: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")]
    card: str
    lines: Annotated[list[NewLine], Field(min_length=1)]


class PlacedOrder(BaseModel):
    """The answer: what was ordered, and which products there were too few of."""

    id: int
    total: int
    unavailable: list[int]


@router.post("", status_code=201)
async def place_order(new: NewOrder, session: RequestSession) -> PlacedOrder:
    """Order what is there of it, if the card is good for that."""
    order = Order(email=new.email)
    session.add(order)
    await session.flush()
    total, unavailable = 0, []
    # In one order for every request, so that no two of them wait for each other's products.
    for wanted in sorted(new.lines, key=lambda line: line.product_id):
        product = await session.get(Product, wanted.product_id)
        if product is None:
            raise HTTPException(404, f"there is no product {wanted.product_id}")
        if await add_line(session, order, wanted):
            total += product.price * wanted.quantity
        else:
            unavailable.append(wanted.product_id)
    if not total:
        raise HTTPException(409, "nothing of this is available")
    order.total = total
    try:
        await authorize(new.card, total)
    except CardDeclined as error:
        raise HTTPException(402, str(error)) from error
    await session.commit()
    return PlacedOrder(id=order.id, total=total, unavailable=unavailable)


async def add_line(session: AsyncSession, order: Order, wanted: NewLine) -> bool:
    """Add a line and take its pieces from stock; or neither, if there are too few left."""
    try:
        async with session.begin_nested():
            session.add(OrderLine(order_id=order.id, **wanted.model_dump()))
            await session.execute(
                update(Product)
                .where(Product.id == wanted.product_id)
                .values(stock=Product.stock - wanted.quantity)
            )
    except IntegrityError:  # stock >= 0
        return False
    return True


@router.get("/{order_id}")
async def read_order(order_id: int, session: RequestSession) -> dict[str, object]:
    """Show an order."""
    order = await find_order(session, order_id)
    names = select(Product.name, OrderLine.quantity).join(OrderLine.product)
    lines = await session.execute(names.where(OrderLine.order_id == order.id))
    return {
        "status": order.status,
        "total": order.total,
        "lines": {name: quantity for name, quantity in lines},
    }


@router.post("/{order_id}/shipment", status_code=204)
async def ship_order(order_id: int, session: RequestSession) -> None:
    """Note that the order is on its way. Saying so twice does no harm."""
    order = await find_order(session, order_id)
    order.status = "shipped"
    await session.commit()


async def find_order(session: AsyncSession, order_id: int) -> Order:
    """The order, or an answer of 404."""
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, f"there is no order {order_id}")
    return order
