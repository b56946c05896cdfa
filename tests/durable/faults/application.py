"""An application for tests that kill its processes. Everything it needs is in the environment.

``FAULTS_FOLDER`` is for the ledger: each call of a receiver is a line in the file ``calls``,
written before anything else happens, which a killed process and a rollback cannot take back.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from celery import Celery, signals
from kombu import Exchange, Queue
from sqlalchemy import create_engine, event
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import sqla_signals
from sqla_signals import post_save, receiver
from sqla_signals.celery import CeleryPublisher
from sqla_signals.durable import Message, Relay
from sqla_signals.durable.tables.holding import Leases

from .models import Effect, Order, outbox

FOLDER = Path(os.environ["FAULTS_FOLDER"])
DATABASE_URL = os.environ["FAULTS_DATABASE_URL"]
OPTIONS: dict[str, Any] = json.loads(os.environ.get("FAULTS_OPTIONS", "{}"))
DIES = OPTIONS.get("dies", "")
POISON = "poison"


def note(file: str, line: str) -> None:
    """Append a line, in one system call."""
    descriptor = os.open(FOLDER / file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def die_at(place: str) -> None:
    """Be killed as by kill -9, where the test says so; the first time only."""
    if place == DIES:
        try:
            os.close(os.open(FOLDER / "died", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def effect(instance: Order, session: Any, attempt: int) -> None:
    note("calls", f"{instance.id}")
    session.add(Effect(order_id=instance.id))
    if instance.status == POISON or (instance.status == "moody" and attempt == 1):
        raise ValueError(instance.status)


if OPTIONS.get("async"):

    @receiver(post_save, sender=Order, durable=True, name="faults.effect")
    async def order_saved(sender, instance, session, event, **kwargs):
        effect(instance, session, event.attempt)
        await session.flush()
        die_at(f"receiver {instance.status}")

elif not OPTIONS.get("stranger"):

    @receiver(post_save, sender=Order, durable=True, name="faults.effect")
    def order_saved(sender, instance, session, event, **kwargs):
        effect(instance, session, event.attempt)
        session.flush()
        die_at(f"receiver {instance.status}")


def make_engine() -> Any:
    options: dict[str, Any] = {"json_serializer": partial(json.dumps, default=str)}
    if DATABASE_URL.startswith("sqlite"):
        return create_engine(DATABASE_URL, connect_args={"timeout": 30}, **options)
    return create_engine(DATABASE_URL, pool_pre_ping=True, **options)


def make_app() -> Celery:
    app = Celery("faults")
    url = os.environ["FAULTS_BROKER_URL"]
    options: dict[str, Any] = {}
    name = os.environ["FAULTS_QUEUE"]
    if url.startswith("redis"):
        # Not only the queue is the scene's own: a worker gives back what any worker has had for too
        # long, and one that is killed while it looks keeps all others from looking for minutes.
        options = {
            "global_keyprefix": name,
            "visibility_timeout": OPTIONS.get("visibility_timeout", 600),
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        }
    elif url.startswith("filesystem"):
        folder = FOLDER / "queue"
        folder.mkdir(exist_ok=True)
        options = {
            "data_folder_in": str(folder),
            "data_folder_out": str(folder),
            "control_folder": str(FOLDER / "control"),
            "polling_interval": 0.05,
        }
    queue: dict[str, Any] = {}
    if "max_length" in OPTIONS:
        queue["queue_arguments"] = {
            "x-max-length": OPTIONS["max_length"],
            "x-overflow": "reject-publish",
        }
    if "exchange" in OPTIONS:
        # Nothing is bound to it, and nobody declares anything.
        exchange = Exchange(OPTIONS["exchange"], type="topic", no_declare=True)
        queue |= {"exchange": exchange, "routing_key": "nowhere", "no_declare": True}
    app.conf.update(
        broker_url=url,
        broker_transport_options=options,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_default_queue=name,
        task_queues=[Queue(name, **queue)],
        worker_enable_remote_control=False,
        worker_prefetch_multiplier=2,
    )
    return app


engine = make_engine()
sqla_signals.install()
app = make_app()
factory: Any = sessionmaker(engine)
if OPTIONS.get("async"):
    factory = async_sessionmaker(create_async_engine(DATABASE_URL, pool_pre_ping=True))


class Publisher(CeleryPublisher):
    """May be killed when the broker has the messages, and the outbox does not know that yet."""

    _last_retry = 0.2

    def publish(self, messages: Sequence[Message]) -> Mapping[Message, Exception]:
        failures = super().publish(messages)
        die_at("relay published")
        return failures


publisher = Publisher(
    app,
    factory,
    max_attempts=3,
    events_per_message=OPTIONS.get("events_per_message", 1),
    max_bytes=OPTIONS.get("max_bytes", 100_000),
    batch_size=10,
)
relay = Relay(factory, publisher, outbox=outbox, max_attempts=OPTIONS.get("relay_attempts", 10))
Leases.seconds = OPTIONS.get("lease", Leases.seconds)

published = 0


@signals.after_task_publish.connect
def count(**kwargs: Any) -> None:
    """Die after so many tasks were published."""
    global published
    published += 1
    die_at(f"relay {published}")


def make_order(status: str) -> Order:
    return Order(status=status)


def place(statuses: Sequence[str]) -> None:
    with Session(engine) as session:
        for status in statuses:
            session.add(make_order(status))
            session.flush()
            if DIES == "before commit":
                event.listen(session.connection(), "commit", lambda _: die_at(DIES))
            if DIES == "after commit":
                event.listen(session, "after_commit", lambda _: die_at(DIES))
            session.commit()


async def place_async(statuses: Sequence[str]) -> None:
    async with factory() as session:
        for status in statuses:
            session.add(make_order(status))
            await session.commit()


def main(statuses: Sequence[str]) -> None:
    """Commit orders, from an AsyncSession where the test says so."""
    if OPTIONS.get("async"):
        asyncio.run(place_async(statuses))
    else:
        place(statuses)
