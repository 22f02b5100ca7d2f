"""Runs that are killed again and again, and resumed, end at the weights of one that was never stopped, bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import small_run
import torch
from processes import Launch, launch

from dllm_memdlm.train import main
from dllm_memdlm.training.checkpoints import CONTENTS, last_checkpoint

#: LoRA dropout and memory dropout draw random numbers, accumulated batches end epochs in the middle of a step, and
#: examples of several lengths are sorted: whatever a resumed run could get wrong.
SETTINGS = (
    *("training.save_steps=1", "training.save_total_limit=2", "training.eval_steps=15"),
    *("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2", "lora.dropout=0.3"),
    *("training.group_by_length=true", "lora.enabled=true", "lora.r=4"),
)
#: Processes, kills and settings, by the name in the table; of runs of 40 steps.
KINDS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "one process": (1, 8, ()),
    "DDP": (2, 8, ("training.engine=ddp",)),
    "ZeRO-1": (2, 2, ("training.engine=zero1",)),
    "ZeRO-2": (2, 8, ("training.engine=zero2",)),
    "ZeRO-3": (2, 2, ("training.engine=zero3",)),
    "FSDP2": (2, 2, ("training.engine=fsdp2",)),
    "FSDP2, all weights": (2, 2, ("training.engine=fsdp2", "lora.enabled=false")),
}
#: Kills and steps in every `make test`; the others run in `make soak`.
SHORT = {"one process": (2, 18)}
ROWS = [{"instruction": "?" * (5 + 3 * i % 20), "output": chr(97 + i) * (6 + i % 4)} for i in range(19)]
TABLE = "Runs killed with SIGKILL and resumed, against one that was never stopped"


def train(recipe: str, settings: tuple[str, ...]) -> None:
    assert main([recipe, *settings, "--resume", "--debug"]) == 0


def last_step(folder: Path) -> int:
    checkpoint = last_checkpoint(folder)
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0


def saving(folder: Path) -> bool:
    """Whether there is a checkpoint that is not whole."""
    return any(not (path / CONTENTS).exists() for path in folder.glob("checkpoint-*"))


def killed_run(recipe: Path, folder: Path, count: int, settings: tuple[str, ...], kills: int, seed: int) -> int:
    """A run that is killed `kills` times after its next checkpoint: anywhere, or in the save that follows.

    Returns how many kills left an unfinished checkpoint.
    """
    while_saving, rng = 0, random.Random(seed)
    for number in range(kills):
        before = last_step(folder)
        running = Launch(count, folder / f"logs{number}", train, str(recipe), settings)
        while running.alive() and last_step(folder) <= before:
            time.sleep(0.005)
        while running.alive() and number % 2 and not saving(folder):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02 if number % 2 else 0.2))
        alive = running.alive()
        running.kill()
        assert alive, f"it ended before kill {number + 1}: {running.logs[0].read_text()[-2000:]}"
        while_saving += saving(folder)
    launch(count, folder / "logs", train, str(recipe), settings)
    return while_saving


@pytest.mark.parametrize(
    ("kind", "kills", "steps"),
    [
        *((kind, *short) for kind, short in SHORT.items()),
        *(pytest.param(kind, KINDS[kind][1], 40, marks=pytest.mark.soak) for kind in KINDS),
    ],
)
def test_killed_runs_end_at_the_same_bits(kind, kills, steps, tmp_path, record_property):
    count, _, own = KINDS[kind]
    recipe = small_run.write_recipe(tmp_path, rows=ROWS)
    settings = (*SETTINGS, *own, f"training.max_steps={steps}")
    if "lora.enabled=false" not in own:
        settings += small_run.write_base(recipe, tmp_path / "base")
    straight, again = tmp_path / "straight", tmp_path / "again"
    launch(count, straight / "logs", train, str(recipe), (*settings, f"training.output_dir={straight}"))
    seed = random.randrange(1 << 30)  # another moment every time; a failure tells which
    settings = (*settings, f"training.output_dir={again}")
    while_saving = killed_run(recipe, again, count, settings, kills, seed)

    expected, actual = map(small_run.trained_weights, (straight, again))
    assert expected.keys() == actual.keys()
    off = max((actual[name] - expected[name]).abs().max().item() for name in expected)
    record_property("table", (TABLE, kind, "kills", str(kills)))
    record_property("table", (TABLE, kind, "of which in a save", str(while_saving)))
    record_property("table", (TABLE, kind, "largest difference of a weight", f"{off:g}"))
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == [], f"seed {seed}"
    losses = [[log["loss"] for log in small_run.logs_of(run) if "loss" in log] for run in (straight, again)]
    assert len(losses[0]) == steps and losses[0] == losses[1], f"seed {seed}"
    assert not saving(again)
