"""All that depends on the release of transformers, PEFT, accelerate or datasets, and the private parts that are used.

Nothing else asks for a version. transformers 4.57, and the others of its time, are dllm's.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

_SINCE_5 = int(transformers.__version__.partition(".")[0]) >= 5

#: Private parts of other libraries that are used, for want of a public way, each with its reason. When one of them has
#: moved, tests/test_versions.py says so; it also refuses those that are not listed here.
PRIVATE = {
    "transformers.Trainer._save_checkpoint": "a checkpoint is marked when it is whole, also one that a signal asks for",
    "transformers.Trainer._push_from_checkpoint": "the same: an upload begins after the marking",
    "transformers.Trainer._get_output_dir": "where checkpoints go: a hyperparameter search has a folder a trial",
    "transformers.Trainer._load_from_checkpoint": "FSDP2's adapters: accelerate restores their first part alone",
    "transformers.Trainer._load_best_model": "the same",
    "transformers.Trainer._get_train_sampler": "an order of examples that is the same after a resume",
    "transformers.Trainer._get_eval_sampler": "examples of similar lengths together",
    "transformers.TrainingArguments._n_gpu": "one GPU a process: replicas of nn.DataParallel would share fast weights",
    "transformers.PreTrainedModel._from_config": "random weights of a given class, made in their dtype",
    "transformers.PreTrainedModel._init_weights": "a router's own, under transformers' scheme",
    "transformers.PreTrainedModel._no_split_modules": "the layers that FSDP wraps",
    "transformers.PreTrainedModel._supports_sdpa": "which attention functions a model takes",
    "transformers.PreTrainedModel._supports_flash_attn": "the same",
    "transformers.PreTrainedModel._tied_weights_keys": "which weights are one",
    "transformers.PretrainedConfig._attn_implementation": "which attention function was chosen",
    "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref": "a model drawn whole under ZeRO-3",
    "peft.LoraConfig._register_custom_module": "a LoRA on layers that PEFT does not know: those of all experts",
    "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer": "that LoRA where its layer is",
    "torch.nn.Module._apply": "the planner's models without memory",
    "torch.nn.Module._backward_hooks": "an expert's own hooks are set aside while all experts run as one function",
    "torch.nn.Module._backward_pre_hooks": "whether anybody waits for a LoRA's own layers to be called",
    "torch.nn.Module._forward_hooks": "the same",
    "torch.nn.Module._forward_pre_hooks": "the same",
    "torch._subclasses.fake_tensor.FakeTensor": "the planner's tensors without memory",
    "torch._subclasses.fake_tensor.FakeTensorMode": "the same",
    "torch.utils._python_dispatch.TorchDispatchMode": "the planner sees every operator",
    "torch.utils._pytree.tree_iter": "and every tensor in its arguments",
    "torch.ops.aten.add.Tensor._overloadpacket": "which operator it is",
    "torch.ops.aten._grouped_mm": "the FLOPs of the experts",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "the FLOPs of attention",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "the same",
}


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' training arguments, with the words that recipes use in all releases."""

    warmup_ratio: float = field(default=0.0, metadata={"help": "Share of all steps that the warm-up takes."})
    group_by_length: bool = field(default=False, metadata={"help": "Put examples of similar lengths together."})

    def __post_init__(self) -> None:
        ratio = self.warmup_ratio
        if not 0 <= ratio <= 1:
            raise ValueError(f"warmup_ratio={ratio}: expected a number in [0,1]")
        if _SINCE_5:  # whose first releases let the ratio win over the steps
            self.warmup_ratio = None  # type: ignore[assignment]  # until transformers has looked
        strategy = getattr(self, "train_sampling_strategy", "random")
        if strategy not in ("random", "group_by_length"):
            raise ValueError(f"train_sampling_strategy={strategy!r}: expected random or group_by_length")
        self.group_by_length |= strategy == "group_by_length"
        for name in ("", "_kwargs"):  # the old names still work, with a warning
            if getattr(self, f"activation_checkpointing{name}", ...) is None:
                setattr(self, f"activation_checkpointing{name}", getattr(self, f"gradient_checkpointing{name}"))
        super().__post_init__()
        self.warmup_ratio = ratio

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the steps of the warm-up: `warmup_steps` where given, else the ratio of all."""
        if self.warmup_steps == 0:
            return math.ceil(num_training_steps * self.warmup_ratio)
        return super().get_warmup_steps(num_training_steps)


def tied_weights(same_as: dict[str, str]) -> Any:
    """Return a model's `_tied_weights_keys`, by the names of weights that may be one with others, and of those."""
    return same_as if _SINCE_5 else list(same_as)


#: What transformers 4, and the published config.json, call the rotary bases and the kinds of layers of a ModernBERT.
MODERNBERT = ("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers")


