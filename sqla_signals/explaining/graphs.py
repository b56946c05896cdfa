"""An explanation as a graph, for Mermaid and for Graphviz."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from .parts import Group, Notice


class Picture(NamedTuple):
    """What is drawn."""

    groups: Sequence[Group]
    notices: Sequence[Notice]
    warnings: Sequence[str]


class _Box(NamedTuple):
    kind: str
    id: str
    lines: list[str]
    after: str = ""
    """The box that an arrow comes from."""
    is_dashed: bool = False


_MERMAID: Final = {
    "senders": "[({})]",
    "signal": "([{}])",
    "receiver": "[{}]",
    "warning": ">{}]",
}
_DOT: Final = {
    "senders": "shape=cylinder, ",
    "signal": "shape=oval, ",
    "receiver": "",
    "warning": "shape=note, ",
}


def mermaid(picture: Picture) -> str:
    """Draw a flowchart: senders, then signals with their phase, then the receivers in order."""
    lines = ["flowchart LR"]
    for box in _boxes(picture):
        arrow = f"{box.after} --> " if box.after else ""
        lines.append(f"  {arrow}{box.id}{_MERMAID[box.kind].format(_mermaid_text(box.lines))}")
        if box.is_dashed:
            lines.append(f"  style {box.id} stroke-dasharray: 5 5")
    return "\n".join(lines) + "\n"


def dot(picture: Picture) -> str:
    """Draw the same as a directed graph."""
    lines = [
        "digraph signals {",
        "  rankdir=LR;",
        '  node [shape=box, fontname="Helvetica", fontsize=11];',
    ]
    for box in _boxes(picture):
        # json escapes quotes, backslashes and line breaks as DOT reads them.
        label = json.dumps("\n".join(box.lines), ensure_ascii=False)
        style = ", style=dashed" if box.is_dashed else ""
        lines.append(f"  {box.id} [{_DOT[box.kind]}label={label}{style}];")
        if box.after:
            lines.append(f"  {box.after} -> {box.id};")
    return "\n".join([*lines, "}"]) + "\n"


def _boxes(picture: Picture) -> Iterator[_Box]:
    never = {(notice.signal, notice.receiver) for notice in picture.notices}
    for number, group in enumerate(picture.groups):
        group_id = f"g{number}"
        yield _Box("senders", group_id, list(group.senders))
        for step_number, step in enumerate(group.steps):
            last = step_id = f"{group_id}s{step_number}"
            yield _Box("signal", step_id, [step.title], group_id)
            for place, entry in enumerate(step.receivers, start=1):
                lines = [f"{place}. {entry.receiver}", entry.location, ", ".join(entry.options)]
                is_dashed = entry.muted or (step.signal, entry.receiver) in never
                box = _Box(
                    "receiver", f"{step_id}r{place}", [*filter(None, lines)], last, is_dashed
                )
                yield box
                last = box.id
    for number, warning in enumerate(picture.warnings):
        yield _Box("warning", f"n{number}", [warning])


def _mermaid_text(lines: list[str]) -> str:
    # Quotes end a label, # begins an entity, < and > are HTML.
    entities = str.maketrans({"#": "#35;", "&": "#amp;", '"': "#quot;", "<": "#lt;", ">": "#gt;"})
    return f'"{"<br>".join(line.translate(entities) for line in lines)}"'
