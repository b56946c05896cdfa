"""What a worker process does with a message: call one receiver, once.

The receiver gets what an ``on="commit"`` receiver gets: a session and a transaction of its own, and
an instance that lives in it and holds the values of the event. A row in the inbox, written in that
same transaction, says that it is done; so what the receiver does to the database happens once,
however often the message comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, event, insert
from sqlalchemy.exc import IntegrityError

from .. import watching
from .._sqlalchemy import (
    attached_copy,
    current_task,
    detached_copy,
    is_autocommit,
    is_committing,
)
from ..bridge.calls import Calls
from ..bridge.columns import columns_of
from ..changes import Changes, diff_of
from ..copies import copies_of
from ..errors import AsyncReceiverError, AutocommitError, SignalsError
from ..mapping import outbox_of
from ..receivers import Receiver
from ..signal import ModelSignal, logger
from ..signals import post_delete, post_save, receiver_failed
from .clock import database_time
from .encoding import Types, codec_of, decode_changes
from .message import SCHEMA, Event, MalformedMessageError, Message, UnknownSchemaError
from .naming import find_mapper, find_receiver
from .sessions import Sessions

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import Mapper, Session, SessionTransaction

    from .tables import Outbox


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
        :returns: ``True``; ``False`` if the receiver had done this event before. Then it was not
            called, or, where it has ended the transaction by itself, it was called for nothing.
        :raises MessageError: the message cannot be run here, however often it is tried.
        :raises Exception: whatever the receiver raised, after it was logged and sent as
            ``receiver_failed``. Nothing of its work in the session remains.
        """
        if not isinstance(message, Message):
            message = Message.from_json(message)
        if attempt is not None:
            message = replace(message, attempt=attempt)
        run = partial(self._run, message)
        watcher = watching.watcher
        return run() if watcher is None else watcher.message(run, message)

    def _run(self, message: Message) -> bool:
        try:
            call = _Call(message)
        except Exception as error:
            logger.error("event %s cannot be run here: %s", message.id, error)
            raise
        return self.sessions.run(lambda: call.run(self.sessions))


