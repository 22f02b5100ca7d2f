"""One training run: from a recipe to a trainer, and from a trainer to a folder with everything in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import transformers
import yaml
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from ..backbones import config_of, load_model, model_class
from ..backbones.loading import weights_digest
from ..compat.dllm_api import NoAttentionMaskWrapper, describe
from ..config import ConfigError, require
from ..data import check_mask, load_examples, tokenizer_for, training_texts
from ..versions import hub_errors
from . import engines
from .arguments import MemDLMConfig
from .checkpoints import CONTENTS, last_checkpoint, read_contents
from .example_ids import digest_of
from .model_card import LOSSES, write_run_card
from .recipe import FILE_NAME, SECTIONS, Recipe
from .trainer import MemDLMTrainer

#: Tokenizers that were trained for runs, so that runs on the same texts share one.
TOKENIZER_CACHE = Path(huggingface_hub.constants.HF_HOME) / "dllm-memdlm" / "tokenizers"

#: Training arguments on which the noise and the order of the examples depend.
ORDER = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "group_by_length")


def say(text: str) -> None:
    """Print in the main process alone."""
    if accelerate.PartialState().is_main_process:
        print(text, flush=True)


def build_trainer(recipe: Recipe) -> MemDLMTrainer:
    """Tokenizer, examples, model and trainer of a recipe. Raises ConfigError for what the user can correct."""
    if recipe.model.load_in_4bit and engines.shares_weights(recipe.training):
        raise ConfigError(
            f"training.engine={recipe.training.engine!r} with model.load_in_4bit: packed weights are not shared out; "
            "expected ddp, zero1 or zero2"
        )
    if recipe.model.path is None and recipe.lora.enabled:
        raise ConfigError(
            "lora.enabled=True without a model.path: an adapter would be saved, and its base, random weights, nowhere; "
            "expected a model.path, or lora.enabled=false to train all weights from scratch"
        )
    if recipe.data.streaming:  # not all rows are at hand
        args, read, why = recipe.training, recipe.model.tokenizer or recipe.model.path, "with data.streaming"
        require("training", args, "max_steps", args.max_steps > 0, f"at least 1 {why}")
        require("training", args, "group_by_length", not args.group_by_length, f"false {why}")
        require("model", recipe.model, "tokenizer", bool(read), f"one {why}, on which none is trained")
    if recipe.model.path is None:
        model_class(recipe.model.architecture)  # or ends, before a tokenizer is trained
    transformers.set_seed(recipe.training.seed)
    with accelerate.PartialState().local_main_process_first():
        tokenizer = tokenizer_for(recipe.model, lambda: training_texts(recipe.data), TOKENIZER_CACHE)
        config = config_of(recipe.model, vocab_size=len(tokenizer))  # or ends, before examples are tokenised
        if config.vocab_size < len(tokenizer):
            where = "model.dimensions" if recipe.model.path is None else f"model.path={recipe.model.path!r}"
            raise ConfigError(
                f"{where}: vocab_size {config.vocab_size}, expected at least the tokenizer's {len(tokenizer)}"
            )
        examples = load_examples(recipe.data, tokenizer)
    say(f"{describe()}\n{examples.summary()}")
    if recipe.model.dtype != "float32" and not recipe.lora.enabled:
        say(f"model.dtype={recipe.model.dtype}: most updates of weights are lost in rounding; float32 keeps them")
    if examples.eval is None:
        if recipe.training.load_best_model_at_end:
            raise ConfigError(
                "training.load_best_model_at_end=True: expected examples to evaluate on (data.eval_fraction or "
                "data.eval_split)"
            )
        recipe.training.eval_strategy, recipe.training.do_eval = IntervalStrategy.NO, False
    if recipe.model.path is None:
        named = ["mask_token_id"] if hasattr(config, "mask_token_id") else []
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", *named):
            setattr(config, name, getattr(tokenizer, name))
    check_mask(tokenizer, config, f"model.tokenizer={recipe.model.tokenizer or recipe.model.path!r}")
    model = load_model(recipe.model, config, recipe.lora, seed=recipe.training.seed)
    collator = transformers.DataCollatorForSeq2Seq(
        tokenizer, padding=True, label_pad_token_id=tokenizer.pad_token_id, return_tensors="pt"
    )
    try:
        trainer = MemDLMTrainer(
            model=model,
            args=recipe.training,
            memory=recipe.memory,
            # Padding is end-of-sequence: it is a label, and it is visible.
            data_collator=NoAttentionMaskWrapper(collator),
            train_dataset=examples.train,
            eval_dataset=examples.eval,
            processing_class=tokenizer,
        )
    except hub_errors() as error:
        raise ConfigError(
            f"training.push_to_hub=True: the hub cannot be written to ({' '.join(str(error).split())[:200]}); log in "
            "with network, or set it to false"
        ) from error
    say(f"engine: {engines.describe(trainer.accelerator)}")
    batches = {name: getattr(recipe.data, name) for name in ("padding_loss", "perbatch_cutoff", "resp_cutoff_ratio")}
    for name, value in batches.items():
        setattr(trainer.data_collator, name, value)
    # Without the cut-offs where there are none, as in checkpoints of before
    kept = {name: value for name, value in batches.items() if value or name == "padding_loss"}
    digest = None if recipe.data.streaming else digest_of(examples.train)
    trainer.made_of |= {"data": {"examples": digest, **kept}, "weights": _weights_of(recipe)}
    trainer.beside_checkpoints += [recipe.save, write_run_card]
    if examples.eval is not None:
        trainer.add_callback(_LastEvaluation())
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Progress())
    return trainer


def train(recipe: Recipe, resume: bool = False) -> MemDLMTrainer:
    """Train, evaluate at the end, and save the model, the tokenizer, the recipe and the trainer's state.

    With `resume` it goes on from the last checkpoint in the output folder, if there is one.
    """
    args = recipe.training
    checkpoint, output_dir = args.resume_from_checkpoint, args.output_dir
    if checkpoint is None and resume:
        checkpoint = last_checkpoint(output_dir)
    elif checkpoint is None and any(Path(output_dir).glob(f"*/{CONTENTS}")):
        say(f"{output_dir} has checkpoints of an earlier run; from now on --resume goes on with this one")
    if checkpoint is not None:
        made_of = read_contents(checkpoint).get("made_of", {})
        sections = ("model", "lora", "memory", "training")
        check_recipe(checkpoint, recipe, sections, made_of.get("weights", {}), _weights_of(recipe))
        args.eval_on_start = False  # it was evaluated at this step before
        say(f"going on from {checkpoint}")
    trainer = build_trainer(recipe)
    if checkpoint is not None and made_of.get("data") != trainer.made_of["data"]:
        made = {"data.dataset": made_of["data"]} if "data" in made_of else {}  # not by an earlier version
        here = {"data.dataset": trainer.made_of["data"]}
        check_recipe(checkpoint, recipe, ("data",), made, here, ("data.num_proc=", "data.eval_s"))
    trainer.train(resume_from_checkpoint=checkpoint)
    steps, logs = trainer.state.global_step, trainer.state.log_history
    if checkpoint is not None and Path(checkpoint).name == f"checkpoint-{steps}":
        say(f"all {steps} steps were done: nothing was left to train")
    if broken := [row["step"] for row in logs if not math.isfinite(row.get("loss", 0.0))]:
        say(
            f"the loss is not finite at step {broken[0]}, the first of {len(broken)} such logs: what is saved may not "
            "work; try a smaller training.learning_rate"
        )
    if trainer.eval_dataset is not None and steps not in {row["step"] for row in logs if "eval_loss" in row}:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if args.should_save:
        recipe.save(output_dir)
        write_run_card(output_dir)
    say(f"saved to {output_dir}")
    return trainer


def check_recipe(
    checkpoint: str,
    recipe: Recipe,
    sections: tuple[str, ...],
    made: dict[str, Any],
    here: dict[str, Any],
    ignored: tuple[str, ...] = (),
) -> None:
    """Refuse a checkpoint that another recipe has made, by some of its sections; of `training` only `ORDER` counts.

    `made` and `here` are digests of contents, then and now, by the setting that names them: what has the same one may
    lie elsewhere. Settings that begin as one of `ignored` may differ.
    """
    ignored += tuple(f"{name}=" for name in here if here[name] == made.get(name))
    change = next((c for c in _changes(checkpoint, recipe, sections) if not c.startswith(ignored)), None)
    other = next((name for name in made if name in here and here[name] != made[name]), None)
    if change is None and other is not None:
        section, key = other.split(".")
        value = getattr(getattr(recipe, section), key)
        change = f"another content of {other}={value!r}, which has been written to since"
    if change is not None:
        raise ConfigError(f"{checkpoint}: made with {change}; change it back, or train to another training.output_dir")


def _weights_of(recipe: Recipe) -> dict[str, str]:
    """Digests of the weights that a run starts from, of those that lie in a folder, by their setting's name."""
    paths = {"model.path": recipe.model.path, "lora.path": recipe.lora.path}
    return {name: digest for name, path in paths.items() if path and (digest := weights_digest(path)) is not None}


