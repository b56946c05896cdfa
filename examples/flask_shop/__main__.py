"""Two requests, and the one mail they cause: `python -m examples.flask_shop`."""

import tempfile
from pathlib import Path

from examples import show
from examples.flask_shop import mail
from examples.flask_shop.database import Product, db
from examples.flask_shop.main import create_app


def main(database_uri: str) -> None:
    """Run the application on the empty database at `database_uri`, and leave its rows there."""
    app = create_app(database_uri)
    with app.app_context():
        db.session.add(Product(name="mug", stock=10))
        db.session.commit()
    client = app.test_client()
    for quantity in (2, 99):
        show.heading(f"Ada orders {quantity} mugs")
        before = len(mail.sent)
        order = {"email": "ada@example.org", "product": "mug", "quantity": quantity}
        show.line(f"POST /orders: {client.post('/orders', json=order).status}")
        for message in mail.sent[before:]:
            about = message.get_content().strip()
            show.line(f"mail to {message['To']}: {message['Subject']}, {about}", style="green")
        if len(mail.sent) == before:
            show.line("no mail", style="dim")
    with app.app_context():
        db.engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(f"sqlite:///{Path(directory, 'shop.db')}")
