"""What a figure or table leaves behind: a JSON file with a line for every number, and pages that need no other file."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from data_files import message_of

from dllm_memdlm.machine import devices, package_versions
from reproduce import report
from reproduce.commands import DONE, Command
from reproduce.page import Grid, Page, read_page
from reproduce.report import write_page, write_reports

#: Text that is something else to HTML, and letters beyond ASCII.
ODD = "a < b & <script>alert('φ')</script> {{ 7 * 7 }} \"quoted\""
PNG = b"\x89PNG\r\n\x1a\n\x00\xff not really"


def make_page(name: str = "figure0", **fields) -> Page:
    values = {
        "title": "Training <dynamics>",
        "scale": "cpu",
        "seeds": [42, 43],
        "about": ["First.", ODD],
        "points": [{"run": "runs/a", "step": 1, "loss": 0.1 + 0.2}, {"run": "runs/b", "step": 2, "loss": None}],
        "pictures": {"one.png": "Caption φ"},
        "tables": [Grid("Losses", ["model", "loss"], [["MDLM", "1.0 ± 0.1"], [ODD, "-"]])],
        "commands": [{"command": "python -m x 'a b'", "folder": "runs/a", "seconds": 90.0}],
        "versions": {"torch": "2.10"},
        "devices": ["cpu: 2 cores"],
    }
    return Page(name, **{**values, **fields})


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a page and its picture."""
    folder = tmp_path / "reports" / "figure0"
    make_page().write(folder)
    (folder / "one.png").write_bytes(PNG)
    return folder


