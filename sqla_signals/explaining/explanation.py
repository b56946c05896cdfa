"""What :func:`~sqla_signals.explain` returns, and what it looks like as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from . import graphs
from .parts import NOT_INSTALLED, Entry, Group, Notice

if TYPE_CHECKING:
    from rich.tree import Tree


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

    @property
    def warnings(self) -> list[str]:
        """The notices as text, after one that says that nothing is installed."""
        missing = [NOT_INSTALLED] if self.not_installed else []
        return missing + [str(notice) for notice in self.notices]

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
        where = ""
        if self.needs_install:
            where = f"installed for {', '.join(self.installed)}"
        if self.not_installed:
            where = "not installed"
        warnings = [Node(f"! {warning}") for warning in self.warnings]
        return Node(self.subject, where, [*groups, *warnings])

    def to_dict(self) -> dict[str, Any]:
        """The same as lists and dictionaries, for ``json``."""
        return asdict(self)

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_mermaid(self) -> str:
        """A Mermaid flowchart, which GitHub and GitLab draw in a pull request."""
        return graphs.mermaid(self._picture)

    def to_dot(self) -> str:
        """A graph for Graphviz' ``dot``."""
        return graphs.dot(self._picture)

    @property
    def _picture(self) -> graphs.Picture:
        return graphs.Picture(self.groups, self.notices, self.warnings)


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
