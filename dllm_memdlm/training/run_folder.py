"""A run's folder: whose checkpoints are in it, which was written last, and whether one is whole and fits this run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..backbones.expert_names import is_stacked
from ..config import ConfigError

#: In a finished checkpoint: the size of every file, what it was made by, in which run and when.
CONTENTS = "contents.json"

#: In the output folder: the name of the newest run, which a run takes at its start and its checkpoints carry.
RUN = ".run"


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The checkpoint that the newest run in a folder has written last; none where no run has written any.

    Not the one of most steps: a run may use the folder of an earlier one, or go on from an earlier checkpoint.

    Raises:
        ConfigError: there are checkpoints of earlier runs alone.
    """
    found, run = checkpoints_in(Path(output_dir)), newest_run(Path(output_dir))
    own = [entry for entry in found if run in (None, entry[3])]
    if found and not own:
        raise ConfigError(
            f"{output_dir}: the newest run there has written no checkpoint, and {Path(max(found)[2]).name} is of an "
            "earlier one; start without resuming, or name it as training.resume_from_checkpoint"
        )
    return max(own)[2] if own else None


def has_checkpoints(output_dir: str | os.PathLike) -> bool:
    """Whether any run has written one."""
    return bool(checkpoints_in(Path(output_dir)))


def checkpoints_in(output_dir: Path) -> list[tuple[int, int, str, str]]:
    """When each was written, its step, its folder, and the name of its run."""
    found = []
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step, contents = folder.name.rpartition("-")[2], contents_of(folder)
        if folder.is_dir() and step.isdecimal():
            found.append((contents.get("written", 0), int(step), str(folder), contents.get("run") or ""))
    return found


def later_than(output_dir: Path) -> int:
    """The time, in ns, and after all that is written there: the clock of another node may be ahead."""
    return max(time.time_ns(), *(written + 1 for written, *_ in checkpoints_in(output_dir)), 0)


def newest_run(output_dir: Path) -> str | None:
    """The newest run's name; none where its folder was put together by hand, or by an earlier version."""
    try:
        return (output_dir / RUN).read_text(encoding="utf-8") or None
    except OSError:
        return None


def contents_of(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint says of itself; empty where it cannot be read."""
    try:
        contents = json.loads(Path(checkpoint, CONTENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def check_whole(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises ConfigError where it is none of this trainer's, or not whole."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ConfigError(f"{checkpoint}: no such checkpoint")
    contents = contents_of(folder)
    if not {"made_by", "files"} <= contents.keys():
        raise ConfigError(f"{checkpoint}: not a checkpoint of this trainer (no readable {CONTENTS})")
    check_release(checkpoint, contents)
    files = contents["files"]
    if "scheduler.pt" not in files:
        raise ConfigError(
            f"{checkpoint}: weights without the optimizer's state (training.save_only_model); to start from them, name "
            "it as model.path or lora.path"
        )
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes of {size:,}"
            raise ConfigError(f"{checkpoint}: not whole, {name} {state}; take an earlier checkpoint")
    return contents


def check_release(checkpoint: str | os.PathLike, contents: dict[str, Any]) -> None:
    here = transformers.__version__
    made = contents.get("transformers", "4.57" if contents else here)  # before it was noted; none of this trainer's
    if made.partition(".")[0] != here.partition(".")[0]:
        raise ConfigError(
            f"{checkpoint}: made with transformers {made}, this is {here}; resume with that release, or start from the "
            "weights (model.path, lora.path)"
        )


def check_layout(checkpoint: str | os.PathLike, contents: dict[str, Any], trained: list[str]) -> None:
    """Refuse a checkpoint whose optimizer has other tensors than those of these names, as before experts were tensors.

    What an earlier version made does not say how many; without experts they are the same.
    """
    same = not contents or not any(map(is_stacked, trained))
    made = contents.get("trained", len(trained) if same else None)
    if made != len(trained):
        count = "a matrix an expert" if made is None else f"{made} tensors"
        raise ConfigError(
            f"{checkpoint}: its optimizer has {count}, this model trains {len(trained)} tensors; resume with the "
            "version that made it, or start from the weights (model.path, lora.path)"
        )


def check_engine(checkpoint: str | os.PathLike, made_by: str, here: str) -> None:
    """Refuse a checkpoint of another engine or number of processes: its parts, or its examples, would not fit."""
    if made_by != here:
        raise ConfigError(
            f"{checkpoint}: made by {made_by}, this is {here}; resume with the same engine and number of processes"
        )
