"""The plan of `--dry-run` against what training really takes: bytes by torch's allocator, FLOPs by torch's counter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from measured import held_storage, measure, measure_rank, trainer_of
from processes import launch
from steps import OF_PROMPTS
from torch.utils.flop_counter import FlopCounterMode

from dllm_memdlm.backbones import config_of, load_model
from dllm_memdlm.config import ConfigError
from dllm_memdlm.training.planner import Plan, advice, make_plans, parse_memory
from dllm_memdlm.training.recipe import Recipe, build_recipe
from dllm_memdlm.versions import checkpoint_activations

LENGTH, RESPONSE, BATCH = 256, 64, 4
TABLE = "Peak memory of a process: planned and measured"
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
DIMENSIONS: dict[str, dict[str, Any]] = {
    "llada_moe": {"dense_intermediate_size": 384, "expert_intermediate_size": 128, "moe_layer_freq": [0, 1, 1, 1]}
    | {"shared_expert_intermediate_size": 128, **ROUTED},
    "llada2": {"intermediate_size": 384, "moe_intermediate_size": 128, "n_group": 2, "topk_group": 1, **ROUTED},
    "llama": {"intermediate_size": 384},
    "llada": {"intermediate_size": 384},
    "modernbert": {"intermediate_size": 384, "local_attention": 64, "num_key_value_heads": None},
}
COMMON = {"vocab_size": 1024, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def without_a_launcher(as_from_a_shell):
    """No variables of an earlier run."""


def recipe_of(
    kind: str, folder: Any, lora: float | None = None, memory: Any = True, layers: int = 2, **training: Any
) -> Recipe:
    """Every response token is masked, as a plan assumes. `lora`: its dropout. Half of the layers have fast weights."""
    steps = {"max_steps": 2, "per_device_train_batch_size": BATCH, "time_epsilon": 0.999, "bf16": False}
    quiet = {"logging_steps": 100, "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    memory = memory if isinstance(memory, dict) else {"enabled": memory}
    dimensions = COMMON | {"num_hidden_layers": layers} | DIMENSIONS[kind]
    dimensions = {name: size for name, size in dimensions.items() if size is not None}
    values = {
        "model": {"architecture": ARCHITECTURES[kind], "dtype": "float32", "dimensions": dimensions},
        "lora": {"enabled": lora is not None, "r": 16, "dropout": lora or 0.0},
        "data": {"dataset": "none.jsonl", "max_length": LENGTH},
        "memory": {"rank": 8, "alpha": 16, "layer_fraction": 0.5, **memory},
        "training": {**steps, **quiet, **training},
    }
    return build_recipe(values, str(folder / "run"))


def plan_of(recipe: Recipe, gpus: int = 1, device: str = "cpu") -> Plan:
    return make_plans(recipe, config_of(recipe.model), gpus, RESPONSE / LENGTH, device)[recipe.memory.enabled]


@pytest.fixture
def assert_within(request, record_property) -> Callable[[Plan, int, float], None]:
    """Compare a plan with a measured peak in bytes; both go into the table at the end."""

    def compare(plan: Plan, measured: int, tolerance: float, rank: str = "") -> None:
        error, row = plan.peak / measured - 1, request.node.name.removeprefix("test_the_peak_") + rank
        for column, size in (("planned, MiB", plan.peak), ("measured, MiB", measured)):
            record_property("table", (TABLE, row, column, f"{size / 2**20:.2f}"))
        record_property("table", (TABLE, row, "off", f"{error:+.1%}"))
        assert abs(error) <= tolerance, f"{error:+.1%}: {plan.peak:,} planned ({plan.at_peak}), {measured:,} measured"

    return compare


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora", "memory", "training"),
    [
        ("llada_moe", None, True, {"gradient_checkpointing": True, "bf16": True}),
        ("llada_moe", 0.05, True, {"gradient_checkpointing": True, "layers": 4}),
        ("llada2", 0.0, {"objective": "kl"}, {"gradient_accumulation_steps": 2}),
        ("llada2", None, {**OF_PROMPTS, "steps": 2, "window": LENGTH // 2}, {"gradient_checkpointing": True}),
        ("llama", None, {"layer_fraction": 1.0}, {"bf16": True}),
        ("llada2", None, True, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        ("llama", 0.0, False, {"gradient_checkpointing": True, "bf16": True}),
        ("llama", 0.0, {"kind": "full", "scope": "batch", "steps": 3}, {"gradient_checkpointing": True}),
    ],
)
def test_the_peak_is_what_training_takes(kind, lora, memory, training, tmp_path, assert_within):
    """Within 4 %; 15 % was asked for. Not planned: for a moment a dropout's mask, as MKL draws it, is integers."""
    recipe = recipe_of(kind, tmp_path, lora, memory, **training)
    plan = plan_of(recipe)
    assert_within(plan, measure(lambda: trainer_of(copy.deepcopy(recipe), RESPONSE)), 0.04)
    if "gradient_accumulation_steps" in training:  # gradients are there all the time
        assert plan.at_peak["gradients"] == plan.trainable * 4 and plan.tokens == 2 * BATCH * LENGTH


