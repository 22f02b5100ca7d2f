"""What a recipe must not ask for, of the model, the LoRA, the memory and the training, and what is said instead.

An id; files to write, by name; overrides; and pieces of the one line that comes: what, where, what would be accepted.
"""

from __future__ import annotations

Row = tuple[str, dict[str, str], list[str], tuple[str, ...]]

SCHEDULE = "training.lr_scheduler_type="
#: Weights that another library has packed.
QUANTISED = '{"architectures": ["LLaDAMoEModelLM"], "quantization_config": {"quant_method": "gptq", "bits": 4}}'
SCRATCH_LORA = ("lora.enabled=True without a model.path", "lora.enabled=false")


def training(name: str, value: str, *says: str) -> Row:
    """A value of training.`name` that is out of range."""
    return (f"{name} {value}", {}, [f"training.{name}={value}"], (f"training.{name}=", *says))


BAD_TRAINING: list[Row] = [
    # numbers out of range
    training("learning_rate", "-1", "-1: expected at least 0, and finite"),
    training("learning_rate", ".inf", "inf: expected at least 0, and finite"),
    training("learning_rate", ".nan", "nan: expected at least 0, and finite"),
    training("learning_rate", "fast", "'fast': expected number"),
    training("learning_rate", "'1e-3'", "'1e-3': expected number"),
    training("weight_decay", "-0.1", "expected at least 0, and finite"),
    training("weight_decay", ".inf", "expected at least 0, and finite"),
    training("adam_beta1", "1.0", "1.0: expected in [0, 1)"),
    training("adam_beta1", "-0.1", "expected in [0, 1)"),
    training("adam_beta2", "1.5", "1.5: expected in [0, 1)"),
    training("adam_beta2", ".nan", "expected in [0, 1)"),
    training("adam_epsilon", "-1e-8", "expected at least 0, and finite"),
    training("max_grad_norm", "-1", "expected at least 0, and finite"),
    training("max_grad_norm", ".nan", "expected at least 0, and finite"),
    training("label_smoothing_factor", "0.1", "0.1: expected 0; the masked diffusion loss has no smoothing"),
    training("max_steps", "0", "0: expected at least 1, or -1 for num_train_epochs"),
    training("max_steps", "-2", "expected at least 1, or -1"),
    training("max_steps", "2.5", "expected whole number"),
    training("num_train_epochs", "0", "expected more than 0"),
    training("num_train_epochs", "-1", "expected more than 0"),
    training("num_train_epochs", ".inf", "expected more than 0"),
    ("warm-up of fewer than no steps", {}, ["training.warmup_steps=-1"], ("training: ", "warmup_steps")),
    training("seed", "-1", "-1: expected in [0, 2^32)"),
    training("seed", "4294967296", "expected in [0, 2^32)"),
    training("seed", "1.5", "expected whole number"),
    training("data_seed", "-1", "expected in [0, 2^32)"),
    training("dataloader_num_workers", "-1", "expected at least 0"),
    training("per_device_train_batch_size", "0", "expected at least 1"),
    training("per_device_eval_batch_size", "0", "expected at least 1"),
    training("gradient_accumulation_steps", "0", "expected at least 1"),
    training("time_epsilon", "1", "expected in (0, 1)"),
    training("time_epsilon", "0", "expected in (0, 1)"),
    ("weights not as safetensors", {}, ["training.save_safetensors=false"], ("training.save_safetensors",)),
    training("loss_norm_type", "words", "'words': expected one of token, sequence, batch"),
    training("loss_weight_type", "none_", "expected one of scheduler, uniform"),
    training("bf16", "maybe", "'maybe': expected true or false"),
    training("engine", "zero4", "'zero4': expected one of auto, ddp, fsdp2"),
    # what transformers refuses itself
    ("warm-up beyond the run", {}, ["training.warmup_ratio=1.5"], ("training: ", "warmup_ratio", "[0,1]")),
    ("no log ever", {}, ["training.logging_steps=0"], ("training: ", "requires non-zero --logging_steps")),
    ("a time of no name", {}, ["training.eval_strategy=sometimes"], ("training: sometimes is not", "steps")),
    ("two precisions", {}, ["training.bf16=true", "training.fp16=true"], ("training: ", "fp16")),
    (
        "evaluated when nothing is saved",
        {},
        ["training.load_best_model_at_end=true", "training.save_steps=3"],
        ("training: ", "saving steps"),
    ),
    ("fp16 with memory", {}, ["training.fp16=true"], ("fp16",)),
    # trackers
    training("report_to", "wandbb", "wandbb"),
    training("report_to", "[tensorboard, nothing_such]", "nothing_such"),
    training("report_to", "comet_ml", "comet_ml is not installed; expected one that is, or none"),
    training("report_to", "[tensorboard, mlflow]", "mlflow is not installed"),
    # optimizers and schedules
    ("an optimizer of no name", {}, ["training.optim=sdg"], ("training", "sdg")),
    ("an optimizer that is not installed", {}, ["training.optim=lomo"], ("training.optim='lomo'",)),
    ("a schedule of no name", {}, ["training.lr_scheduler_type=cosin"], ("training", "cosin")),
    ("an argument of no schedule", {}, ["training.lr_scheduler_kwargs={cycles: 2}"], (SCHEDULE, "cycles")),
    (
        "a schedule without its arguments",
        {},
        ["training.lr_scheduler_type=warmup_stable_decay"],
        (SCHEDULE + "'warmup_stable_decay'",),
    ),
    # the best model
    (
        "a metric of no evaluation",
        {},
        ["training.metric_for_best_model=accuracy"],
        ("'accuracy': expected one of eval_loss, eval_loss_memory_off",),
    ),
    (
        "a metric of memory, without it",
        {},
        ["training.metric_for_best_model=eval_loss_memory_off", "memory.enabled=false"],
        ("training.metric_for_best_model='eval_loss_memory_off': expected one of eval_loss",),
    ),
    (
        "the best of no evaluation",
        {},
        ["training.load_best_model_at_end=true", "data.eval_fraction=0"],
        ("training.load_best_model_at_end=True: expected examples to evaluate on",),
    ),
    # folders and the hub
    (
        "a file for a folder",
        {"taken": ""},
        ["training.output_dir=taken"],
        ("training.output_dir='taken': expected a folder; taken is a file",),
    ),
    (
        "a folder in a file",
        {"taken": ""},
        ["training.output_dir=taken/run"],
        ("training.output_dir='taken/run': expected a folder; taken is a file",),
    ),
    (
        "a hub out of reach",
        {},
        ["training.push_to_hub=true"],
        ("training.push_to_hub=True: the hub cannot be written to", "set it to false"),
    ),
    ("a checkpoint that is not there", {}, ["training.resume_from_checkpoint=gone"], ("gone: no such checkpoint",)),
    (
        "a checkpoint of another trainer",
        {"theirs/model.safetensors": ""},
        ["training.resume_from_checkpoint=theirs"],
        ("theirs: not a checkpoint of this trainer",),
    ),
    (
        "no batch at all",
        {},
        ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=99"],
        ("training.dataloader_drop_last=True: no whole batch of 99", "16 examples"),
    ),
    # the model
    ("no model", {}, ["model.architecture=null"], ("model: neither path nor architecture is set",)),
    (
        "an architecture of no name",
        {},
        ["model.architecture=Llama"],
        ("model.architecture='Llama': no backbone for it; known:",),
    ),
    ("no such folder", {}, ["model.path=/nowhere/model"], ("model.path='/nowhere/model'", "no such folder")),
    ("no such folder at home", {}, ["model.path=~/nowhere"], ("model.path=", "/nowhere'", "no such folder")),
    (
        "a folder without a config",
        {"empty/a": ""},
        ["model.path=empty", "model.tokenizer=null"],
        ("model.path=", "tokenizer"),
    ),
    (
        "a base in 4 bit from scratch",
        {},
        ["model.load_in_4bit=true"],
        ("model.load_in_4bit=True: expected a model.path",),
    ),
    (
        "4 bit without a LoRA",
        {},
        ["model.path=x", "model.load_in_4bit=true"],
        ("model.load_in_4bit=True: expected lora.enabled=true",),
    ),
    (
        "4 bit without a LoRA, planned",
        {},
        ["model.path=x", "model.load_in_4bit=true", "--dry-run"],
        ("model.load_in_4bit=True: expected lora.enabled=true",),
    ),
    (
        "a base that is packed already",
        {"packed/config.json": QUANTISED},
        ["model.path=packed", "model.architecture=null", "lora.enabled=true", "--dry-run"],
        ("model.path='packed': its weights are quantised already (gptq); expected float weights",),
    ),
    ("a dtype of no name", {}, ["model.dtype=float8"], ("model.dtype='float8': expected one of auto, float32",)),
    (
        "an attention of no name",
        {},
        ["model.attn_implementation=fast"],
        ("model.attn_implementation='fast': expected one of sdpa",),
    ),
    (
        "a kernel that is not installed",
        {},
        ["model.attn_implementation=flash_attention_2"],
        ("model.attn_implementation='flash_attention_2'",),
    ),
    ("a dimension of no model", {}, ["model.dimensions.width=3"], ("model.dimensions.width: not a field of",)),
    (
        "dimensions that make no model",
        {},
        ["model.dimensions.num_attention_heads=5"],
        ("model.dimensions: they make no",),
    ),
    (
        "no room for the tokenizer",
        {},
        ["model.dimensions.vocab_size=10"],
        ("model.dimensions: vocab_size 10, expected at least",),
    ),
    (
        "a vocabulary too small",
        {},
        ["model.tokenizer_vocab_size=10"],
        ("model.tokenizer_vocab_size=10: expected at least",),
    ),
    ("heads that share no keys", {}, ["model.dimensions.num_key_value_heads=3"], ("num_key_value_heads 3",)),
    ("more experts than there are", {}, ["model.dimensions.num_experts_per_tok=5"], ("num_experts_per_tok 5 of",)),
    ("no experts", {}, ["model.dimensions.num_experts_per_tok=0"], ("num_experts_per_tok 0 of num_experts 4",)),
    (
        "no layers at all",
        {},
        ["model.dimensions.num_hidden_layers=0"],
        ("model.dimensions.num_hidden_layers=0: expected a whole number, at least 1",),
    ),
    # LoRA
    ("an adapter of random weights", {}, ["lora.enabled=true"], SCRATCH_LORA),
    ("an adapter of random weights, by default", {}, ["lora={}", "lora.enabled=true", "lora.r=4"], SCRATCH_LORA),
    ("a rank of none", {}, ["lora.r=0"], ("lora.r=0: expected at least 1",)),
    ("a dropout of all", {}, ["lora.dropout=1"], ("lora.dropout=1.0: expected in [0, 1)",)),
    ("a bias of no kind", {}, ["lora.bias=some"], ("lora.bias='some': expected one of none, all, lora_only",)),
    ("an adapter without a base", {}, ["lora.enabled=true", "lora.path=x"], ("lora.path='x': expected a model.path",)),
    (
        "an adapter where all weights train",
        {},
        ["lora.path=x", "model.path=y"],
        ("lora.path='x': expected none with lora.enabled=False",),
    ),
    # memory
    ("no step", {}, ["memory.steps=0"], ("memory.steps=0: expected at least 1",)),
    ("a negative rate", {}, ["memory.inner_lr=-1"], ("memory.inner_lr=-1.0: expected at least 0",)),
    ("a rate without end", {}, ["memory.inner_lr=.inf"], ("memory.inner_lr=inf: expected number",)),
    ("a rate in words", {}, ["memory.inner_lr=high"], ("memory.inner_lr='high': expected number",)),
    ("a memory of rank 0", {}, ["memory.rank=0"], ("memory.rank=0: expected at least 1",)),
    ("no layers", {}, ["memory.layer_fraction=0"], ("memory.layer_fraction=0.0: expected in (0, 1]",)),
    ("more than all layers", {}, ["memory.layer_fraction=1.5"], ("memory.layer_fraction=1.5: expected in (0, 1]",)),
    ("no modules", {}, ["memory.target_modules=[]"], ("memory.target_modules=(): expected at least one module name",)),
    ("modules of no layer", {}, ["memory.target_modules=[w1]"], ("memory.target_modules: 'w1' matches nothing",)),
    ("a strategy of no name", {}, ["memory.strategy=anchor"], ("memory.strategy='anchor': expected one of",)),
    ("an objective of no name", {}, ["memory.objective=l2"], ("memory.objective='l2': expected one of",)),
    ("a ratio of none", {}, ["memory.anchor_ratio=0"], ("memory.anchor_ratio=0.0: expected in (0, 1]",)),
    (
        "a trajectory that rises",
        {},
        ["memory.strategy=inconsistent", "memory.start_ratio=0.1", "memory.anchor_ratio=0.5"],
        ("memory.start_ratio=0.1: expected at least memory.anchor_ratio, 0.5",),
    ),
    (
        "one φ of each sample for all",
        {},
        ["memory.sync=true"],
        ("memory.sync=True: expected false with memory.scope: sample",),
    ),
    ("a dropout of more than all", {}, ["memory.dropout=2"], ("memory.dropout=2.0: expected in [0, 1]",)),
    ("a clip below 0", {}, ["memory.grad_clip=-1"], ("memory.grad_clip=-1.0: expected at least 0",)),
    # the recipe itself
    ("a section of no name", {}, ["memry.rank=4"], ("unknown key memry; did you mean memory?",)),
    ("a key of no name", {}, ["memory.rnk=4"], ("unknown key memory.rnk; did you mean memory.rank?",)),
    ("a number for a section", {}, ["memory=3"], ("memory=3: expected a mapping",)),
    ("an override without a value", {}, ["memory.rank"], ("override 'memory.rank': expected section.key=value",)),
    ("an override without a key", {}, ["=4"], ("override '=4': expected section.key=value",)),
    ("an override that is no YAML", {}, ["memory.rank=[1"], ("override 'memory.rank=[1'",)),
    (
        "a base that is not there",
        {"child.yaml": "extends: gone.yaml\n"},
        ["child.yaml"],
        ("no such recipe file", "gone.yaml"),
    ),
    (
        "a circle",
        {"child.yaml": "extends: child.yaml\n"},
        ["child.yaml"],
        ("extends: child.yaml → child.yaml is a circle",),
    ),
    ("a list", {"child.yaml": "- a\n"}, ["child.yaml"], ("child.yaml: expected a mapping of sections",)),
    ("no YAML", {"child.yaml": "a: [1\n"}, ["child.yaml"], ("child.yaml: not a readable YAML file",)),
    ("no recipe", {}, ["gone.yaml"], ("gone.yaml: no such recipe file",)),
    ("a folder for a recipe", {"child/a": ""}, ["child"], ("child: not a readable YAML file",)),
    (
        "an unknown variable",
        {"child.yaml": "data: {dataset: '${nowhere}'}\n"},
        ["child.yaml"],
        ("child.yaml: ", "nowhere"),
    ),
    # planning
    ("a plan for no GPUs", {}, ["--dry-run", "--gpus", "0"], ("--gpus", "0")),
    ("a plan for half a GPU", {}, ["--dry-run", "--gpus", "half"], ("--gpus", "half")),
    ("a GPU of no size", {}, ["--dry-run", "--memory", "much"], ("--memory", "much")),
    ("a share of more than all", {}, ["--dry-run", "--response-share", "2"], ("--response-share", "2")),
    (
        "a plan without --dry-run",
        {},
        ["--gpus", "8"],
        ("--gpus, --memory and --response-share: expected with --dry-run",),
    ),
]
