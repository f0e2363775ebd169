"""Tables for people: drawn on a terminal, plain columns elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

Row = Sequence[str]


def show(title: str, header: Row, rows: Sequence[Row], console: Console | None = None) -> None:
    """Prints a table whose first column is text and whose others are numbers."""
    console = console or Console()
    if console.is_terminal:
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        text = "\n".join(plain(title, header, rows))
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def plain(title: str, header: Row, rows: Sequence[Row]) -> list[str]:
    """The lines of a table in plain text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [title]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
