"""The pages of the documentation: links that lead somewhere, names that the code has, and a site that leaves none out.

`make docs` builds the site; what takes no building is tested here.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from collections import Counter
from pathlib import Path

import markdown
import pytest
import yaml
from markdown_it import MarkdownIt

import dllm_memdlm
from dllm_memdlm import info

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
#: Pages that docs/site/pages.py makes.
GENERATED = {"index.md", "keys.md"}


def load_hook():
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "site" / "pages.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


SITE = load_hook()


class Settings(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags for Python objects are none of ours."""


Settings.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def leaves(nav):
    for entry in nav:
        (target,) = entry.values()
        yield from [target] if isinstance(target, str) else leaves(target)


def anchors(text: str) -> set[str]:
    """Those of the headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target, anchor in SITE.LINK.findall(text):
        path = (page.parent / target).resolve() if target else page
        if path == DOCS / "keys.md":
            there = SITE.keys_page()
        elif not path.is_relative_to(ROOT) or not path.exists():
            broken.append(target)
            continue
        else:
            there = path.read_text() if path.suffix == ".md" else ""
        if anchor and anchor[1:] not in anchors(there):
            broken.append(target + anchor)
    return broken


def test_every_page_is_in_the_navigation_once():
    nav = list(leaves(yaml.load((ROOT / "mkdocs.yml").read_text(), Settings)["nav"]))
    assert sorted(nav) == sorted({page.relative_to(DOCS).as_posix() for page in PAGES[1:]} | GENERATED)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text()
    assert broken_links(page, text) == []
    assert broken_links(page, text + "\n[a](none.md) [b](#none)") == ["none.md", "#none"]


def test_the_site_has_a_page_for_every_link():
    assert SITE.site_link("index.md", "docs/results.md") == "results.md"
    assert SITE.site_link("results.md", "documents.png") == "documents.png"
    assert SITE.site_link("method.md", "../README.md") == "index.md"
    assert SITE.site_link("api/method.md", "../symbols.md") == "../symbols.md"
    assert SITE.site_link("method.md", "../dllm_memdlm/config.py") == "source/dllm_memdlm/config.py.md"
    assert SITE.site_link("method.md", "../reproduce") == "source/reproduce/index.md"
    linked = {"recipes/ablations", "recipes/ablations/kl.yaml"}
    folder, file = (SITE.source_page(path, linked) for path in sorted(linked))
    assert "- [`kl.yaml`](kl.yaml.md): Figure 5" in folder and "\n- `full.yaml`: Figure 6" in folder
    assert (ROOT / "recipes/ablations/kl.yaml").read_text() in file


def test_every_key_is_on_the_page_of_keys():
    rows = [line.split(" | ") for line in SITE.keys_page().splitlines() if line.startswith("| `")]
    keys = [*info.recipe_keys(), *info.model_arguments()]
    assert [row[0] for row in rows] == [f"| `{key.name}`" for key in keys]
    assert {len(row) for row in rows} == {4}
    assert [row[2] for row in rows] == [f"`{key.default}`" for key in keys]


def test_the_api_pages_have_every_public_name_and_no_other():
    text = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    documented = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert len(set(documented)) == len(documented)
    objects = {name: pkgutil.resolve_name(name) for name in documented}
    public = {name: getattr(dllm_memdlm, name) for name in dllm_memdlm.__all__ if name != "__version__"}
    assert [name for name, thing in public.items() if thing not in objects.values()] == []


def test_symbols_name_what_is_in_the_file():
    rows = re.findall(r"^\|.*\| (`.*) \| \[`.*`\]\((.*)\) \|$", (DOCS / "symbols.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 20
    for names, file in rows:
        source = (DOCS / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"(class |def |^    ){part}\b|^{part}\b", source, flags=re.MULTILINE), (name, file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_read_alike_on_github_and_on_the_site(page):
    """The site's Markdown is not GitHub's: there a list that is not indented by four, say, is not inside another."""

    def parts(html: str) -> Counter:
        return Counter(re.findall(r"<(h\d|img|li|ol|pre|strong|table|tr|ul)\b", html))

    text = page.read_text()
    github = MarkdownIt("commonmark").enable("table").render(text)
    assert parts(markdown.markdown(text, extensions=["fenced_code", "tables"])) == parts(github)
