"""A worker runs a message: it calls one receiver, once.

The receiver gets what an ``on="commit"`` receiver gets: a session and a transaction of its own, and
an instance that lives in it and holds the values of the event. A row in the inbox, written in that
same transaction, says that it is done; so the effects of the receiver on the database happen
once, however often the message comes.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import IntegrityError

from .._sqlalchemy.instances import attached_copy, detached_copy
from .._sqlalchemy.sessions import current_task
from .._sqlalchemy.transactions import is_autocommit
from ..bridge.calling.calls import Calls
from ..bridge.calling.guard import IN_DURABLE, guarded
from ..changes.change import UNSET, Change, Changes, diff_of
from ..errors import AsyncReceiverError, AutocommitError, SignalsError, printable
from ..receivers.mapped import known_outbox
from ..receivers.observing import Call, observe, observers
from ..receivers.receiver import Receiver
from ..signals.builtin import post_delete, post_save, receiver_failed
from ..signals.kinds import ModelSignal
from ..signals.signal import logger
from .message.codec import Codec, codec_of
from .message.envelope import (
    SCHEMA,
    Event,
    MalformedMessageError,
    Message,
    MessageError,
    UnknownSchemaError,
)
from .message.naming import find_mapper, find_origin, find_receiver
from .sessions import Sessions, bind_for_writing

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Engine
    from sqlalchemy.orm import Mapper, Session

    from .outbox import Outbox


class Worker:
    """Runs messages.

    :param sessions: what makes the sessions of the receivers: a ``sessionmaker``, an
        ``async_sessionmaker``, an engine, or a function that returns a session. ``None``: the
        ``session_factory`` given to :func:`sqla_signals.install`.

    With an ``async_sessionmaker`` it runs both kinds of receivers, on an event loop of its own, and
    may be called from any thread; with plain sessions only plain functions.
    """

    def __init__(self, sessions: Any = None) -> None:
        self.sessions: Sessions = sessions if isinstance(sessions, Sessions) else Sessions(sessions)

    def run(self, message: Message | str | bytes, attempt: int | None = None) -> bool:
        """Call the receiver that the message is for, unless it is done.

        :param message: a :class:`Message`, or its JSON.
        :param attempt: which attempt this is, where the engine counts them; by default that of the
            message.
        :returns: ``True``; ``False`` if the receiver had done this event before; it was not called.
        :raises MessageError: the message cannot be run here, however often it is tried.
        :raises Exception: whatever the receiver raised, after it was logged and sent as
            ``receiver_failed``. Nothing of its work in the session remains.
        """
        if not isinstance(message, Message):
            message = Message.from_json(message)
        if attempt is not None:
            message = replace(message, attempt=attempt)
        if not observers:
            return self._run(message)
        with observe(Call(on="durable", name=message.receiver, message=message)):
            return self._run(message)

    def _run(self, message: Message) -> bool:
        try:
            call = _Call(message)
            return self.sessions.run(lambda: call.run(self.sessions))
        except MessageError as error:
            logger.error("event %s cannot be run here: %s", message.id, printable(error))
            raise


class _Call:
    """One message, with the model and the receiver that it names in this process."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.data = message.data
        if self.data.get("schema") != SCHEMA:
            raise UnknownSchemaError(
                f"message {message.id} has schema {self.data.get('schema')!r}; this version of "
                f"sqla_signals knows {SCHEMA}. Upgrade the workers before what writes the messages"
            )
        self.deleted = message.kind == "deleted"
        self.created = message.kind == "created"
        self.signal: ModelSignal = post_delete if self.deleted else post_save
        self.mapper: Mapper[Any] = find_mapper(message.model, message.outbox)
        self.receiver: Receiver = find_receiver(message.receiver, self.signal, self.mapper.class_)
        self.outbox: Outbox = known_outbox(self.mapper)
        self.event = Event(message.id, message.occurred_at, message.attempt, message.sequence)

    def run(self, sessions: Sessions) -> bool:
        """Call the receiver in a transaction that is committed if it returns."""
        session, front = sessions.make()
        instance: Any = None
        try:
            # Where the row is, and so its outbox and its inbox.
            using = bind_for_writing(session, self.mapper)
            codec = codec_of(self.mapper, using.dialect)
            instance = self._instance(session, codec)
            arguments = self._arguments(codec)
            if not self._enter(session, using):
                return False
            with guarded(session, IN_DURABLE):
                self._call(Calls(session, front), instance=instance, using=using, **arguments)
            session.commit()
            return True
        except MessageError:
            session.rollback()
            raise
        except Exception as error:
            session.rollback()
            self._failed(instance, error)
            raise
        finally:
            session.close()

    def _enter(self, session: Session, using: Engine | Connection) -> bool:
        """Note in the inbox that this is done; return ``False`` if it was done before."""
        if not session.in_transaction():
            session.begin()  # with autobegin=False nobody else does
        # The session itself would ask listeners where a statement goes.
        connection = session.connection(bind_arguments={"bind": using})
        if is_autocommit(connection):
            raise AutocommitError(
                f"{self.signal.name}: receiver {self.receiver} is durable, and the sessions of "
                f"this worker are on {connection.engine!r} with isolation_level='AUTOCOMMIT': the "
                f"note that it is done would stay when it fails. Give the Relay or the Worker "
                f"sessions on an engine with transactions"
            )
        row = {"event_id": self.message.id, "receiver": self.message.receiver}
        try:
            # Waits for another worker that is doing the same, and learns what became of it.
            connection.execute(self.outbox.note_done, row)
        except IntegrityError:
            session.rollback()
            return False
        return True

    def _instance(self, session: Session, codec: Codec) -> Any:
        encoded = self.data.get("snapshot", {})
        for name, value in zip(codec.primary_key, self.data.get("key", ()), strict=False):
            if name in encoded and repr(encoded[name]) != repr(value):
                raise MalformedMessageError(
                    f"the message is about the {self.mapper.class_.__name__} {value!r:.80} and "
                    f"holds the values of {encoded[name]!r:.80}"
                )
        identity = codec.decode_key(self.data.get("key", ()))
        key = self.mapper.identity_key_from_primary_key(identity)
        named = zip(codec.primary_key, identity, strict=True)
        self.values = {**codec.decode_all(encoded), **dict(named)}
        try:
            if self.deleted:
                return detached_copy(self.mapper, key, self.values)
            return attached_copy(session, self.mapper, key, self.values)
        except Exception as error:  # who listens to loads, such as Mutable, has refused a value
            raise MalformedMessageError(
                f"no {self.mapper.class_.__name__} can have these values: {error!r:.200}"
            ) from error

    def _origin(self, dialect: Dialect) -> Any:
        found = self.data.get("origin")
        if found is None:
            return None
        mapper = find_origin(found["model"], self.mapper)
        if mapper is None:
            return None
        if found["key"] is None:
            return mapper.class_manager.new_instance()
        codec = codec_of(mapper, dialect)
        values = codec.decode_key(found["key"])
        key = mapper.identity_key_from_primary_key(values)
        return detached_copy(mapper, key, dict(zip(codec.primary_key, values, strict=True)))

    def _arguments(self, codec: Codec) -> dict[str, Any]:
        if self.deleted:
            return {"origin": self._origin(codec.dialect)}
        changes = {}
        if self.created:
            encoded = self.data.get("snapshot", {})
            for key, value in self.values.items():
                # Not that of the instance, which the receiver may change in place.
                is_own = key in encoded and codec.is_mutable(key)
                own = codec.decode(key, encoded[key]) if is_own else value
                changes[key] = Change(UNSET, own)
        changes |= codec.decode_changes(self.data.get("changes", {}))
        along = codec.keys.intersection(self.data.get("along", ()))
        fields = None if self.created else along.union(changes)
        if not self.receiver.passes(self.mapper, self.created, fields or ()):
            raise MessageError(
                f"receiver {self.receiver} of {self.signal.name} does not ask for such a change of "
                f"{self.mapper.class_.__name__}, by its created= or fields=. If that was another "
                f"way when the event was written, delete its dead letter"
            )
        return {
            "created": self.created,
            "changes": Changes(diff_of(changes)),
            "update_fields": fields,
            "raw": self.data.get("raw", False),
        }

    def _call(self, calls: Calls, **arguments: Any) -> None:
        if self.receiver.is_async and calls.async_session is None:
            raise AsyncReceiverError(
                f"{self.signal.name}: receiver {self.receiver} is async, but the sessions of this "
                f"worker are not. Give the Relay or the Worker an async_sessionmaker"
            )
        cls = self.mapper.class_
        try:
            calls.call(self.signal, self.receiver, cls, event=self.event, **arguments)
        except asyncio.CancelledError as error:
            task = current_task()
            if task is not None and task.cancelling():
                raise  # it is us who are cancelled
            raise SignalsError(
                f"{self.signal.name}: receiver {self.receiver} was cancelled by something in it"
            ) from error

    def _failed(self, instance: Any, error: Exception) -> None:
        cls = self.mapper.class_
        logger.error(
            "%s durable: receiver %s failed for %s %s, event %s, attempt %d",
            self.signal.name,
            self.receiver,
            cls.__name__,
            printable(self.message.subject),
            self.event.id,
            self.event.attempt,
            exc_info=error,
        )
        receiver_failed.send_robust(
            cls,
            receiver=self.receiver.fn,
            signal=self.signal,
            instance=instance,
            exception=error,
        )
