"""The patches to dllm, on copies of an installed dllm: that they apply, and that each does what it claims.

The registry resolves our trainer; a plain install works; dllm's plain trainer takes our collator's noise.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import examples, make_tokenizer, make_trainer, scale_up, seq2seq, take_gradients
from fresh_python import printed, run
from patched_dllm import ALL, FOLDER, GIT, INSTALL, NOISE, PATCH, REGISTRY, apply, files, told, with_patches
from steps import OFF
from stock_models import a2d_llama
from torch import Tensor, nn

import dllm_memdlm
from dllm_memdlm.compat.dllm_api import DLLM_COMMIT, MDLMConfig, MDLMTrainer
from dllm_memdlm.training.example_ids import with_example_ids


def changes(patch: str) -> str:
    return (FOLDER / patch).read_text().partition("\n---\n")[2]


def test_the_readme_speaks_of_each_patch():
    assert sorted(path.name for path in FOLDER.iterdir()) == [*ALL, "README.md"]
    text = (FOLDER / "README.md").read_text()
    assert DLLM_COMMIT in text and all(f"[`{patch}`]({patch})" in text for patch in ALL)
    for name in ("register_trainer", "get_trainer", "_sample_noise"):
        assert name in text and any(f"def {name}(" in changes(patch) for patch in ALL)


@pytest.mark.dllm
@pytest.mark.parametrize("patches", [*([patch] for patch in ALL), ALL, ALL[::-1]], ids=[*ALL, "all", "all_reversed"])
def test_patches_apply(patches, unpatched, tmp_path):
    before, after = files(unpatched), []
    touched = {name for patch in patches for name in re.findall(r"^\+\+\+ b/(.*)", changes(patch), flags=re.MULTILINE)}
    for command in (GIT, PATCH):
        if shutil.which(command[0]):
            tree = shutil.copytree(unpatched, tmp_path / command[0])
            for patch in patches:
                done = apply(tree, patch, command)
                assert done.returncode == 0 and "offset" not in done.stdout, done.stdout + done.stderr
            after.append(files(tree))
            assert {name for name in after[-1] if after[-1][name] != before.get(name)} == touched
    assert after[1:] in ([], after[:1]), "both tools give the same"


def print_trainers() -> None:
    """What names lead to, before and after `register`, and what a name that is taken says."""
    from dllm.core import trainers

    def answer(function: Any, *args: Any, **named: Any) -> Any:
        try:
            return [f"{cls.__module__}.{cls.__qualname__}" for cls in function(*args, **named)]
        except ValueError as error:
            return str(error)

    early = answer(trainers.get_trainer, "memdlm")
    assert dllm_memdlm.register() and dllm_memdlm.register(), "twice is as good as once"
    ours = {"trainer": dllm_memdlm.MemDLMTrainer, "config": dllm_memdlm.MemDLMConfig}
    taken = answer(trainers.register_trainer, "mdlm", **ours)
    names = ("memdlm", "mdlm", "bd3lm", "dream", "editflow", "mdml")
    print(json.dumps([trainers.__file__, early, taken, *(answer(trainers.get_trainer, name) for name in names)]))


@pytest.mark.dllm
@with_patches((REGISTRY,), ALL)
def test_the_registry_resolves_memdlm(tree):
    place, early, taken, memdlm, mdlm, bd3lm, dream, editflow, misspelt = told(print_trainers, tree)
    assert Path(place).is_relative_to(tree)
    assert early == "Unknown trainer 'memdlm'. Available: ['bd3lm', 'dream', 'editflow', 'mdlm']"
    assert misspelt == "Unknown trainer 'mdml'. Available: ['bd3lm', 'dream', 'editflow', 'mdlm', 'memdlm']"
    assert taken == "Trainer 'mdlm' is already dllm.core.trainers.mdlm.MDLMTrainer"
    ours = (dllm_memdlm.MemDLMTrainer, dllm_memdlm.MemDLMConfig)
    assert memdlm == [f"{cls.__module__}.{cls.__qualname__}" for cls in ours]
    assert mdlm == [f"dllm.core.trainers.mdlm.MDLM{end}" for end in ("Trainer", "Config")]
    assert bd3lm == [f"dllm.core.trainers.bd3lm.BD3LM{end}" for end in ("Trainer", "Config")]
    assert dream == [f"dllm.pipelines.dream.trainer.DreamTrainer{end}" for end in ("", ".DreamConfig")]
    assert editflow == [f"dllm.pipelines.editflow.trainer.EditFlowTrainer{end}" for end in ("", ".EditFlowConfig")]


#: lm-eval and TRL, which dllm does not declare, are not there.
HIDING = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *args, **kwargs):
        return None if name.partition(".")[0] in ("lm_eval", "trl") else super().find_spec(name, *args, **kwargs)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder]
"""
#: But for the scripts in tools, which run when they are imported.
IMPORT_EVERYTHING = """
import importlib, json
from pathlib import Path
import dllm

root, names, missing = Path(dllm.__file__).parents[1], [], {}
for path in sorted(path for path in root.glob("dllm/**/*.py") if path.parent.name != "tools"):
    names.append(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
    try:
        importlib.import_module(names[-1])
    except ModuleNotFoundError as error:
        missing[names[-1]] = error.name
print(json.dumps([str(root), len(names), missing]))
"""
#: As attributes first: an import statement would set them.
RESOLVE = """
import json, sys
import dllm
early = [name for name in ("lm_eval", "trl") if name in sys.modules]
found = [dllm.core.eval.mdlm.MDLMEvalConfig, dllm.pipelines.rl.DiffuGRPOTrainer]
from dllm.core.eval import MDLMEvalHarness
from dllm.pipelines.rl import DiffuGRPOConfig
found += [MDLMEvalHarness, DiffuGRPOConfig]
print(json.dumps([early, [f"{cls.__module__}.{cls.__name__}" for cls in found], hasattr(dllm.core, "evil")]))
"""


