"""The outbox of a metadata: how it is made, found and written to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import MetaData

from .._sqlalchemy.mappers import configured_mappers
from ..errors import InstallError, ReceiverOptionError
from ..receivers.mapped import OUTBOX, durable_receivers, known_outbox
from .message.codec import check_columns
from .tables.tables import OutboxTables
from .writing import insert_events

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection
    from sqlalchemy.orm import Mapper

    from ..bridge.transaction.durable import Events
    from ..receivers.receiver import Receiver


class Outbox(OutboxTables):
    """The tables of one metadata; made by :func:`outbox_table`.

    Its attributes ``table``, ``started``, ``inbox`` and ``dead_letters`` are the tables.
    """

    def check(self, mapper: Mapper[Any], receiver: Receiver) -> None:
        """Raise :class:`ReceiverOptionError` if a model can never be put into a message."""
        check_columns(mapper, receiver)

    def write(self, connection: Connection, events: Events) -> None:
        """Insert the events of a transaction."""
        insert_events(self, connection, events)


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
    :returns: the :class:`Outbox`, with its ``table``, ``started``, ``inbox`` and ``dead_letters``.
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


def models_by_outbox() -> dict[Outbox, list[Mapper[Any]]]:
    """The outboxes of this process, each with the models that write into it."""
    found: dict[Outbox, list[Mapper[Any]]] = {}
    for mapper in configured_mappers():
        if outbox := known_outbox(mapper):
            found.setdefault(outbox, []).append(mapper)
    return found


def with_durable_receivers(models: Iterable[Mapper[Any]]) -> list[Mapper[Any]]:
    """Those of these models that have durable receivers."""
    receivers = durable_receivers()
    return [model for model in models if any(one.matches(model.class_) for one in receivers)]


def the_outbox() -> Outbox:
    """The outbox of this process: the only one, or the only one whose models have receivers.

    :raises InstallError: there is none, or there are several.
    """
    found = models_by_outbox()
    candidates = [*found]
    if len(candidates) > 1:
        candidates = [one for one, models in found.items() if with_durable_receivers(models)]
    if len(candidates) == 1:
        return candidates[0]
    raise InstallError(
        "several outboxes are known in this process. Say which one: Relay(..., outbox=...)"
        if found
        else "no outbox is known in this process. Import the models, and call "
        "outbox_table(Base.metadata) beside them"
    )
