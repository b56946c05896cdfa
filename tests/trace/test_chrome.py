"""A trace in Chrome's format: what Perfetto's importer of JSON asks for."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_signals import post_save, receiver, trace

from .models import Entry, Order


def complete_events(chrome: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The events that take time, by track, after checking what the format demands of all."""
    assert chrome.keys() == {"traceEvents", "displayTimeUnit"}
    assert chrome["displayTimeUnit"] == "ms"
    tracks: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in chrome["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            continue
        assert isinstance(event["cat"], str)
        assert event["ts"] >= 0
        if event["ph"] == "i":
            assert event["s"] == "t"
        else:
            assert event["ph"] == "X"
            assert event["dur"] >= 0
            tracks[event["tid"]].append(event)
    return tracks


def assert_nested(events: list[dict[str, Any]]) -> None:
    """Perfetto drops an event that overlaps another one of its track without being inside of it."""
    open_until: list[float] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while open_until and open_until[-1] <= event["ts"]:
            open_until.pop()
        end = event["ts"] + event["dur"]
        assert not open_until or end <= open_until[-1] + 1e-6, event["name"]
        open_until.append(end)


def test_a_saved_trace_has_complete_events_in_microseconds_that_nest(
    shop: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Rows are marks, and arguments of their flush; an error is one of its receiver."""

    @receiver(post_save, sender=Order)
    def write(sender, session, **kwargs):
        session.add(Entry(text="saved"))

    @receiver(post_save, sender=Order, on="commit")
    def place_another(sender, instance, session, **kwargs):
        if instance.id < 3:
            session.add(Order())
        else:
            raise ValueError("enough")

    with trace() as traced, Session(shop) as session:
        session.add(Order())
        session.commit()
    path = tmp_path / "trace.json"
    traced.save_chrome(path)
    chrome = json.loads(path.read_text())
    assert chrome == traced.to_chrome()
    (events,) = complete_events(chrome).values()
    assert_nested(events)
    names = [event["name"].rpartition(".")[2] for event in events]
    assert names.count("commit") == names.count("place_another") == 3
    assert names.count("write") == 3
    (root,) = (event for event in events if event["cat"] == "trace")
    assert root["ts"] == 0
    assert root["dur"] == pytest.approx(traced.root.duration * 1e6)
    flush = next(event for event in events if event["cat"] == "flush")
    assert flush["args"] == {"rows": ["INSERT Order 1"]}
    errors = [event["args"]["error"] for event in events if "error" in event.get("args", {})]
    assert errors == ["ValueError: enough"]
    receivers = [event for event in events if event["cat"] == "receiver"]
    assert all(event["args"]["location"].startswith(__file__) for event in receivers)
    marks = [event["name"] for event in chrome["traceEvents"] if event["ph"] == "i"]
    assert marks.count("INSERT Order 3") == 1


def test_each_task_is_a_track_with_its_name(shop: Engine):
    """So that what overlaps in time does not in the picture."""

    @receiver(post_save, sender=Order)
    async def saved(sender, **kwargs):
        await asyncio.sleep(0)

    async def place(engine: Any) -> None:
        async with AsyncSession(engine) as session:
            session.add(Order())
            await session.commit()

    async def main() -> dict[str, Any]:
        url = f"sqlite+aiosqlite:///{shop.url.database}"
        engine = create_async_engine(url, connect_args={"timeout": 60})
        with trace() as traced:
            await asyncio.gather(
                *(asyncio.create_task(place(engine), name=name) for name in ("one", "two"))
            )
        await engine.dispose()
        return traced.to_chrome()

    chrome = asyncio.run(main())
    tracks = complete_events(chrome)
    for events in tracks.values():
        assert_nested(events)
    names = {
        event["tid"]: event["args"]["name"]
        for event in chrome["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert {names[tid] for tid, events in tracks.items() if len(events) == 4} == {"one", "two"}