def test_the_peak_with_a_base_in_4_bit(tmp_path, assert_within):
    pytest.importorskip("bitsandbytes")
    recipe = recipe_of("llada2", tmp_path, lora=0.0, bf16=True, gradient_checkpointing=True)
    load_model(recipe.model, config_of(recipe.model)).save_pretrained(tmp_path / "base")
    model = {"path": str(tmp_path / "base"), "load_in_4bit": True}
    recipe = build_recipe({**recipe.values, "model": model}, str(tmp_path / "run"))
    assert_within(plan_of(recipe), measure(lambda: trainer_of(copy.deepcopy(recipe), RESPONSE)), 0.02)


def test_a_prompt_that_is_cut_counts_as_one_window(tmp_path):
    """However long a window is beside what the model sees."""
    plans = {}
    for window, visible in ((LENGTH // 4, None), (LENGTH // 4, 4), (8 * LENGTH, 4)):
        recipe = recipe_of("llama", tmp_path, memory={**OF_PROMPTS, "steps": 1, "window": window})
        plans[window, visible] = plan_of(replace(recipe, data=replace(recipe.data, visible=visible)))
    whole, short, long = plans.values()
    assert short.peak < long.peak and short.flops_memdlm < min(long.flops_memdlm, whole.flops_memdlm)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "lora", "low"),
    [("ddp", 0.05, False), ("zero2", None, True), ("zero3", 0.05, True), ("fsdp2", None, True)],
)
def test_the_peak_of_each_of_two_processes(engine, lora, low, tmp_path, assert_within):
    recipe = recipe_of("llada_moe", tmp_path, lora, layers=4, bf16=low, gradient_checkpointing=low, engine=engine)
    launch(2, tmp_path, measure_rank, recipe.values, RESPONSE, tmp_path / "peak")
    plan = plan_of(recipe, gpus=2)
    for rank in range(2):
        assert_within(plan, int((tmp_path / f"peak.{rank}").read_text()), 0.15, ", rank 1" * rank)


@pytest.mark.parametrize("lora", [None, 0.05])
def test_weights_gradients_and_optimizer_are_exact(lora, tmp_path):
    recipe = recipe_of("llada2", tmp_path, lora)
    trainer = trainer_of(copy.deepcopy(recipe), RESPONSE)
    trainer.train()
    plan, trainable = plan_of(recipe), [p for p in trainer.model.parameters() if p.requires_grad]
    states = [state for states in trainer.optimizer.state.values() for name, state in states.items() if name != "step"]
    assert plan.at_peak["weights"] == held_storage(trainer.model)
    assert plan.at_peak["optimizer"] == sum(state.nbytes for state in states)
    assert plan.largest["gradients"] == sum(p.nbytes for p in trainable)
    assert plan.parameters == sum(p.numel() for p in trainer.model.parameters())
    assert plan.trainable == sum(p.numel() for p in trainable)
    assert plan.fast == trainer.memory.fast_parameters
    experts = [module for module in trainer.memory.model.modules() if type(module).__name__ == "RoutedExperts"]
    idle = sum(p[2:].numel() for module in experts for p in module.parameters())
    assert experts and plan.active == plan.parameters - idle, "two of four experts"


aten = torch.ops.aten
#: By the shapes of their inputs. Grouped products: each row (or column, where the groups are on the inner side) is
#: multiplied once. Attention: two products of all queries with all keys, and five in the backward pass, which computes
#: the scores again; with fewer heads of keys than of queries too, which the formula of torch 2.11 refuses.
COUNTED: dict[Any, Callable[..., int]] = {
    aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * math.prod(q) * k[2],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: 10 * math.prod(q) * k[2],
}


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [("llada_moe", True), ("llada2", False), ("llama", True), ("llada", False), ("modernbert", True)],
)
def test_flops_are_those_that_torch_counts(kind, checkpointing, tmp_path):
    layers, memories = 3 if kind == "llada_moe" else 2, [{"enabled": on, "layer_fraction": 0.3} for on in (False, True)]
    settings = {"layers": layers, "gradient_checkpointing": checkpointing}
    recipes = [recipe_of(kind, tmp_path, 0.05, memory, **settings) for memory in memories]
    plan = plan_of(recipes[1])
    for recipe, planned in zip(recipes, (plan.flops_mdlm, plan.flops_memdlm), strict=True):
        trainer = trainer_of(copy.deepcopy(recipe), RESPONSE)
        checkpoint_activations(trainer.model, checkpointing)
        trainer.state.global_step, trainer.state.logging_steps = 5, 100  # this step is not logged
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
        assert planned == pytest.approx(counter.get_total_flops(), rel=0.002)
    assert 1.1 < plan.flops_memdlm / plan.flops_mdlm < 3
    if kind == "llada2":  # experts all at once
        elsewhere = plan_of(recipes[1], device="cuda")
        assert (elsewhere.flops_mdlm, elsewhere.flops_memdlm) == (plan.flops_mdlm, plan.flops_memdlm)


