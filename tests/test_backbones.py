"""The backbones' fast paths against the plain ones: stages, sorted experts, packing, checkpointing; dllm's models."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from conftest import (
    COMMON,
    DIMENSIONS,
    KINDS,
    assert_close_relative,
    make_trainer,
    scale_up,
    take_gradients,
    tiny,
    tiny_config,
    train_batch,
)
from naive import loop_over_experts, plain_experts
from torch import Tensor, nn

from dllm_memdlm.backbones import adopt, model_class, staged_backbone, with_lora
from dllm_memdlm.backbones.layers import GatedMLP, take
from dllm_memdlm.backbones.moe import RoutedExperts
from dllm_memdlm.config import LoraConfig, MemoryConfig
from dllm_memdlm.fast_weights import FastWeights, SiteWeights
from dllm_memdlm.grouped import grouped_linear, grouped_linear_loop
from dllm_memdlm.memory import ParametricMemory

BATCH, LENGTH = 3, 12
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def tokens() -> Tensor:
    return torch.randint(3, 48, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def mask_of(form: str, dtype: torch.dtype) -> Tensor | None:
    """An attention mask; every query sees at least one key."""
    padding = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    padding[1, 8:] = 0
    padding[2, :2] = 0
    block_causal = (torch.arange(LENGTH)[:, None] // 4 >= torch.arange(LENGTH)[None] // 4).expand(BATCH, 1, -1, -1)
    additive = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=dtype).masked_fill(~block_causal, torch.finfo(dtype).min)
    return {
        "none": None,
        "2-D": padding,
        "2-D bool": padding.bool(),
        "4-D bool": block_causal,
        "4-D additive": additive,
        "4-D of zeros": torch.zeros(1, 1, LENGTH, LENGTH, dtype=dtype),
    }[form]


MASKS = ("none", "2-D", "2-D bool", "4-D bool", "4-D additive", "4-D of zeros")


# === stages ===


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", MASKS)
def test_trunk_and_head_are_the_full_forward(kind, attention, form):
    model, mask = tiny(kind, torch.float64, attention=attention), mask_of(form, torch.float64)
    full = model(input_ids=tokens(), attention_mask=mask).logits
    positions = torch.tensor([[0, 3, 11], [7, 2, 2], [5, 4, 9]])  # in no order, with a repetition
    for boundary in (0, 1, 2):
        trunk = model(stage="trunk", input_ids=tokens(), attention_mask=mask, boundary=boundary).hidden
        out = model(stage="head", hidden=trunk, boundary=boundary, positions=positions, attention_mask=mask)
        # routers compute in float32, and round what differs in the last digit
        torch.testing.assert_close(out.logits, take(full, positions), rtol=1e-6, atol=1e-6)
        everywhere = model(stage="head", hidden=trunk, boundary=boundary, attention_mask=mask)
        torch.testing.assert_close(everywhere.logits, full, rtol=1e-6, atol=1e-6)
        bare = model(
            stage="head", hidden=trunk, boundary=boundary, positions=positions, attention_mask=mask, project=False
        )
        assert bare.logits is None and torch.equal(bare.hidden, out.hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_say_the_same_in_every_form(kind):
    model = tiny(kind)
    model.eval()

    def logits(form: str) -> Tensor:
        return model(input_ids=tokens(), attention_mask=mask_of(form, torch.float32)).logits

    torch.testing.assert_close(logits("2-D"), logits("2-D bool"))
    torch.testing.assert_close(logits("4-D bool"), logits("4-D additive"))
    torch.testing.assert_close(logits("none"), logits("4-D of zeros"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits("none"), logits("2-D"), atol=1e-2)
    assert not torch.allclose(logits("none"), logits("4-D bool"), atol=1e-2)
    shorter = model(input_ids=tokens()[1:2, :8]).logits  # hidden padding is as no padding
    torch.testing.assert_close(logits("2-D")[1:2, :8], shorter, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_attention_is_sdpa(kind):
    results = [tiny(kind, attention=attention)(input_ids=tokens()).logits for attention in ("sdpa", "eager")]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_give_the_gradients_of_the_full_forward(kind):
    model = tiny(kind, torch.float64)
    positions = torch.tensor([[0, 3, 11], [7, 2, 5], [5, 4, 9]])
    take(model(input_ids=tokens()).logits, positions).square().sum().backward()
    full = take_gradients(model)
    trunk = model(stage="trunk", input_ids=tokens(), boundary=2).hidden
    model(stage="head", hidden=trunk, boundary=2, positions=positions).logits.square().sum().backward()
    staged = take_gradients(model)
    for name, gradient in full.items():
        assert_close_relative(staged[name], gradient, 1e-6, name)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_may_stand_in_for_tokens(kind):
    model = tiny(kind)
    embedded = model.get_input_embeddings()(tokens())
    expected = model(input_ids=tokens()).logits
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, expected)
    first = model(stage="trunk", inputs_embeds=embedded, boundary=1).hidden
    torch.testing.assert_close(model(stage="head", hidden=first, boundary=1).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_can_be_given(kind):
    model = tiny(kind)
    reordered = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=tokens()).logits[:, reordered]
    out = model(input_ids=tokens()[:, reordered], position_ids=reordered[None]).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


# === routed experts ===


def experts_of(dtype: torch.dtype, lora: bool, count: int = 6, hidden: int = 16, width: int = 8) -> RoutedExperts:
    """Routed experts, of which LoRA leaves nothing but its own weights to be trained."""
    torch.manual_seed(0)
    experts = RoutedExperts(GatedMLP(hidden, width, "silu") for _ in range(count)).to(dtype)
    if lora:
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down_proj"])
        peft.inject_adapter_in_model(config, experts)
        for name, parameter in experts.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    return experts


def routing(dtype: torch.dtype, used: list[int], top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 7, 16, generator=generator).to(dtype)
    orders = torch.stack([torch.randperm(len(used), generator=generator)[:top_k] for _ in range(14)])
    weights = torch.rand(2, 7, top_k, generator=generator).to(dtype)
    return x, torch.tensor(used)[orders].view(2, 7, top_k), weights


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("used", [[0, 1, 2, 3, 4, 5], [1, 4]], ids=["all", "few"])
def test_sorted_experts_are_a_loop_over_experts(dtype, lora, used):
    experts = experts_of(dtype, lora)
    results = []
    for run in (experts, lambda *arguments: loop_over_experts(experts, *arguments)):
        x, chosen, weights = routing(dtype, used)
        x.requires_grad_()
        weights.requires_grad_()
        output = run(x, chosen, weights)
        output.square().sum().backward()
        gradients = {name: p.grad for name, p in experts.named_parameters() if p.requires_grad}
        results.append((output, x.grad, weights.grad, gradients))
        experts.zero_grad()
    (ours, x, w, gradients), (plain, x_plain, w_plain, plain_gradients) = results
    assert ours.dtype == dtype
    assert_close_relative(ours, plain, TOLERANCE[dtype], "output")
    assert_close_relative(x, x_plain, TOLERANCE[dtype], "gradient of the input")
    assert_close_relative(w, w_plain, TOLERANCE[dtype], "gradient of the weights")
    for name, gradient in gradients.items():
        assert gradient is not None, f"{name}: no gradient"
        number = int(name.split(".")[0])
        if number in used:
            assert_close_relative(gradient, plain_gradients[name], 2 * TOLERANCE[dtype], name)
        else:  # zeros, not None: every rank must have a gradient of everything
            assert not gradient.any() and plain_gradients[name] is None


@pytest.mark.parametrize("hidden", [16, 10])  # the kernel takes the first only
def test_widths_that_the_kernel_does_not_take(hidden):
    experts = experts_of(torch.float32, lora=False, hidden=hidden, width=6)
    x, chosen, weights = routing(torch.float32, [0, 2, 5])
    x = x[..., :hidden]
    assert_close_relative(experts(x, chosen, weights), loop_over_experts(experts, x, chosen, weights), 1e-5)


def test_disabled_and_merged_adapters_are_followed():
    experts = experts_of(torch.float32, lora=True)
    x, chosen, weights = routing(torch.float32, [0, 1, 2])
    layers = [module for module in experts.modules() if hasattr(module, "enable_adapters")]
    with_adapters = loop_over_experts(experts, x, chosen, weights).detach()
    for layer in layers:
        layer.enable_adapters(False)
    plain = loop_over_experts(experts, x, chosen, weights).detach()
    assert not torch.allclose(plain, with_adapters, atol=1e-2)
    assert_close_relative(experts(x, chosen, weights), plain, 1e-5)
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    assert_close_relative(experts(x, chosen, weights), with_adapters, 1e-5)
    for layer in layers:
        layer.unmerge()
    assert_close_relative(experts(x, chosen, weights), with_adapters, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_grouped_products_are_a_loop(dtype):
    torch.manual_seed(0)
    results = []
    offsets = torch.tensor([3, 3, 4, 9, 9], dtype=torch.int32)  # groups of 3, 0, 1, 5, 0 rows
    for function in (grouped_linear, grouped_linear_loop):
        x, weight = (torch.linspace(-1, 1, n).sin().to(dtype) for n in (9 * 16, 5 * 8 * 16))
        x, weight = x.view(9, 16).requires_grad_(), weight.view(5, 8, 16).requires_grad_()
        output = function(x, weight, offsets)
        output.square().sum().backward()
        results.append((output, x.grad, weight.grad))
    for ours, plain in zip(*results, strict=True):
        assert_close_relative(ours, plain, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["llada_moe", "llada2"])
def test_frozen_experts_are_packed_once(kind, tmp_path):
    model = tiny(kind, lora=True).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first = model(input_ids=tokens()).logits
    routed = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    for experts in routed:
        weights = [expert.up_proj.base_layer.weight for expert in experts]
        assert len({w.untyped_storage().data_ptr() for w in weights}) == 1, "not views of one buffer"
        assert len({w.data_ptr() for w in weights}) == len(weights)
        assert all(isinstance(w, nn.Parameter) and not w.requires_grad for w in weights)
    buffers = [experts._packed["up_proj"].data_ptr() for experts in routed]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, first)
    assert [experts._packed["up_proj"].data_ptr() for experts in routed] == buffers, "packed again"
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

    # weights loaded afterwards are seen, whether they are copied into place or take their place
    for assign in (False, True):
        other = tiny(kind, lora=True, seed=1 + assign).eval()
        model.load_state_dict(other.state_dict(), assign=assign)
        with torch.no_grad(), plain_experts(other):
            expected = other(input_ids=tokens()).logits
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(expected, first, atol=1e-2)
    with torch.no_grad():
        for expert in routed[0]:
            expert.gate_proj.base_layer.weight.mul_(2)
        with plain_experts(model):
            expected = model(input_ids=tokens()).logits
        torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)

    # another dtype, and a checkpoint
    with torch.no_grad():
        wide = model.double()(input_ids=tokens()).logits
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model(input_ids=tokens())
    merged = model.float().merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        expected = merged(input_ids=tokens()).logits
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llada_moe", "llada2"])
def test_trainable_experts_are_read_anew_at_every_step(kind):
    model = tiny(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        logits = model(input_ids=tokens()).logits
        with plain_experts(model), torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens()).logits, logits.detach(), rtol=1e-4, atol=1e-4)
        logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["llada_moe", "llada2"])
@pytest.mark.parametrize("lora", [False, True])
def test_experts_that_no_token_chose_have_a_gradient(kind, lora):
    count = 24 if kind == "llada2" else 20
    model = tiny(kind, lora=lora, num_experts=count)
    model(input_ids=tokens()[:1, :3]).logits.square().sum().backward()
    gradients = take_gradients(model)  # none missing
    zero = [name for name, g in gradients.items() if ".experts." in name and not g.any()]
    assert len(zero) > count


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fast_weights_of_experts_are_a_loop(samples, dtype):
    """Each (expert, sample) through its own low-rank pair."""
    experts = experts_of(dtype, lora=False)
    x, chosen, weights = routing(dtype, [0, 2, 3])
    shapes = {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}
    fast = {
        name: SiteWeights(torch.randn(6, samples, 8, i), torch.randn(6, samples, o, 8), 0.1)
        for name, (i, o) in shapes.items()
    }
    experts.fast.update(fast)
    ours = experts(x, chosen, weights)
    experts.fast.clear()

    def adding(down: Tensor, up: Tensor) -> Any:
        return lambda module, inputs, output: output + 0.1 * inputs[0] @ down.T @ up.T

    rows = []
    for b in range(2):
        s = b if samples > 1 else 0
        handles = [
            getattr(expert, name).register_forward_hook(adding(w.down[e, s].to(dtype), w.up[e, s].to(dtype)))
            for name, w in fast.items()
            for e, expert in enumerate(experts)
        ]
        rows.append(loop_over_experts(experts, x[b : b + 1], chosen[b : b + 1], weights[b : b + 1]))
        for handle in handles:
            handle.remove()
    assert_close_relative(ours, torch.cat(rows), TOLERANCE[dtype])


# === gradient checkpointing ===


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [True, 0.3])
def test_checkpointing_changes_nothing(kind, dropout, tokenizer, tmp_path):
    memory = MemoryConfig(rank=4, layer_fraction=0.4, inner_lr=10.0, grad_clip=0.2)
    results, recomputed = [], []
    for on in (False, True):
        model = tiny(kind, lora=dropout)
        trainer = make_trainer(model, tokenizer, tmp_path, memory, gradient_checkpointing=on)
        if on:
            assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": False}
            model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        staged_backbone(model).layers[0].post_attention_layernorm.register_forward_hook(count)
        torch.manual_seed(3)
        loss = trainer.compute_loss(model, train_batch(trainer))
        loss.backward()
        results.append((loss.item(), take_gradients(model)))
        recomputed.append(calls)
    assert recomputed == [2, 3], "the anchor's trunk should be computed again, and nothing else"
    (loss, gradients), (loss_on, gradients_on) = results
    assert loss_on == loss
    for name, gradient in gradients.items():
        assert_close_relative(gradients_on[name], gradient, 1e-6, name)


# === dllm's own definitions ===


def dllms(kind: str, config: dict[str, object]) -> nn.Module:
    """dllm's model of the same dimensions."""
    if kind == "llada_moe":
        from dllm.pipelines.llada.models.configuration_lladamoe import LLaDAMoEConfig
        from dllm.pipelines.llada.models.modeling_lladamoe import LLaDAMoEModelLM

        return LLaDAMoEModelLM(LLaDAMoEConfig(**config))
    from dllm.pipelines.llada21 import LLaDA2MoeConfig, LLaDA2MoeModelLM

    return LLaDA2MoeModelLM(LLaDA2MoeConfig(**config))