def modernbert_layers(config: PretrainedConfig) -> list[tuple[bool, float]]:
    """Return of each layer of a ModernBERT whether it attends to the nearest positions alone, and its rotary base.

    Raises:
        ValueError: rotary positions are scaled.
    """
    count = range(config.num_hidden_layers)
    if not _SINCE_5:
        scaling, bases = getattr(config, "rope_scaling", None), [config.global_rope_theta, config.local_rope_theta]
        near = [bool(index % config.global_attn_every_n_layers) for index in count]
    else:
        rope = [config.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding")]
        scaling = next((own for own in rope if own.get("rope_type", "default") != "default"), None)
        bases = [own["rope_theta"] for own in rope]
        near = [config.layer_types[index] == "sliding_attention" for index in count]
    if scaling is not None:
        raise ValueError(f"rope_scaling={scaling!r}: expected none")
    everywhere, nearby = bases
    return [(local, everywhere if nearby is None or not local else nearby) for local in near]


def config_values(values: dict[str, Any], config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Return what a config.json of either release holds, in the words of this config class.

    transformers 5 puts all about rotary positions under `rope_parameters`. Classes of 4.57, and the bundled ones, would
    keep that key without reading it, and turn positions by their default frequency.

    Raises:
        ValueError: those words have no way to say it.
    """
    if values.get("local_rope_theta", ...) is None:  # as 4.57 saves that there is one base; 5 does not know it
        values = {**values, "local_rope_theta": values.get("global_rope_theta")}
    if not inspect.signature(config_class.__init__).parameters.keys() & {"rope_theta", *MODERNBERT}:
        return values
    old = _old_rope(values)
    return {key: value for key, value in values.items() if key != "rope_parameters"} | old if old else values


def _old_rope(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary positions that transformers 5 has written, in the words of 4.

    Raises:
        ValueError: those are too few.
    """
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    if "full_attention" in rope:  # of a ModernBERT
        kinds = [kind == "full_attention" for kind in values.get("layer_types", ())]
        every = next((index for index, full in enumerate(kinds) if full and index), max(1, len(kinds)))
        both = [rope.get(f"{kind}_attention", {}) for kind in ("full", "sliding")]
        if kinds != [index % every == 0 for index in range(len(kinds))]:
            raise ValueError(f"layer_types={values['layer_types']}: expected a full_attention every so many layers")
        if any(own.get("rope_type", "default") != "default" for own in both):
            raise ValueError(f"rope_parameters={rope}: expected the default rope_type")
        return dict(zip(MODERNBERT, (*(own.get("rope_theta") for own in both), every), strict=True))
    names = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in names}
    scaled = scaling.get("rope_type", "default") != "default"
    return {key: rope[key] for key in names if key in rope} | ({"rope_scaling": scaling} if scaled else {})


def readable_by_both(folder: str | os.PathLike) -> None:
    """Say in a saved config.json and tokenizer_config.json what transformers 4.57 reads, where 5 has written them."""
    if not _SINCE_5:
        return
    for name, in_words_of_both in (("config.json", _both_configs), ("tokenizer_config.json", _both_tokenizers)):
        path = Path(folder) / name
        if path.is_file():
            values = in_words_of_both(json.loads(path.read_text(encoding="utf-8")))
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _both_configs(values: dict[str, Any]) -> dict[str, Any]:
    try:
        return values | _old_rope(values)
    except ValueError:
        return values


def _both_tokenizers(values: dict[str, Any]) -> dict[str, Any]:
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        known = PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
        named = {key: token for key, token in values.items() if key.endswith("_token") and key not in known}
        values["additional_special_tokens"] = values["extra_special_tokens"]
        values["extra_special_tokens"] = {key: token for key, token in named.items() if isinstance(token, str)}
    return values


def load_any_tokenizer(name: str, **settings: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub name that either release has saved.

    What transformers 5 remarks on the config.json beside it, of a model that it does not know, is not shown.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return transformers.AutoTokenizer.from_pretrained(name, **settings)
    except (AttributeError, ValueError) as error:  # a list of special tokens, or a class, that only 5 has
        said = {} if _SINCE_5 else _both_tokenizers(get_tokenizer_config(name))
        if "additional_special_tokens" not in said:
            raise
        backend = "TokenizersBackend" in str(error)
        loader = transformers.PreTrainedTokenizerFast if backend else transformers.AutoTokenizer
        special = {key: said[key] for key in ("extra_special_tokens", "additional_special_tokens")}
        return loader.from_pretrained(name, **special, **settings)
    finally:
        transformers.logging.set_verbosity(verbosity)


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what asking the hub ends with without network, or a right to: its own errors, its HTTP library's."""
    http = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]  # requests; since 1.0 httpx
    failed = http.RequestError if hasattr(http, "RequestError") else http.RequestException
    return HfHubHTTPError, LocalTokenNotFoundError, ConnectionError, failed


def cache_argument(layer: type[nn.Module]) -> str:
    """Return the name under which a decoder layer of transformers takes its part of the cache."""
    return "cache" if "cache" in inspect.signature(layer.forward).parameters else "past_key_values"


def checkpoint_activations(model: transformers.PreTrainedModel, enable: bool = True, **settings: Any) -> None:
    """Keep each layer's input alone for the backward pass, or all that it computes again. `settings` are torch's."""
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if enable:
        getattr(model, f"{name}_enable")({"use_reentrant": False, **settings})
    else:
        getattr(model, f"{name}_disable")()
