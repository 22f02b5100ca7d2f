"""Checkpoints that a run can be killed beside: marked when whole, found again, checked before use."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..backbones.expert_names import is_stacked
from ..config import ConfigError
from ..versions import readable_by_both
from . import engines
from .engines.shared_out import load_shared_out

#: The mark of a whole checkpoint, written last: by what and in which run it was made, and its number in the folder.
CONTENTS = "contents.json"

#: Behind the name of a whole checkpoint that is being written anew, until the new one is whole.
BEFORE = ".before"

#: In the output folder: the name of the newest run, which a run takes at its start and its checkpoints carry.
RUN = ".run"


# === which checkpoint, and whether it fits ===


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the checkpoint that the newest run in a folder has written last; none where no run has written any.

    It need not be the one of most steps: a run may go on from an earlier checkpoint, or use the folder of another run.

    Raises:
        ConfigError: there are checkpoints of earlier runs alone.
    """
    found = [(contents, path) for contents, path in _by_age(Path(output_dir)) if contents]
    # No name is there where the folder was put together by hand, or by an earlier version.
    run = path.read_text(encoding="utf-8") if (path := Path(output_dir, RUN)).is_file() else ""
    own = [path for contents, path in found if run in ("", contents.get("run"))]
    if found and not own:
        raise ConfigError(
            f"{output_dir}: the newest run there has written no checkpoint, and {found[-1][1].name} is of an "
            "earlier one; start without resuming, or name it as training.resume_from_checkpoint"
        )
    return str(own[-1]) if own else None


def _by_age(output_dir: Path) -> list[tuple[dict[str, Any], Path]]:
    """What all checkpoints of a folder say of themselves, and their folders, the newest last; unmarked ones first."""
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: path.name.rpartition("-")[2].removesuffix(BEFORE) for path in folders}
    found = [(contents_of(path), int(step), path) for path, step in steps.items() if step.isdecimal()]
    found.sort(key=lambda one: (one[0].get("written", 0), one[1]))
    return [(contents, path) for contents, _, path in found]


