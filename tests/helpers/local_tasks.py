"""Tasks for lm-eval that need nothing but their own files, and how the tests run them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from saved_models import byte_tokenizer, save_model
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dllm_memdlm.evaluation.lm_eval_model import MemDLMEvalLM
from dllm_memdlm.inference.decoding import Decoder, memory_for
from dllm_memdlm.inference.pretrained import load_pretrained

NEW = 6  #: tokens of an answer
DOCUMENTS = [
    "Ada lives in the red house by the river, and Bob lives in the mill. ",
    "The train to Rome leaves at nine, the one to Oslo at ten past four. ",
]
QUESTIONS = ["Who lives by the river?", "Where is the mill?", "When does it leave?", "And to Oslo?", "Who?"]
#: Five documents with questions, an odd number; the first three about one document.
ROWS = [
    {"question": DOCUMENTS[i // 3] + question, "answer": f"Answer {i}.", "choices": ["Ada", "the mill", f"at {i}"]}
    for i, question in enumerate(QUESTIONS)
]
SHOTS = [{"question": f"Say {i}.", "answer": str(i), "choices": ["1", "2"]} for i in range(4)]

GREEDY = {"until": ["\n"], "max_gen_toks": NEW, "do_sample": False}
SAMPLED = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}


def task(name: str, output_type: str, text: str, target: Any, metric: str, **more: Any) -> dict[str, Any]:
    asked = {"doc_to_text": text, "doc_to_target": target, "metric_list": [{"metric": metric}]}
    return {"task": name, "output_type": output_type, **asked, **more}


TASKS = [
    task("tiny_generate", "generate_until", "{{question}}", "{{answer}}", "bypass", generation_kwargs=GREEDY),
    task("tiny_prefixed", "generate_until", "{{question}}", "{{answer}}", "bypass", generation_kwargs=GREEDY)
    | {"gen_prefix": "Well, "},
    task("tiny_sample", "generate_until", "Say something.", "{{answer}}", "bypass", generation_kwargs=SAMPLED),
    task("tiny_choose", "multiple_choice", "{{question}}", 0, "acc", doc_to_choice="{{choices}}"),
    task("tiny_roll", "loglikelihood_rolling", "", "{{question}}", "bits_per_byte"),
]


def write_tasks(folder: Path) -> Path:
    """A folder for lm-eval's `include_path`."""
    for name, rows in {"test": ROWS, "train": SHOTS}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files = {name: str(folder / f"{name}.jsonl") for name in ("test", "train")}
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    for task in TASKS:
        written = {**data, "fewshot_split": "train", **task}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")
    return folder


@contextlib.contextmanager
def data_in(folder: Path) -> Iterator[None]:
    """Datasets are built in a folder of the tests' own, and lm-eval does not ask pip what is installed (seconds)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


def save_uniform(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """A model that knows nothing, with a tokenizer that begins every text with its first token."""
    tokenizer = tokenizer or byte_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    file = f"{save_model(folder, 'llama', tokenizer)}/model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": 0 * weights["lm_head.weight"]}, file, {"format": "pt"})
    return str(folder)


def evaluate(tasks: Path, names: list[str], model_args: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """lm-eval's results. The model goes by its name, as on the command line."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    settings = {"device": "cpu", "bootstrap_iters": 0, **settings}
    return simple_evaluate("memdlm", model_args, names, task_manager=manager, **settings)


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """What the model answered, document by document."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


def asking(*contexts: str, **settings: Any) -> list[Instance]:
    """Requests to generate."""
    settings = {"max_gen_toks": NEW, **settings}
    return [Instance("generate_until", {}, (context, settings), i) for i, context in enumerate(contexts)]


def generate(lm: MemDLMEvalLM, *texts: str, **settings) -> list[str]:
    return lm.generate_until(asking(*texts, **settings), disable_tqdm=True)


def score(lm: MemDLMEvalLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    """The likelihoods of continuations, and whether they are greedy."""
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)


def values(lm: MemDLMEvalLM, *pairs: tuple[str, str]) -> list[float]:
    return [value for value, _ in score(lm, *pairs)]


def rolling(lm: MemDLMEvalLM, *texts: str) -> list[float]:
    """The likelihoods of whole texts."""
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


def decoded(folder: str, texts: list[str], memories: list[str] | None) -> list[str]:
    """What the decoder gives for each text alone, with the memory of another text or none."""
    pretrained = load_pretrained(folder)
    encode = pretrained.tokenizer.encode
    answers = []
    for text, remembered in zip(texts, memories or [None] * len(texts), strict=True):
        decoder = Decoder(pretrained, memory=memory_for(pretrained, {}) if memories else None)
        with decoder.recalled([remembered and encode(remembered)]):
            (tokens,) = decoder.answers([encode(text)], NEW)
        answers.append(pretrained.tokenizer.decode(tokens, skip_special_tokens=True))
    return answers
