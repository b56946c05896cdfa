"""A relay in a process of its own, whose receiver ends, hangs or starves it at one event."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable

from sqlalchemy import create_engine

import sqla_signals
from sqla_signals import post_save, receiver
from sqla_signals.durable import Relay

from .models import Ledger, Order, outbox


def starve() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
    [bytearray(2**27) for _ in "abcdef"]


KINDS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: sys.exit(1),
    "hangs": lambda: time.sleep(3600),
    "out of memory": starve,
}


def run(url: str, kind: str, file: str) -> None:
    """Run a relay until nothing is due.

    :param file: gets a line with the attempt and the process, for each call with the bad event.
    """
    sqla_signals.install()

    @receiver(post_save, sender=Order, durable=True, name="shop.fn")
    def fn(sender, instance, session, event, **kwargs):
        session.add(Ledger(entry=instance.status))
        if instance.status == "bad":
            session.flush()
            with open(file, "a") as attempts:
                attempts.write(f"{event.attempt} {os.getpid()}\n")
            KINDS[kind]()

    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    relay = Relay(create_engine(url, **options), outbox=outbox, max_attempts=3)
    while relay.run_once():
        pass
