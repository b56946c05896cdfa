"""Whether the signals of one flush are those that are promised for the rows it wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from sqlalchemy import JSON, Column, inspect
from sqlalchemy.orm import Mapper

import sqla_signals

from .recorder import BASES, Flush, Sent
from .witness import Fate, Key, attributes_of

UNSET = sqla_signals.UNSET


def expected(flush: Flush) -> Counter[tuple[Key, str]]:
    """What the rows written and the instances born and dead promise.

    The database sees a row switch (one instance deleted, another with its key added) as an UPDATE,
    or not at all when no column but the key was set. Only the session knows better.
    """
    kinds = Counter((fate.key, fate.kind) for fate in flush.fates)
    dead = {key for _, key in flush.died}
    for _, key in flush.born:
        assert key is not None
        if key in dead and not kinds[key, "created"]:
            del kinds[key, "updated"]
            kinds[key, "created"] = kinds[key, "deleted"] = 1
    for instance, key in flush.died:
        if key is None:  # Pending: it has no row, but its DELETE may hit the one of another.
            mapper = inspect(instance).mapper
            values = tuple(mapper.primary_key_from_instance(instance))
            del kinds[(mapper.base_mapper.local_table.name, values), "deleted"]
    return +kinds


def late(flush: Flush) -> list[Sent]:
    """The `pre_*` signals that came after the first statement of the flush."""
    first = min(flush.statements, default=None)
    return [s for s in flush.sent if s.signal[:4] == "pre_" and first is not None and s.at > first]


def mismatches(flush: Flush, *, stale: set[Key], meddling: bool = False) -> Iterator[str]:
    """Each way in which the signals of `flush` differ from what was written.

    `stale` are the rows that others wrote: old values the session has of them may be wrong.
    With `meddling`, receivers act on the session: a `pre_*` may then be sent for a write that
    another receiver prevents, and what one receiver sees another may have changed.
    """
    pre = [sent for sent in flush.sent if sent.signal.startswith("pre_")]
    post = [sent for sent in flush.sent if sent.signal.startswith("post_")]
    if flush.error is not None:
        if not meddling:
            yield from (f"a flush that failed has sent {sent}" for sent in post)
        return

    want = expected(flush)
    got = Counter((sent.key, sent.kind) for sent in post)
    yield from (f"written but no post: {k} x{n}" for k, n in (want - got).items())
    yield from (f"post but not written: {k} x{n}" for k, n in (got - want).items())

    announced = Counter((id(sent.instance), sent.kind) for sent in pre)
    for sent in post:
        n = announced.pop((id(sent.instance), sent.kind), 0)
        if n != 1:
            yield f"{n} pre for {sent}"
    if not meddling:
        left = set(announced)
        yield from (f"pre without post: {s}" for s in pre if (id(s.instance), s.kind) in left)

    first_write = {fate.key: fate.first_at for fate in flush.fates}
    sent_at = {(id(sent.instance), sent.kind): sent.at for sent in pre}
    for sent in post:
        at = sent_at.get((id(sent.instance), sent.kind), 0)
        if at > first_write.get(sent.key, at):
            yield f"pre after the row's own statement: {sent}"
        if sent.at < max(flush.statements, default=0):
            yield f"post before the last statement: {sent}"
        if not meddling and not (sent.deleted if sent.kind == "deleted" else sent.in_session):
            yield f"post in the wrong state: {sent}"
        if not meddling and sent.kind != "deleted" and sent.modified:
            yield f"post for an instance that is still modified: {sent}"
        if sent.kind == "deleted":
            yield from _origin(sent, flush)
    yield from _order(post, flush)
    for sent in flush.sent:
        if sent.sender is not type(sent.instance):
            yield f"sender is not the exact class: {sent}"

    by_key = {(fate.key, fate.kind): fate for fate in flush.fates}
    for sent in post:
        key = sent.key
        assert key is not None
        fate = by_key.get((key, sent.kind))
        if fate is not None:
            yield from _class(sent, fate)
            if sent.kind != "deleted":
                # SQLAlchemy clears a sheet's key in memory when it leaves its pile, and no more.
                is_stale = key in stale or key[0] == "sheets"
                yield from _values(sent, fate, is_stale=is_stale)


def _origin(sent: Sent, flush: Flush) -> Iterator[str]:
    origin = sent.arguments["origin"]
    if origin is sent.instance or (
        origin is not None and not any(origin is dead for dead, _ in flush.died)
    ):
        yield f"origin is not a deleted instance: {sent} {origin!r}"


def _order(post: list[Sent], flush: Flush) -> Iterator[str]:
    """Within a mapper, `post_*` come in the order of SQLAlchemy's own events."""
    switched = {key for _, key in flush.born} & {key for _, key in flush.died}
    once = Counter(map(id, flush.mapper_events))
    places = {id(instance): at for at, instance in enumerate(flush.mapper_events)}
    last: dict[Mapper[Any], tuple[int, Sent]] = {}
    for sent in post:
        if once[id(sent.instance)] != 1 or sent.key in switched:
            continue  # No event of its own (post_update), or not one for each side (row switch).
        mapper, place = inspect(sent.instance).mapper, places[id(sent.instance)]
        if mapper in last and last[mapper][0] > place:
            yield f"post not in the order of the after_* events: {last[mapper][1]} before {sent}"
        last[mapper] = place, sent


