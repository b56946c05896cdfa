"""The names that the package has; it imports them when the first is asked for."""

from typing import TYPE_CHECKING, Any

from .bridge.calling.raw import raw
from .bridge.transaction.frames import on_commit, on_rollback
from .changes.change import UNSET, Change
from .discovery import autodiscover
from .errors import (
    AsyncReceiverError,
    AutocommitError,
    BulkBypassError,
    BulkBypassWarning,
    BulkOptionError,
    InstallError,
    ReceiverOptionError,
    ReceiverTypeError,
    SessionInFlushError,
    SignalRecursionError,
    SignalsError,
    SignalsNotInstalledWarning,
)
from .explaining import explain
from .installation import Installation, install
from .receivers.dispatch import mute
from .signals.builtin import (
    class_prepared,
    m2m_changed,
    post_bulk,
    post_delete,
    post_init,
    post_migrate,
    post_save,
    pre_bulk,
    pre_delete,
    pre_init,
    pre_migrate,
    pre_save,
    receiver_failed,
)
from .signals.decorator import receiver
from .signals.signal import Signal
from .tracing.recording import trace
from .tracing.steps import Trace

if TYPE_CHECKING:
    from .durable import outbox_table

__all__ = [
    "UNSET",
    "AsyncReceiverError",
    "AutocommitError",
    "BulkBypassError",
    "BulkBypassWarning",
    "BulkOptionError",
    "Change",
    "InstallError",
    "Installation",
    "ReceiverOptionError",
    "ReceiverTypeError",
    "SessionInFlushError",
    "Signal",
    "SignalRecursionError",
    "SignalsError",
    "SignalsNotInstalledWarning",
    "Trace",
    "autodiscover",
    "class_prepared",
    "explain",
    "install",
    "m2m_changed",
    "mute",
    "on_commit",
    "on_rollback",
    "outbox_table",
    "post_bulk",
    "post_delete",
    "post_init",
    "post_migrate",
    "post_save",
    "pre_bulk",
    "pre_delete",
    "pre_init",
    "pre_migrate",
    "pre_save",
    "raw",
    "receiver",
    "receiver_failed",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import durable delivery when it is first asked for: it needs the dialects of SQLAlchemy."""
    if name == "outbox_table":
        from .durable import outbox_table

        return outbox_table
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