class _Call:
    """One message, made out against the models and receivers of this process."""

    def __init__(self, message: Message) -> None:
        self.message = message
        if message.data.get("schema") != SCHEMA:
            raise UnknownSchemaError(
                f"message {message.id} has schema {message.data.get('schema')!r}; this version of "
                f"sqla_signals knows {SCHEMA}. Upgrade the workers before what writes the messages"
            )
        self.deleted = message.kind == "deleted"
        self.created = message.kind == "created"
        self.signal: ModelSignal = post_delete if self.deleted else post_save
        self.mapper: Mapper[Any] = find_mapper(message.model)
        self.receiver: Receiver = find_receiver(message.receiver, self.signal, self.mapper.class_)
        self.outbox: Outbox = outbox_of(self.mapper, self.receiver)
        self.types = Types(codec_of(self.mapper), message.data.get("types"))
        self.snapshot = {
            key: self.types.decode(key, value)
            for key, value in self._still_mapped(message.data["snapshot"]).items()
            if key not in self.types.codec.secret
        }
        self.using: Engine | Connection | None = None
        """Where the row is, and so its outbox and its inbox."""
        self.event = Event(message.id, message.occurred_at, message.attempt, message.sequence)

    def run(self, sessions: Sessions) -> bool:
        """Call the receiver in a transaction that is committed if it returns."""
        session, front = sessions.make()
        instance: Any = None
        begun: SessionTransaction | None = None

        def before_commit(_: Session) -> None:
            if begun is not None and begun is session.get_transaction() and is_committing(begun):
                self._leave(session)

        event.listen(session, "before_commit", before_commit)
        try:
            calls = Calls(session, front)
            instance = self._instance(session)
            self.using = calls[self.mapper].using(instance)
            if not self._enter(session):
                return False
            begun = session.get_transaction()
            self._call(calls, instance)
            if session.get_transaction() is not begun and not self._enter(session):
                # The receiver has ended the transaction by itself, and somebody was quicker then.
                return False
            begun = None
            session.commit()
            return True
        except Exception as error:
            session.rollback()
            self._failed(instance, error)
            raise
        finally:
            event.remove(session, "before_commit", before_commit)
            session.close()

    def _enter(self, session: Session) -> bool:
        """Write into the inbox that this is done; ``False`` if it was."""
        if not session.in_transaction():
            session.begin()  # with autobegin=False nobody else does
        connection = self._connection(session)
        if is_autocommit(connection):
            raise AutocommitError(
                f"{self.signal.name}: receiver {self.receiver} is durable, but the sessions of "
                f"this worker are on {connection.engine!r} with isolation_level='AUTOCOMMIT': the "
                f"note that it is done would stay when it fails. Give the Relay or the Worker "
                f"sessions on an engine with transactions"
            )
        row = {"event_id": self.message.id, "receiver": self.message.receiver}
        try:
            # Waits for another worker that is doing the same, and learns what became of it.
            connection.execute(insert(self.outbox.inbox).values(done_at=database_time(), **row))
        except IntegrityError:
            session.rollback()
            return False
        return True

    def _leave(self, session: Session) -> None:
        """Take that back: the receiver commits by itself, and may fail or be killed after that."""
        inbox = self.outbox.inbox.c
        self._connection(session).execute(
            delete(self.outbox.inbox).where(
                inbox.event_id == self.message.id, inbox.receiver == self.message.receiver
            )
        )

    def _connection(self, session: Session) -> Connection:
        # The session itself would ask listeners and shards where a statement goes.
        return session.connection(bind_arguments={"bind": self.using})

    def _instance(self, session: Session) -> Any:
        key = self._identity(self.mapper, self.types, self.message.data)
        if self.deleted:
            return detached_copy(self.mapper, key, self.snapshot)
        return attached_copy(session, self.mapper, key, self.snapshot)

    @staticmethod
    def _identity(mapper: Mapper[Any], types: Types, data: Mapping[str, Any]) -> Any:
        names = types.codec.primary_key
        if len(names) != len(data["key"]):
            raise MalformedMessageError(
                f"the message names a {mapper.class_.__name__} by {data['key']!r}, whose primary "
                f"key is ({', '.join(names)}) in this process. If that has changed since, let the "
                f"relay empty the outbox before such a migration"
            )
        values = [
            types.decode(name, value, ".key")
            for name, value in zip(names, data["key"], strict=True)
        ]
        return mapper.identity_key_from_primary_key(tuple(values), data.get("shard"))

    def _origin(self) -> Any:
        data = self.message.data.get("origin")
        if data is None:
            return None
        mapper = find_mapper(data["model"], has_outbox=False)
        if data["key"] is None:
            return mapper.class_manager.new_instance()
        key = self._identity(mapper, Types(codec_of(mapper), data.get("types")), data)
        values = zip(codec_of(mapper).primary_key, key[1], strict=True)
        return detached_copy(mapper, key, dict(values))

    def _still_mapped(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Without attributes that the model had only when the message was written."""
        keys = columns_of(self.mapper).keys
        return {key: value for key, value in values.items() if key in keys}

    def _arguments(self) -> dict[str, Any]:
        if self.deleted:
            return {"origin": self._origin()}
        data = self.message.data
        encoded = self._still_mapped(data.get("changes", {}))
        # Not those of the instance, which the receiver may change in place.
        snapshot = copies_of(self.snapshot)
        changes = decode_changes(self.types, encoded, snapshot, self.created)
        along = self._still_mapped(dict.fromkeys(data.get("along", ())))
        return {
            "created": self.created,
            "changes": Changes(diff_of(changes)),
            "update_fields": None if self.created else frozenset((*changes, *along)),
            "raw": data.get("raw", False),
        }

    def _call(self, calls: Calls, instance: Any) -> None:
        if self.receiver.is_async and calls.async_session is None:
            raise AsyncReceiverError(
                f"{self.signal.name}: receiver {self.receiver} is async, but the sessions of this "
                f"worker are not. Give the Relay or the Worker an async_sessionmaker"
            )
        try:
            calls.call(
                self.signal,
                self.receiver,
                self.mapper.class_,
                instance=instance,
                **self._arguments(),
                using=self.using,
                event=self.event,
            )
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
            self.message.subject,
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
