"""The commands that a user types, on tiny models: train, resume, train a 4-bit copy's LoRA, generate, evaluate.

`python -m benchmarks.user_commands FOLDER [--cpu]` writes commands.json and commands.md after every command, and a log
of each. Exit code 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .report import Section, write

LIMIT = 150  #: seconds of one command


class Command(NamedTuple):
    """What is run, and what its line in the table says it is."""

    name: str
    arguments: list[str]
    run: Path | None = None  #: where it trains to
    line: str = ""  #: a word of the last line that says what came of it


def chains(folder: Path, cpu: bool) -> list[list[Command]]:
    """Commands of which each needs what the ones before it in its chain have made."""
    moe, packed, llada2 = folder / "moe", folder / "packed", folder / "llada2"
    steps = 4 if cpu else 20
    shared = [
        *(f"data.dataset={folder / 'rows.jsonl'}", "data.eval_size=16", "model.tokenizer_vocab_size=600"),
        *(f"training.max_steps={steps}", f"training.eval_steps={steps // 2}", f"training.save_steps={steps // 2}"),
        *("training.logging_steps=2", "training.disable_tqdm=true", "training.bf16=true"),
        f"training.use_cpu={str(cpu).lower()}",
    ]

    def train(recipe: str, run: Path, *more: str) -> list[str]:
        return ["dllm_memdlm.train", f"recipes/{recipe}.yaml", *shared, f"training.output_dir={run}", *more]

    lora = ("lora.enabled=true", "lora.r=8", "training.gradient_checkpointing=true", "training.learning_rate=1e-3")
    base = (f"model.path={moe}", "model.load_in_4bit=true", "model.dtype=bfloat16")
    ask = ["dllm_memdlm.generate", "--model", str(moe), "--prompt-file", str(folder / "text.txt")]
    ask += ["--question", "Who?", "--memory", "--max-new-tokens", "8"]
    evaluate = ["dllm_memdlm.evaluate", "run", "--tasks", "niah_single_1"]
    evaluate += ["--config", "recipes/eval/ruler_offline.yaml", "--samples", '{"niah_single_1": [0, 1]}']
    evaluate += ["--model_args", f"pretrained={llada2},memory=true,max_length=2048,num_to_transfer=8"]
    evaluate += ["--output_path", str(folder / "scores")]
    resumed = train("tiny_llada2", llada2, f"training.max_steps={steps * 3 // 2}", "--resume")
    return [
        [
            Command("train LLaDA-MoE in bfloat16", train("tiny_llada_moe", moe), moe),
            Command("train a LoRA on it in 4 bit", train("tiny_llada_moe", packed, *base, *lora), packed),
            Command("generate with memory", ask),
            Command("generate, a bfloat16 base with the adapter", [*ask, "--adapter", str(packed), "dtype=bfloat16"]),
        ],
        [
            Command("train LLaDA2.1 in bfloat16", train("tiny_llada2", llada2), llada2),
            Command("resume it", resumed, llada2),
            Command("lm_eval with memory", evaluate, line="  1024|"),
        ],
    ]


def write_data(folder: Path) -> None:
    """Rows to train on, each with a fact to be found in it, and a text to ask about."""
    draw = random.Random(0)
    words = [first + vowel + last for first in "klmnr" for vowel in "aeo" for last in "nst"]
    rows = []
    for _ in range(400):
        text, (name, value) = " ".join(draw.choices(words, k=60)), draw.sample(words, 2)
        question = f"{text}. The {name} is {value}. {text[:80]} What is the {name}?"
        rows.append(json.dumps({"instruction": question, "output": f"The {name} is {value}, as the text says."}))
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "text.txt").write_text(Path("README.md").read_text(encoding="utf-8")[:1500], encoding="utf-8")


def losses(run: Path) -> Iterator[str]:
    """What a run's log says, first → last."""
    logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
    for name in ("loss", "eval_loss", "eval_loss_memory_off"):
        values = [log[name] for log in logs if name in log]
        if values:
            yield f"{name} {values[0]:.3f} → {values[-1]:.3f}"
    without = sum(log.get("nonfinite_samples", 0) for log in logs)
    if without:
        yield f"{without} samples without memory (not finite)"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.user_commands")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpu", action="store_true", help="a few steps on a CPU")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    table = Section(title="What a user types", columns=["command", "exit code", "s", "what came of it"])
    lock = threading.Lock()

    def run(chain: list[Command]) -> bool:
        """Until one of them fails, which the next ones would build on."""
        for command in chain:
            log, start = folder / f"{command.name.replace(' ', '_')}.log", time.perf_counter()
            code: int | str = f"none after {LIMIT} s"
            with log.open("w") as out, log.with_suffix(".err").open("w") as err, suppress(subprocess.TimeoutExpired):
                line = [sys.executable, "-m", *command.arguments]
                code = subprocess.run(line, stdout=out, stderr=err, timeout=LIMIT).returncode
            printed = log.read_text(errors="replace")
            lines = [line for line in printed.splitlines() if line.strip() and command.line in line]
            said = ", ".join(losses(command.run)) if command.run and code == 0 else " ".join(lines[-1:])
            with lock:
                seconds = round(time.perf_counter() - start, 1)
                table.rows.append([command.name, code, seconds, " ".join(said.replace("|", " ").split())[:160]])
                write([table], "What a user types", {}, folder, "commands")
                print(*table.rows[-1], sep="  ", flush=True)
            if code != 0:
                print(printed[-3000:], log.with_suffix(".err").read_text(errors="replace")[-6000:], flush=True)
                return False
        return True

    with ThreadPoolExecutor() as pool:
        return 0 if all(pool.map(run, chains(folder, args.cpu))) else 1


if __name__ == "__main__":
    raise SystemExit(main())
