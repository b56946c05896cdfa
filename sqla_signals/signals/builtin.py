"""The built-in signals, each with when it is sent, what it carries and when it is not sent."""

from __future__ import annotations

from typing import Final

from .kinds import (
    AssociationSignal,
    FailureSignal,
    InstalledSignal,
    InstanceSignal,
    ModelSignal,
)
from .signal import Signal

_SAVE_ARGUMENTS: Final = (
    "instance", "created", "changes", "update_fields", "raw", "using", "session", "signal",
)  # fmt: skip
_DELETE_ARGUMENTS: Final = ("instance", "origin", "using", "session", "signal")
_MIGRATE_ARGUMENTS: Final = (
    "connection", "plan", "direction", "heads", "using", "session", "signal",
)  # fmt: skip

receiver_failed: Final = FailureSignal(
    "receiver_failed",
    """Sent when a receiver that was called after the transaction raised an exception.

    The exception was logged already; it does not reach the caller of ``commit()``. Receivers are
    plain functions, because nothing awaits them; what they raise is logged, and that is all.

    Arguments besides the sender, the model: ``receiver``, the function; ``signal``;
    ``instance``; ``exception``.
    """,
    arguments=("receiver", "signal", "instance", "exception"),
)

pre_save: Final = ModelSignal(
    "pre_save",
    """Sent before the first statement of a flush, for each row it is going to INSERT or UPDATE.

    Arguments besides the sender, which is the exact class:

    - ``instance``: the instance.
    - ``created``: ``True`` if this flush inserts the row.
    - ``changes``: mapping of column attribute name to :class:`~sqla_signals.Change`, as assigned
      so far. Foreign keys that the flush sets itself are not in it yet.
    - ``update_fields``: ``None`` if created, else the frozenset of the names in ``changes``.
    - ``raw``: inside :func:`sqla_signals.raw`.
    - ``using``: the ``Engine`` or ``Connection`` the row goes to.
    - ``session``: the session; the ``AsyncSession`` for an async receiver.
    - ``signal``: this signal.

    A receiver may change this and other instances, add, delete, expunge and query; what it adds to
    the flush gets its own ``pre_*``. Raising an exception vetoes the flush: nothing was written and
    the session stays usable.

    Not sent: for an instance whose row the flush does not write (no-op and reverted assignments, a
    change to a collection only), for bulk statements and the legacy ``bulk_save_objects()``.
    """,
    arguments=_SAVE_ARGUMENTS,
)
post_save: Final = ModelSignal(
    "post_save",
    """Sent at the end of a flush, for each row it has INSERTed or UPDATEd.

    The arguments are those of :data:`pre_save`; ``changes`` now holds what was written, and
    ``update_fields`` also versions and ``onupdate`` columns that the UPDATE wrote. In ``changes``,
    ``new`` is :data:`~sqla_signals.UNSET` where the database computed a value that was not fetched.

    Sent mapper by mapper as the unit of work writes them and, within a mapper, in the order of
    SQLAlchemy's ``after_insert`` and ``after_update``. The session knows the new rows already;
    what a receiver changes or adds goes out with the next flush. Raising an exception rolls the
    transaction back.

    Not sent: when :data:`pre_save` is not, and when the flush fails.
    """,
    arguments=_SAVE_ARGUMENTS,
    phases=("flush", "commit", "rollback"),
)
pre_delete: Final = ModelSignal(
    "pre_delete",
    """Sent before the first statement of a flush, for each row it is going to DELETE.

    Arguments besides the sender, which is the exact class:

    - ``instance``: the instance.
    - ``origin``: the deleted instance whose cascade takes this one along; ``None`` for one given
      to ``session.delete()`` and for an orphan.
    - ``using``, ``session``, ``signal``: as with :data:`pre_save`.

    What a receiver may do is said with :data:`pre_save`; raising an exception refuses the deletion.

    Not sent: for rows that the database deletes by ``ON DELETE CASCADE``.
    """,
    arguments=_DELETE_ARGUMENTS,
)
post_delete: Final = ModelSignal(
    "post_delete",
    """Sent at the end of a flush, for each row it has DELETEd.

    The arguments are those of :data:`pre_delete`, the order is that of ``after_delete``.

    Not sent: when :data:`pre_delete` is not, and when the flush fails.
    """,
    arguments=_DELETE_ARGUMENTS,
    phases=("flush", "commit", "rollback"),
)
m2m_changed: Final = AssociationSignal(
    "m2m_changed",
    """Sent for the rows that a flush adds to and removes from a ``secondary`` table.

    The sender is the :class:`~sqlalchemy.schema.Table`. Connect to it, or to a relationship,
    ``sender=User.groups``: then also to what is done through ``Group.users``, if the two are tied
    by ``back_populates`` or ``backref``, and always told from the side of the user.

    Arguments besides the sender:

    - ``action``: ``"pre_remove"`` and ``"pre_add"`` before the first statement of the flush, with
      the ``pre_*`` signals of rows and after them; ``"post_remove"`` and ``"post_add"`` at its end,
      after the ``post_*`` signals of rows.
    - ``instance``: the instance on the side that it is told from.
    - ``relationship``: that side's attribute, ``User.groups``.
    - ``model``: the class that the relationship leads to.
    - ``pk_set``: frozenset of the primary keys on the other side, of all rows of this instance and
      action; tuples where the key has several columns. ``"pre_add"`` lacks the keys that the
      database is still to generate.
    - ``raw``, ``using``, ``session``, ``signal``: as with :data:`pre_save`.

    A row is told of once, whichever side it was changed from. A receiver connected to the table
    hears of it from the side whose foreign key stands first in the table.

    What a receiver of a ``pre_`` action may do is said with :data:`pre_save`; raising an exception
    vetoes the flush. Raising in a ``post_`` action rolls the transaction back.

    Not sent: for rows that the database removes by ``ON DELETE CASCADE``, for statements on the
    table, for the association object pattern (its rows are instances with signals of their own),
    and when an UPDATE carries a changed primary key over to the rows.
    """,
    arguments=(
        "instance", "action", "relationship", "model", "pk_set", "raw", "using", "session",
        "signal",
    ),
)  # fmt: skip
pre_bulk: Final = InstalledSignal(
    "pre_bulk",
    """Sent before an ORM-enabled ``insert()``, ``update()`` or ``delete()`` is executed.

    That is by ``Session.execute()`` and its like, by ``Query.update()`` and ``Query.delete()``.

    Arguments besides the sender, which is the class that the statement names:

    - ``operation``: ``"insert"``, ``"update"`` or ``"delete"``.
    - ``statement``: the statement, as it was given.
    - ``parameters``: the dictionary or the list of dictionaries given with it, or ``None``.
    - ``using``, ``session``, ``signal``: as with :data:`pre_save`.

    What the receiver changes in the session is flushed before the statement, if the session
    flushes automatically. Raising an exception vetoes the statement: it is not executed.

    Not sent: for statements on a :class:`~sqlalchemy.schema.Table`, also on that of a model; for
    those inside of a ``select()``; for the legacy ``bulk_save_objects()`` and its like; with the
    execution option ``{"signals": "skip"}``.
    """,
    arguments=("operation", "statement", "parameters", "using", "session", "signal"),
)
post_bulk: Final = InstalledSignal(
    "post_bulk",
    """Sent after an ORM-enabled ``insert()``, ``update()`` or ``delete()`` was executed.

    The arguments are those of :data:`pre_bulk`, and ``rowcount``: how many rows the statement has
    matched, as the database counts them; -1 where it does not tell, as of an upsert with a list of
    parameters.

    Raising an exception rolls the transaction back, or the savepoint, as a flush does that fails.

    With ``on="commit"`` it is sent once for each statement whose transaction was committed, in its
    place among the signals of rows; with ``on="rollback"`` if it was undone.

    Not sent: when :data:`pre_bulk` is not, and when the statement fails.
    """,
    arguments=("operation", "statement", "parameters", "rowcount", "using", "session", "signal"),
    phases=("flush", "commit", "rollback"),
)
pre_init: Final = InstanceSignal(
    "pre_init",
    """Sent when a model is called to construct an instance, before its ``__init__`` runs.

    Arguments besides the sender, which is the class:

    - ``args``: the tuple of positional arguments.
    - ``kwargs``: the dictionary of keyword arguments. What a receiver changes in it counts.
    - ``signal``: this signal.

    Parameters that have a default come in ``kwargs``, filled in, however the caller gave them: this
    is how SQLAlchemy calls ``__init__``.

    Raising an exception prevents the construction. The receiver cannot be ``async``.

    Not sent: for rows that are loaded, because SQLAlchemy does not call ``__init__`` for these.
    """,
    arguments=("args", "kwargs", "signal"),
)
post_init: Final = InstanceSignal(
    "post_init",
    """Sent when an instance is complete: after its ``__init__``, or once its row is loaded.

    Arguments besides the sender, which is the class:

    - ``instance``: the instance.
    - ``loaded``: whether it was made from a row, and its ``__init__`` not called.
    - ``signal``: this signal.

    Of a loaded instance, relationships that the same query loads may not be there yet; a receiver
    may load them. A constructed one belongs to no session, so the signal is sent while anything is
    installed; a loaded one to the session, which must be one that is listened to.

    As with SQLAlchemy's own ``load`` event, the copies that ``Session.merge()`` makes count as
    loaded if they stand for a row; so does the instance that an ``on="commit"`` or
    ``on="rollback"`` receiver gets: what ``post_init`` sets up is there on every instance.

    Raising an exception fails the construction or the query. The receiver cannot be ``async``.

    Not sent: when an instance is refreshed, by ``refresh()``, after it had expired, or with
    ``populate_existing``; when it is unpickled.
    """,
    arguments=("instance", "loaded", "signal"),
)
class_prepared: Final = InstanceSignal(
    "class_prepared",
    """Sent once for each mapped class, when it and all others mapped so far are configured.

    That is before the first instance, or the first query, or in ``configure_mappers()``: attributes
    and relationships are there, backrefs included. Classes come in the order of their mapping.

    Arguments besides the sender, which is the class: ``signal``.

    Raising an exception reaches whoever caused the configuration; the class stays usable, and the
    classes behind it are announced the next time that any are configured. The receiver cannot be
    ``async``.

    Not sent: for classes that were configured before the receiver was connected, or before
    :func:`~sqla_signals.install`; connect and install before the models are used.
    """,
    arguments=("signal",),
)
pre_migrate: Final = Signal(
    "pre_migrate",
    """Sent before the first step of a run of Alembic's migrations.

    An ``env.py`` sends it with :func:`sqla_signals.alembic.migration_signals`.

    The sender is the ``target_metadata`` of ``context.configure()``: connect with
    ``sender=Base.metadata``, or without a sender for any. Of several ``MetaData``, a receiver is
    called for the first that it is connected to; without any, the sender is ``None``. Arguments
    besides it:

    - ``connection``: the ``Connection`` that is migrated.
    - ``plan``: the steps to take, a tuple of Alembic's ``MigrationInfo``.
    - ``direction``: ``"upgrade"``, ``"downgrade"`` or ``"stamp"``.
    - ``heads``: frozenset of the revisions that the database is at now, empty at base.
    - ``using``: the ``Engine`` of the connection.
    - ``session``: a session on the connection, for the receivers of this signal; an
      ``AsyncSession`` for an async receiver. It is in the transaction of the first step, and its
      work is committed with that.
    - ``signal``: this signal.

    Raising an exception prevents the run: nothing was migrated.

    Not sent: when there is nothing to migrate, in offline mode (``--sql``), and by commands that
    only look.
    """,
    arguments=_MIGRATE_ARGUMENTS,
)
post_migrate: Final = Signal(
    "post_migrate",
    """Sent after the last step of a run of Alembic's migrations, before that step is committed.

    The arguments are those of :data:`pre_migrate`; ``heads`` is where the database is now.

    What the receivers do is committed with the last step. Raising an exception rolls that back, as
    if the migration itself had failed, and with it the steps before if they are in the same
    transaction; to migrate again sends the signal again.

    Not sent: when :data:`pre_migrate` is not, and when a step fails.
    """,
    arguments=_MIGRATE_ARGUMENTS,
)