def test_more_gpus_share_what_the_engine_shares(tmp_path):
    one, ddp, zero2, zero3, fsdp2 = (
        plan_of(recipe_of("llama", tmp_path, engine=engine), gpus, "cuda")
        for engine, gpus in (("ddp", 1), ("ddp", 8), ("zero2", 8), ("zero3", 8), ("fsdp2", 8))
    )
    assert (one.engine, ddp.engine) == ("none", "ddp")
    assert ddp.tokens == 8 * one.tokens and ddp.flops_memdlm == 8 * one.flops_memdlm
    assert ddp.peak == one.peak + one.trainable * 4, "buckets for the gradients"
    assert zero2.at_peak["weights"] == one.at_peak["weights"]
    assert zero2.at_peak["optimizer"] == one.trainable * 12 // 8
    assert ddp.largest["gradients"] == 2 * one.largest["gradients"] == 2 * 4 * one.trainable
    for plan in (zero2, fsdp2):
        assert plan.largest["gradients"] == pytest.approx(4 * one.trainable / 8, rel=0.001)
    for plan in (zero3, fsdp2):
        assert plan.at_peak["weights"] == one.at_peak["weights"] // 8
    assert fsdp2.at_peak["optimizer"] == one.at_peak["optimizer"] // 8


def test_a_batch_has_as_many_fast_weights_as_samples(tmp_path):
    def plan(batch: int, **memory: Any) -> Plan:
        return plan_of(recipe_of("llada2", tmp_path, memory=memory, per_device_train_batch_size=batch), device="cuda")

    plans = [plan(1), plan(3)]
    assert plans[1].largest["fast weights"] == pytest.approx(3 * plans[0].largest["fast weights"], rel=0.001)
    assert plans[0].largest["fast weights"] >= 3 * 4 * plans[0].fast, "now, their gradients, and the next"
    shared = plan(3, scope="batch")
    assert shared.largest["fast weights"] == pytest.approx(plans[0].largest["fast weights"], rel=0.001)


def test_sizes_of_memory():
    for text, size in {"80GiB": 80 * 2**30, "141 GB": 141 * 10**9, "512mib": 2**29, "1.5TB": 15 * 10**11}.items():
        assert parse_memory(text) == size
    for text in ("80", "GiB", "-1GiB", "0GB", "80 Gb/s", ""):
        with pytest.raises(ConfigError, match=r"^--memory .*: expected a size such as 80GiB"):
            parse_memory(text)


def test_the_first_thing_to_change(tmp_path):
    plan = plan_of(recipe_of("llama", tmp_path))  # most of it activations

    def first(gpus: int = 1, weights: int = 0, **changes: Any) -> str:
        recipe = recipe_of("llama", tmp_path, **changes)
        batch, engine = recipe.training.per_device_train_batch_size, recipe.training.engine
        own = replace(plan, gpus=gpus, batch=batch, engine=engine, at_peak={**plan.at_peak, "weights": weights})
        return advice(own, recipe)

    assert first() == "training.gradient_checkpointing=true"
    smaller = "training.per_device_train_batch_size=2, with training.gradient_accumulation_steps=2"
    assert first(gradient_checkpointing=True) == smaller
    assert first(lora=0.05, gradient_checkpointing=True, per_device_train_batch_size=1) == "data.max_length=128"
    assert first(gpus=2, weights=2**40) == "training.engine=fsdp2"
    assert first(gpus=2, weights=2**40, engine="zero3") == "lora.enabled=true"


def test_at_worst_as_many_tokens_are_revealed_as_masked(tmp_path):
    recipes = [recipe_of("llama", tmp_path, memory={"targets": name}) for name in ("masked", "newly_revealed")]
    masked, revealed = map(plan_of, recipes)
    assert (revealed.flops_memdlm, revealed.peak) == (masked.flops_memdlm, masked.peak)
