"""Tables of what tests have measured, printed after them."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table for each title among the tests' `record_property("table", (title, row, column, value))`."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    rows = [value for report in reports for name, value in report.user_properties if name == "table"]
    for title in dict.fromkeys(title for title, *_ in rows):
        cells = {(row, column): value for own, row, column, value in rows if own == title}
        table = Table(title=title, title_justify="left")
        table.add_column("")
        columns = list(dict.fromkeys(column for _, column in cells))
        for column in columns:
            table.add_column(column, justify="right")
        for row in dict.fromkeys(row for row, _ in cells):
            table.add_row(escape(row), *(cells.get((row, column), "") for column in columns))
        terminalreporter.write_line("")
        Console(file=terminalreporter._tw._file, width=120, force_terminal=False).print(table)