class Html(HTMLParser):
    """Tags with their attributes, the text, and the rows of its tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.rows = "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1][0] in ("td", "th") and data.strip():
            self.rows[-1][-1] += data

    def values(self, attribute: str) -> list[str | None]:
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


# --- the JSON file -------------------------------------------------------------------------------------------------


def test_a_page_is_read_as_it_was_written(tmp_path):
    page = make_page()
    path = page.write(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "figure0.json"
    assert read_page(path) == page
    assert read_page(path).points[0]["loss"] == 0.1 + 0.2, "to the last digit"
    bare = Page(name="bare", title="T", scale="paper", about=[], points=[])
    again = read_page(bare.write(tmp_path))
    assert (again.name, again.title, again.scale, again.points, again.tables) == ("bare", "T", "paper", [], [])


def test_tuples_come_back_as_lists(tmp_path):
    grid = Grid("Losses", ("model", "loss"), [("MDLM", "1.0")])
    assert read_page(make_page(about=("x",), tables=(grid,)).write(tmp_path)) == make_page(
        about=["x"], tables=[Grid("Losses", ["model", "loss"], [["MDLM", "1.0"]])]
    )


def test_every_point_and_every_command_is_a_line_of_json(tmp_path):
    page = make_page(points=[{"n": n, "text": ODD} for n in range(5)], commands=[{"c": 1}, {"c": "φ"}])
    text = page.write(tmp_path).read_text(encoding="utf-8")
    for name, expected in (("points", page.points), ("commands", page.commands)):
        (block,) = re.findall(rf'^  "{name}": \[\n(.*?)\n  \]', text, re.M | re.S)
        assert [json.loads(line.removesuffix(",")) for line in block.splitlines()] == expected
        assert block.count("φ") == str(expected).count("φ"), "to be read by people, too"
    assert text.endswith("}\n")


def test_the_commands_are_noted_with_what_they_ran_on(tmp_path):
    first, second = (Command(tmp_path / name, ("-m", name), env={"A": name}) for name in "ab")
    for seconds, command in ((12.34, first), (5.0, second)):
        command.folder.mkdir()
        command.write_record(seconds)
    page = make_page().made_by(iter([first, second, first]))
    assert page.commands == [
        {"command": "A=a python -m a", "folder": str(tmp_path / "a"), "seconds": 12.3},
        {"command": "A=b python -m b", "folder": str(tmp_path / "b"), "seconds": 5.0},
    ]
    assert (page.versions, page.devices) == (package_versions(), devices())
    assert read_page(page.write(tmp_path)) == page
    record = json.loads((second.folder / DONE).read_text())
    record |= {"versions": record["versions"] | {"torch": "0.1"}, "devices": ["another"]}
    (second.folder / DONE).write_text(json.dumps(record))
    page.made_by([first, second])
    assert page.versions == package_versions() | {"torch": f"{package_versions()['torch']} and 0.1"}
    assert page.devices == [*devices(), "another"]


# --- pages ---------------------------------------------------------------------------------------------------------


def test_a_page_needs_no_other_file(folder):
    html = Html(write_page(folder, make_page()))
    (source,) = html.values("src")
    kind, _, encoded = source.partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(encoded, validate=True) == PNG
    assert html.values("href") == ["figure0.json"], "the numbers alone stand elsewhere, beside it"
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in html.tags}
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "http" not in text and "@import" not in text and "url(" not in text


def test_a_page_shows_everything_and_nothing_as_markup(folder):
    page = make_page(title=ODD, pictures={"one.png": ODD}, scale="paper", devices=["cpu", ODD])
    page.commands = [{"command": f"python {ODD}", "seconds": 90.4}, {"command": "python b", "seconds": 60}]
    html = Html(write_page(folder, page))
    for text in (f"python {ODD}", "torch 2.10", "First.", f"cpu; {ODD}", "Scale: paper; seeds: 42, 43.", "# 90 s"):
        assert text in html.text
    # The title, twice; a paragraph, a caption, a cell, a command, a device
    assert html.text.count(ODD) == 7 and html.values("alt") == [ODD]
    assert html.rows == [["model", "loss"], ["MDLM", "1.0 ± 0.1"], [ODD, "-"]]
    assert "2 commands, 3 minutes" in html.text


def test_every_page_is_written_and_listed(folder):
    reports = folder.parent
    make_page(title="Other & more", scale="small", pictures={}).write(reports / "figure0-small")
    written = write_reports(reports)
    names = ["figure0/index.html", "figure0-small/index.html", "index.html"]
    assert [str(path.relative_to(reports)) for path in written] == names
    html = Html(reports / "index.html")
    assert html.values("href") == names[:2] and not html.values("src")
    assert "Training <dynamics>, scale cpu" in html.text and "Other & more, scale small" in html.text
    assert "Other & more" in Html(reports / "figure0-small" / "index.html").text
    (folder / "one.png").write_bytes(b"another")
    write_reports(reports)
    assert base64.b64encode(b"another").decode() in (folder / "index.html").read_text(), "what changed is shown"


def test_a_missing_picture_is_one_line(folder):
    (folder / "one.png").unlink()
    text = f"{folder / 'one.png'}: named by figure0.json, and not there"
    assert message_of(write_page, folder, make_page()) == text == message_of(write_reports, folder.parent)


def test_no_page_is_one_line(tmp_path):
    for reports in (tmp_path, tmp_path / "none"):
        assert message_of(write_reports, reports) == f"{reports}: no page there; `make reproduce-figure4` writes one"


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"{}", b'"text"', b"\xff", b'{"tables": []}', b'{"tables": [1]}'),
        *(b'{"tables": [{"title": "a"}]}', b'{"tables": [], "unknown": 1}'),
    ],
)
def test_a_file_that_is_no_page_is_one_line(folder, content):
    path = folder.parent / "figure1" / "figure1.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert message_of(write_reports, folder.parent).startswith(f"{path}: not a page as `make reproduce-…` writes it (")


@pytest.mark.parametrize("fields", [{"commands": [{}]}, {"pictures": None}])
def test_a_page_with_something_else_in_its_fields_is_one_line(folder, fields):
    path = folder / "figure0.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields))
    assert message_of(write_reports, folder.parent).startswith(f"{path}: not a page as `make reproduce-…` writes it (")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_what_it_wrote(folder, capsys, monkeypatch):
    reports = folder.parent
    assert report.main(["--reports", str(reports)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "index.html"), str(reports / "index.html")]
    monkeypatch.chdir(reports.parent)
    assert report.main([]) == 0
    assert capsys.readouterr().out.splitlines() == ["reports/figure0/index.html", "reports/index.html"]


def test_what_the_user_can_correct_is_one_line_and_exit_code_2(folder, capsys):
    def error_of(reports: Path) -> str:
        assert report.main(["--reports", str(reports)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    assert error_of(folder) == f"error: {folder}: no page there; `make reproduce-figure4` writes one\n"
    (folder / "one.png").unlink()
    assert error_of(folder.parent).startswith(f"error: {folder / 'one.png'}: named by ")
    (folder / "figure0.json").write_text("{")
    assert error_of(folder.parent).startswith(f"error: {folder / 'figure0.json'}: not a page")
    with pytest.raises(Exception, match="not a page"):
        report.main(["--debug", "--reports", str(folder.parent)])
    with pytest.raises(SystemExit) as stopped:
        report.main(["--report-all"])
    assert stopped.value.code == 2
