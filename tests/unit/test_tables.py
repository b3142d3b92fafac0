"""Tables: whole numbers on any terminal, and labels as they are."""

import re

import pytest

from megads.tables import print_table

HEADINGS = ["source", "documents", "tokens", "share of all tokens"]
ROWS = [["[web]", "1,234,567", "3,000,000,000,000", "99.25%"], ["a :smile: b", "1", "22,500,000", "0.75%"]]


@pytest.mark.parametrize(("terminal_columns", "tables"), [(None, 1), (100, 1), (50, 2), (38, 3), (10, 3)])
def test_no_number_is_cut_short(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal_columns: int | None,
    tables: int,
) -> None:
    if terminal_columns is not None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(terminal_columns))
        monkeypatch.setenv("LINES", "40")
        monkeypatch.setenv("TERM", "dumb")
    print_table(HEADINGS, [ROWS, [["all", "1,234,568", "3,000,022,500,000", "100.00%"]]])
    said = capsys.readouterr().out
    assert said.count("\u250f") == tables
    if terminal_columns == 10:
        return  # not even one number and its label fit
    for row in ROWS:
        assert said.count(f" {row[0]} ") == tables
        for number in row[1:]:
            assert len(re.findall(rf" {re.escape(number)} ", said)) == 1
