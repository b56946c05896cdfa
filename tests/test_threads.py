"""Eight threads at once: nothing is lost, nothing comes twice, nothing is raised."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, StaticPool, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import sqla_signals
from sqla_signals import Signal, post_save, pre_save, receiver

THREADS = 8
ROUNDS = 25


class Base(DeclarativeBase):
    """The declarative base."""


class Job(Base):
    """What the threads write."""

    __tablename__ = "jobs"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """Let threads take turns far more often than usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def engine_of(engine: Engine) -> Iterator[Callable[[], Engine]]:
    """Make the engine of one thread: the same for all on PostgreSQL, one in memory on SQLite.

    A file of SQLite has one writer at a time: the threads would take turns where we do not want it.
    """
    made = []

    def engine_of() -> Engine:
        if engine.dialect.name != "sqlite":
            return engine
        made.append(
            create_engine(
                "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
            )
        )
        Base.metadata.create_all(made[-1])
        return made[-1]

    if engine.dialect.name != "sqlite":
        Base.metadata.create_all(engine)
    yield engine_of
    for one in made:
        one.dispose()


def in_threads(work: Callable[[int], None]) -> None:
    """Run ``work`` in all threads at the same time, and raise what any of them raised."""
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> None:
        barrier.wait()
        work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(run, number) for number in range(THREADS)]:
            done.result()


def test_threads_that_connect_disconnect_send_and_flush_do_not_disturb_each_other(
    installed: sqla_signals.Installation, engine_of: Callable[[], Engine]
):
    """Each thread's receiver sees each of its rows once; the one that stays sees all of them."""
    everything: Counter[tuple[str, str]] = Counter()
    lock = threading.Lock()
    paid = Signal("paid")

    @receiver([pre_save, post_save], sender=Base)
    def stays(sender, instance, signal, **kwargs):
        with lock:
            everything[signal.name, instance.name] += 1

    engines = [engine_of() for _ in range(THREADS)]

    def work(number: int) -> None:
        for n in range(ROUNDS):
            mine: list[str] = []

            def own(sender, instance, signal, number=number, mine=mine, **kwargs):
                if instance.name.startswith(f"{number}-"):
                    mine.append(f"{signal.name} {instance.name}")

            def own_paid(sender, mine=mine, **kwargs):
                mine.append(f"paid {sender}")

            pre_save.connect(own, sender=Job)
            post_save.connect(own, sender="Job")
            paid.connect(own_paid, sender=number)
            with Session(engines[number]) as session:
                session.add(Job(name=f"{number}-{n}"))
                session.flush()
                paid.send(number)
                with sqla_signals.mute(receiver=own):
                    session.add(Job(name=f"{number}-{n}-muted"))
                    session.flush()
                assert pre_save.disconnect(own)
                assert post_save.disconnect(own, sender="Job")
                assert paid.disconnect(own_paid)
                paid.send(number)
                session.add(Job(name=f"{number}-{n}-late"))
                session.commit()
            expected = [f"pre_save {number}-{n}", f"post_save {number}-{n}", f"paid {number}"]
            assert mine == expected

    in_threads(work)
    assert everything == {
        (signal, f"{number}-{n}{kind}"): 1
        for signal in ("pre_save", "post_save")
        for number in range(THREADS)
        for n in range(ROUNDS)
        for kind in ("", "-muted", "-late")
    }
    written = 0
    for engine in set(engines):
        with Session(engine) as session:
            written += session.scalar(select(func.count()).select_from(Job)) or 0
    assert written == THREADS * ROUNDS * 3
    assert not paid.receivers
    assert len(pre_save.receivers) == len(post_save.receivers) == 1


def test_a_send_uses_the_receivers_there_were_when_it_began():
    """Others are connected and disconnected while it is under way, by another thread."""
    paid = Signal("paid")
    seen: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def first(sender, **kwargs):
        seen.append("first")
        inside.set()
        assert go_on.wait(30)

    def second(sender, **kwargs):
        seen.append("second")

    def third(sender, **kwargs):
        seen.append("third")

    paid.connect(first)
    paid.connect(second)
    sending = threading.Thread(target=paid.send)
    sending.start()
    assert inside.wait(30)
    paid.disconnect(second)
    paid.connect(third)
    go_on.set()
    sending.join()
    assert seen == ["first", "second"]
    seen.clear()
    paid.send()
    assert seen == ["first", "third"]


def test_a_session_is_only_guarded_while_its_own_receivers_run(
    installed: sqla_signals.Installation, engine_of: Callable[[], Engine]
):
    """Another thread commits its session while a receiver of this one is at work."""
    inside, go_on = threading.Event(), threading.Event()

    @receiver(pre_save, sender=Job)
    def waits(sender, instance, **kwargs):
        if instance.name == "slow":
            inside.set()
            assert go_on.wait(30)

    slow, quick = engine_of(), engine_of()

    def work() -> None:
        with Session(slow) as session:
            session.add(Job(name="slow"))
            session.commit()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        assert inside.wait(30)
        with Session(quick) as session:
            session.add(Job(name="quick"))
            session.commit()
            assert "quick" in session.scalars(select(Job.name)).all()
        go_on.set()
        done.result()
    with Session(slow) as session:
        assert "slow" in session.scalars(select(Job.name)).all()
