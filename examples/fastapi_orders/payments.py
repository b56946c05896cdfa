"""Stands for the client of a payment service."""


class CardDeclined(Exception):
    """The bank says no."""


async def authorize(card: str, amount: int) -> None:
    """Put a hold on so many cents; it lapses by itself unless it is captured later."""
    if card == "declined":
        raise CardDeclined(f"{amount / 100:.2f} declined")
