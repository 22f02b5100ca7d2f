"""Checkpoints that a run can be killed beside: written under another name, renamed when whole, checked before use."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..backbones.expert_names import is_stacked, split_name
from ..backbones.stock_peft import own_state
from ..config import ConfigError
from ..versions import readable_by_both, rotate_checkpoints
from . import engines
from .run_folder import CONTENTS, RUN, check_layout, check_release, contents_of, last_checkpoint, later_than, newest_run

#: In the output folder: a checkpoint that is being written. What a killed run leaves there, the next save removes.
UNFINISHED = ".unfinished-checkpoint"


class WholeCheckpoints(transformers.Trainer):
    """What a trainer does about checkpoints: `written_aside`, and FSDP2's put together again. To be mixed in first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: Called with the folder of every checkpoint, before it is complete.
        self.beside_checkpoints: list[Callable[[Path], None]] = []
        #: What the trainer's user wants to find again in a checkpoint, to compare with when a run goes on from it.
        self.made_of: dict[str, Any] = {}
        self._aside: Path | None = None
        self._run: str | None = None  #: the name of this run, in its folder and in its checkpoints
        super().__init__(*args, **kwargs)
        self._began = _Began()
        self.add_callback(self._began)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers' method; True goes on from the last checkpoint of the newest run in the output folder."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ConfigError(f"{self.args.output_dir}: no checkpoint to go on from")
        resumed = resume_from_checkpoint or None
        if resumed:
            check_release(resumed, contents_of(resumed))
            check_layout(resumed, contents_of(resumed), self._trained())
        (self._run,) = broadcast_object_list([contents_of(resumed).get("run") if resumed else uuid.uuid4().hex])
        self._began.run, self._began.resumed = self._run, resumed
        return super().train(resume_from_checkpoint=resumed, **kwargs)

    def _trained(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        about = {"made_by": engines.describe(self.accelerator), "made_of": self.made_of, "run": self._run}
        about |= {"transformers": transformers.__version__, "trained": len(self._trained())}
        try:
            with written_aside(run_dir, self.accelerator, self.args.should_save, about) as self._aside:
                super()._save_checkpoint(model, trial)
                self._complete(self._aside / name, run_dir / name)
        finally:
            self._aside = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            rotate_checkpoints(self, run_dir)

    def _complete(self, folder: Path, place: Path) -> None:
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(place)
        if self.args.should_save:
            # accelerate's copy of what FSDP shares out, of an adapter a part only; the safetensors are whole
            (folder / f"{FSDP_MODEL_NAME}.bin").unlink(missing_ok=True)
            self.state.save_to_json(folder / TRAINER_STATE_NAME)
            for write in self.beside_checkpoints:
                write(folder)

    def save_model(self, output_dir: str | None = None, **kwargs: Any) -> None:
        super().save_model(output_dir, **kwargs)
        if self.args.should_save:
            readable_by_both(output_dir or self.args.output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # it uploads in the background: not what is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

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


@contextmanager
def written_aside(
    output_dir: str | os.PathLike, accelerator: Accelerator, saves: bool, about: dict[str, Any]
) -> Iterator[Path]:
    """A folder to write checkpoints into, which move to `output_dir` at the end. For all processes together.

    Each is on the disk before it gets its name, so a name that is there is that of a whole checkpoint.

    Args:
        output_dir: where the checkpoints shall be.
        accelerator: of the processes that write.
        saves: whether this process finishes them: one for each file system.
        about: what each says of itself; `made_by` is what `check_engine` compares.
    """
    final, aside = Path(output_dir), Path(output_dir) / UNFINISHED
    if saves:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    yield aside
    accelerator.wait_for_everyone()
    if saves:
        _finish(aside, final, about)
    accelerator.wait_for_everyone()


def _finish(aside: Path, final: Path, about: dict[str, Any]) -> None:
    for folder in list(aside.iterdir()):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        contents = folder / CONTENTS
        told = {**about, "written": later_than(final), "files": sizes}
        contents.write_text(json.dumps(told, indent=1), encoding="utf-8")
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
    except OSError:
        if path.is_file():  # some network file systems take no folder
            raise
    finally:
        os.close(descriptor)


class _Began(transformers.TrainerCallback):
    """When a run begins: its name goes into its folder, and the best checkpoint so far is found again.

    The folder may have moved since, or be a copy, or be reached from another working directory.
    """

    run: str | None = None
    resumed: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir)
        if args.should_save and self.run != newest_run(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RUN).write_text(self.run or "", encoding="utf-8")
        if self.resumed is not None:
            self._find_best(Path(self.resumed), folder, state)

    def _find_best(self, resumed: Path, folder: Path, state: Any) -> None:
        # from the checkpoint, as transformers 5 forgets a best one that is not where it was
        if not (resumed / TRAINER_STATE_NAME).is_file():
            return
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


def load_shared_out(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Read the weights of a checkpoint into a model that FSDP2 shares out, of which every process holds a part.

    accelerate (1.11) saves and restores an adapter's first part alone; the checkpoint's own safetensors are whole.

    Raises:
        ConfigError: there are none.
    """
    folder = Path(checkpoint)
    files = sorted(folder.glob("adapter_model*.safetensors")) or sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ConfigError(f"{checkpoint}: expected adapter_model.safetensors or model.safetensors")
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        holder = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a mapping)
        for name, part in own_state(model).items():
            names = split_name(name, len(part)) if is_stacked(name) else [name]
            if not holder.keys() & set(names):  # tied to another weight, which is there
                continue
            tensors = [holder[one].get_tensor(one) for one in names]
            tensor = torch.stack(tensors) if is_stacked(name) else tensors[0]
            if isinstance(part, DTensor):
                tensor = distribute_tensor(
                    tensor.to(part.device), part.device_mesh, part.placements, src_data_rank=None
                )
            part.copy_(tensor)
