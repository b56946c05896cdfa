"""The application: its database, its Celery app, its relay. Three kinds of processes import it.

The application itself, ``sqla-signals relay --app examples.durable_shop.app:relay``, and
``celery --app examples.durable_shop.app worker``. Two environment variables say where things are:

- ``SHOP_DATABASE_URL``, such as ``postgresql+psycopg://user:password@host/shop``
- ``SHOP_BROKER_URL``, such as ``redis://host:6379/0``, ``amqp://host``, or ``filesystem://`` and a
  folder, which needs no server
"""

import os
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

import examples.durable_shop.receivers  # noqa: F401  connects them
import sqla_signals
from sqla_signals.celery import CeleryPublisher
from sqla_signals.durable import Relay

DATABASE_URL = os.environ.get("SHOP_DATABASE_URL", "sqlite:///durable_shop.db")
BROKER_URL = os.environ.get("SHOP_BROKER_URL", "filesystem://durable_shop_queue")


def broker_settings(url: str) -> dict[str, Any]:
    """The settings of Celery for a broker, those that keep every message included."""
    scheme, _, rest = url.partition("://")
    if scheme == "filesystem":
        folder = Path(rest).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        options = {
            "data_folder_in": str(folder),
            "data_folder_out": str(folder),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.1,
        }
        return {"broker_url": "filesystem://", "broker_transport_options": options}
    # Redis only: how long a killed worker's messages wait for another one.
    options = {"visibility_timeout": 60} if scheme.startswith("redis") else {}
    return {"broker_url": url, "broker_transport_options": options}


engine = create_engine(DATABASE_URL)
SessionLocal = sessionmaker(engine)

celery_app = Celery("durable_shop")
celery_app.conf.update(
    broker_settings(BROKER_URL),
    broker_connection_retry_on_startup=True,
    task_default_queue="durable_shop",
    worker_enable_remote_control=False,
)

sqla_signals.install()
publisher = CeleryPublisher(celery_app, SessionLocal, max_attempts=2)
relay = Relay(SessionLocal, publisher)
