"""The commands that a user types, on tiny models: train, resume, train a 4-bit copy's LoRA, generate, evaluate."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from .parts import ROOT, Part

SECONDS = 90  #: of one command


def chains(folder: Path, cpu: bool) -> list[list[Part]]:
    """Commands of which each needs what the ones before it in its chain have made, and their data."""
    moe, packed, llada2 = folder / "moe", folder / "packed", folder / "llada2"
    steps = 4 if cpu else 20
    write_data(folder)
    shared = [
        *(f"data.dataset={folder / 'rows.jsonl'}", "data.eval_size=8", "model.tokenizer_vocab_size=600"),
        *("training.per_device_train_batch_size=4", "training.per_device_eval_batch_size=4"),
        *(f"training.max_steps={steps}", f"training.eval_steps={steps // 2}", f"training.save_steps={steps // 2}"),
        *("training.logging_steps=2", "training.disable_tqdm=true", "training.bf16=true"),
        f"training.use_cpu={str(cpu).lower()}",
    ]

    def command(name: str, *words: str) -> Part:
        return Part(f"commands_{name}", SECONDS, [sys.executable, "-m", *words])

    def train(name: str, recipe: str, run: Path, *more: str) -> Part:
        words = [f"recipes/{recipe}.yaml", *shared, f"training.output_dir={run}", *more]
        return replace(command(name, "dllm_memdlm.train", *words), found=partial(losses, run))

    lora = ("lora.enabled=true", "lora.r=8", "training.gradient_checkpointing=true", "training.learning_rate=1e-3")
    base = (f"model.path={moe}", "model.load_in_4bit=true", "model.dtype=bfloat16")
    ask = ["dllm_memdlm.generate", "--model", str(moe), "--prompt-file", str(folder / "text.txt")]
    ask += ["--question", "Who?", "--memory", "--max-new-tokens", "8"]
    evaluate = ["dllm_memdlm.evaluate", "run", "--tasks", "niah_single_1"]
    evaluate += ["--config", "recipes/eval/ruler_offline.yaml", "--samples", '{"niah_single_1": [0, 1]}']
    evaluate += ["--model_args", f"pretrained={llada2},memory=true,max_length=2048,num_to_transfer=8"]
    evaluate += ["--gen_kwargs", "max_gen_toks=16", "--output_path", str(folder / "scores")]
    return [
        [
            train("train_llada_moe", "tiny_llada_moe", moe),
            train("train_4bit", "tiny_llada_moe", packed, *base, *lora),
            command("generate", *ask),
            command("generate_adapter", *ask, "--adapter", str(packed), "dtype=bfloat16"),
        ],
        [
            train("train_llada2", "tiny_llada2", llada2),
            train("resume", "tiny_llada2", llada2, f"training.max_steps={steps * 3 // 2}", "--resume"),
            replace(command("lm_eval", *evaluate), found=score),
        ],
    ]


def write_data(folder: Path) -> None:
    """Rows to train on, each with a fact to be found in it, and a text to ask about."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = [first + vowel + last for first in "klmnr" for vowel in "aeo" for last in "nst"]
    rows = []
    for _ in range(400):
        text, (name, value) = " ".join(draw.choices(words, k=60)), draw.sample(words, 2)
        question = f"{text}. The {name} is {value}. {text[:80]} What is the {name}?"
        rows.append(json.dumps({"instruction": question, "output": f"The {name} is {value}, as the text says."}))
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "text.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8")[:1500], encoding="utf-8")


def losses(run: Path, printed: str) -> str:
    """What a run's log says, first → last."""
    logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
    said = []
    for name in ("loss", "eval_loss", "eval_loss_memory_off"):
        values = [log[name] for log in logs if name in log]
        said += [f"{name} {values[0]:.3f} → {values[-1]:.3f}"] if values else []
    without = sum(log.get("nonfinite_samples", 0) for log in logs)
    return ", ".join([*said, *[f"{without} samples without memory (not finite)"] * bool(without)])


def score(printed: str) -> str:
    """The row of lm-eval's table that has one."""
    return " ".join(line for line in printed.splitlines() if "  1024|" in line).replace("|", " ")
