"""Tables for people, of which no number is cut short, however narrow the terminal is."""

import sys
from collections.abc import Sequence

UNLIMITED_COLUMNS = 10_000


def print_table(
    headings: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], *, label_columns: int = 1
) -> None:
    """Print rows of texts, in sections with a line between them.

    The first `label_columns` say what a row is of; they are on the left, the others are numbers. On a
    terminal that is too narrow for all numbers there are several tables, each with the labels.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    # Off a terminal rich would fold to 80 columns. No label is markup, whatever it holds.
    console = Console(width=None if sys.stdout.isatty() else UNLIMITED_COLUMNS, markup=False, emoji=False)

    def made(columns: Sequence[int]) -> Table:
        table = Table()
        for column in columns:
            is_label = column < label_columns
            justify, overflow = ("left", "fold") if is_label else ("right", "ellipsis")
            table.add_column(headings[column], justify=justify, overflow=overflow, no_wrap=not is_label)  # type: ignore[arg-type]
        for rows in sections:
            table.add_section()
            for row in rows:
                table.add_row(*(row[column] for column in columns))
        return table

    def fits(columns: Sequence[int]) -> bool:
        unlimited = console.options.update(width=UNLIMITED_COLUMNS)
        return Measurement.get(console, unlimited, made(columns)).maximum <= console.width

    labels, left = list(range(label_columns)), list(range(label_columns, len(headings)))
    while left:
        count = next((n for n in range(len(left), 1, -1) if fits(labels + left[:n])), 1)
        console.print(made(labels + left[:count]))
        left = left[count:]
