"""What :func:`~sqla_signals.explain` returns: plain values, and what they look like as text.

The pictures are in modules of their own, imported when one is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.tree import Tree

    from ..receivers import Call


@dataclass(frozen=True, slots=True)
class Entry:
    """A receiver at its place in the order, with the options it was connected with."""

    receiver: str
    """Its name."""
    file: str | None
    """Where it is defined, relative to the current directory if it is below; ``None`` for a
    builtin."""
    line: int | None
    sender: str
    """What it was connected to: a class, a name in quotes, a relationship, ``any sender``."""
    fields: tuple[str, ...] | None
    propagate: bool
    durable: bool
    is_async: bool
    weak: bool
    muted: bool
    """Whether a ``mute`` block silenced it where ``explain`` was called."""
    dispatch_uid: str | None

    @property
    def location(self) -> str:
        """``file:line``."""
        return f"{self.file}:{self.line}" if self.file else "<built-in>"

    @property
    def options(self) -> list[str]:
        """The options that are not the default, as one would write them."""
        given = []
        if self.fields is not None:
            given.append(f"fields={{{', '.join(map(repr, self.fields))}}}")
        if self.dispatch_uid is not None:
            given.append(f"dispatch_uid={self.dispatch_uid}")
        words = {
            "propagate": self.propagate,
            "async": self.is_async,
            "weak": self.weak,
            "muted": self.muted,
        }
        return given + [word for word, holds in words.items() if holds]


@dataclass(frozen=True, slots=True)
class Step:
    """The receivers of one signal that are called at the same time, in order."""

    signal: str
    phase: Call
    """When: ``"flush"``, ``"commit"``, ``"rollback"``, or ``"durable"``, by a worker."""
    through: str | None
    """The ``secondary`` table that ``m2m_changed`` is about, else ``None``."""
    receivers: tuple[Entry, ...]

    @property
    def title(self) -> str:
        """The signal and the phase, as one would write them."""
        phase = "durable=True" if self.phase == "durable" else f'on="{self.phase}"'
        through = f" through {self.through}" if self.through else ""
        return f"{self.signal} {phase}{through}"


@dataclass(frozen=True, slots=True)
class Group:
    """Senders that the same receivers listen to, and these."""

    senders: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about a receiver that its author does not expect."""

    signal: str
    receiver: str
    location: str
    never: bool
    """Whether it means that the receiver can never be called."""
    text: str

    def __str__(self) -> str:
        called = "can never be called" if self.never else "is not called for every change"
        return f"{self.signal}: {self.receiver} ({self.location}) {called}: {self.text}"


class Node(NamedTuple):
    """A line of the tree, and those below it."""

    label: str
    detail: str = ""
    below: Sequence[Node] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Who is called, when and in which order. ``str()`` of it is a tree to read.

    With `rich <https://pypi.org/project/rich/>`_, ``rich.print()`` shows that tree in colour.
    """

    subject: str
    """What was asked about."""
    installed: tuple[str, ...]
    """For which sessions ``install()`` was called."""
    needs_install: bool
    """Whether anything of this is sent by an installation, and not by hand or by Alembic."""
    groups: tuple[Group, ...]
    notices: tuple[Notice, ...]

    @property
    def not_installed(self) -> bool:
        """Whether nothing of this is ever sent, for want of an ``install()``."""
        return self.needs_install and not self.installed

    def __str__(self) -> str:
        return "\n".join(_lines(self._tree()))

    def __rich__(self) -> Tree:
        from rich.markup import escape
        from rich.tree import Tree

        def rich_label(node: Node) -> str:
            style = "[yellow]" if node.label.startswith("!") else "[bold]" if node.below else ""
            label = f"{style}{escape(node.label)}{'[/]' if style else ''}"
            return f"{label}  [dim]{escape(node.detail)}[/]" if node.detail else label

        def grow(tree: Tree, nodes: Sequence[Node]) -> Tree:
            for node in nodes:
                grow(tree.add(rich_label(node)), node.below)
            return tree

        top = self._tree()
        return grow(Tree(rich_label(top)), top.below)

    def _tree(self) -> Node:
        groups = [
            Node(
                ", ".join(group.senders),
                "" if group.steps else "nobody listens",
                [
                    Node(
                        step.title,
                        "",
                        [
                            Node(f"{place}. {entry.receiver}", _detail(entry, group))
                            for place, entry in enumerate(step.receivers, start=1)
                        ],
                    )
                    for step in group.steps
                ],
            )
            for group in self.groups
        ]
        if len(self.groups) == 1 and self.groups[0].senders == (self.subject,) and groups[0].below:
            groups = list(groups[0].below)
        notices = [Node(f"! {notice}") for notice in self.notices]
        if self.not_installed:
            warning = Node(f"! {NOT_INSTALLED}")
            return Node(self.subject, "not installed", [*groups, warning, *notices])
        where = f"installed for {', '.join(self.installed)}" if self.needs_install else ""
        return Node(self.subject, where, [*groups, *notices])

    def to_dict(self) -> dict[str, Any]:
        """The same as lists and dictionaries, for ``json``."""
        return asdict(self)

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_mermaid(self) -> str:
        """A Mermaid flowchart, which GitHub and GitLab draw in a pull request."""
        from .graphs import mermaid

        return mermaid(self)

    def to_dot(self) -> str:
        """A graph for Graphviz' ``dot``."""
        from .graphs import dot

        return dot(self)

    def to_svg(self) -> str:
        """A picture: a row for each signal, a column for each phase, the receivers numbered."""
        from .svg import svg

        return svg(self)


NOT_INSTALLED = (
    "nothing is sent, because sqla_signals is not installed. Add one line where the application "
    "starts: sqla_signals.install()"
)


def printable(name: str) -> str:
    """The name without what would break a line, a terminal or a file format."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def place_of(location: str) -> tuple[str | None, int | None]:
    """The file, relative to the current directory if it is below, and the line."""
    file, _, line = location.rpartition(":")
    if not line.isdecimal():
        return None, None
    return file.removeprefix(os.path.join(os.getcwd(), "")), int(line)


def _detail(entry: Entry, group: Group) -> str:
    connected = [] if entry.sender in group.senders else [f"sender={entry.sender}"]
    return "  ".join(filter(None, [entry.location, ", ".join(connected + entry.options)]))


def _lines(top: Node, indent: str = "") -> Iterator[str]:
    if not indent:
        yield _line(top)
    for number, node in enumerate(top.below, start=1):
        is_last = number == len(top.below)
        yield f"{indent}{'└── ' if is_last else '├── '}{_line(node)}"
        deeper = f"{indent}{'    ' if is_last else '│   '}"
        if node.below:
            yield from _lines(node, deeper)


def _line(node: Node) -> str:
    return f"{node.label}  {node.detail}" if node.detail else node.label
