"""Who is called for the rows of one mapped class, in each phase of a transaction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from ..._sqlalchemy.mappers import property_count
from ...signals.builtin import post_delete, post_save, pre_delete, pre_save
from ..columns.by_mapper import current_columns_of
from ..columns.columns import Columns

if TYPE_CHECKING:
    from typing import Any

    from sqlalchemy.orm import Mapper

    from ...receivers.dispatch import Table
    from ...receivers.receiver import Phase, Receiver
    from ...signals.signal import Signal

Tables = tuple["Table", "Table", "Table", "Table"]

ROW_SIGNALS: Final = (pre_save, post_save, pre_delete, post_delete)
AFTER_FLUSH: Final[tuple[Phase, ...]] = ("commit", "rollback", "durable")
"""The calls that wait for the end of the transaction."""


def tables() -> Tables:
    """The receivers of :data:`ROW_SIGNALS` as they are now; not the same after a change."""
    return pre_save.table, post_save.table, pre_delete.table, post_delete.table


class Audience:
    """Who is called for the rows of one mapped class; made once for each state of the receivers.

    Muted receivers are among them, because a mute is the matter of one thread and one moment.
    """

    __slots__ = (
        "_columns",
        "_property_count",
        "hears_before_deletes",
        "hears_before_saves",
        "notes_saves",
        "outlasts_flush",
        "phases",
        "some_choose",
        "table_of",
        "waits",
    )

    def __init__(self, mapper: Mapper[Any], of_signals: Tables) -> None:
        cls = mapper.class_
        self.table_of: Mapping[Signal, Table] = dict(zip(ROW_SIGNALS, of_signals, strict=True))
        """The receivers of each signal, as they were then."""
        self.phases: Mapping[Signal, Mapping[Phase, tuple[Receiver, ...]]] = {
            signal: table.phases(cls) for signal, table in self.table_of.items()
        }
        saves, deletes = self.phases[post_save], self.phases[post_delete]
        self.hears_before_saves: bool = bool(self.phases[pre_save]["flush"])
        self.hears_before_deletes: bool = bool(self.phases[pre_delete]["flush"])
        self.waits: Mapping[Phase, bool] = {
            on: bool(saves[on] or deletes[on]) for on in AFTER_FLUSH
        }
        """Whether anybody waits for the transaction to end like this."""
        self.outlasts_flush: bool = any(self.waits.values())
        # Also for who waits for deletes: a row created and deleted again is no deleted row.
        self.notes_saves: bool = bool(saves["flush"]) or self.outlasts_flush
        """Whether anybody is called for what was inserted or updated, at once or in the end."""
        self.some_choose: Mapping[Phase, bool] = {
            on: any(one.chooses for one in saves[on]) for on in AFTER_FLUSH
        }
        """Whether a receiver of ``post_save`` is not called for each row."""
        self._property_count = property_count(mapper)
        self._columns: Columns | None = None

    def has_attributes_of(self, mapper: Mapper[Any]) -> bool:
        """Whether the class has gained no attribute since."""
        return self._property_count == property_count(mapper)

    def columns_of(self, mapper: Mapper[Any]) -> Columns:
        """The columns of the class; they know what of them receivers have named."""
        if self._columns is None:
            self._columns = current_columns_of(mapper, lambda: self._fields(mapper))
        return self._columns

    def _fields(self, mapper: Mapper[Any]) -> Iterator[str]:
        for receivers in self.phases[post_save].values():
            for receiver in receivers:
                for one in (receiver, *receiver.others):
                    if one.fields is not None:
                        yield from one.columns(mapper)


_known: tuple[Tables, WeakKeyDictionary[Mapper[Any], Audience]] | None = None
"""The receivers, and the audiences made of them: dropped together, so that no receiver that was
disconnected is held by a model that is not flushed any more."""


def audience_of(mapper: Mapper[Any]) -> Audience:
    """The :class:`Audience` of a mapper as it is now."""
    global _known
    now, known = tables(), _known
    if known is None or known[0] != now:
        known = _known = now, WeakKeyDictionary()
    found = known[1].get(mapper)
    if found is None or not found.has_attributes_of(mapper):
        found = known[1][mapper] = Audience(mapper, now)
    return found


class Audiences(dict["Mapper[Any]", Audience]):
    """:func:`audience_of`, for one pass over many rows: asked once for each mapper."""

    def __missing__(self, mapper: Mapper[Any]) -> Audience:
        self[mapper] = found = audience_of(mapper)
        return found
