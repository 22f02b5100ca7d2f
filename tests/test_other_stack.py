"""Two stacks of libraries, today's and dllm's: the same numbers, and what one has saved the other reads.

Needs both virtual environments: `make venv` and `make venv STACK=dllm`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from small_run import write_base, write_recipe

from dllm_memdlm import train
from dllm_memdlm.inference.pretrained import load_pretrained

ROOT = Path(__file__).parents[1]
#: In both stacks with these commands: all weights from scratch, and adapters on the same base.
OTHER = ROOT / (".venv-dllm" if transformers.__version__.startswith("5.") else ".venv") / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OTHER.exists(), reason=f"needs {OTHER}"),
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning"),  # PEFT, of a newer one's config
]

PROMPT = torch.tensor([[1, 30, 31, 32, 33, 34, 35, 2, 2, 2]])


def elsewhere(code: str, *arguments: str) -> str:
    """What a script prints in the other stack."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [OTHER, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


TRAIN = """
import json, sys
from dllm_memdlm.train import main
assert all(main(arguments) == 0 for arguments in json.loads(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Folders of runs, by what was trained and where: `here` or `there`."""
    folder = tmp_path_factory.mktemp("stacks")
    recipe, found = write_recipe(folder), {}
    llama = folder / "llama.yaml"
    llama.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"model": LLAMA}))
    on_base = (*write_base(recipe, folder / "base"), "lora.enabled=true", "lora.r=4", "lora.dropout=0")
    commands: dict[str, list[list[str]]] = {"here": [], "there": []}
    for name, arguments in (("scratch", [recipe]), ("llama", [llama]), ("adapter", [recipe, *on_base])):
        for where, own in commands.items():
            found[name, where] = folder / f"{name}-{where}"
            own.append([*map(str, arguments), f"training.output_dir={found[name, where]}"])
    assert all(train.main(arguments) == 0 for arguments in commands["here"])
    elsewhere(TRAIN, json.dumps(commands["there"]))
    return found


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = {"architecture": "LlamaForCausalLM", "dimensions": SIZES | {"rope_theta": 500.0}, "tokenizer_vocab_size": 300}
KINDS = ("scratch", "llama", "adapter")


def losses(folder: Path) -> list[dict[str, Any]]:
    names = ("step", "loss", "eval_loss", "loss_memory_off", "inner_loss_1", "inner_loss_2", "grad_norm", "train_loss")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: log[name] for name in names if name in log} for log in history]


@pytest.mark.parametrize("kind", KINDS)
def test_both_stacks_train_alike(kind, runs):
    here, there = losses(runs[kind, "here"]), losses(runs[kind, "there"])
    assert len(here) == len(there) > 4
    for one, other in zip(here, there, strict=True):
        assert one.pop("loss", None) == pytest.approx(other.pop("loss", None), abs=6e-5)  # 4.57 keeps 4 digits
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_other_has_saved_is_read_as_our_own(kind, runs):
    one, other = (load_pretrained(str(runs[kind, where]), device="cpu") for where in ("here", "there"))
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    for name in ("mask_token_id", "eos_token_id", "pad_token_id", "eot_token_id", "all_special_ids", "chat_template"):
        assert getattr(one.tokenizer, name) == getattr(other.tokenizer, name), name
    assert (one.memory, one.right_shift_logits) == (other.memory, other.right_shift_logits)
    with torch.no_grad():
        torch.testing.assert_close(one.model(PROMPT).logits, other.model(PROMPT).logits, rtol=1e-4, atol=1e-4)


READ = """
import json, sys, torch
from dllm_memdlm.inference.pretrained import load_pretrained
from dllm_memdlm.train import main
torch.set_num_threads(1)
prompt, *folders = map(json.loads, sys.argv[1:-1])
for folder in folders:
    torch.save(load_pretrained(folder, device="cpu").model(torch.tensor(prompt)).logits.detach(), folder + "/logits.pt")
assert main(json.loads(sys.argv[-1])) == 2
"""


def test_what_we_have_saved_the_other_reads_but_a_run_goes_on_in_its_own_stack_alone(runs, capsys):
    recipe, folders = str(runs["scratch", "here"].parent / "tiny.yaml"), [runs[kind, "here"] for kind in KINDS]
    here, there = ([recipe, f"training.output_dir={runs['scratch', where]}", "--resume"] for where in ("here", "there"))
    told = elsewhere(READ, *map(json.dumps, (PROMPT.tolist(), *map(str, folders), here)))
    for folder in folders:
        own = load_pretrained(str(folder), device="cpu").model(PROMPT).logits
        torch.testing.assert_close(torch.load(folder / "logits.pt"), own.detach(), rtol=1e-5, atol=1e-5)
    assert train.main(there) == 2
    for text in (capsys.readouterr().err, told):
        assert "checkpoint-4: made with transformers " in text and "; resume with that release, or start" in text
        assert "Traceback" not in text
