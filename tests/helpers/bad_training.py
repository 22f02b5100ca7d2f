"""What a recipe must not ask for, of the model, the LoRA, the memory and the training, and what is said instead.

A row: the command line, at spaces, and pieces of the one line that comes: what, where, what would be accepted. Its
first word is the recipe where FILES has it; else the row is about a recipe that trains. `NAME=value` alone in the first
column stands for `training.NAME=value`, and the line begins with `training.NAME=`.
"""

from __future__ import annotations

#: Files beside the recipe.
FILES = {
    "taken": "",
    "empty/a": "",
    "theirs/model.safetensors": "",
    # weights that another library has packed
    "packed/config.json": '{"architectures": ["LLaDAMoEModelLM"], "quantization_config": {"quant_method": "gptq"}}',
    "orphan.yaml": "extends: gone.yaml\n",
    "circle.yaml": "extends: other.yaml\n",
    "other.yaml": "extends: circle.yaml\n",
    "number.yaml": "extends: 5\n",
    "five.yaml": "5\n",
    "nul.yaml": "\0",
    "latin.yaml": "name: Größe\n",  # as all of them are written: not UTF-8
    "list.yaml": "- a\n",
    "cut.yaml": "a: [1\n",
    "twice.yaml": "memory: {rank: 1}\nmemory: {rank: 2}\n",
    "nowhere.yaml": "data: {dataset: '${nowhere}'}\n",
}

ONE, ZERO = "whole number of at least 1", "whole number of at least 0"
NOT_NEGATIVE, MAPPING = "number of at least 0", "expected a mapping"
SEED, SAFE = "whole number in [0, 2^32)", "weights are saved as nothing else"
METRIC = "training.metric_for_best_model"

