"""What makes messages and rows that are wrong in every way.

The suite runs a few of each with a fixed seed, ``SQLA_SIGNALS_FUZZ=100`` a hundred times as many.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import inspect

from .models import Color, Money, Point, Values

TYPES: dict[str, Any] = {
    "id": UUID,
    "number": int,
    "real": float,
    "yes": bool,
    "total": Decimal,
    "at": datetime,
    "day": date,
    "hour": time,
    "span": timedelta,
    "blob": bytes,
    "color": Color,
    "point": Point,
    "text": str,
    "price": Money,
    "ratio": Money,
}
"""What a receiver may see, besides ``None``; the document may be any JSON."""

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    2**64,
    10**400,
    0.5,
    1e17,
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud800",
    "é\n\x1b[2J",
    "1",
    "true",
    "NaN",
    "nan",
    "inf",
    "1E+999999999",
    "9" * 5000,
    "0001-01-01",
    "2026-02-30",
    "2026-01-01T00:00:00+14:00",
    "AAAA",
    "%%%",
    "RED",
    "BLUE",
    "1,2",
    "1,2,3",
    "00000000-0000-4000-8000-00000000002a",
    [],
    {},
    [[]],
    {"a": None},
    [1, "a", None],
    {"new": 1},
    {"old": 1, "new": 2},
    "x" * 10_000,
    "created",
    "updated",
    "deleted",
    "shop.fuzzed",
    "os.system",
    "sqlalchemy.orm.Session",
    "tests.durable.models.Order",
]


def deep(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found] if levels % 2 else {"a": found}
    return found


def mutate(value: Any, chance: random.Random) -> Any:
    """A copy of a document in which something is another thing."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        value = _mutated(value, chance)
    return value


def _mutated(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice([*value])
        if chance.random() < 0.1:
            del value[key]
        elif chance.random() < 0.1:
            value[chance.choice(["shard", "origin", "types", "along", "raw", *TYPES])] = odd(chance)
        else:
            value[key] = _mutated(value[key], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        value[at] = _mutated(value[at], chance)
        return value
    if isinstance(value, str) and value and chance.random() < 0.4:
        at = chance.randrange(len(value))
        return value[:at] + chance.choice(["", "\0", "\ud800", "9", ".", "\n"]) + value[at + 1 :]
    return odd(chance)


def odd(chance: random.Random) -> Any:
    return (
        deep(chance.choice((50, 300, 901)))
        if chance.random() < 0.02
        else copy.deepcopy(chance.choice(ODD))
    )


def mangle(text: str, chance: random.Random) -> Any:
    """Text in which some characters are others, or which is no text."""
    kind = chance.randrange(6)
    at = chance.randrange(len(text))
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + chance.choice('{}[]",:0x\\') + text[at + 1 :]
    if kind == 2:
        return text[:at] + text[at:][::-1]
    if kind == 3:
        return chance.choice([None, 5, {"a": 1}, [], "", "[" * 100_000, "null", text.encode()])
    if kind == 4:
        return text.replace('"', chance.choice(["", "'", '""']), 3)
    return text + text


def mutated_text(message: str, chance: random.Random) -> Any:
    """A message that is wrong somewhere."""
    if chance.random() < 0.15:
        return mangle(message, chance)
    return json.dumps(mutate(json.loads(message), chance))


def check_call(instance: Any, kwargs: dict[str, Any]) -> None:
    """Raise an error for what a receiver must never get."""
    assert type(instance) is Values
    held = inspect(instance).dict
    for key, kind in TYPES.items():
        value = held.get(key)
        assert value is None or type(value) is kind, (key, value)
        for value in kwargs.get("changes", {}).get(key, ()):
            assert value is None or type(value) is kind or repr(value) == "UNSET", (key, value)
    assert [held["id"]] == [*inspect(instance).identity]
    event = kwargs["event"]
    assert type(event.attempt) is int
    assert event.attempt >= 0
    assert type(event.id) is UUID
    assert event.occurred_at.tzinfo is not None
    if "created" in kwargs:
        assert type(kwargs["created"]) is bool
        assert type(kwargs["raw"]) is bool


def mutated_row(row: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The columns of a row of the outbox, of which some are wrong, as text."""
    documents = {name: row[name] for name in ("payload", "headers", "receivers")}
    if chance.random() < 0.8:
        changed = mutate(documents, chance)
        documents = changed if isinstance(changed, dict) else documents
    made = {
        "id": uuid4(),
        "aggregate_type": row["aggregate_type"],
        "aggregate_id": row["aggregate_id"],
        "event_type": row["event_type"],
        "attempts": chance.choice((0, 0, 0, -(2**31), 2**31 - 1, 1024)),
        **{name: json.dumps(documents.get(name)) for name in ("payload", "headers", "receivers")},
    }
    names: list[Callable[[], str]] = [
        lambda: "tests.durable.models.Order", lambda: "x" * 255, lambda: "é\n\x1b[2J", lambda: ""
    ]  # fmt: skip
    if chance.random() < 0.2:
        made[chance.choice(("aggregate_type", "aggregate_id"))] = chance.choice(names)()
    if chance.random() < 0.1:
        made["event_type"] = chance.choice(("nonsense", "", "deleted", "updated"))
    return made