def _class(sent: Sent, fate: Fate) -> Iterator[str]:
    state = inspect(sent.instance)
    mapper = state.mapper
    base = BASES[mapper.local_table.name]
    row = fate.new.get(base.name) or fate.old.get(base.name)
    if mapper.polymorphic_on is not None and row:
        discriminator = row[mapper.polymorphic_on.name]
        # Merging an instance of another class into this one assigns that one's discriminator.
        # SQLAlchemy warns and writes it (_validate_polymorphic_identity of orm/mapper.py), and the
        # instance stays what it is, in Python and for the mapper that emits the UPDATE.
        assigned = state.dict.get(mapper.get_property_by_column(mapper.polymorphic_on).key)
        if discriminator not in (mapper.polymorphic_identity, assigned):
            yield f"the row is a {discriminator}: {sent}"


def _values(sent: Sent, fate: Fate, *, is_stale: bool) -> Iterator[str]:
    """Compare `changes` and `update_fields` with the row before and after."""
    mapper = inspect(sent.instance).mapper
    changes, update_fields = sent.arguments["changes"], sent.arguments["update_fields"]
    attributes = attributes_of(mapper)
    changed: set[str] = set()
    for table, new_row in fate.new.items():
        old_row = fate.old[table] if fate.kind == "updated" else {}
        for name, new in new_row.items():
            attribute = attributes.get((table, name))
            if attribute is None:  # A column of a sibling in single-table inheritance.
                continue
            column = BASES[table].metadata.tables[table].c[name]
            known = changes.get(attribute)
            is_change = (old_row.get(name) != new) if fate.kind == "updated" else new is not None
            if is_change and not column.computed:
                changed.add(attribute)
                if known is None and not _made_by_flush(mapper, column, fate.kind):
                    yield f"{attribute} changed, but is not in changes: {sent}"
            if known is None:
                continue
            old_known, new_known = known
            if new_known is not UNSET and not _same(column, new_known, new):
                yield f"{attribute}: new is {new_known!r}, written was {new!r}: {sent}"
            if fate.kind == "created":
                if old_known is not UNSET:
                    yield f"{attribute}: old is {old_known!r} though the row is new: {sent}"
            elif old_known is not UNSET and not is_stale:
                if not _same(column, old_known, old_row.get(name)):
                    yield f"{attribute}: old is {old_known!r}, was {old_row.get(name)!r}: {sent}"
                elif (
                    not is_change
                    and new_known is not UNSET
                    and (table, name) not in fate.columns_computed
                ):
                    yield f"{attribute}: {known!r} is no change: {sent}"
    if fate.kind == "created":
        if update_fields is not None:
            yield f"update_fields is {update_fields!r} though the row is new: {sent}"
        return
    assigned = {attributes[c] for c in fate.columns_set if c in attributes}
    if not isinstance(update_fields, frozenset) or update_fields != assigned:
        yield f"update_fields is {update_fields!r}, assigned were {sorted(assigned)}: {sent}"
    elif not changed <= update_fields or not set(changes) <= update_fields:
        yield f"update_fields {set(update_fields)} lacks some of {changed | set(changes)}: {sent}"


def _made_by_flush(mapper: Mapper[Any], column: Column[Any], kind: str) -> bool:
    """Whether the value is one that the flush or the database made, not the program."""
    return (
        column is mapper.version_id_col
        or column is mapper.polymorphic_on
        or (kind == "updated" and column.onupdate is not None)
        or (kind == "created" and (column.primary_key or column.default is not None))
        or column.server_default is not None
    )


def _same(column: Column[Any], known: Any, logged: Any) -> bool:
    if isinstance(column.type, JSON) and isinstance(logged, str):
        logged = json.loads(logged)
    return bool(known == logged)
