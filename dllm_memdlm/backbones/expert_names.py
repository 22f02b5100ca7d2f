"""Names of experts' weights: tensors of all experts in memory, a matrix an expert in files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PROJECTION = rf"(?:{'|'.join(PROJECTIONS)})(?:\..+)?"
_STACKED = re.compile(rf"((?:.+\.)?experts\.)({_PROJECTION})")
_APART = re.compile(rf"((?:.+\.)?experts\.)(\d+)\.({_PROJECTION})")


def is_stacked(name: str) -> bool:
    """Whether a parameter of this name is of all experts of a layer."""
    return _STACKED.fullmatch(name) is not None


def split_name(name: str, experts: int) -> list[str]:
    """What files call a layer, or a tensor, of all experts: `experts.up_proj` is `experts.0.up_proj` and so on."""
    found = _STACKED.fullmatch(name)
    assert found is not None, name
    return [f"{found[1]}{number}.{found[2]}" for number in range(experts)]


def pattern_of(path: str) -> str:
    """A regular expression of what files call a layer, or a layer of all experts."""
    found = _STACKED.fullmatch(path)
    return re.escape(path) if found is None else rf"{re.escape(found[1])}\d+\.{re.escape(found[2])}"


def split_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with a tensor an expert, as in files. Those of one layer are views of one tensor."""
    names: dict[str, Tensor] = {}
    for name, value in state.items():
        names |= zip(split_name(name, len(value)), value, strict=True) if is_stacked(name) else [(name, value)]
    return names


def stack_names(state: Mapping[str, Tensor], experts: int | None = None) -> dict[str, Tensor]:
    """The other way round. Where not all of so many experts are there, they are left as they are."""
    names: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        found = _APART.fullmatch(name)
        if found is None:
            names[name] = value
        else:
            parts.setdefault(found[1] + found[3], {})[int(found[2])] = value
    for name, of in parts.items():
        if len(of) == max(of) + 1 == (experts or len(of)):
            names[name] = torch.stack([of[number] for number in range(len(of))])
        else:
            names |= {split_name(name, max(of) + 1)[number]: value for number, value in of.items()}
    return names


@torch.no_grad()
def stack_on_loading(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook for `load_state_dict` of RoutedExperts, which takes a tensor an expert, too.

    A file of a sharded checkpoint may have some experts of a layer only. Those are put in place at once.
    """
    own = stack_names({name: state.pop(name) for name in list(state) if name.startswith(prefix)}, len(module))
    there = module.state_dict(prefix=prefix)
    if any("lora_" in name and name not in there for name in own) and not any("lora_" in name for name in there):
        raise ValueError("an adapter on experts, whose layers PEFT has not found: use backbones.load_adapter")
    for name in list(own):
        found = _APART.fullmatch(name)
        whole = None if found is None else there.get(found[1] + found[3])
        if found and whole is not None and whole.shape[1:] == own[name].shape and int(found[2]) < len(whole):
            whole[int(found[2])].copy_(own.pop(name))
    state.update(own)