def plain_install(tree: Path) -> Path:
    """The wheel of this tree, unpacked as pip does it."""
    build = shutil.copytree(tree, tree.parent / "build")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tree.parent))
    done = run("-m", "pip", "wheel", *options, str(build), PIP_DISABLE_PIP_VERSION_CHECK="1")
    if re.search("No module named pip|BackendUnavailable|invalid command 'bdist_wheel'", done.stderr):
        pytest.skip("needs pip and setuptools 70.1 to build a wheel")
    assert done.returncode == 0, done.stderr[-3000:]
    [wheel] = tree.parent.glob("dllm-*.whl")
    zipfile.ZipFile(wheel).extractall(tree.parent / "site")
    return tree.parent / "site"


@pytest.mark.dllm
@with_patches((INSTALL,))
def test_a_plain_install_works(tree):
    site = plain_install(tree)
    assert files(site / "dllm") == files(tree / "dllm")
    place, modules, missing = printed(run("-c", HIDING + IMPORT_EVERYTHING, paths=(site,)))
    assert place == str(site) and modules > 100
    assert {"dllm.core.eval": "lm_eval", "dllm.pipelines.rl": "trl"}.items() <= missing.items()
    for name, module in missing.items():
        assert module == ("trl" if ".rl" in name else "lm_eval" if ".eval" in name else None), name
    early, found, misspelt = printed(run("-c", RESOLVE, paths=(site,)))
    assert early == [] and misspelt is False
    harness, grpo = "dllm.core.eval.mdlm.MDLMEval", "dllm.pipelines.rl.grpo.trainer.DiffuGRPO"
    assert found == [f"{harness}Config", f"{grpo}Trainer", f"{harness}Harness", f"{grpo}Config"]


