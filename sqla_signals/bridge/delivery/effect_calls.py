"""One call for one net effect, after a commit or a rollback, and what is done where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._sqlalchemy.instances import state_of
from ...changes.effects import CREATED, DELETED, Effect, Executed
from ...errors import printable
from ...receivers.observing import Call, Observer, note_failure
from ...receivers.receiver import On, Receiver
from ...signals.builtin import post_bulk, post_delete, post_save, receiver_failed
from ...signals.signal import Signal, logger
from ..calling.calls import ModelCalls


def signal_of(effect: Effect | Executed) -> Signal:
    """The signal that tells of a net effect, or of a statement."""
    if isinstance(effect, Executed):
        return post_bulk
    return post_delete if effect.kind is DELETED else post_save


def observed_call(
    effect: Effect | Executed, receiver: Receiver, on: On, notes: Mapping[Observer, Any]
) -> Call:
    """Describe the call of a receiver for observers, as far as it is known before it."""
    sender: Any
    arguments: dict[str, Any]
    if isinstance(effect, Executed):
        sender, arguments = effect.sender, dict(effect.arguments)
    else:
        sender = state_of(effect.instance).manager.class_
        arguments = {"instance": effect.instance, "using": effect.source.using}
        if effect.kind is not DELETED:
            arguments["created"] = effect.kind is CREATED
    return Call(
        on=on,
        name=receiver.name,
        signal=signal_of(effect),
        receiver=receiver,
        sender=sender,
        arguments=arguments,
        notes=notes,
    )


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
    effect: Effect | Executed, receiver: Receiver, instance: Any, error: Exception, on: On
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
    note_failure(error)
    receiver_failed.send_robust(
        sender,
        receiver=receiver.fn,
        signal=signal,
        instance=instance,
        exception=error,
    )
