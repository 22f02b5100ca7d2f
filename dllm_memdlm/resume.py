"""Checkpoints that a run can be killed beside: written under another name, renamed when whole, checked before use."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import ConfigError

#: In the output folder: a checkpoint that is being written. What a killed run leaves there, the next save removes.
UNFINISHED = ".unfinished-checkpoint"

#: In a finished checkpoint: the size of every file, and what it was made by.
CONTENTS = "contents.json"


@contextmanager
def written_aside(output_dir: str | os.PathLike, accelerator: Accelerator, made_by: str) -> Iterator[Path]:
    """A folder to write checkpoints into, which move to `output_dir` at the end. For all processes together.

    Each is on the disk before it gets its name, so a name that is there is that of a whole checkpoint.
    """
    final, aside = Path(output_dir), Path(output_dir) / UNFINISHED
    if accelerator.is_local_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    yield aside
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(aside, final, made_by)
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:  # on a node that does not see the main process's files
        _finish(aside, final, made_by)


def _finish(aside: Path, final: Path, made_by: str) -> None:
    if not aside.is_dir():
        return
    for folder in aside.iterdir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        contents = folder / CONTENTS
        contents.write_text(json.dumps({"made_by": made_by, "files": sizes}, indent=1), encoding="utf-8")
        for path in (*files, contents, *(path for path in folder.rglob("*") if path.is_dir()), folder):
            _to_disk(path)
        place, replaced = final / folder.name, aside / f".{folder.name}"
        if place.exists():  # an earlier run's, in a folder that is used again
            place.rename(replaced)
        folder.rename(place)
    shutil.rmtree(aside)
    _to_disk(final)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_whole(checkpoint: str | os.PathLike) -> str:
    """What a checkpoint was made by. Raises ConfigError where it is none of this trainer's, or not whole."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ConfigError(f"{checkpoint}: no such checkpoint")
    try:
        contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        made_by, files = contents["made_by"], contents["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{checkpoint}: not a checkpoint of this trainer (no readable {CONTENTS})") from None
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes of {size:,}"
            raise ConfigError(f"{checkpoint}: not whole, {name} {state}; take an earlier checkpoint")
    return made_by


def check_engine(checkpoint: str | os.PathLike, made_by: str, here: str) -> None:
    """Refuse a checkpoint in parts that were made for other processes, and say so where resuming is not exact."""
    if made_by == here:
        return
    if any(name in described for name in ("ZeRO", "FSDP") for described in (made_by, here)):
        raise ConfigError(
            f"{checkpoint}: made by {made_by}, this is {here}; resume with the same engine and number of processes"
        )
    warnings.warn(
        f"{checkpoint}: made by {made_by}, this is {here}: the examples will come in another order", stacklevel=2
    )


def load_shared_out(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Read the weights of a checkpoint into a model that FSDP2 shares out, of which every process holds a part.

    accelerate (1.11) saves and restores an adapter's first part alone; the checkpoint's own safetensors are whole.
    """
    own = peft.get_peft_model_state_dict(model) if isinstance(model, peft.PeftModel) else model.state_dict()
    folder = Path(checkpoint)
    for path in sorted(folder.glob("adapter_model*.safetensors")) or sorted(folder.glob("model*.safetensors")):
        for name, tensor in load_file(path).items():
            part = own[name]
            if isinstance(part, DTensor):
                tensor = distribute_tensor(
                    tensor.to(part.device), part.device_mesh, part.placements, src_data_rank=None
                )
            part.copy_(tensor)