def _changes(checkpoint: str, recipe: Recipe, sections: tuple[str, ...]) -> Iterator[str]:
    """What a recipe says of these sections where the checkpoint's own says something else, both in words."""
    try:
        before = yaml.safe_load((Path(checkpoint) / FILE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # made by the trainer without a recipe
    now = yaml.safe_load(recipe.to_yaml())
    for values in (before, now):  # a recipe holds what it sets of this section, and no more
        values["training"] = {key: values["training"].get(key, getattr(MemDLMConfig, key)) for key in ORDER}
    for section in sections:
        for key, value in now[section].items():
            made = before.get(section, {}).get(key, getattr(SECTIONS[section], key, None))  # new keys: their defaults
            if _place(made) != _place(value):
                yield f"{section}.{key}={made!r}, the recipe now says {value!r}"


def _place(value: Any) -> Any:
    """A path that leads to something as where it leads to; anything else as it is."""
    if isinstance(value, str) and (path := Path(value).expanduser()).exists():
        return str(path.resolve())
    return value


class _LastEvaluation(transformers.TrainerCallback):
    """Evaluates at the last step. Trackers end with the training, and would begin another run for what comes later."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.EPOCH:
            control.should_evaluate = True


class _Progress(ProgressCallback):
    """transformers' progress bar, with its time left, and logs a person can read along."""

    SHOWN = (*LOSSES, "nll", "eval_nll", "grad_norm", "train_loss")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or not state.is_world_process_zero or self.training_bar is None:
            return
        shown = [f"{name} {logs[name]:.4f}" for name in self.SHOWN if isinstance(logs.get(name), float)]
        if logs.get("nonfinite_samples"):
            shown.append(f"{logs['nonfinite_samples']} samples without memory (not finite)")
        if shown:
            self.training_bar.write(f"step {state.global_step:>5}  " + "  ".join(shown))
