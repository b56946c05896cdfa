"""The command ``sqla-signals``: for those who run an application, not for the application itself.

Each command gets its options from a function here and imports what it needs when it is called.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .durable.relay import Relay
    from .durable.tables.upkeep import Backlog

APP = "SQLA_SIGNALS_APP"


class UsageError(Exception):
    """What was asked for cannot be done; the message is for the terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for bad news, 2 for wrong usage."""
    options = parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except UsageError as error:
        print(f"sqla-signals: {error}", file=sys.stderr)
        return 2
    return status


def parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    top = argparse.ArgumentParser(prog="sqla-signals", description="Model signals for SQLAlchemy.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_relay(commands)
    _add_outbox(commands)
    _add_explain(commands)
    return top


def load(app: str | None, option: str = "--app ") -> Any:
    """Import ``package.module:object`` and return the object; ``None`` without ``:object``.

    The current directory is on the path, as with ``python -m``.

    :param option: what ``app`` was given to, for messages.
    """
    app = app or os.environ.get(APP)
    if not app:
        raise UsageError(f"which application? Give --app package.module:object, or set {APP}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, path = app.partition(":")
    if not module or module.startswith("."):
        raise UsageError(f"{option}{app}: give MODULE or MODULE:OBJECT, as in package.module:name")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"{option}{app}: there is no module {error.name}") from error
    if not path:
        return None
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise UsageError(f"{option}{app}: {found!r} has no {name!r}") from error
    return found


def load_relay(options: argparse.Namespace) -> Relay:
    """The relay that ``--app`` names or describes."""
    from .durable import Relay
    from .errors import SignalsError

    app = load(options.app)
    try:
        return app if isinstance(app, Relay) else Relay(app)
    except SignalsError as error:
        raise UsageError(f"--app {options.app}: {error}") from error


def _takes_app(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--app",
        metavar="MODULE:OBJECT",
        help="a Relay, or what makes sessions: a sessionmaker, an async_sessionmaker, an engine, "
        f"a function; without :OBJECT, the session_factory given to install(). Default: ${APP}",
    )


# -- relay -----------------------------------------------------------------------------------------


def _add_relay(commands: Any) -> None:
    relay = commands.add_parser("relay", help="deliver the events of the outbox, until stopped")
    _takes_app(relay)
    relay.add_argument(
        "--once", action="store_true", help="deliver what is due now and return, instead"
    )
    relay.set_defaults(command=_relay)


def _relay(options: argparse.Namespace) -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    relay = load_relay(options)
    if options.once:
        while relay.run_once():
            pass
        return 0
    relay.run(handle_signals=True)
    return 0


# -- outbox ----------------------------------------------------------------------------------------


def _add_outbox(commands: Any) -> None:
    outbox = commands.add_parser("outbox", help="look at the outbox and its dead letters")
    actions = outbox.add_subparsers(required=True, metavar="ACTION")

    show = actions.add_parser(
        "list",
        help="the backlog and the dead letters; status 1 if there are any, or the oldest event is "
        "older than --max-age",
    )
    _takes_app(show)
    show.add_argument(
        "--max-age", type=duration, default=300.0, metavar="SECONDS", help="default 300"
    )
    show.add_argument(
        "--limit", type=int, default=100, metavar="N", help="list N dead letters; default 100"
    )
    show.add_argument("--json", action="store_true", help="for machines")
    show.set_defaults(command=_list)

    retry = actions.add_parser("retry", help="put dead letters back into the outbox")
    _takes_app(retry)
    _takes_sequences(retry)
    retry.set_defaults(command=_retry)

    purge = actions.add_parser("purge", help="delete dead letters, or old rows of the inbox")
    _takes_app(purge)
    _takes_sequences(purge).add_argument(
        "--inbox",
        type=duration,
        metavar="DAYS",
        help="not dead letters, but rows of the inbox that are older than that",
    )
    purge.set_defaults(command=_purge)


def duration(text: str) -> float:
    """Seconds or days, as many as a ``timedelta`` takes."""
    if not 0 <= (found := float(text)) <= timedelta.max.days:
        raise ValueError
    return found


def _takes_sequences(command: argparse.ArgumentParser) -> Any:
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("sequences", nargs="*", type=int, default=[], metavar="SEQUENCE")
    which.add_argument("--all", action="store_true", help="every dead letter")
    return which


def _in_transaction(relay: Relay, fn: Any, *arguments: Any) -> Any:
    from sqlalchemy.exc import DBAPIError

    def run() -> Any:
        with relay.engine.begin() as connection:
            return fn(connection, relay.outbox, *arguments)

    try:
        return relay.sessions.run(run)
    except DBAPIError as error:
        raise UsageError(
            f"{relay.engine.url.render_as_string()}: {error.orig}. Is this the database, and has "
            f"it the tables of {relay.outbox!r}? Alembic or Base.metadata.create_all() creates them"
        ) from error


def _list(options: argparse.Namespace) -> int:
    from .durable.tables import upkeep

    found = _in_transaction(load_relay(options), upkeep.backlog, options.limit)
    late = found.is_late(timedelta(seconds=options.max_age))
    print(_as_json(found, late) if options.json else _as_text(found, late))
    return 1 if late or found.dead else 0


def _as_text(found: Backlog, late: bool) -> str:
    from .errors import printable

    age = f", the oldest for {found.oldest.total_seconds():.1f} s" if found.oldest else ""
    lines = [
        f"waiting: {found.waiting}{age}{': is a relay running?' if late else ''}",
        f"failing: {found.failing}",
        f"dead letters: {found.dead}",
    ]
    for dead in found.dead_letters:
        lines.append(
            f"  {dead.sequence}  {printable(dead.model)} {printable(dead.subject)} "
            f"{printable(dead.kind)}, for {printable(', '.join(dead.receivers))}; given up "
            f"{dead.dead_at:%Y-%m-%d %H:%M:%S} UTC after {dead.attempts} attempts"
        )
        lines += [f"      {printable(line)}" for line in dead.last_error.splitlines()]
    if found.dead > len(found.dead_letters):
        lines.append(f"  and {found.dead - len(found.dead_letters)} more")
    return "\n".join(lines)


def _as_json(found: Backlog, late: bool) -> str:
    return json.dumps(
        {
            "waiting": found.waiting,
            "failing": found.failing,
            "oldest_seconds": found.oldest.total_seconds() if found.oldest is not None else None,
            "late": late,
            "dead": found.dead,
            "dead_letters": [
                {**asdict(dead), "id": str(dead.id), "dead_at": dead.dead_at.isoformat()}
                for dead in found.dead_letters
            ],
        }
    )


def _retry(options: argparse.Namespace) -> int:
    from .durable.tables import upkeep

    return _report(
        "put back", _in_transaction(load_relay(options), upkeep.retry, _sequences(options)), options
    )


def _purge(options: argparse.Namespace) -> int:
    from .durable.tables import upkeep

    relay = load_relay(options)
    if options.inbox is not None:
        age = timedelta(days=options.inbox)
        print(f"deleted {_in_transaction(relay, upkeep.purge_inbox, age)} rows of the inbox")
        return 0
    return _report("deleted", _in_transaction(relay, upkeep.purge, _sequences(options)), options)


def _sequences(options: argparse.Namespace) -> list[int] | None:
    found: list[int] = options.sequences
    return None if options.all else found


def _report(what: str, count: int, options: argparse.Namespace) -> int:
    print(f"{what} {count} dead letters")
    return 0 if options.all or count == len(set(options.sequences)) else 1


# -- explain ---------------------------------------------------------------------------------------


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain", help="which receivers are called, when and in which order, and which never are"
    )
    explain.add_argument(
        "what",
        metavar="MODULE[:OBJECT]",
        help="what to import, and what of it to explain: a model, a signal, a module; without "
        ":OBJECT, everything that somebody listens to then",
    )
    explain.add_argument(
        "--format",
        choices=["text", "json", "mermaid", "dot"],
        default="text",
        help="default text, in colour on a terminal where rich is installed",
    )
    explain.add_argument(
        "--check", action="store_true", help="status 1 if a receiver can never be called"
    )
    explain.set_defaults(command=_explain)


def _explain(options: argparse.Namespace) -> int:
    import warnings

    from .errors import SignalsError, SignalsNotInstalledWarning
    from .explaining import explain

    with warnings.catch_warnings():
        # The explanation says it as well.
        warnings.simplefilter("ignore", SignalsNotInstalledWarning)
        with contextlib.redirect_stdout(sys.stderr):  # it may print when it is imported
            target = load(options.what, "")
        try:
            found = explain(target)
        except SignalsError as error:
            raise UsageError(f"{options.what}: {error}") from error
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        # Files of these formats are UTF-8, and the text has characters that a code page has not.
        sys.stdout.reconfigure(encoding="utf-8")
    if options.format == "text":
        _show(found)
    else:
        print(getattr(found, f"to_{options.format}")().rstrip())
    return 1 if options.check and found.warnings else 0


def _show(found: Any) -> None:
    """Print in colour for somebody who looks at it, else for a file or another program."""
    if sys.stdout.isatty():
        try:
            import rich
        except ImportError:
            pass
        else:
            rich.print(found)
            return
    print(found)