class SameNoise(MDLMTrainer):
    """As in the README of the patches."""

    def _sample_noise(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return inputs["noise_level"], inputs["anchor_mask"]


def a2d_model() -> nn.Module:
    torch.manual_seed(0)
    model = a2d_llama()
    scale_up(model)
    return model.train()


def dllms_trainer(trainer: type, config: type, model: nn.Module, shift: bool, collator: Any = None) -> Any:
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "eval_strategy": "no", "dataloader_pin_memory": False}
    options = {"remove_unused_columns": False, "per_device_train_batch_size": 3, "right_shift_logits": shift}
    return trainer(
        args=config("runs", **options, **quiet),
        model=model,
        train_dataset=with_example_ids(examples(6, prompt=0)),
        data_collator=collator or seq2seq(make_tokenizer()),
        processing_class=make_tokenizer(),
    )


def step(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.detach(), take_gradients(trainer.model)


def print_steps_on_given_noise() -> None:
    """dllm's own model and trainers, and our trainer without memory, on a batch of our collator."""
    from dllm.core.trainers import BD3LMConfig, BD3LMTrainer

    class SameBlocks(SameNoise, BD3LMTrainer):
        pass

    results = []
    for shift in (False, True):
        model, data = a2d_model(), examples(6, prompt=0)
        ours = make_trainer(copy.deepcopy(model), make_tokenizer(), Path("ours"), OFF, data, right_shift_logits=shift)
        kinds = ((SameNoise, MDLMConfig), (SameBlocks, BD3LMConfig), (MDLMTrainer, MDLMConfig))
        theirs, blocks, ignoring = (dllms_trainer(*kind, model, shift, ours.data_collator) for kind in kinds)
        batch, calls = next(iter(theirs.get_train_dataloader())), []
        model.register_forward_pre_hook(lambda *call, calls=calls: calls.append(sorted(call[2])), with_kwargs=True)
        (our_loss, our_gradients), state = step(ours, batch), torch.get_rng_state()
        loss, gradients = step(theirs, batch)
        step(blocks, batch)
        drawn = not torch.equal(state, torch.get_rng_state())
        off = [(gradients[name] - gradient).norm() / gradient.norm() for name, gradient in our_gradients.items()]
        losses = (our_loss, loss, step(ignoring, batch)[0])
        results.append([*(loss.item() for loss in losses), max(off).item(), drawn, calls])
    print(json.dumps(results))


@pytest.mark.dllm
@with_patches((NOISE,))
def test_given_noise_is_used_as_in_our_trainer(tree):
    plain = ["attention_mask", "input_ids"]
    for ours, theirs, ignored, gradients, drawn, calls in told(print_steps_on_given_noise, tree):
        assert theirs == pytest.approx(ours, rel=1e-6) and gradients < 3e-6
        assert abs(ignored - ours) > 0.01 * ours, "without the override other noise is drawn"
        assert not drawn
        assert calls == [plain, [*plain, "position_ids"], plain], "nothing else of the batch reaches the model"


def print_drawn_steps() -> None:
    """Loss, gradients and the generator after a step, of dllm's trainers as they are."""
    from dllm.core.trainers import BD3LMConfig, BD3LMTrainer

    results = []
    kinds = ((MDLMTrainer, MDLMConfig, False), (MDLMTrainer, MDLMConfig, True), (BD3LMTrainer, BD3LMConfig, False))
    for trainer_class, config, shift in kinds:
        trainer = dllms_trainer(trainer_class, config, a2d_model(), shift)
        batch = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(1)
        loss, gradients = step(trainer, batch)
        data = b"".join(tensor.numpy().tobytes() for tensor in (loss, *gradients.values(), torch.get_rng_state()))
        results.append([loss.item(), hashlib.sha256(data).hexdigest()])
    print(json.dumps(results))


@pytest.mark.dllm
@with_patches(ALL)
def test_drawn_noise_gives_the_same_bits(tree, unpatched):
    drawn = told(print_drawn_steps, tree)
    assert drawn == told(print_drawn_steps, unpatched)
    assert len({loss for loss, _ in drawn}) == len(drawn)
