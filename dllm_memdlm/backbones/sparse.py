"""What LLaDA-MoE and LLaDA2.1 share: a decoder of sparse layers, its language-model head, its files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .expert_names import split_names
from .experts import ExpertLinear, PackedExpertLinear
from .layers import DecoderLayer, RMSNorm, rotary_embedding
from .moe import stack_experts
from .output import OutputLinear
from .stacking import experts_apart
from .staged import StagedForward


class SparseLayer(DecoderLayer):
    """A layer of attention, under the name `attention_name`, and the `parts` of a feed-forward network."""

    attention_name: str

    def __init__(self, config: Any, **parts: nn.Module) -> None:
        super().__init__()
        for name, module in parts.items():
            setattr(self, name, module)
        for name in self.norms:
            setattr(self, name, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def attended(self, x: Tensor, *context: Any) -> Tensor:
        return getattr(self, self.attention_name)(x, *context)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class SparseDecoder(nn.Module):
    """Embeddings, layers and the last norm: `model` of a SparseModel of this class."""

    def __init__(self, cls: type[SparseModel], config: Any) -> None:
        super().__init__()
        setattr(self, cls.embeddings_name, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(cls.layer_class(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config)


class SparseModel(StagedForward, PreTrainedModel):
    """A language model with routed experts: tensors of all of them in memory, a matrix an expert in files."""

    layer_class: Callable[[Any, int], SparseLayer]
    embeddings_name: str
    layers_take_queries = True
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = SparseDecoder(type(self), config)
        self.lm_head = OutputLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return getattr(self.model, self.embeddings_name)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        setattr(self.model, self.embeddings_name, value)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' method. Beside the model there is room for one projection of a layer's experts."""
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = split_names(kwargs["state_dict"])
        with experts_apart():
            loaded = super().from_pretrained(*args, **kwargs)
        stack_experts(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: dict | None = None, **kwargs: Any
    ) -> None:
        """As transformers' method. Raises ValueError for weights in 4 bit."""
        if any(isinstance(module, PackedExpertLinear) for module in self.modules()):
            raise ValueError("experts in 4 bit are not saved; load the model without load_in_4bit")
        whole = self.state_dict() if state_dict is None else state_dict
        parts = split_names(whole)  # copied to the host here: of views transformers would make copies on the device
        state_dict = {n: value if n in whole else value.to("cpu", copy=True) for n, value in parts.items()}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ExpertLinear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
