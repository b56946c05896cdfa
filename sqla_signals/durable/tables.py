"""The tables of durable delivery, in the user's own metadata.

Three tables: the *outbox* holds what was committed and is not handed over yet, the *inbox* which
receiver has done which event, *dead letters* what was given up. Alembic's autogenerate creates and
migrates them like any other table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects import mysql, postgresql

from ..errors import ReceiverOptionError
from ..mapping import OUTBOX
from ..receivers import MAX_NAME
from .encoding import check_columns
from .writing import insert_events

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Mapper
    from sqlalchemy.types import TypeEngine

    from ..bridge.owed import Events
    from ..receivers import Receiver

MYSQL: Final = ("mysql", "mariadb")


class Outbox:
    """The tables of one metadata; made by :func:`outbox_table`.

    Its attributes ``table``, ``inbox`` and ``dead_letters`` are the tables.
    """

    def __init__(
        self,
        metadata: MetaData,
        *,
        prefix: str,
        schema: str | None,
        source: str,
        notify: bool,
        ordered: bool,
    ) -> None:
        self.metadata: MetaData = metadata
        self.source: str = source
        """The ``source`` of the messages."""
        self.notify: bool = notify
        """Whether writing an event wakes the relay."""
        name = f"{prefix}_{{}}"
        self.ordered: bool = ordered
        """Whether the events of one row are published one after the other."""
        self.options: tuple[Any, ...] = (prefix, schema, source, notify, ordered)
        self.table: Table = Table(
            name.format("outbox"),
            metadata,
            # Not used again when it was deleted: the sequence only rises.
            *_event_columns(autoincrement=True),
            schema=schema,
            sqlite_autoincrement=True,
        )
        if ordered:
            columns = self.table.c
            Index(
                name.format("outbox_in_order"),
                columns.aggregate_type,
                columns.aggregate_id,
                columns.sequence,
            )
        self.inbox: Table = Table(
            name.format("inbox"),
            metadata,
            Column("event_id", Uuid(), primary_key=True),
            Column("receiver", _name(), primary_key=True),
            Column("done_at", _timestamp(), nullable=False),
            schema=schema,
        )
        self.dead_letters: Table = Table(
            name.format("dead_letters"),
            metadata,
            *_event_columns(autoincrement=False),
            Column("dead_at", _timestamp(), nullable=False),
            schema=schema,
        )

    @property
    def channel(self) -> str:
        """The channel of PostgreSQL's ``NOTIFY``."""
        return self.table.fullname.replace(".", "_")

    def check(self, mapper: Mapper[Any], receiver: Receiver) -> None:
        """Raise :class:`ReceiverOptionError` if a model can never be put into a message."""
        check_columns(mapper, receiver)

    def write(self, connection: Connection, events: Events) -> None:
        """Insert the events of a transaction."""
        insert_events(self, connection, events)

    def __repr__(self) -> str:
        return f"<Outbox {self.table.fullname}>"


def outbox_table(
    metadata: MetaData,
    *,
    prefix: str = "sqla_signals",
    schema: str | None = None,
    source: str = "/sqla_signals",
    notify: bool = False,
    ordered: bool = False,
) -> Outbox:
    """Add the tables of durable delivery to the metadata of the models.

    :param metadata: ``Base.metadata``; models of it may have durable receivers then.
    :param prefix: what the names of the tables begin with.
    :param schema: the schema of the tables; that of the metadata by default.
    :param source: a URI reference that names this application in its messages.
    :param notify: wake the relay with PostgreSQL's ``NOTIFY`` instead of letting it wait for its
        next poll. Commits that notify wait for one another: leave it out where many transactions
        commit at once.
    :param ordered: publish the events of one row one after the other, however many relays there
        are: a later one waits until the earlier one was published, or has become a dead letter.
        Takes an index. Past the publisher, several workers may still run them in any order.
    :returns: the :class:`Outbox`, with its ``table``, ``inbox`` and ``dead_letters``.
    :raises ReceiverOptionError: not a ``MetaData``; or called before for it, with other options.

    Creates nothing in a database: ``Base.metadata.create_all()`` and Alembic do.
    """
    if not isinstance(metadata, MetaData):
        raise ReceiverOptionError(
            f"outbox_table(): {metadata!r} is no MetaData; give that of the models: "
            f"outbox_table(Base.metadata)"
        )
    schema = schema or metadata.schema
    known: Outbox | None = metadata.info.get(OUTBOX)
    if known is not None:
        if known.options != (prefix, schema, source, notify, ordered):
            raise ReceiverOptionError(
                f"outbox_table(): this metadata has {known!r} already, with other options. "
                f"One outbox serves all models of a metadata; call it once."
            )
        return known
    outbox = Outbox(
        metadata, prefix=prefix, schema=schema, source=source, notify=notify, ordered=ordered
    )
    metadata.info[OUTBOX] = outbox
    return outbox


def _event_columns(*, autoincrement: bool) -> list[Column[Any]]:
    return [
        Column(
            "sequence",
            BigInteger().with_variant(Integer(), "sqlite"),
            primary_key=True,
            autoincrement=autoincrement,
        ),
        Column("id", Uuid(), nullable=False),
        Column("aggregate_type", String(255), nullable=False),
        Column("aggregate_id", String(255), nullable=False),
        Column("event_type", String(16), nullable=False),
        Column("occurred_at", _timestamp(), nullable=False),
        Column("payload", _json(), nullable=False),
        Column("headers", _json(), nullable=False),
        Column("receivers", _json(), nullable=False),
        Column("attempts", Integer(), nullable=False),
        Column("available_at", _timestamp(), nullable=False),
        Column("last_error", Text(), nullable=True),
    ]


class _JSONB(postgresql.JSONB):
    def __repr__(self) -> str:
        return "JSONB()"


# What Alembic writes into a migration on another database is the repr, and that of the type itself,
# JSONB(astext_type=Text()), names something that the migration does not import.
_JSONB.__module__ = postgresql.JSONB.__module__


def _json() -> TypeEngine[Any]:
    return JSON().with_variant(_JSONB(), "postgresql")


def _name() -> TypeEngine[Any]:
    # Else "shop.Confirm" has done what "shop.confirm" did.
    return String(MAX_NAME).with_variant(String(MAX_NAME, collation="utf8mb4_bin"), *MYSQL)


def _timestamp() -> TypeEngine[Any]:
    return DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL)
