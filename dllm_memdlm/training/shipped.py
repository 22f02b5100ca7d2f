"""The recipes that come with the package, by name: `recipe:llada2_mini` stands wherever a recipe file does.

An installation has them beside this file, where setup.py puts them; a checkout has them in its folder recipes/.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import yaml

from ..config import ConfigError

#: What a name begins with, where a file could be meant, too.
PREFIX = "recipe:"

_INSTALLED = Path(__file__).with_name("recipes")
FOLDER = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "recipes"


def names() -> list[str]:
    """Return the names of all recipes in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(recipe: str | os.PathLike[str], beside: Path = Path()) -> Path:
    """Return the file of `recipe:NAME`; of a path, itself, seen from the folder `beside`.

    Raises:
        ConfigError: no recipe has this name.
    """
    name = str(recipe)
    if not name.startswith(PREFIX):
        return beside / recipe
    name = name.removeprefix(PREFIX)
    if name not in names():
        raise ConfigError(f"{PREFIX}{name}: no such recipe; known: {', '.join(names())}")
    return FOLDER / f"{name}.yaml"


def about(name: str) -> str:
    """Return what a recipe says of itself: the first sentence of its header below the empty line.

    Raises:
        ConfigError: no recipe has this name.
    """
    lines = find(PREFIX + name).read_text(encoding="utf-8").splitlines()
    header = [line.strip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    text = " ".join(header[header.index("") + 1 :])
    return re.split(r"(?<=\.) ", text)[0]


def copy(name: str, folder: str | os.PathLike[str]) -> list[Path]:
    """Copy a recipe, and the files that it extends, into a folder. What is there already is left as it is.

    Returns:
        The copies; that of the recipe comes first.

    Raises:
        ConfigError: no recipe has this name; another file stands where a copy would, and then nothing is copied; the
            folder cannot be written to.
    """
    copies: dict[Path, bytes] = {}
    source: Path | None = find(PREFIX + name)
    while source is not None:
        content = source.read_bytes()
        copies[Path(folder) / source.relative_to(FOLDER)] = content
        base = yaml.safe_load(content).get("extends")
        source = base and source.parent / base
    try:
        for path, content in copies.items():
            if path.exists() and path.read_bytes() != content:
                raise ConfigError(f"{path}: there is another file of this name; expected a folder without it")
        for path, content in copies.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; expected a folder that can be written to") from None
    return list(copies)
