"""Pages from what `python -m reproduce` has written: `python -m reproduce.report [--reports reports]`.

Every folder with a page's JSON file gets an index.html that needs no other file, pictures included; one more lists
them.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
from rich.console import Console

from dllm_memdlm.cli import exit_code
from dllm_memdlm.config import ConfigError

from .page import Page, read_page

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.9em }
caption { text-align: left; font-weight: 600; padding: 0.3em 0 }
th, td { border-bottom: 1px solid #ddd; padding: 0.25em 0.8em 0.25em 0; text-align: left; vertical-align: top }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; font-size: 0.8em }
figcaption, .small { color: #555; font-size: 0.9em }
figure { margin: 1.5em 0 }
.wide { overflow-x: auto }
"""

_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ page.title }}</title><style>{{ style }}</style></head><body>
<h1>{{ page.title }}</h1>
<p class="small">Scale: {{ page.scale }}; seeds: {{ page.seeds | join(", ") }}. Every point drawn or tabled
here is a line of <a href="{{ page.name }}.json">{{ page.name }}.json</a>, with the run that it is from.</p>
{% for text in page.about %}<p>{{ text }}</p>
{% endfor %}
{% for picture, caption in page.pictures.items() %}
<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ images[picture] }}">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% for table in page.tables %}
<div class="wide"><table><caption>{{ table.title }}</caption>
<tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
<h2>How it was made</h2>
{% set minutes = page.commands | sum(attribute="seconds") / 60 %}
<p class="small">{{ page.commands | length }} commands, {{ "%.0f" | format(minutes) }} minutes if run one by one
({{ page.devices | join("; ") }}). A run that was cut short counts from where it went on.</p>
<pre>{% for entry in page.commands %}{{ entry.command }}   # {{ "%.0f" | format(entry.seconds) }} s
{% endfor %}</pre>
<p class="small">{% for name, version in page.versions.items() %}{{ name }} {{ version }}{{ "" if loop.last else ", " }}
{% endfor %}</p>
</body></html>
"""

_INDEX = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>MemDLM, reproduced</title><style>{{ style }}</style></head><body>
<h1>MemDLM, reproduced</h1>
<ul>{% for folder, page in pages %}
<li><a href="{{ folder }}/index.html">{{ page.title }}</a>, scale {{ page.scale }}</li>
{% endfor %}</ul>
</body></html>
"""


def write_page(folder: Path, page: Page) -> Path:
    """Write a page's index.html. Raises ConfigError if a picture is missing."""
    try:
        images = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in page.pictures}
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename}: named by {page.name}.json, and not there") from None
    path = folder / "index.html"
    path.write_text(_render(_PAGE, page=page, images=images), encoding="utf-8")
    return path


def write_reports(reports: Path) -> list[Path]:
    """Write every page, and the list of them. Raises ConfigError if there is none, or a file is not a page's."""
    pages, written = [], []
    for path in sorted(reports.glob("*/*.json")):
        try:
            page = read_page(path)
            written.append(write_page(path.parent, page))
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, jinja2.TemplateError) as error:
            raise ConfigError(f"{path}: not a page as `make reproduce-…` writes it ({error})") from None
        pages.append((path.parent.name, page))
    if not pages:
        raise ConfigError(f"{reports}: no page there; `make reproduce-figure4` writes one")
    index = reports / "index.html"
    index.write_text(_render(_INDEX, pages=pages), encoding="utf-8")
    return [*written, index]


def _render(template: str, **values: object) -> str:
    return jinja2.Environment(autoescape=True).from_string(template).render(style=_STYLE, **values)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 2 after one line about what the user can correct."""
    parser = argparse.ArgumentParser(prog="reproduce.report", description="Write pages from what was reproduced.")
    parser.add_argument("--reports", type=Path, default=Path("reports"), metavar="DIR", help="default: reports")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    def run() -> None:
        for path in write_reports(args.reports):
            Console().print(str(path), soft_wrap=True, highlight=False)

    return exit_code(run, args.debug)


if __name__ == "__main__":
    sys.exit(main())
