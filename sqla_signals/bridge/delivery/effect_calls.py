"""One call for one net effect, after a commit or a rollback, and what is done where it fails."""

from __future__ import annotations

from typing import Any

from ...changes.effects import CREATED, DELETED, Effect, Executed
from ...errors import printable
from ...receivers import watching
from ...receivers.receiver import Phase, Receiver
from ...signals.builtin import post_bulk, post_delete, post_save, receiver_failed
from ...signals.signal import Signal, logger
from ..calling.calls import ModelCalls


def signal_of(effect: Effect | Executed) -> Signal:
    """The signal that tells of a net effect, or of a statement."""
    if isinstance(effect, Executed):
        return post_bulk
    return post_delete if effect.kind is DELETED else post_save


def call_for(effect: Effect, model: ModelCalls, receiver: Receiver, instance: Any) -> None:
    """Call one receiver for a net effect."""
    source = effect.source
    if effect.kind is DELETED:
        model.delete(post_delete, (receiver,), instance, effect.origin, source.using)
        return
    created, changes = effect.kind is CREATED, effect.changes
    if model.columns.mutable:  # a receiver may change it; the next one must not see that
        changes = model.columns.own_changes(changes)
    fields = effect.fields if created or effect.fields is not None else effect.written()
    unknown = effect.unknown
    if receiver.chooses:
        unknown = model.columns.still_unknown(changes, unknown)
    model.save(
        post_save,
        (receiver,),
        instance,
        created,
        changes,
        fields,
        source.raw,
        source.using,
        unknown,
    )


def failed(
    effect: Effect | Executed, receiver: Receiver, instance: Any, error: Exception, on: Phase
) -> None:
    """Log and tell that a receiver has raised an exception."""
    signal = signal_of(effect)
    sender = effect.sender if isinstance(effect, Executed) else type(effect.instance)
    identity: Any = None if isinstance(effect, Executed) else effect.row
    key = None if identity is None else identity[1]
    logger.error(
        "%s on=%r: receiver %s failed for %s%s; nothing but its own work is undone by that",
        signal.name,
        on,
        receiver,
        sender.__name__,
        "" if key is None else f" {printable(key[0] if len(key) == 1 else key)}",
        exc_info=error,
        extra={
            "signal": signal.name,
            "phase": on,
            "receiver": str(receiver),
            "sender": sender.__name__,
            "primary_key": key,
        },
    )
    if (watcher := watching.watcher) is not None:
        watcher.failed(error)
    receiver_failed.send_robust(
        sender,
        receiver=receiver.fn,
        signal=signal,
        instance=instance,
        exception=error,
    )
