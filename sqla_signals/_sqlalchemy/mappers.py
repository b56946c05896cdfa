"""Mappers: which there are, their attributes, and how their classes are related."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import (
    MANYTOONE,
    ColumnProperty,
    CompositeProperty,
    QueryableAttribute,
    RelationshipProperty,
    SynonymProperty,
    attributes,
)
from sqlalchemy.orm.exc import UnmappedColumnError
from sqlalchemy.orm.mapper import _mapper_registries
from sqlalchemy.schema import Column, Table

from ..errors import SignalsError

if TYPE_CHECKING:
    from sqlalchemy.orm import ClassManager, Mapper


def all_mappers() -> list[Mapper[Any]]:
    """Every mapper of the process that is complete, configured or not.

    ``registry.mappers`` (orm/decl_api.py) raises while another thread defines a class, and for as
    long as somebody keeps a class whose definition has failed. ``keyrefs()`` copies in one step,
    and ``Mapper.__init__`` ends with ``_flag_new_mapper``.
    """
    managers = [ref() for registry in _registries() for ref in registry._managers.keyrefs()]
    mappers = [manager.__dict__.get("mapper") for manager in managers if manager is not None]
    return [mapper for mapper in mappers if mapper is not None and mapper._ready_for_configure]


def configured_mappers() -> list[Mapper[Any]]:
    """Every mapper that can be configured, after configuring it.

    ``configure_mappers()`` does not do: it raises if one class of the process cannot be configured.
    """
    for registry in _registries():
        try:
            registry.configure(cascade=True)
        except SignalsError:
            raise
        except Exception:
            continue  # using one of its classes raises this, too
    return [mapper for mapper in all_mappers() if mapper.configured]


def _registries() -> list[Any]:
    return [registry for ref in _mapper_registries.keyrefs() if (registry := ref())]


manager_of_class: Callable[[type], ClassManager[Any]] = attributes.manager_of_class
"""The class manager of a mapped class."""


def mapper_of(cls: type) -> Mapper[Any] | None:
    """The mapper of exactly this class, without configuring mappers; ``None`` if unmapped."""
    manager = cls.__dict__.get("_sa_class_manager")
    if manager is None or not manager.is_mapped:
        return None
    mapper: Mapper[Any] = manager.mapper
    return mapper


def is_mapped(cls: type) -> bool:
    """Whether exactly this class is mapped, without configuring mappers."""
    return mapper_of(cls) is not None


def property_count(mapper: Mapper[Any]) -> int:
    """How many properties a mapper has; more come when one is assigned to its class later."""
    return len(mapper._props)


def column_keys(mapper: Mapper[Any], attribute: str) -> frozenset[str]:
    """The column attributes behind an attribute name, empty if there is no column behind it.

    A relationship stands for its foreign keys on this class, a composite for its columns, a
    synonym for what it is a synonym of.
    """
    prop = mapper._props.get(attribute)
    if isinstance(prop, SynonymProperty):
        return column_keys(mapper, prop.name)
    if isinstance(prop, ColumnProperty):
        return frozenset([prop.key] if isinstance(prop.columns[0], Column) else [])
    if isinstance(prop, CompositeProperty):
        return frozenset(column_prop.key for column_prop in prop.props)
    if isinstance(prop, RelationshipProperty):
        return frozenset(
            mapper.get_property_by_column(column).key
            for column in prop.local_columns
            if prop.direction is MANYTOONE
        )
    return frozenset()


def attribute_of(column: Any, mapper: Mapper[Any]) -> str | None:
    """The name of the attribute for a column; ``None`` if the class has none.

    :param column: a column of the class or of an alias of it, or the key of one.
    """
    if isinstance(column, str):
        column = mapper.local_table.c.get(column)
    else:
        column = mapper.persist_selectable.corresponding_column(column)
    try:
        return None if column is None else mapper.get_property_by_column(column).key
    except UnmappedColumnError:
        return None


def key_columns_of(mapper: Mapper[Any]) -> list[Any]:
    """The columns in the mapper's own table that hold the primary key, in the order of the key."""
    found = []
    for column in mapper.primary_key:
        same, todo = {column}, [column]
        while todo:
            more = mapper._equivalent_columns.get(todo.pop(), set()) - same
            same |= more
            todo += more
        found.append(next(one for one in same if one.table is mapper.local_table))
    return found


def relations_size(mapper: Mapper[Any]) -> int:
    """How many properties a mapper has, and how many relationships and cascades lead to it.

    It grows when a property is assigned to one of the classes later.
    """
    size = len(mapper._props)
    parent: Mapper[Any] | None = mapper
    while parent is not None:
        size += len(parent._dependency_processors) + len(parent._delete_orphans)
        parent = parent.inherits
    return size


def is_referenced(mapper: Mapper[Any]) -> bool:
    """Whether a relationship of another class leads to the mapper."""
    return any(parent._dependency_processors for parent in mapper.iterate_to_root())


def referenced_keys(mapper: Mapper[Any]) -> Iterator[str]:
    """The attributes whose change a flush carries over to the foreign keys of other rows."""
    relationships = [
        prop
        for prop in mapper.relationships
        if not prop.viewonly and prop.direction is not MANYTOONE
    ]
    relationships += [
        processor.prop  # many-to-one, from the other side
        for parent in mapper.iterate_to_root()
        for processor in parent._dependency_processors
    ]
    for prop in relationships:
        for column, _ in prop.synchronize_pairs:
            # A relationship that reads through a table in between may name a column of that.
            key = attribute_of(column, mapper)
            if key is not None:
                yield key


def can_orphan(mapper: Mapper[Any]) -> bool:
    """Whether a ``delete-orphan`` cascade leads to the mapper."""
    return any(parent._delete_orphans for parent in mapper.iterate_to_root())


def secondary_relationship(attribute: Any) -> RelationshipProperty[Any] | None:
    """The many-to-many relationship of ``User.groups``, without configuring mappers.

    ``None`` if it is anything else.
    """
    prop = getattr(attribute, "prop", None) if isinstance(attribute, QueryableAttribute) else None
    if not isinstance(prop, RelationshipProperty) or prop._init_args.secondary.argument is None:
        return None
    return prop


def writes_rows(prop: RelationshipProperty[Any]) -> bool:
    """Whether a relationship has a ``secondary`` table and can write rows of it.

    It cannot write to a join, nor to a table without the foreign keys to both sides: then
    ``ManyToManyDP._synchronize`` fails as soon as the collection is changed.
    """
    if prop.viewonly or not isinstance(prop.secondary, Table):
        return False
    pairs = (*prop.synchronize_pairs, *(prop.secondary_synchronize_pairs or ()))
    return all(column.table is prop.secondary for _, column in pairs)


def both_sides(prop: RelationshipProperty[Any]) -> list[RelationshipProperty[Any]]:
    """A relationship, and those tied to it by ``back_populates`` or ``backref``."""
    return [prop, *filter(writes_rows, prop._reverse_property)]
