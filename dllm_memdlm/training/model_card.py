"""README.md of a trained model: what it is, its losses, how to load it, and the recipe and versions behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..config import ConfigError
from ..data.sources import SUFFIXES
from ..machine import package_versions
from .recipe import FILE_NAME

PAPER = "[MemDLM](https://arxiv.org/abs/2603.22241)"

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

#: How to read the losses, by what fast weights were written on in training.
ON_PROMPTS = (
    "`loss` and `eval_loss` are computed with fast weights written on the prompts, as in use. What they remember is by "
    "how much `_memory_other`, with the memory of another text, is higher. To compare with a model that has no memory, "
    "take the `_memory_off` values."
)
FITTED = (
    "`loss` and `eval_loss` are computed with fast weights that have just been fitted to the very tokens being scored, "
    "so part of them is the inner loop having seen the answer. To compare with a model that has no memory, take the "
    "`_memory_off` values: the same weights with the fast weights discarded."
)

REMEMBERED = " The memory is fast weights that the inner loop has written on one text. It fits no other weights."


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
    method = f"with {PAPER}" if training.uses_memory else "with plain masked diffusion (MDLM), without memory,"
    trained = f" Trained {method} by dllm-memdlm." if training.recipe else ""
    kind = "It is a masked diffusion language model; attention is bidirectional."
    sections = [f"# {name}", f"{what} {kind}{trained}{REMEMBERED if has_memory else ''}"]
    sections += [*([] if has_memory else _results(training)), _use(training, is_adapter, has_memory)]
    if training.recipe_text:
        sections.append(f"## Recipe\n\n```yaml\n{training.recipe_text.rstrip()}\n```")
    versions = "\n".join(f"- {package} {version}" for package, version in package_versions().items())
    sections.append(f"## Versions\n\n{versions}")
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(folder / "README.md")


def _results(training: Training) -> list[str]:
    """The section of the losses as last logged; none for weights without logs."""
    logs = training.state.get("log_history", [])
    last = {name: next((log[name] for log in reversed(logs) if name in log), None) for name in LOSSES}
    rows = [f"| `{name}` | {value:.4f} | {LOSSES[name]} |" for name, value in last.items() if value is not None]
    if not rows:
        return []
    steps, epochs = training.state["global_step"], training.state["epoch"]
    section = f"## Results\n\nAfter {steps} steps ({epochs:.2f} epochs), in nats:\n\n| | | on |\n|---|---|---|\n"
    reading = ON_PROMPTS if training.section("memory").get("source") == "prompt" else FITTED
    if training.section("memory").get("prompt_loss"):
        reading += " `loss` has the loss of prompts in it."
    return [section + "\n".join(rows) + (f"\n\n{reading}" if training.uses_memory else "")]


def _use(training: Training, is_adapter: bool, has_memory: bool) -> str:
    plain = (
        'The adapter is PEFT\'s own: `PeftModel.from_pretrained(base, "FOLDER")` puts it on the base model as dllm or\n'
        "transformers loads it."
        if is_adapter
        else "The weights have the names that dllm and transformers give them, and load there without dllm-memdlm."
    )
    document = "" if has_memory else " --prompt-file doc.txt"
    memory = " --memory" if training.uses_memory and not has_memory else ""
    return f"""## Use

With `FOLDER` this folder or its hub name, and dllm-memdlm installed:

```
memdlm generate --model FOLDER{document} --question "Who wrote it?"{memory}
```

```python
from dllm_memdlm.inference.pretrained import load_pretrained

loaded = load_pretrained("FOLDER")
logits = loaded.model(input_ids=loaded.tokenizer("…", return_tensors="pt").input_ids).logits
```

{plain}
transformers' own decoders (Llama, Mistral, Qwen) apply a causal mask, which this model was trained without: give them
a 4-D mask that hides nothing."""


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
