"""The exceptions and warnings of the package.

Every exception derives from :class:`SignalsError`; where one is also what a Python or SQLAlchemy
user would catch (``TypeError``, ``InvalidRequestError``), it derives from that too.
"""

from __future__ import annotations

from contextlib import suppress

from sqlalchemy.exc import InvalidRequestError


def note(error: BaseException, text: str) -> None:
    """Add a note to an exception, if it takes one and does not have it yet.

    One that is raised again and again would collect them, and a frozen dataclass refuses any.
    """
    with suppress(Exception):
        if text not in getattr(error, "__notes__", ()):
            error.add_note(text)


def printable(text: object) -> str:
    """A text on one line, without what would forge a line of a log or move a terminal's cursor."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(text))


class SignalsError(Exception):
    """Base of every exception that ``sqla_signals`` raises."""


class ReceiverTypeError(SignalsError, TypeError):
    """A receiver cannot be called with what its signal sends; raised at connect time."""


class ReceiverOptionError(SignalsError, ValueError):
    """An option of a receiver is wrong: an unknown phase, sender, attribute or combination.

    Raised at connect time, or when mappers are configured if the class was not mapped before.
    """


class InstallError(SignalsError, TypeError):
    """:func:`~sqla_signals.install` was given something that makes no sessions."""


class AsyncReceiverError(SignalsError, RuntimeError):
    """An ``async def`` receiver was reached from synchronous code, where nothing can await it."""


class SignalRecursionError(SignalsError, RecursionError):
    """Receivers keep causing each other's signals and never settle; the message names them."""


class SessionInFlushError(SignalsError, InvalidRequestError):
    """A flush receiver called ``flush()``, ``commit()``, ``rollback()`` or ``close()``.

    The session is in the middle of a flush then; letting the call through would leave that flush
    half written. So it is with a savepoint of a ``post_*`` receiver that ends with changes which
    are not flushed. The session of a durable receiver is committed by its worker, together with the
    note that the event is done.
    """


class AutocommitError(SignalsError, InvalidRequestError):
    """A session writes rows with durable receivers, or would call these, with AUTOCOMMIT.

    The events could not be written in the same transaction, nor what a receiver does together with
    the note that it is done. Nothing was written.
    """


class BulkOptionError(SignalsError, ValueError):
    """The execution option ``signals`` is wrong, or cannot be had for this statement.

    Nothing was executed.
    """


class BulkBypassError(SignalsError):
    """A statement bypasses the receivers of rows, with ``install(bulk="raise")``.

    It was not executed. The message says what to do.
    """


class BulkBypassWarning(UserWarning):
    """A statement bypasses the receivers of rows, with ``install(bulk="warn")``.

    Points at the line that executes it.
    """


class SignalsNotInstalledWarning(UserWarning):
    """Receivers are connected to model signals but :func:`~sqla_signals.install` was not called."""
