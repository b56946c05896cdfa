"""Off, looking on costs nothing: calls are counted, which are the same on every machine."""

from __future__ import annotations

import subprocess
import sys

COUNT = """
import sys
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
import sqla_signals
from sqla_signals import Signal, post_save, pre_save, receiver
from tests.trace.models import Base, Order

sqla_signals.install()
own = Signal("own")

@own.connect
@receiver(pre_save, sender=Order)
@receiver(post_save, sender=Order)
@receiver(post_save, sender=Order, on="commit")
def hear(sender, **kwargs):
    pass

engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
number = 0

def work(rows):
    global number
    with Session(engine) as session:
        for _ in range(rows):
            number += 1
            session.add(Order(id=number))
        session.commit()
        own.send(None)
        for order in session.query(Order).order_by(Order.id.desc()).limit(rows):
            order.status += "!"
        session.commit()

def count(rows):
    calls = 0
    def profile(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")
    sys.setprofile(profile)
    work(rows)
    sys.setprofile(None)
    return calls

for _ in range(3):  # caches are warm
    work(40)
{before}
import gc
gc.collect()
gc.disable()
print(count(20), count(40))
"""

NEVER = ""
TRACED = """
with sqla_signals.trace() as t:
    work(40)
assert str(t).count("hear") > 150, str(t)
for _ in range(3):
    work(40)
"""


def counts(before: str) -> list[int]:
    script = COUNT.replace("{before}", before)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return [int(number) for number in run.stdout.split()]


def test_once_a_trace_is_over_everything_is_called_as_often_as_if_there_had_been_none():
    """The same number of calls, for twenty rows and for forty: not one more."""
    never = counts(NEVER)
    assert never[1] > never[0] > 0
    assert counts(TRACED) == never
