"""The :class:`Columns` of each mapper, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import inspect

from ..._sqlalchemy.mappers import property_count
from .columns import Columns

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

_columns: WeakKeyDictionary[Mapper[Any], Columns] = WeakKeyDictionary()


def columns_of(mapper: Mapper[Any]) -> Columns:
    """The :class:`Columns` of a mapper, made once."""
    found = _columns.get(mapper)
    if found is None:
        found = _columns[mapper] = Columns(inspect(mapper))
    return found


class ColumnsByMapper(dict["Mapper[Any]", Columns]):
    """:func:`columns_of`, for one pass over many rows: quicker than the weak references."""

    def __missing__(self, mapper: Mapper[Any]) -> Columns:
        self[mapper] = found = columns_of(mapper)
        return found


def current_columns_of(mapper: Mapper[Any], fields: Callable[[], Iterable[str]]) -> Columns:
    """The same, made again if columns were added to the class since; asked once for each flush.

    :param fields: the attributes that somebody asks for by name; called where it matters.
    """
    found = columns_of(mapper)
    if found.property_count != property_count(mapper):
        found = _columns[mapper] = Columns(inspect(mapper))
    if found.filled_in and (watched := found.filled_in.intersection(fields())):
        if watched not in found.watching:
            found.watching[watched] = Columns(inspect(mapper), watched)
        return found.watching[watched]
    return found
