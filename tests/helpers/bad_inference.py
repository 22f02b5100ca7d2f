"""What cannot be generated, exported or evaluated: by command, its arguments, and pieces of the one line that comes.

Every row runs in a folder with these: `base`, a model of a token for each byte, with the recipe of a run; `adapter`,
a LoRA for it; copies of the two that are damaged as DAMAGED and COPIES say; and FILES.
"""

from __future__ import annotations

from typing import Any

#: Files beside the models.
FILES: dict[str, bytes] = {"doc.txt": b"Ada wrote it.", "empty.txt": b" \n", "latin.txt": "Größe".encode("latin-1")}
FILES |= {"folder/file": b"", "full/file": b"mine", "memory.safetensors": b"no memory"}

#: Damaged copies: of which folder, what becomes of its files (other bytes, none, or other values of the JSON in it),
#: and pieces of the line that comes when they are loaded.
# fmt: off
DAMAGED: list[tuple[Any, ...]] = [
    ("config_cut", "base", {"config.json": b"{"}, "pretrained='config_cut'", "without a readable config.json"),
    ("config_list", "base", {"config.json": b"[1]"}, "pretrained='config_list'", "without a readable config.json"),
    ("config_bytes", "base", {"config.json": b"\xff\xfe"},
     "pretrained='config_bytes'", "without a readable config.json"),
    ("config_text", "base", {"config.json": {"architectures": "LlamaForCausalLM"}},
     "pretrained='config_text'", "architectures='LlamaForCausalLM'", "expected a list"),
    ("config_bert", "base", {"config.json": {"architectures": ["BertModel"]}},
     "pretrained='config_bert'", "architecture='BertModel'", "known: LLaDAMoEModelLM"),
    ("config_size", "base", {"config.json": {"hidden_size": "wide"}},
     "pretrained='config_size'", "a config.json that makes no", "str"),
    ("config_heads", "base", {"config.json": {"num_attention_heads": 0}},
     "pretrained='config_heads'", "a config.json that makes no"),
    ("config_act", "base", {"config.json": {"hidden_act": "bent"}},
     "pretrained='config_act'", "a config.json that makes no", "'bent'"),
    ("config_dtype", "base", {"config.json": {"dtype": "floaty"}},
     "pretrained='config_dtype'", "a config.json that makes no", "floaty"),
    ("config_length", "base", {"config.json": {"max_position_embeddings": -1}},
     "max_position_embeddings=-1", "max_length=N"),
    ("config_small", "base", {"config.json": {"vocab_size": 100}},
     "pretrained='config_small'", "weights of another shape"),
    ("no_weights", "base", {"model.safetensors": None}, "pretrained='no_weights'", "no weights", "model.safetensors"),
    ("pickled", "base", {"model.safetensors": None, "pytorch_model.bin": b"x"},
     "pretrained='pickled'", "no weights", "model.safetensors"),
    ("weights_text", "base", {"model.safetensors": b"weights"}, "pretrained='weights_text'", "no weights", "header"),
    ("no_tokenizer", "base", {"tokenizer.json": None, "tokenizer_config.json": None, "special_tokens_map.json": None},
     "tokenizer='no_tokenizer'", "no tokenizer files"),
    ("template_cut", "base", {"chat_template.jinja": b"{% if %}"}, "tokenizer='template_cut'", "chat template refuses"),
    ("template_no", "base", {"chat_template.jinja": b"{{ raise_exception('not a chat model') }}"},
     "tokenizer='template_no'", "not a chat model"),
    ("recipe_bytes", "base", {"recipe.yaml": b"\xff"}, "recipe_bytes/recipe.yaml: not a", "utf-8"),
    ("recipe_cut", "base", {"recipe.yaml": b"memory: ["}, "recipe_cut/recipe.yaml: not a", "expected the node content"),
    ("recipe_list", "base", {"recipe.yaml": b"- memory"}, "recipe_list/recipe.yaml: not a", "length"),
    ("recipe_key", "base", {"recipe.yaml": b"memory: {rnak: 4}"}, "recipe_key/recipe.yaml: not a", "'rnak'"),
    ("recipe_value", "base", {"recipe.yaml": b"memory: {rank: 0}"},
     "recipe_value/recipe.yaml: not a", "memory.rank=0: expected", "at least 1"),
    ("adapter_alone", "adapter", {"adapter_config.json": {"base_model_name_or_path": None}},
     "pretrained='adapter_alone'", "does not name its base", "pretrained=BASE,adapter=adapter_alone"),
    ("adapter_moved", "adapter", {"adapter_config.json": {"base_model_name_or_path": "gone"}},
     "pretrained='gone'", "for another give pretrained=BASE"),
    ("adapter_cut", "adapter", {"adapter_config.json": b"{"},
     "pretrained='adapter_cut'", "no readable adapter_config.json"),
    ("adapter_kind", "adapter", {"adapter_config.json": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}},
     "adapter='adapter_kind'", "PROMPT_TUNING", "LORA"),
    ("adapter_empty", "adapter", {"adapter_model.safetensors": None}, "adapter='adapter_empty'", "no adapter_model"),
    ("adapter_rank", "adapter", {"adapter_config.json": {"r": 2}},
     "adapter='adapter_rank'", "no adapter for this model"),
    ("both", "base", {"adapter_config.json": b"{}"}, "pretrained='both'", "holds an adapter", "expected weights alone"),
]
# fmt: on