# fmt: off
BAD_TRAINING: list[tuple[str, ...]] = [
    # values that transformers would take
    ("learning_rate=-1", NOT_NEGATIVE), ("learning_rate=.inf", NOT_NEGATIVE), ("learning_rate=.nan", NOT_NEGATIVE),
    ("learning_rate=fast", "'fast'", NOT_NEGATIVE), ("learning_rate='1e-3'", NOT_NEGATIVE),
    ("learning_rate=true", NOT_NEGATIVE), ("weight_decay=-0.1", NOT_NEGATIVE), ("weight_decay=.inf", NOT_NEGATIVE),
    ("max_grad_norm=-1", NOT_NEGATIVE, "or none"), ("max_grad_norm=.nan", NOT_NEGATIVE),
    ("label_smoothing_factor=0.1", "expected 0"), ("time_epsilon=1", "in (0, 1)"), ("time_epsilon=0", "in (0, 1)"),
    ("max_steps=0", ONE, "or -1 for num_train_epochs"), ("max_steps=-2", ONE), ("max_steps=2.5", ONE),
    ("max_steps=true", ONE), ("max_steps=five", ONE), ("num_train_epochs=0", "number above 0"),
    ("num_train_epochs=.inf", "number above 0"), ("seed=-1", SEED), ("seed=4294967296", SEED), ("seed=1.5", SEED),
    ("seed=null", SEED), ("data_seed=-1", SEED), ("dataloader_num_workers=-1", ZERO),
    ("per_device_train_batch_size=0", ONE), ("per_device_eval_batch_size=0", ONE),
    ("gradient_accumulation_steps=0", ONE), ("bf16=maybe", "true or false"), ("bf16=1", "true or false"),
    ("output_dir=5", "expected text"), ("eval_delay=[1]", "expected number"), ("torch_compile=true", "expected none"),
    ("torch_compile_backend=inductor", "expected none"), ("torch_compile_mode=default", "expected none"),
    ("loss_norm_type=words", "one of token, sequence, batch"), ("loss_weight_type=flat", "uniform, cart[geo_p"),
    ("training.gradient_checkpointing=true training.gradient_checkpointing_kwargs.use_reentrant=true", "use_reentrant"),
    ("engine=zero4", "'zero4'", "one of auto, ddp, fsdp2"), ("training.save_safetensors=false", "training.save_safe"),
    # what the optimizer and its schedule refuse
    ("training.adam_beta1=1.0", "training.optim=", "beta"), ("training.adam_beta2=1.5", "training.optim=", "beta"),
    ("training.adam_beta2=.nan", "training.adam_beta2=nan", "number"),
    ("training.adam_epsilon=-1e-8", "training.optim=", "epsilon"),
    ("training.optim=sdg", "training", "sdg"), ("optim=lomo", "'lomo'", "install"),
    ("training.lr_scheduler_type=cosin", "training", "cosin"),
    ("training.lr_scheduler_kwargs.cycles=2", "training.lr_scheduler_type=", "cycles"),
    ("lr_scheduler_type=warmup_stable_decay", "'warmup_stable_decay'"),
    # what transformers refuses itself
    ("training.warmup_steps=-1", "training: ", "warmup_steps"), ("training.warmup_ratio=1.5", "training: ", "[0,1]"),
    ("training.logging_steps=0", "training: ", "non-zero --logging_steps"),
    ("training.eval_strategy=sometimes", "training: sometimes", "steps"),
    ("training.save_strategy=sometimes", "sometimes is not a valid SaveStrategy"),
    ("training.bf16=true training.fp16=true", "training: ", "fp16"), ("fp16=true", "expected bf16"),
    ("training.load_best_model_at_end=true training.save_steps=3", "training: ", "saving steps"),
    # trackers, the best model
    ("report_to=wandbb", "wandbb", "none, all"), ("report_to=[tensorboard,nothing_such]", "nothing_such"),
    ("report_to=comet_ml", "comet_ml", "installed"),
    ("training.metric_for_best_model=accuracy", "'accuracy': expected one of eval_loss, eval_loss_memory_off"),
    (f"{METRIC}=eval_loss_memory_prompt data.mask_prompt=false", f"{METRIC}=", "of eval_loss, eval_loss_memory_off"),
    (f"{METRIC}=eval_loss_memory_off memory.enabled=false", f"{METRIC}=", "expected one of eval_loss"),
    ("training.load_best_model_at_end=true data.eval_fraction=0", "load_best_model_at_end=True", "to evaluate on"),
    # folders and the hub
    ("output_dir=taken", "a folder; taken is a file"), ("output_dir=taken/run", "a folder; taken is a file"),
    ("push_to_hub=true", "the hub cannot be written to", "set it to false"),
    ("training.resume_from_checkpoint=gone", "gone: no such checkpoint"),
    ("training.resume_from_checkpoint=theirs", "theirs: not a checkpoint of this trainer"),
    ("training.dataloader_drop_last=true training.per_device_train_batch_size=99", "no whole batch of 99", "16 exam"),
    # the model
    ("model.architecture=null", "model: neither path nor architecture is set"),
    ("model.architecture=Llama", "model.architecture='Llama': no backbone for it; known:"),
    ("model.path=/nowhere/model", "model.path='/nowhere/model'", "no such folder"),
    ("model.path=~/nowhere", "model.path=", "/nowhere'", "no such folder"),
    ("model.path=empty model.tokenizer=null", "model.path=", "tokenizer"),
    ("model.path=5", "model.path=5: expected folder or hub name or none"),
    ("model.load_in_4bit=true", "model.load_in_4bit=True: expected a model.path"),
    ("model.path=x model.load_in_4bit=true", "model.load_in_4bit=True: expected lora.enabled=true"),
    ("model.path=packed model.architecture=null lora.enabled=true --dry-run",
     "model.path='packed': its weights are quantised already (gptq); expected float weights"),
    ("model.dtype=float8", "model.dtype='float8': expected one of auto, float32"),
    ("model.attn_implementation=fast", "model.attn_implementation='fast': expected one of sdpa"),
    ("model.attn_implementation=flash_attention_2", "model.attn_implementation='flash_attention_2'"),
    ("--dry-run model.architecture=Llama", "model.architecture='Llama': no backbone for it; known: LLaDAMoEModelLM, "),
    ("model.dimensions=5", "model.dimensions=5: expected mapping"),
    ("model.dimensions.width=3", "model.dimensions.width: not a field of LLaDAMoEConfig"),
    ("model.dimensions.num_attention_heads=5", "model.dimensions: they make no"),
    ("model.dimensions.vocab_size=10", "model.dimensions: vocab_size 10, expected at least"),
    ("model.tokenizer_vocab_size=10", "model.tokenizer_vocab_size=10: expected at least"),
    ("model.dimensions.num_key_value_heads=3", "num_key_value_heads 3"),
    ("model.dimensions.num_experts_per_tok=5", "num_experts_per_tok 5 of"),
    ("model.dimensions.num_experts_per_tok=0", "num_experts_per_tok 0 of num_experts 4"),
    ("model.dimensions.num_hidden_layers=0", "num_hidden_layers=0: expected a whole number, at least 1"),
    # LoRA, memory, data
    ("lora.enabled=true", "lora.enabled=True without a model.path", "lora.enabled=false"),
    ("lora.r=0", "lora.r=0: expected", ONE), ("lora.dropout=1", "lora.dropout=1: expected number in [0, 1)"),
    ("lora.target_modules=5", "lora.target_modules=5: expected text or list"),
    ("lora.enabled=true lora.path=x", "lora.path='x': expected a model.path"),
    ("lora.path=x model.path=y", "lora.path='x': expected none with lora.enabled=False"),
    ("memory.rank=four", "memory.rank='four': expected", ONE), ("memory.rank.x=4", "memory.rank={'x': 4}: expected"),
    ("memory.inner_lr=.inf", "memory.inner_lr=inf: expected", NOT_NEGATIVE),
    ("memory.target_modules=up_proj", "memory.target_modules='up_proj': expected list of"),
    ("memory.target_modules=[w1]", "memory.target_modules: 'w1' matches nothing"),
    ("--dry-run memory.target_modules=[up_proj,w1]", "'w1' matches nothing in layers 1-2 of "),
    ("memory.objective=l2", "memory.objective='l2': expected one of"),
    ("memory.strategy=inconsistent memory.start_ratio=0.1 memory.anchor_ratio=0.5", "at least memory.anchor_ratio"),
    ("data.mask_prompt=false memory.source=prompt", "data.mask_prompt=False: expected true with memory.source: prompt"),
    ("memory.sync=true", "memory.sync=True: expected false with memory.scope: sample"),
    ("data.dataset=null", "data.dataset=None: expected text"), ("data.max_length=long", "data.max_length='long'", ONE),
    ("data.max_length=3", "none of the 16 train examples", "16 too long"),
    ("data.dataset=other.jsonl", "other.jsonl", "no such file or folder"),
    ("data.dataset=nobody/nothing", "data.dataset='nobody/nothing'", "with network, or downloaded before"),
    # the recipe itself
    ("memry.rank=4", "unknown key 'memry'; did you mean memory?"),
    ("values.a=4", "unknown key 'values'; known: model, "),
    ("memory.rnk=4", "unknown key 'memory.rnk'; did you mean memory.rank?"),
    ("lora.rank=4", "unknown key 'lora.rank'; known: enabled, r, alpha"),
    ("training.lerning_rate=1", "unknown key 'training.lerning_rate'; did you mean training.learning_rate?"),
    ("training._n_gpu=2", "unknown key 'training._n_gpu'"),  # not for a user to set
    ("memory=3", "memory=3: ", MAPPING), ("lora=[a]", "lora=['a']: ", MAPPING), ("training=[a]", "training=", MAPPING),
    ("memory.rank", "override 'memory.rank': expected section.key=value"), ("=4", "override '=4': expected"),
    ("memory.rank:4", "override 'memory.rank:4'"), ("memory.rank=[1", "override 'memory.rank=[1'"),
    ("memory.rank=${nothing.there}", "'nothing.there' not found"), ("nowhere.yaml", "nowhere.yaml: ", "nowhere"),
    ("orphan.yaml", "no such recipe file", "gone.yaml"), ("gone.yaml", "gone.yaml: no such recipe file"),
    ("circle.yaml", "extends: circle.yaml → other.yaml → circle.yaml is a circle"),
    ("number.yaml", "extends=5: expected a file name"), ("list.yaml", "list.yaml: expected a mapping of sections"),
    ("cut.yaml", "cut.yaml: not a readable YAML file"), ("twice.yaml", "twice.yaml: not a readable YAML file"),
    ("empty", "empty: not a readable YAML file"), ("five.yaml", "five.yaml: not a readable YAML file"),
    ("nul.yaml", "nul.yaml: not a readable YAML file"), ("latin.yaml", "latin.yaml: not a readable YAML file"),
    ("taken", "taken: model: neither path nor architecture"),
    # planning
    ("--dry-run --gpus 0", "--gpus '0': expected a whole number, at least 1"),
    ("--dry-run --gpus half", "--gpus 'half'"), ("--dry-run --memory much", "--memory 'much': expected a size such as"),
    ("--dry-run --response-share 0", "--response-share '0': expected a number above 0, at most 1"),
    ("--dry-run --response-share 2", "--response-share '2': expected a number"),
    ("--gpus 8", "--gpus, --memory and --response-share: expected with --dry-run"),
]
# fmt: on
