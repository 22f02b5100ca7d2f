"""What the site has beside docs/*.md: the README as its start page, the table of all keys, and the files linked to.

A hook of MkDocs. Links in README.md and docs/*.md are relative to these files, as GitHub needs them. A link out of
docs/ becomes one to a page of the site that shows the file, or lists the folder, as it was when the site was built.
"""

from __future__ import annotations

import html
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

    from dllm_memdlm.info import Key

ROOT = Path(__file__).parents[2]
#: `](target#anchor)`; targets of other schemes are none of ours.
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]*)(#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".patch": "diff", ".sbatch": "bash"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8"), "keys.md": keys_page()}
    written = {file.src_uri: file.content_string for file in files.documentation_pages()} | pages
    linked: set[str] = set()
    for uri, text in written.items():
        linked |= {in_repository(uri, target) for target, _ in LINK.findall(text)}
    outside = {path for path in linked if path != "README.md" and not path.startswith("docs/")}
    sources = {path for path in outside if (ROOT / path).exists()}  # MkDocs names the pages whose links lead nowhere
    pages |= {source_uri(path): source_page(path, sources) for path in sources}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at pages of the site."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    return LINK.sub(lambda link: site_link(here, link[1]) + (link[2] or ""), markdown)


def site_link(page: str, target: str) -> str:
    """Return the link of a page to what `target`, relative to where the page is in the repository, stands for."""
    path = in_repository(page, target)
    if path == "README.md":
        uri = "index.md"
    elif path.startswith("docs/"):
        uri = path.removeprefix("docs/")
    else:
        uri = source_uri(path)
    return os.path.relpath(uri, os.path.dirname(page) or ".") if target else ""


def in_repository(page: str, target: str) -> str:
    """Return the path, from the root of the repository, that a link on a page of the site stands for."""
    folder = "" if page == "index.md" else os.path.dirname(f"docs/{page}")
    return os.path.normpath(os.path.join(folder, target)) if target else f"docs/{page}"


def source_uri(path: str) -> str:
    return f"source/{path}.md" if (ROOT / path).is_file() else f"source/{path}/index.md"


def source_page(path: str, sources: set[str]) -> str:
    """Return a page that shows a file, or lists the files of a folder; those among `sources` have a page, too."""
    place = ROOT / path
    head = f"---\ntitle: {place.name}\nsearch: {{exclude: true}}\n---\n# `{path}`\n\n"
    if place.is_file():
        text = place.read_text(encoding="utf-8")
        return f"{head}````{LANGUAGES.get(place.suffix, 'text')}\n{text}\n````\n"
    rows = []
    for part in sorted(place.iterdir()):
        inside, name = part.relative_to(ROOT).as_posix(), f"`{part.name}`"
        if inside in sources:
            name = f"[{name}]({os.path.relpath(source_uri(inside), os.path.dirname(source_uri(path)))})"
        if not part.name.startswith((".", "__pycache__")):
            rows.append(f"- {name}{about(part)}")
    return head + "\n".join(rows) + "\n"


def about(path: Path) -> str:
    """Return what a file says of itself, after a colon: its docstring, or the comment after its command."""
    if path.is_dir():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[:3]
    said = [line.strip('# "') for line in lines if line.startswith(("# ", '"""'))]
    said = [line for line in said if line and path.name not in line]
    return f": {said[0]}" if said else ""


def keys_page() -> str:
    """Return the page of all keys, as `memdlm info --keys` and `--arguments` print them."""
    from dllm_memdlm.info import model_arguments, recipe_keys

    sections = itertools.groupby(recipe_keys(), lambda key: key.name.partition(".")[0])
    recipe = "\n\n".join(f"### {name}\n\n{table(keys)}" for name, keys in sections)
    return f"""# Keys

This page is made from the code. `memdlm info --keys` and `memdlm info --arguments` print the same.

## Keys of a recipe

In a recipe they stand in sections (`memory: {{steps: 2}}`). On the command line they have their whole name
(`memory.steps=2`). A fifth section, `training`, takes the fields of [`MemDLMConfig`](api/training.md): those of
transformers' `TrainingArguments`, and some more.

{recipe}

## Arguments of lm-eval and generate

`lm_eval --model memdlm --model_args NAME=VALUE,NAME=VALUE` and `memdlm generate … NAME=VALUE NAME=VALUE` take them.

{table(model_arguments())}
"""


def table(keys: Iterable[Key]) -> str:
    """Return keys as a Markdown table."""
    rows = [(f"`{key.name}`", html.escape(key.help, quote=False), f"`{key.default}`", key.type) for key in keys]
    lines = [("key", "meaning", "default", "type"), ("---",) * 4, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
