"""Commands that leave a folder behind, as rules for make.

A folder's name ends in a digest of what its result depends on, but for code and data: the settings of a recipe, the
arguments of a score. As these name the folder of the model, it covers what came before, too. So what changes is made
anew in a folder of its own, and what is there is not made again. A folder holds what its command wrote, `log.txt` with
what it printed, and, once it has ended well, `done` with its seconds, the date and the commit.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What stands for the folder in the words of a command.
FOLDER = "{folder}"


@dataclass(frozen=True)
class Step:
    """One command: the folder it writes to, the words behind the interpreter, and the steps whose results it reads."""

    folder: Path
    argv: tuple[str, ...]
    after: tuple[Step, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, name: Path, argv: Sequence[str], made_from: Any, runs: Path, **fields: Any) -> Step:
        """A step in `name` with the digest of `made_from` behind it, which FOLDER stands for in `argv`.

        `runs`, the folder of all, may be another one tomorrow, and is left out of the digest.
        """
        text = json.dumps(made_from, sort_keys=True)
        text = text.replace(f'"{runs}/', '"').replace(f"={runs}/", "=")
        folder = name.with_name(f"{name.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
        return cls(folder, tuple(word.replace(FOLDER, str(folder)) for word in argv), **fields)

    @property
    def line(self) -> str:
        """The command as one would type it."""
        return self._line("python")

    @property
    def done(self) -> Path:
        """The file that says that it has ended well."""
        return self.folder / "done"

    def _line(self, python: str) -> str:
        return " ".join(
            [
                *(f"{name}={shlex.quote(value)}" for name, value in self.env.items()),
                python,
                *map(shlex.quote, self.argv),
            ]
        )

    def rule(self) -> str:
        """The rule of make. A training that was cut short goes on; what else was begun is begun anew."""
        folder, log, done = self.folder, self.folder / "log.txt", self.done
        mode = ">>" if "--resume" in self.argv else ">"
        lines = [
            "" if "--resume" in self.argv else f"rm -rf {folder}",
            f"mkdir -p {folder}; echo {shlex.quote(self.line)}",
            f"begun=$(date +%s); {self._line(shlex.quote(sys.executable))} {mode} {log} 2>&1 < /dev/null || "
            f"{{ {{ grep -a '^error: ' {log} || tail -n 3 {log}; }} >&2; echo 'failed: {log}' >&2; exit 1; }}; "
            f'echo "$(( $(date +%s) - begun )) s, $(date +%F), $(git describe --always --dirty 2>&-)" > {done}.new',
            f"mv {done}.new {done}",
        ]
        # Order only: a copy of the runs has other times, and what changes has another folder.
        head = f"{done}: | {' '.join(str(step.done) for step in self.after)}"
        return "\n\t@".join([head, *(line.replace("$", "$$") for line in lines if line)]) + "\n"


def in_order(steps: Iterable[Step]) -> list[Step]:
    """The steps and all that they come after, each once and behind those."""
    found: dict[Step, None] = {}
    for step in steps:
        found |= dict.fromkeys([*in_order(step.after), step])
    return list(found)
