"""The application, complete without signals."""

from typing import Any

from flask import Flask, abort, request

from examples.flask_shop.database import Order, Product, db


def create_app(database_uri: str = "sqlite:///shop.db") -> Flask:
    """Make the application, and its tables where they are not there yet."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = database_uri
    app.post("/orders")(place_order)
    db.init_app(app)
    with app.app_context():
        db.create_all()
    return app


def place_order() -> tuple[dict[str, Any], int]:
    """Place an order, if there are as many pieces left."""
    wanted = request.get_json()
    order = Order(**{name: wanted[name] for name in ("email", "product", "quantity")})
    db.session.add(order)
    db.session.flush()
    product = db.session.get(Product, order.product)
    if product is None:
        abort(404, f"there is no {order.product}")
    product.stock -= order.quantity
    if product.stock < 0:
        abort(409, f"there are not so many of {product.name}")
    db.session.commit()
    return {"id": order.id}, 201
