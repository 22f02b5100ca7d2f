"""Fast weights φ: plain float32 tensors beside the model, and the SGD step on them.

A dense layer's tensors are [S, rows, columns], a routed expert layer's [E, S, rows, columns]. S is the number of
samples (1 if they share), E that of experts. So the last two dimensions are always one tensor of the paper.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..backbones.site_weights import SiteShape, SiteWeights
from ..config import ConfigError, MemoryConfig
from . import noise

#: What a file of fast weights calls itself.
FORMAT = "memdlm-fast-weights"


@dataclass
class FastWeights:
    """All fast weights of a batch: `{site}.A` and `{site}.B`, or `{site}.delta`, and the scaling α/r."""

    tensors: dict[str, Tensor]
    scaling: float

    @classmethod
    def initial(
        cls, sites: Iterable[SiteShape], config: MemoryConfig, keys: Tensor, device: torch.device
    ) -> FastWeights:
        """Make φ0: A is Kaiming-uniform (a = √5), B or the difference is zero, so the model is as without them.

        keys [S] int64: A of set i is a function of keys[i] alone, on every device.
        """
        sites, tensors = list(sites), {}
        keys = noise.stream_keys(keys.to(device)[:, None], noise.INITIAL + torch.arange(len(sites), device=device))
        for number, site in enumerate(sites):
            experts = () if site.experts is None else (site.experts,)
            for name, (rows, columns) in site.tensors(config).items():
                if name == "A":
                    draws = noise.uniform_of(keys[:, number], math.prod(experts) * rows * columns)
                    draws = draws.view(len(keys), *experts, rows, columns).sub_(0.5).mul_(2 * columns**-0.5)
                    value = draws.movedim(0, -3).contiguous()
                else:
                    value = torch.zeros(*experts, len(keys), rows, columns, device=device)
                tensors[f"{site.name}.{name}"] = value
        return cls(tensors, config.scaling)

    @property
    def samples(self) -> int:
        """S, sets of fast weights."""
        return next(iter(self.tensors.values())).shape[-3]

    def site(self, name: str) -> SiteWeights:
        """Return the tensors of one site. Raises KeyError if it has none."""
        if f"{name}.delta" in self.tensors:
            return SiteWeights(None, self.tensors[f"{name}.delta"], self.scaling)
        return SiteWeights(self.tensors[f"{name}.A"], self.tensors[f"{name}.B"], self.scaling)

    def norm(self) -> Tensor:
        """Return the size of φ [S]: the Frobenius norm of all that it adds to a sample's layers."""
        names = dict.fromkeys(name.rpartition(".")[0] for name in self.tensors)
        squares = [self.site(name).squared_norm().view(-1, self.samples) for name in names]
        return torch.cat(squares).sum(0).clamp_min(0).sqrt()

    def leaves(self) -> FastWeights:
        """Return the same values as leaves of a new graph."""
        return FastWeights({k: v.detach().requires_grad_() for k, v in self.tensors.items()}, self.scaling)

    def keep(self, samples: Tensor) -> FastWeights:
        """Return φ for the samples where `samples` [S] bool holds; B or the difference is zero for the others."""
        kept = samples[:, None, None]
        tensors = {k: v if k.endswith(".A") else torch.where(kept, v, 0) for k, v in self.tensors.items()}
        return FastWeights(tensors, self.scaling)

    def select(self, samples: list[int]) -> FastWeights:
        """Return φ of these samples, in this order; one may be named more than once."""
        return FastWeights({k: v[..., samples, :, :] for k, v in self.tensors.items()}, self.scaling)

    @classmethod
    def stack(cls, parts: list[FastWeights]) -> FastWeights:
        """Join the samples of all parts, one after the other."""
        names = parts[0].tensors
        return cls({k: torch.cat([part.tensors[k] for part in parts], dim=-3) for k in names}, parts[0].scaling)

    def save(self, path: str | os.PathLike[str], header: dict[str, Any] | None = None) -> None:
        """Write a safetensors file; `header`, what they belong to, goes into its metadata as JSON."""
        metadata = {"format": FORMAT, "scaling": repr(self.scaling), "header": json.dumps(header or {})}
        save_file({k: v.detach().contiguous() for k, v in self.tensors.items()}, path, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> tuple[FastWeights, dict[str, Any]]:
        """Read what `save` wrote: the fast weights and their header. Raises ConfigError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError("the tensors of something else")
                tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            header = json.loads(metadata["header"])
            if not tensors or min(tensor.dim() for tensor in tensors.values()) < 3 or not isinstance(header, dict):
                raise ValueError("no fast weights, or no header")
            return cls(tensors, float(metadata["scaling"])), header
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            expected = "expected a file that --save-memory has written"
            raise ConfigError(f"{path}: not a fast-weight snapshot ({error}); {expected}") from None


class InnerStep(NamedTuple):
    """One inner step, for the log. Its tensors may still be under way on the device."""

    loss: Tensor  #: of each set of fast weights, before the step [S]
    grad_norm: Tensor  #: over all its tensors, before clipping [S]
    finite: Tensor  #: whether both are finite [S] bool
    tokens: Tensor | None = None  #: tokens that the loss is the mean of [S]; of none it says nothing


def sgd_step(
    fast: FastWeights, gradients: dict[str, Tensor], loss: Tensor, config: MemoryConfig
) -> tuple[FastWeights, InnerStep]:
    """Compute φ ← φ - lr · clip(g). A sample whose loss or gradient is not finite stays where it is.

    Args:
        fast: current values.
        gradients: of the same names and shapes.
        loss: inner loss of each set [S].
        config: `clip` says what is clipped: `local` every matrix by its own norm, `global` each sample's matrices by
            their common norm, `none`; `grad_clip` the largest norm that is left, 0 for none.
    """
    norms = [torch.linalg.vector_norm(g, dim=(-2, -1)) for g in gradients.values()]  # [(E,) S] each
    rows = torch.cat([norm.view(-1, fast.samples) for norm in norms])  # one of each matrix
    total = torch.linalg.vector_norm(rows, dim=0)
    finite = torch.isfinite(loss) & torch.isfinite(total)
    rates = torch.full_like(rows, config.inner_lr)
    if config.clip != "none" and config.grad_clip > 0:
        rates = rates * (config.grad_clip / ((rows if config.clip == "local" else total) + 1e-12)).clamp(max=1.0)
    tensors, kept = {}, finite[:, None, None]
    parts = rates.split([norm.numel() // fast.samples for norm in norms])
    for (name, gradient), norm, rate in zip(gradients.items(), norms, parts, strict=True):
        before = fast.tensors[name].detach()
        after = torch.addcmul(before, gradient, rate.view_as(norm)[..., None, None], value=-1)
        tensors[name] = torch.where(kept, after, before)
    return FastWeights(tensors, fast.scaling), InnerStep(loss.detach(), total, finite)