COPIES: dict[str, tuple[str, dict[str, Any]]] = {name: (source, changes) for name, source, changes, *_ in DAMAGED}
COPIES |= {
    "quantised": ("base", {"config.json": {"quantization_config": {"quant_method": "bitsandbytes"}}}),
    "no_recipe": ("base", {"recipe.yaml": None}),
    "state_cut": ("base", {"trainer_state.json": b"{"}),
    "state_list": ("base", {"trainer_state.json": b"[]"}),
}

UNIT, NAMES, SNAPSHOT = "expected number in [0, 1]", "known: ", "not a fast-weight snapshot"

#: By command. Arguments, in one text at spaces, and pieces of the one line on stderr.
# fmt: off
BAD: dict[str, list[Any]] = {
    "generate": [
        ("temperature", "'temperature'", "expected name=value"),
        ("=3", "unknown model argument ''", NAMES),
        ("temprature=1", "'temprature'", "did you mean temperature?"),
        ("steps=[", "'steps=['", "expected name=value", "suppress_tokens=[5, 7]"),
        ("temperature=", "sampler.temperature=None", "expected number"),
        ("top_k=3", "top_k", "mdlm sampler", NAMES),
        ("temperature=-1", "sampler.temperature=-1", "at least 0"),
        ("temperature=.inf", "sampler.temperature=inf", "expected number"),
        ("threshold=1.5", "sampler.threshold=1.5", UNIT),
        ("remasking=most", "sampler.remasking='most'", "low_confidence, random"),
        ("suppress_tokens=5", "sampler.suppress_tokens=5", "list of whole number"),
        ("suppress_tokens=[263]", "suppress_tokens=[263]", "vocabulary's size, 263"),
        ("sampler=ddim", "model_args.sampler='ddim'", "auto, mdlm, llada2, llada21, dream"),
        ("sampler=llada21 use_cache=no_", "sampler.use_cache='no_'", "true or false"),
        ("seed=2020-01-01", "model_args.seed=", "at most 62 bits"),
        (f"seed={2**80}", "model_args.seed=", "at most 62 bits"),
        ("device=tpu", "device='tpu'", "expected cpu, cuda, cuda:N or mps"),
        ("dtype=int4", "model_args.dtype='int4'", "float32, bfloat16"),
        ("attn_implementation=fast", "attn_implementation='fast'", "sdpa, eager"),
        ("load_in_4bit=true merge_adapter=true", "merge_adapter=True", "load_in_4bit"),
        ("max_length=1", "model_args.max_length=1", "at least 2"),
        ("max_length=8", "prompt of 7 tokens", "at most 8 together", "max_length=10"),
        ("memory_inner_lr=-5e-2", "memory.inner_lr=-0.05", "at least 0"),
        ("memory_target_modules=[nose]", "memory.target_modules", "'nose'", "up_proj"),
        ("memory_scope=prefix", "memory_scope='prefix'", "memory=true"),
        ("memory_dropout=0.5", "'memory_dropout'", "did you mean"),
        ("--prompt-file no.txt", "--prompt-file no.txt", "No such file", "text file"),
        ("--prompt-file folder", "--prompt-file folder", "directory", "text file"),
        ("--prompt-file latin.txt", "--prompt-file latin.txt", "not a text in UTF-8"),
        ("--prompt-file empty.txt", "--prompt-file empty.txt", "empty", "expected a text"),
        (["--question", " "], "--question ' '", "empty", "--prompt-file"),
        ("--question a\udcff", "--question 'a\\udcff'", "not a text in UTF-8"),
        ("--save-memory no/m", "--save-memory no/m", "No such file", "expected a file"),
        ("--save-memory doc.txt/m", "--save-memory doc.txt/m", "Not a directory", "expected a file"),
        (["--prompt-file", "x" * 300], "--prompt-file xxx", "name too long", "text file"),
        ("--load-memory no", "no: ", SNAPSHOT, "--save-memory"),
        ("--load-memory memory.safetensors", "memory.safetensors: ", SNAPSHOT),
        ("--load-memory base/model.safetensors", "model.safetensors: ", "--save-memory"),
        ("--load-memory other.memory", "other.memory: written with the model", "not '"),
        ("--load-memory two.memory", "two.memory", "expected the memory of one text"),
        ("--load-memory other.memory memory_rank=4", "fast_weights", "no memory_"),
        ("--model /no/such", "pretrained='/no/such'", "no such folder"),
        ("--model nobody/no", "pretrained='nobody/no'", "no local copy"),
        ("--model a//b", "pretrained='a//b'", "no such folder"),
        ("--model doc.txt", "pretrained='doc.txt'", "a file; expected the folder"),
        ("--model folder", "pretrained='folder'", "without a readable config.json"),
        ("--adapter /no", "adapter='/no'", "no readable adapter_config.json"),
        ("tokenizer=/no", "tokenizer='/no'", "no such folder"),
        ("tokenizer=large", "tokenizer='large'", "has 263", "trained with"),
        *((f"--model {name}", *says) for name, _, _, *says in DAMAGED),
    ],
    "export": [
        ("--out full", "--out 'full': not empty", "expected a folder"),
        ("--out doc.txt", "doc.txt is a file", "expected a folder that is empty"),
        ("--out doc.txt/out", "--out 'doc.txt/out': ", "doc.txt is a file"),
        (["--out", ""], "--out ''", "expected a folder that is empty"),
        ("--memory no", "no: ", SNAPSHOT, "--save-memory"),
        ("--memory other.memory", "other.memory: written with the model", "not '"),
        ("--memory two.memory --as-adapter", "two.memory", "expected the memory of one text"),
        ("--memory other.memory --as-adapter --out full", "--out 'full': not empty"),
        ("--model quantised", "pretrained='quantised'", "quantised weights", "BASE"),
        ("--model state_cut", "state_cut/trainer_state.json", "not the state of a trainer"),
        ("--model state_list", "trainer_state.json", "expected a mapping with log_history"),
    ],
    "lm_eval": [
        ("", "model_args.pretrained=''", "expected folder or hub name"),
        ("pretrained=2024", "model_args.pretrained=2024", "expected folder or hub name"),
        ("pretrained=none", "model_args.pretrained=None", "expected folder or hub name"),
        ("pretrained=base memry=true", "'memry'", "did you mean memory?"),
        ("pretrained=base suppress_tokens=[5 7]", "argument '7]'", NAMES),
        ("pretrained=base zzz=1", "'zzz'; known: adapter, alg, alg_temp, attn", "memory_inner_lr", "editing_threshold"),
        ("pretrained=base memory_enabled=1", "'memory_enabled'"),
        ("pretrained=base max_new_tokens=1", "'max_new_tokens'"),
        ("pretrained=base memory_scope=prefix fast_weights=a", "memory_scope", "memory=true"),
        ("pretrained=base batch_size=2.5", "model_args.batch_size=2.5", "at least 1, or auto"),
        ("pretrained=base batch_size=-1", "model_args.batch_size=-1", "at least 1, or auto"),
        ("pretrained=base check_greedy=yes", "check_greedy='yes'", "true or false"),
        ("pretrained=base memory=true fast_weights=x", "memory=True", "fast_weights"),
    ],
    "task": [
        ("max_gen_toks=long", "gen_kwargs.max_gen_toks='long'", "whole number"),
        ("max_gen_toks=2.5", "gen_kwargs.max_gen_toks=2.5", "whole number"),
        ("max_gen_toks=true", "gen_kwargs.max_gen_toks=True", "a number"),
        ("max_gen_toks=999", "max_length=99", "999 tokens", "max_gen_toks=N"),
        ("until=5", "gen_kwargs.until=5", "text or a list of texts"),
        ("temperature=hot", "gen_kwargs.temperature='hot'", "expected number"),
        ("steps=0", "sampler.steps=0", "at least 1"),
    ],
    "template": [
        ("kind", "--apply_chat_template", "no chat template 'kind'", "expected one of default"),
    ],
    "exposure_bias": [
        ("--output folder", "--output folder", "directory; expected a file"),
        ("--output doc.txt/x", "--output doc.txt/x", "expected a file"),
        ("--model no_recipe", "no_recipe/recipe.yaml", "no such recipe file"),
        ("--model recipe_value", "recipe_value/recipe.yaml", "give one of them"),
        ("--batch-size x", "model_args.batch_size='x'", "at least 1, or auto"),
        ("steps=4", "steps: a setting of the samplers", "--steps N"),
        ("max_length=3", "max_length=3", "expected at least one step and one example"),
    ],
    "needle": [
        ("--output folder", "--output folder", "directory; expected a file"),
        ("", "data.eval_size=None", "all 4 rows", "expected fewer"),
    ],
}
# fmt: on
