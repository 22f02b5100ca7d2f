"""README.md of a trained model: what it is, its losses, how to load it, and the recipe and versions behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..config import ConfigError
from ..data.sources import SUFFIXES
from ..machine import package_versions
from .recipe import FILE_NAME

#: What a card says of a run's last logged values, in this order.
LOSSES = {
    "loss": "training batches since the log before",
    "eval_loss": "held-out examples",
    "loss_memory_off": "one training batch, fast weights discarded",
    "eval_loss_memory_off": "held-out examples, fast weights discarded",
    "eval_loss_memory_prompt": "held-out examples, fast weights written on their prompts alone",
    "eval_loss_memory_other": "held-out examples, fast weights written on the prompts of others",
    "eval_prompt_nll": "masked tokens of held-out prompts, without fast weights",
}

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


@dataclass
class Training:
    """What a folder tells about how its weights were trained; nothing where it has no recipe."""

    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)  #: the trainer's: its logs, and how far it came

    @classmethod
    def of(cls, recipe: Path | None, state: Path | None) -> Training:
        """From recipe.yaml and trainer_state.json, where there are such files. Raises ConfigError for a broken one."""
        text = "" if recipe is None else recipe.read_text(encoding="utf-8")
        try:
            found = {} if state is None else json.loads(state.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{state}: not the state of a trainer ({error})") from None
        wanted = ("log_history", "global_step", "epoch")
        if state is not None and not (isinstance(found, dict) and all(name in found for name in wanted)):
            raise ConfigError(f"{state}: not the state of a trainer; expected a mapping with {', '.join(wanted)}")
        return cls(text, yaml.safe_load(text) or {}, found)

    @property
    def uses_memory(self) -> bool:
        """Whether the inner loop ran."""
        return bool(self.recipe) and self.section("memory").get("enabled", True)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe, empty where there is none."""
        section = self.recipe.get(name)
        return section if isinstance(section, dict) else {}


def write_run_card(folder: str | Path) -> None:
    """Write README.md of a run's folder from the files in it, in place of the draft that PEFT leaves there."""
    folder = Path(folder)
    training = Training.of(folder / FILE_NAME, folder / "trainer_state.json")
    base = training.section("model").get("path")
    is_adapter = (folder / "adapter_config.json").is_file()
    kind = "A PEFT LoRA adapter" if is_adapter else "A full model"
    origin = ", trained from scratch" if base is None else f"{' for' if is_adapter else ', trained from'} {label(base)}"
    what = f"{kind}{origin}."
    write_card(folder, folder.resolve().name, what, training, base, is_adapter)


def write_card(
    folder: Path,
    name: str,
    what: str,
    training: Training,
    base: str | None,
    is_adapter: bool = False,
    has_memory: bool = False,
) -> None:
    """Write README.md into a folder.

    `name` is its title, `what` a sentence that says what the weights are. `base` is the folder or hub name of the model
    that they come from, or are an adapter for; none for one from scratch. With `has_memory` there is a text's memory in
    them, with which the training has logged no losses.
    """
    on_hub, given = _hub_name(base), training.section("data").get("dataset")
    names = [given] if given is None or isinstance(given, str) else [*given]  # of one, or of several
    found = [name for name in map(_hub_name, names) if name]
    data = ModelCardData(
        base_model=on_hub,
        base_model_relation=("adapter" if is_adapter else "finetune") if on_hub else None,
        datasets=found or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["dllm", "masked-diffusion", *["memdlm"] * (training.uses_memory or has_memory), *["lora"] * is_adapter],
    )
    logs = [] if has_memory else training.state.get("log_history", [])
    last = {name: value for log in logs for name, value in log.items() if name in LOSSES}
    card = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True).render(
        data=data.to_yaml(),
        name=name,
        what=what,
        training=training,
        memory=training.section("memory"),
        losses=[(name, last[name], examples) for name, examples in LOSSES.items() if name in last],
        is_adapter=is_adapter,
        has_memory=has_memory,
        versions=package_versions(),
    )
    ModelCard(card).save(folder / "README.md")


def label(name: str) -> str:
    """How a card calls a model: by its hub name, or by the last part of a local path, which is nobody else's matter."""
    return f"`{_hub_name(name) or Path(name).name}`"


def _hub_name(name: str | None) -> str | None:
    """The name if it can be one on the hub, rather than a local file or folder."""
    if name is None or name.startswith("~") or Path(name).exists() or Path(name).suffix in SUFFIXES:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