#: What the published configs say and our defaults do not, or the other way round.
AS_PUBLISHED = {
    "llada_moe": {
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "norm_topk_prob": None,
        "qk_layernorm": True,
        "num_key_value_heads": 4,
        "shared_expert_intermediate_size": None,
    },
    "llada2": {
        "rms_norm_eps": 1e-6,
        "use_bias": False,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
    },
}
DENSE_ATTRIBUTES = ("vocab_size", "hidden_size", "rope_theta", "partial_rotary_factor", "attention_dropout")


@pytest.mark.dllm
@pytest.mark.parametrize("kind", ["llada_moe", "llada2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bundled_models_are_dllms(kind, attention):
    ours_config = tiny_config(kind, **{k: v for k, v in AS_PUBLISHED[kind].items() if "dropout" not in k})
    shared = {name: getattr(ours_config, name) for name in DENSE_ATTRIBUTES}
    theirs_config = {**COMMON, **DIMENSIONS[kind], **shared, **AS_PUBLISHED[kind], "attn_implementation": attention}
    theirs = dllms(kind, theirs_config)
    torch.manual_seed(0)
    scale_up(theirs)
    ours_config._attn_implementation = attention
    ours = model_class(ours_config.architectures[0])(ours_config)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    for mode in ("train", "eval"):
        getattr(ours, mode)()
        getattr(theirs, mode)()
        with torch.no_grad():
            expected = theirs(input_ids=tokens()).logits
            torch.testing.assert_close(ours(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)
            assert expected.std() > 0.1
            forms = {"llada_moe": ["2-D"], "llada2": ["4-D bool", "4-D additive", "4-D of zeros"]}[kind]
            for form in forms:
                mask = mask_of(form, torch.float32)
                expected = theirs(input_ids=tokens(), attention_mask=mask).logits
                out = ours(input_ids=tokens(), attention_mask=mask).logits
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    theirs.load_state_dict(ours.state_dict())  # and the other way


# === fast weights through the stages and through the full forward ===


@pytest.mark.parametrize("kind", KINDS)
def test_fast_weights_act_alike_in_stages_and_in_full(kind):
    """What training adapts with stages, decoding reads with full forwards."""
    model = tiny(kind)
    memory = ParametricMemory(model, MemoryConfig(rank=4, layer_fraction=0.4), mask_token_id=2)
    fast = FastWeights.initial(memory.shapes, memory.config, torch.arange(BATCH), torch.device("cpu"))
    fast = FastWeights({name: torch.randn_like(v) * 0.2 for name, v in fast.tensors.items()}, fast.scaling)
    positions = torch.tensor([[0, 3, 11], [7, 2, 5], [5, 4, 9]])
    plain = model(input_ids=tokens()).logits
    with memory.holding(fast):
        full = model(input_ids=tokens()).logits
        head = memory.head(memory.trunk(tokens()), positions).logits
    torch.testing.assert_close(head, take(full, positions), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(full, plain, atol=0.1)


def test_lora_config_reaches_peft():
    model = with_lora(tiny("llama"), LoraConfig(r=3, alpha=6, dropout=0.25, target_modules=("q_proj",)))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 6, 0.25, {"q_proj"})


# === models that dllm built ===


@pytest.mark.dllm
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llada_moe", "llada2", "llama"])
def test_a_model_of_dllms_gets_our_forward(kind, lora):
    """The same parameters under the same names, the same logits and gradients; and stages, and sites for memory."""
    if kind == "llama":
        from dllm.pipelines.a2d import A2DLlamaConfig, A2DLlamaLMHeadModel

        model = A2DLlamaLMHeadModel(A2DLlamaConfig(**{**COMMON, **DIMENSIONS[kind]}))
    else:
        shared = {name: getattr(tiny_config(kind), name) for name in DENSE_ATTRIBUTES}
        model = dllms(kind, {**COMMON, **DIMENSIONS[kind], **shared, **AS_PUBLISHED[kind]})
    scale_up(model)
    if lora:
        model = with_lora(model, LoraConfig(r=4, dropout=0.0))
        scale_up(model)
    model.train()
    names = [name for name, _ in model.named_parameters()]
    before = {name: parameter for name, parameter in model.named_parameters()}

    def logits_and_gradients():
        model.zero_grad()
        logits = model(input_ids=tokens()).logits
        logits.square().mean().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None and p.grad.any()]

    logits, gradients = logits_and_gradients()
    adopt(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    again, gradients_again = logits_and_gradients()
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.1
    torch.testing.assert_close(gradients_again, gradients, rtol=1e-3, atol=1e-5)

    memory = ParametricMemory(model, MemoryConfig(rank=4, layer_fraction=0.3), mask_token_id=0)
    hidden = memory.trunk(tokens())
    positions = torch.arange(tokens().shape[1]).expand(len(tokens()), -1)
    torch.testing.assert_close(memory.head(hidden, positions).logits, again, rtol=1e-4, atol=1e-4)
    adopt(model)  # once is enough, and twice changes nothing
