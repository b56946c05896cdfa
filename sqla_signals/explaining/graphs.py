"""An explanation as a graph, for Mermaid and for Graphviz."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from .parts import Entry, Group, Notice, Step


def mermaid(groups: Iterable[Group], notices: Iterable[Notice], warnings: Iterable[str]) -> str:
    """A flowchart: senders, then signals with their phase, then the receivers in order."""
    lines = ["flowchart LR"]
    for group_id, senders, steps in _numbered(groups):
        lines.append(f"  {group_id}[({_mermaid_text(*senders)})]")
        for step_id, step in steps:
            lines.append(f"  {group_id} --> {step_id}([{_mermaid_text(step.title)}])")
            source = step_id
            for place, entry in enumerate(step.receivers, start=1):
                target = f"{step_id}r{place}"
                text = _mermaid_text(f"{place}. {entry.receiver}", *_small(entry))
                lines.append(f"  {source} --> {target}[{text}]")
                if entry.muted or _is_never(notices, step, entry):
                    lines.append(f"  style {target} stroke-dasharray: 5 5")
                source = target
    for number, warning in enumerate(warnings):
        lines.append(f"  n{number}>{_mermaid_text(warning)}]")
    return "\n".join(lines) + "\n"


def dot(groups: Iterable[Group], notices: Iterable[Notice], warnings: Iterable[str]) -> str:
    """The same as a directed graph."""
    lines = [
        "digraph signals {",
        "  rankdir=LR;",
        '  node [shape=box, fontname="Helvetica", fontsize=11];',
    ]
    for group_id, senders, steps in _numbered(groups):
        lines.append(f"  {group_id} [shape=cylinder, label={_dot_text(*senders)}];")
        for step_id, step in steps:
            lines.append(f"  {step_id} [shape=oval, label={_dot_text(step.title)}];")
            lines.append(f"  {group_id} -> {step_id};")
            source = step_id
            for place, entry in enumerate(step.receivers, start=1):
                target = f"{step_id}r{place}"
                label = _dot_text(f"{place}. {entry.receiver}", *_small(entry))
                dashed = entry.muted or _is_never(notices, step, entry)
                lines.append(f"  {target} [label={label}{', style=dashed' if dashed else ''}];")
                lines.append(f"  {source} -> {target};")
                source = target
    for number, warning in enumerate(warnings):
        lines.append(f"  n{number} [shape=note, label={_dot_text(warning)}];")
    return "\n".join([*lines, "}"]) + "\n"


def _numbered(
    groups: Iterable[Group],
) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, Step]]]]:
    for number, group in enumerate(groups):
        steps = [(f"g{number}s{place}", step) for place, step in enumerate(group.steps)]
        yield f"g{number}", group.senders, steps


def _small(entry: Entry) -> list[str]:
    return [entry.location, *([", ".join(entry.options)] if entry.options else [])]


def _is_never(notices: Iterable[Notice], step: Step, entry: Entry) -> bool:
    return any(
        notice.never and (notice.signal, notice.receiver) == (step.signal, entry.receiver)
        for notice in notices
    )


def _mermaid_text(*lines: str) -> str:
    # Quotes end a label, # begins an entity, < and > are HTML.
    safe = [
        line.replace("&", "#amp;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")
        for line in (line.replace("#", "#35;") for line in lines)
    ]
    return f'"{"<br>".join(safe)}"'


def _dot_text(*lines: str) -> str:
    # json escapes quotes, backslashes and line breaks as DOT reads them.
    return json.dumps("\n".join(lines), ensure_ascii=False)
