"""The rooms of the package: imports run one way, those inside of functions too."""

from __future__ import annotations

import ast
from pathlib import Path

import dllm_memdlm

#: From the ground up: a module imports what is named before it, or is in the same room.
ROOMS = (
    *("__init__", "config", "cli", "versions", "machine", "compat", "backbones", "data", "method", "training"),
    *("inference", "evaluation", "info", "generate", "export", "evaluate", "recipes", "train"),
)
PACKAGE = Path(dllm_memdlm.__file__).parent


def imports(path: Path) -> list[tuple[int, str]]:
    """The line and the room of each import of the package's own."""
    package, found = [PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]], []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            inside = [part for part in base if part][1:]
            names = inside[:1] or [alias.name for alias in node.names if not alias.name.startswith("__")]
            found += [(node.lineno, room) for room in names]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            found += [(node.lineno, name.split(".")[1]) for name in names if name.startswith(f"{PACKAGE.name}.")]
    return found


def test_no_room_knows_one_above_it():
    odd = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        odd += [f"{path}:{line}: {room}" for line, room in imports(path) if ROOMS.index(room) > ROOMS.index(own)]
    assert not odd


def test_no_file_is_longer_than_a_reader_wants():
    assert not [path for path in PACKAGE.rglob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 300]
