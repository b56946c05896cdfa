"""How the examples print: with Rich where it is installed, as plain text where it is not."""

import textwrap
from collections.abc import Iterable, Sequence

try:
    from rich.console import Console
    from rich.syntax import Syntax
    from rich.table import Table
except ImportError:
    console = None
else:
    console = Console(highlight=False)


def heading(text: str) -> None:
    """Print a title line with space above it."""
    if console is None:
        print(f"\n{text}\n{'-' * len(text)}")
    else:
        console.print(f"\n{text}", style="bold yellow", markup=False)


def line(text: str, style: str = "") -> None:
    """Print one line; `style` is Rich's and has no effect without it."""
    if console is None:
        print(text)
    else:
        console.print(text, style=style, markup=False, soft_wrap=True)


def code(text: str) -> None:
    """Print a snippet of Python, indented."""
    text = textwrap.indent(text, "    ")
    if console is None:
        print(text)
    else:
        python = Syntax("", "python", theme="ansi_dark")
        console.print(python.highlight(text), end="", soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print `rows` under `columns`, each cell as `str` shows it."""
    cells = [[str(cell) for cell in row] for row in rows]
    if console is None:
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for row in [columns, *cells]:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
    else:
        drawn = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="dim")
        for row in cells:
            drawn.add_row(*row)
        console.print(drawn)