def contents_of(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a whole checkpoint says of itself, empty for any other folder."""
    try:
        contents = json.loads(Path(checkpoint, CONTENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) and "made_by" in contents else {}


def read_contents(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint says of itself. Raises ConfigError where no run can go on from it."""
    folder, contents = Path(checkpoint), contents_of(checkpoint)
    if not folder.is_dir():
        raise ConfigError(f"{checkpoint}: no such checkpoint")
    if not contents:
        raise ConfigError(f"{checkpoint}: not a checkpoint of this trainer, or not whole (no readable {CONTENTS})")
    here = transformers.__version__
    made = contents.get("transformers", "4.57")  # before it was noted
    if made.partition(".")[0] != here.partition(".")[0]:
        raise ConfigError(
            f"{checkpoint}: made with transformers {made}, this is {here}; resume with that release, or start from the "
            "weights (model.path, lora.path)"
        )
    if not (folder / "scheduler.pt").is_file():
        raise ConfigError(
            f"{checkpoint}: weights without the optimizer's state (training.save_only_model); to start from them, name "
            "it as model.path or lora.path"
        )
    return contents


def check_fits(checkpoint: str | os.PathLike[str], contents: dict[str, Any], trained: list[str], engine: str) -> None:
    """Refuse what another engine or number of processes has made, or a version for which experts were no tensors.

    `trained` are the names of the tensors that train; `engine` is in use, as `engines.describe` puts it.
    """
    if contents["made_by"] != engine:
        raise ConfigError(
            f"{checkpoint}: made by {contents['made_by']}, this is {engine}; resume with the same engine and number of "
            "processes"
        )
    # An earlier version did not say how many tensors it trained; without experts they are the same.
    made = contents.get("trained", None if any(map(is_stacked, trained)) else len(trained))
    if made != len(trained):
        count = "a matrix an expert" if made is None else f"{made} tensors"
        raise ConfigError(
            f"{checkpoint}: its optimizer has {count}, this model trains {len(trained)} tensors; resume with "
            "the version that made it, or start from the weights (model.path, lora.path)"
        )


# === the trainer's part ===


class WholeCheckpoints(transformers.Trainer):
    """A trainer whose checkpoints are marked when they are whole. To be mixed in first.

    A checkpoint is marked when all processes have written. Then older ones, and one of the same name, are removed, and
    an upload begins.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: Called with the folder of every checkpoint, before it is marked.
        self.beside_checkpoints: list[Callable[[Path], None]] = []
        #: What the trainer's user wants to find again in a checkpoint, to compare with when a run goes on from it.
        self.made_of: dict[str, Any] = {}
        self.run: str | None = None  #: the name of this run, in its folder and in its checkpoints
        self.resumed: Path | None = None  #: what this run goes on from
        self.limit: int | None = None  #: `save_total_limit`
        super().__init__(*args, **kwargs)
        self.add_callback(_Begins(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers' method; True goes on from the last checkpoint of the newest run in the output folder."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ConfigError(f"{self.args.output_dir}: no checkpoint to go on from")
        run: str | None = uuid.uuid4().hex
        self.resumed = None
        if resume_from_checkpoint:
            self.resumed, contents = Path(resume_from_checkpoint), contents_of(resume_from_checkpoint)
            if contents:  # else one of another trainer's
                check_fits(self.resumed, contents, self.trained_names(), engines.describe(self.accelerator))
                run = contents.get("run")
        (self.run,) = broadcast_object_list([run])
        self.limit = self.args.save_total_limit
        self.args.save_total_limit = None  # transformers would remove an older one before the next is marked
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            self.args.save_total_limit = self.limit

    def trained_names(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            readable_by_both(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            if contents_of(folder):  # as where a finished run is resumed
                before = folder.with_name(folder.name + BEFORE)
                remove(before)
                folder.rename(before)
            remove(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.mark(folder)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: `_save_checkpoint` uploads once the checkpoint is marked, and no longer changes."""

    def mark(self, folder: Path) -> None:
        """Mark a checkpoint that all processes have written, and remove old ones beyond the limit."""
        # accelerate's copy of what FSDP shares out, of an adapter a part only; the safetensors are whole
        (folder / f"{FSDP_MODEL_NAME}.bin").unlink(missing_ok=True)
        for write in self.beside_checkpoints:
            write(folder)
        others = [(contents, path) for contents, path in _by_age(folder.parent) if path != folder]
        contents = {
            "made_by": engines.describe(self.accelerator),
            "made_of": self.made_of,
            "run": self.run,
            "transformers": transformers.__version__,
            "trained": len(self.trained_names()),
            "written": 1 + max((contents.get("written", 0) for contents, _ in others), default=0),
        }
        for path in (*folder.rglob("*"), folder):  # on the disk before the mark is
            _to_disk(path)
        (folder / CONTENTS).write_text(json.dumps(contents, indent=1), encoding="utf-8")
        for path in (folder / CONTENTS, folder, folder.parent):
            _to_disk(path)
        replaced = [path for _, path in others if path.suffix == BEFORE]
        older = [path for _, path in others if path.suffix != BEFORE]
        if self.limit is not None and self.limit > 0:
            best = Path(self.state.best_model_checkpoint or folder).resolve()
            worse = [path for path in older if path.resolve() != best]
            stay = max(0, self.limit - 1 - (len(older) - len(worse)))  # of them, beside the best and the new one
            replaced += worse[: max(0, len(worse) - stay)]
        for path in replaced:
            remove(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.accelerator.is_fsdp2:
            load_shared_out(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.accelerator.is_fsdp2:
            load_shared_out(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


class _Begins(transformers.TrainerCallback):
    """Steps in before the first step."""

    def __init__(self, trainer: WholeCheckpoints) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the run's name into its folder, and find the best checkpoint so far.

        The folder may have moved since, or be a copy, or be reached from another working directory.
        """
        folder, run, resumed = Path(args.output_dir), self.trainer.run, self.trainer.resumed
        if args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RUN).write_text(run or "", encoding="utf-8")
        if resumed is None:
            return
        # from the checkpoint, as transformers 5 forgets a best one that is not where it was
        recorded = transformers.TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME))
        if recorded.best_model_checkpoint is None:
            return
        best = Path(recorded.best_model_checkpoint)
        places = (resumed.parent / best.name, folder / best.name, best)
        found = next((str(place) for place in places if place.is_dir()), None)
        if found is None and state.is_world_process_zero:
            print(f"the best checkpoint so far, {best}, is no longer there: the best from here on counts", flush=True)
        state.best_model_checkpoint = found
        for name in ("best_metric", "best_global_step"):
            setattr(state, name, None if found is None else getattr(recorded, name))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its mark first: what a kill leaves of it is none."""
    (checkpoint / CONTENTS).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some network file systems take no folder
            raise
    finally:
        os.close(descriptor)
