"""An evening in the shop, with a relay and a Celery worker: `python -m examples.durable_shop`.

Everything that can die does, once. In a folder of its own, on SQLite and with files for a broker,
unless SHOP_DATABASE_URL and SHOP_BROKER_URL say otherwise.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic.config import main as alembic

from examples import show
from sqla_signals.cli import main as sqla_signals_command

APP = "examples.durable_shop.app"
DEADLINE = 60.0
"""Seconds to wait for what should take one or two."""

UPGRADE = ["-c", "examples/durable_shop/alembic.ini", "upgrade", "head"]
RELAY = f"-m sqla_signals relay --app {APP}:relay".split()
WORKER = f"-m celery --app {APP}:celery_app worker --pool solo --loglevel INFO".split()
WORKER += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
running: list["subprocess.Popen[bytes]"] = []
PLACE = ["-m", "examples.durable_shop.place"]


def main() -> None:
    """Tell the whole story."""
    with tempfile.TemporaryDirectory(prefix="durable-shop-") as folder:
        os.environ.setdefault("SHOP_DATABASE_URL", f"sqlite:///{folder}/shop.db")
        os.environ.setdefault("SHOP_BROKER_URL", f"filesystem://{folder}/queue")
        tell(Path(folder))


def tell(folder: Path) -> None:
    """Open the shop, serve, and close."""
    show.heading("1. The tables, the outbox among them, come from Alembic")
    show.line("$ alembic upgrade head", "cyan")
    alembic(UPGRADE)
    from examples.durable_shop import counting

    show.line(", ".join(counting.tables()))

    show.heading("2. The application is killed with -9: before COMMIT, and right after")
    place("before", "Charlie", 1, "4000-1")
    place("after", "Ada", 3, "4000-1")
    show.line("Neither relay nor worker is running yet. What the database holds now:")
    show.table(*counting.orders())
    outbox("list")

    show.heading("3. A relay and a worker are started")
    with process(WORKER, folder / "worker.log") as worker:
        with process(RELAY, folder / "relay.log") as relay:
            wait("Ada's parcel", lambda: counting.parcels() == 1)
            # SQLite: what a killed relay had in hand, the next one gets after minutes.
            wait("an empty outbox", lambda: counting.waiting() == 0)
            show.line("Ada's order is confirmed, paid and packed.")

            show.heading("4. The relay is killed with -9; the shop goes on selling")
            relay.kill()
        place("", "Grace", 2, "4000-0", "Alan", 1, "4000-1", "Mallory", 5, "expired")
        outbox("list", "--max-age", "0")

        show.heading("5. Another relay is started; and a bank has its moods")
        with process(RELAY, folder / "relay.log"):
            wait("the dead letter", lambda: counting.dead_letters() == 1)
            wait("two more parcels", lambda: counting.parcels() == 3)
            show.line("Grace's bank was busy at first: she was charged at the second attempt.")
            show.line("Mallory's card has expired. After two attempts that is a dead letter:")
            outbox("list")

            show.heading("6. Mallory has a new card; the dead letter is tried again")
            counting.new_card("Mallory", "4000-1")
            outbox("retry", "--all")
            wait("the last parcel", lambda: counting.parcels() == 4)
            wait("an empty outbox", lambda: counting.waiting() == 0)
            outbox("list")
        worker.kill()  # it would go on polling for some seconds, and has nothing any more

    show.heading("What the database holds in the end: everything once")
    show.table(*counting.everything())


def place(dies: str, *orders: object) -> None:
    """Place orders in a process of their own, which dies where it is told to."""
    arguments = [*PLACE, *(str(one) for one in orders)]
    show.line(f"$ python {' '.join(arguments)}", "cyan")
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "SHOP_DIES": dies}, check=False
    )
    assert done.returncode == (-signal.SIGKILL if dies else 0)
    if dies:
        show.line(f"killed {'right after' if dies == 'after' else 'before'} COMMIT", "red")


def outbox(*arguments: str) -> None:
    """Show what `sqla-signals outbox` says."""
    show.line(f"$ sqla-signals outbox {' '.join(arguments)}", "cyan")
    sqla_signals_command(["outbox", *arguments, "--app", f"{APP}:relay"])


@contextmanager
def process(arguments: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run Python beside us; ended with SIGTERM, as a supervisor would."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT
        )
    running.append(process)
    try:
        yield process
    except BaseException:
        show.line(log.read_text(), "red")
        raise
    finally:
        running.remove(process)
        process.terminate()
        process.wait(DEADLINE)


def wait(what: str, happened: Callable[[], bool]) -> None:
    """Wait until something is in the database."""
    deadline = time.monotonic() + DEADLINE
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {DEADLINE:g} seconds")
        for process in running:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args!r} has ended")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
