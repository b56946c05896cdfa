"""An :class:`Explanation` as a picture: a row for each signal, a column for each phase.

A flush reads from top to bottom, a transaction from left to right. The layout is done here, in
widths of one fixed font, so that nothing else is needed to draw it.
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape, quoteattr

from .explanation import NOT_INSTALLED, Entry, Explanation, Group

if TYPE_CHECKING:
    from ..receivers import Call

CHAR: Final = 7.3
"""Width of a character of the fixed font at 12 px, rounded up."""
LINE: Final = 16
GAP: Final = 10
MARGIN: Final = 24
LONGEST: Final = 44
"""Characters of a name that are shown; the whole name is in the tooltip."""

TITLES: Final[dict[Call, str]] = {
    "flush": "in the flush",
    "commit": "after COMMIT",
    "rollback": "after a rollback",
    "durable": "durable, by a worker",
}
COLOURS: Final[dict[Call, tuple[str, str]]] = {
    "flush": ("#eef4ff", "#5b83c4"),
    "commit": ("#edf9f0", "#4c9a63"),
    "rollback": ("#fff3ea", "#c98244"),
    "durable": ("#f5effc", "#8d66b8"),
}
STYLE: Final = """
    .paper { fill: #ffffff }
    text { fill: #24292f; font: 12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
    .title { font: 600 16px system-ui, "DejaVu Sans", sans-serif }
    .head { font: 600 12px system-ui, "DejaVu Sans", sans-serif; fill: #57606a }
    .sender { font-weight: 700; font-size: 13px }
    .small { font-size: 10px; fill: #57606a }
    .rule { stroke: #d0d7de }
    .warning { fill: #b42318; font: 12px system-ui, "DejaVu Sans", sans-serif }
"""


class _Cell:
    """The receivers of one signal and phase, below each other."""

    def __init__(self, phase: Call, receivers: tuple[Entry, ...], dashed: set[str]) -> None:
        self.phase: Call = phase
        self.boxes = [(place, e, _lines(place, e)) for place, e in enumerate(receivers, start=1)]
        self._dashed = dashed

    @property
    def width(self) -> float:
        return max(_width(lines) for _, _, lines in self.boxes)

    @property
    def height(self) -> float:
        return sum(_height(lines) + GAP for _, _, lines in self.boxes) - GAP

    def draw(self, x: float, y: float, width: float) -> Iterator[str]:
        fill, stroke = COLOURS[self.phase]
        for number, (_, entry, lines) in enumerate(self.boxes):
            if number:  # the order
                yield f'<path d="M{x + 14} {y - GAP} v{GAP}" stroke="{stroke}"/>'
            dashed = entry.muted or entry.receiver in self._dashed
            dash = ' stroke-dasharray="4 3"' if dashed else ""
            yield (
                f"<g><title>{escape(f'{entry.receiver} ({entry.location})')}</title>"
                f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{_height(lines)}" rx="5" '
                f'fill="{fill}" stroke="{stroke}"{dash}/>'
            )
            for line_number, line in enumerate(lines):
                kind = ' class="small"' if line_number else ""
                yield _text(x + GAP, y + 18 + line_number * LINE, line, kind)
            yield "</g>"
            y += _height(lines) + GAP


class _Row:
    """A signal, with a cell for each phase in which somebody is called."""

    def __init__(self, group: Group, title: str, through: str | None, dashed: set[str]) -> None:
        self.labels = [title, *([f"through {_short(through)}"] if through else [])]
        self.cells: dict[Call, _Cell] = {
            step.phase: _Cell(step.phase, step.receivers, dashed)
            for step in group.steps
            if (step.signal, step.through) == (title, through)
        }
        self.height = max(
            LINE * len(self.labels) + 2, *(cell.height for cell in self.cells.values())
        )

    @property
    def width(self) -> float:
        return max(len(label) for label in self.labels) * CHAR + GAP


def svg(explanation: Explanation) -> str:
    """The picture, as the text of an SVG file."""
    never = {(notice.signal, notice.receiver) for notice in explanation.notices if notice.never}
    groups: list[tuple[Group, list[_Row]]] = []
    for group in explanation.groups:
        signals = dict.fromkeys((step.signal, step.through) for step in group.steps)
        rows = [
            _Row(group, signal, through, {r for s, r in never if s == signal})
            for signal, through in signals
        ]
        groups.append((group, rows))
    every_row = [row for _, rows in groups for row in rows]
    phases: list[Call] = [phase for phase in TITLES if any(phase in row.cells for row in every_row)]
    label_width = max([row.width for row in every_row], default=0)
    widths = {
        phase: max(
            len(TITLES[phase]) * CHAR,
            *(row.cells[phase].width for row in every_row if phase in row.cells),
        )
        for phase in phases
    }
    x = MARGIN + label_width + GAP
    columns: dict[Call, float] = {}
    for phase in phases:
        columns[phase] = x
        x += widths[phase] + 2 * GAP
    warnings = _warnings(explanation)
    senders = [sender for group, _ in groups for sender in group.senders]
    width = (
        max(
            x - 2 * GAP,
            *(MARGIN + len(sender) * (CHAR + 1) for sender in senders),
            *(MARGIN + len(line) * 6.4 for line in warnings),
            MARGIN + (len(explanation.subject) + 30) * 9,
        )
        + MARGIN
    )

    parts = [_text(MARGIN, 36, f"Signals of {explanation.subject}", ' class="title"')]
    y = 56.0
    if explanation.not_installed:
        parts.append(_text(MARGIN, y, "not installed", ' class="warning"'))
    elif explanation.needs_install:
        where = ", ".join(explanation.installed)
        parts.append(_text(MARGIN, y, f"installed for {where}", ' class="small"'))
    for phase, left in columns.items():
        parts.append(_text(left, y + 28, TITLES[phase], ' class="head"'))
    y += 42
    for group, rows in groups:
        parts.append(f'<path class="rule" d="M{MARGIN} {y} H{width - MARGIN:.1f}"/>')
        for sender in group.senders:
            y += 20
            parts.append(_text(MARGIN, y, sender, ' class="sender"'))
        y += 14
        if not rows:
            parts.append(_text(MARGIN, y + 8, "nobody listens", ' class="small"'))
            y += 2 * LINE
        for row in rows:
            for number, label in enumerate(row.labels):
                kind = ' class="small"' if number else ""
                parts.append(_text(MARGIN, y + 18 + number * LINE, label, kind))
            for phase, cell in row.cells.items():
                parts.extend(cell.draw(columns[phase], y, widths[phase]))
            y += row.height + 14
        y += 4
    for line in warnings:
        y += 18
        parts.append(_text(MARGIN, y, line, ' class="warning"'))
    height = y + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
            f"aria-label={quoteattr(f'Signals of {explanation.subject}')}>",
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _warnings(explanation: Explanation) -> list[str]:
    texts = [NOT_INSTALLED] if explanation.not_installed else []
    return [
        f"{'' if number else '! '}{line}"
        for text in texts + [str(notice) for notice in explanation.notices]
        for number, line in enumerate(wrap(text, 110))
    ]


def _lines(place: int, entry: Entry) -> list[str]:
    lines = [f"{place}. {_short(entry.receiver)}", _short(entry.location)]
    return lines + ([_short(", ".join(entry.options))] if entry.options else [])


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}"


def _width(lines: list[str]) -> float:
    return max(len(line) * (CHAR if not number else 6.1) for number, line in enumerate(lines)) + (
        2 * GAP
    )


def _height(lines: list[str]) -> int:
    return len(lines) * LINE + 10


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(text)}</text>'
