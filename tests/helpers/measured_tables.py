"""Tables of what tests have measured, printed after them, and written where `--tables` says."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.report import Section, write


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table for each title among the tests' `record_property("table", (title, row, column, value))`."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    cells = [value for report in reports for name, value in report.user_properties if name == "table"]
    tables = []
    for title in dict.fromkeys(title for title, *_ in cells):
        values = {(row, column): value for own, row, column, value in cells if own == title}
        columns = list(dict.fromkeys(column for _, column in values))
        rows = [
            [row, *(values.get((row, column)) for column in columns)] for row in dict.fromkeys(r for r, _ in values)
        ]
        tables.append(Section(title, ["", *columns], rows=rows))
    console = Console(file=terminalreporter._tw._file, width=120, force_terminal=False)
    for table in tables:
        table.print(console)
    folder = terminalreporter.config.getoption("--tables")
    if folder is not None:
        write(tables, "What tests have measured", {}, folder, "tables")
