"""A table of data and tokenizers that cannot be trained on: files, overrides, and what the one line must say."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow
import pyarrow.parquet

from dllm_memdlm.data import train_tokenizer

GOOD = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(4)]
HOTPOT = {
    "question": "Who?",
    "answer": "Ann",
    "context": {"title": ["Ann"], "sentences": [["Ann is ill."]]},
    "supporting_facts": {"title": ["Ann"], "sent_id": [0]},
}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(*turns: tuple[str | None, Any], **beside: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **beside}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    schema = pyarrow.schema([("instruction", pyarrow.string()), ("output", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), buffer)
    return buffer.getvalue()


def tokenizer(template: str | None = None, **config: Any) -> dict[str, str]:
    """The files of a tokenizer of bytes, with LLaDA's special tokens declared unless `config` says otherwise."""
    trained = train_tokenizer([], 263)
    declared = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    declared |= {"chat_template": template or trained.chat_template, **config}
    return {
        "tok/tokenizer.json": trained.backend_tokenizer.to_str(),
        "tok/tokenizer_config.json": json.dumps({k: v for k, v in declared.items() if v is not None}),
    }


ROW = ["data.dataset='d.jsonl', train row 0: "]
JSON, LINES, TABLE = (["data.dataset=d.json"], ["data.dataset=d.jsonl"], ["data.dataset=d.parquet"])
TOK = ["model.tokenizer=tok"]
NOT_HOTPOT = "is not as in HotpotQA: expected pairs, or the hub's two lists, "

#: An identifier, the files to write, the overrides, and the parts of the one line on stderr.
Bad = tuple[str, dict[str, bytes | str], list[str], list[str]]

# fmt: off
SOURCES: list[Bad] = [
    ("none", {}, ["data.dataset=''"], ["data.dataset=''", "expected a dataset name or path"]),
    ("null", {}, ["data.dataset=null"], ["data.dataset=None", "expected text"]),
    ("several", {}, ["data.dataset=[a.json,b.json]"], ["data.dataset=['a.json', 'b.json']", "expected text"]),
    ("number", {}, ["data.dataset=5"], ["data.dataset=5", "expected text"]),
    ("absent-file", {}, ["data.dataset=absent.json"], ["data.dataset='absent.json'", "no such file", "/absent"]),
    ("absent-folder", {}, ["data.dataset=./absent"], ["data.dataset='./absent'", "no such file or folder"]),
    ("absent-at-home", {}, ["data.dataset='~/no/such'"], ["data.dataset='~/no/such'", "no such file or folder"]),
    ("absent-home", {}, ["data.dataset='~nobody-here/a.json'"], ["~nobody-here", "home directory", "expected a"]),
    ("inline", {}, ["data.dataset='{\"output\": \"" + "a" * 300 + "\"}'"], ["data.dataset=", "too long", "expected"]),
    ("table-of-text", {"d.csv": "a,b"}, ["data.dataset=d.csv"], ["'d.csv'", "type '.csv'", "expected .json, .jsonl"]),
    ("packed", {"d.jsonl.gz": b"\x1f\x8b"}, ["data.dataset=d.jsonl.gz"],
     ["'d.jsonl.gz'", "type '.gz'", "expected .json"]),
    ("no-suffix", {"rows": "{}"}, ["data.dataset=rows"], ["'rows'", "a file of type ''", "expected .json, .jsonl"]),
    ("no-package", {}, ["data.dataset=package:no_such_pkg/a.json"],
     ["no_such_pkg is not installed", "pip install no_such"]),
    ("package-alone", {}, ["data.dataset=package:json"],
     ["package:json'", "expected package:NAME/PATH, a file of .json"]),
    ("package-type", {}, ["data.dataset=package:yaml/a.csv"], ["package:yaml/a.csv'", "expected package:NAME/PATH"]),
    ("package-file", {}, ["data.dataset=package:yaml/a.json"], ["the installed package yaml has no file a.json"]),
    ("hub", {}, ["data.dataset=nobody/no-such-dataset"],
     ["'nobody/no-such-dataset', split 'train'", "expected a hub name"]),
    ("hub-name", {}, ["data.dataset=a/b/c"], ["data.dataset='a/b/c'", "expected a hub name"]),
    ("hub-letters", {}, ["data.dataset='what a name'"], ["data.dataset='what a name'", "expected a hub name"]),
    ("empty-folder", {"d/": ""}, ["data.dataset=./d"],
     ["'./d', split 'train'", "any data files", "expected a folder with"]),
    ("other-files", {"d/a.bin": b"1"}, ["data.dataset=./d"],
     ["'./d'", "No (supported) data files", "expected a folder with"]),
    ("script", {"d/d.py": "1"}, ["data.dataset=./d"],
     ["'./d'", "scripts are no longer supported", "expected a folder with"]),
    ("saved-folder-in-part",
     {"d/state.json": '{"_data_files": [{"filename": "a.arrow"}]}', "d/dataset_info.json": "{}"}, ["data.dataset=./d"],
     ["data.dataset='./d', split 'train'", "expected a folder with files of", "save_to_disk has written"]),
    ("split-of-json", {"d.json": json.dumps(GOOD)}, [*JSON, "data.split=test"], ["'test'", "Unknown split", "'train'"]),
    ("split-of-lines", {"d.jsonl": lines(*GOOD)}, [*LINES, "data.split=dev"],
     ["split 'dev'", "Unknown split", "'train'"]),
    ("split-of-parquet", {"d.parquet": parquet(GOOD)}, [*TABLE, "data.split=dev"],
     ["split 'dev'", "Unknown", "'train'"]),
    ("split-of-folder", {"d/train.jsonl": lines(*GOOD)}, ["data.dataset=./d", "data.split=x"],
     ["'x'", "Unknown", "'train'"]),
    ("eval-split", {"d.jsonl": lines(*GOOD)}, [*LINES, "data.eval_split=dev"], ["'dev'", "Unknown split", "'train'"]),
    ("slice", {"d.jsonl": lines(*GOOD)}, [*LINES, "data.split='train[x]'"],
     ["split 'train[x]'", "expected the name of a split"]),
    ("all-held-out", {"d.jsonl": lines(GOOD[0])}, LINES,
     ["data.eval_fraction=0.2", "leaves no row", "expected less, or 0"]),
]

CONTENT: list[Bad] = [
    ("json-empty", {"d.json": ""}, JSON, ["'d.json'", "has no rows", "expected at least one"]),
    ("json-no-rows", {"d.json": "[]"}, JSON, ["'d.json'", "expected a list of objects, at least one"]),
    ("json-cut", {"d.json": json.dumps(GOOD)[:-9]}, JSON,
     ["'d.json'", "is not JSON", "line 1 column", "expected a list of"]),
    ("json-numbers", {"d.json": "[1, 2]"}, JSON, ["'d.json'", "expected a list of objects"]),
    ("json-null", {"d.json": "null"}, JSON, ["'d.json'", "expected a list of objects"]),
    ("json-columns", {"d.json": '{"instruction": ["a"], "output": ["b"]}'}, JSON,
     ["'d.json'", "such a list under `data`"]),
    ("json-deep", {"d.json": "[" * 99999}, JSON, ["'d.json'", "too deeply nested", "expected a list of objects"]),
    ("json-latin-1", {"d.json": b'[{"output": "\xe9"}]'}, JSON, ["'d.json'", "byte 14 is 0xe9", "expected UTF-8"]),
    ("json-utf-16", {"d.json": json.dumps(GOOD).encode("utf-16")}, JSON, ["'d.json'", "is UTF-16", "expected UTF-8"]),
    ("json-types", {"d.json": json.dumps([*GOOD, {"instruction": "a", "output": 5}])}, JSON,
     ["'d.json'", "row 4: field 'output' is a number", "expected text, as in row 0"]),
    ("json-types-within", {"d.json": json.dumps([chat(("user", "a")), chat(("user", 1))])}, JSON,
     ["'d.json'", "row 1: field 'messages[].content' is a number", "expected text, as in row 0"]),
    ("json-surrogate", {"d.json": '[{"output": "\\ud800"}]'}, JSON, ["row 0", "'output'", "expected whole characters"]),
    ("json-large", {"d.json": f'[{{"output": "a", "n": {10**30}}}]'}, JSON,
     ["row 0", "'n'", "expected numbers of 64 bits"]),
    ("json-lines-cut", {"d.json": lines(*GOOD)[:-9]}, JSON,
     ["'d.json'", "line 4 is not JSON", "expected one object a line"]),
    ("lines-empty", {"d.jsonl": ""}, LINES, ["'d.jsonl'", "has no rows", "expected at least one"]),
    ("lines-blank", {"d.jsonl": "\n\n \n"}, LINES, ["'d.jsonl'", "has no rows", "expected at least one"]),
    ("lines-cut", {"d.jsonl": lines(*GOOD)[:-9]}, LINES,
     ["'d.jsonl'", "line 4 is not JSON", "expected one object a line"]),
    ("lines-commas", {"d.jsonl": lines(*GOOD).replace("}", "},")}, LINES,
     ["line 1", "Extra data, column", "one object"]),
    ("lines-python", {"d.jsonl": repr(GOOD[0])}, LINES,
     ["line 1 is not JSON", "double quotes", "expected one object a line"]),
    ("lines-text", {"d.jsonl": "Say it.\n"}, LINES, ["line 1 is not JSON", "column 1;", "expected one object a line"]),
    ("lines-numbers", {"d.jsonl": "1\n2\n"}, LINES, ["line 1 is a number", "expected an object"]),
    ("lines-latin-1", {"d.jsonl": lines(*GOOD).encode() + b'{"output": "\xe9"}'}, LINES,
     ["line 5", "0xe9", "expected UTF-8"]),
    ("lines-utf-16", {"d.jsonl": lines(*GOOD).encode("utf-16")}, LINES, ["'d.jsonl'", "is UTF-16", "expected UTF-8"]),
    ("lines-types", {"d.jsonl": lines(*GOOD, {"instruction": "a", "output": ["b"]})}, LINES,
     ["line 5: field 'output' is a list", "expected text, as in line 1"]),
    ("lines-twice", {"d.jsonl": '{"output": "a", "output": "b"}'}, LINES,
     ["line 1", "'output' stands twice", "expected once"]),
    ("lines-zeros", {"d.jsonl": lines(*GOOD).encode() + b"\0" * 9}, LINES,
     ["line 5 is not JSON", "expected one object"]),
    ("parquet-empty", {"d.parquet": b""}, TABLE,
     ["'d.parquet'", "size is 0 bytes", "expected a whole file of .parquet"]),
    ("parquet-no-rows", {"d.parquet": parquet([])}, TABLE, ["'d.parquet'", "has no rows", "expected at least one"]),
    ("parquet-text", {"d.parquet": lines(*GOOD)}, TABLE,
     ["'d.parquet'", "magic bytes not found", "expected a whole file"]),
    ("parquet-cut", {"d.parquet": parquet(GOOD)[:-9]}, TABLE,
     ["'d.parquet'", "magic bytes not found", "expected a whole"]),
    ("folder-cut", {"d/a.jsonl": lines(*GOOD), "d/b.jsonl": lines(*GOOD)[:-9]}, ["data.dataset=./d"],
     ["data.dataset='./d'", "b.jsonl, line 4 is not JSON", "expected one object a line"]),
    ("folder-columns", {"d/a.jsonl": lines(*GOOD), "d/b.jsonl": lines(HOTPOT)}, ["data.dataset=./d"],
     ["data.dataset='./d'", "must have the same columns", "supporting_facts", "expected a folder with files of"]),
]

FIELDS: list[Bad] = [
    ("unknown", {"d.jsonl": lines({"text": "a"})}, LINES,
     ["data.format='auto'", "the fields text", "expected messages"]),
    ("half", {"d.jsonl": lines({"instruction": "a"})}, LINES,
     ["the fields instruction", "instruction: instruction, output"]),
    ("renamed", {"d.jsonl": lines(*GOOD)}, [*LINES, "data.output_field=answer"],
     ["instruction, output", "instruction, answer"]),
    ("chat-named", {"d.jsonl": lines(*GOOD)}, [*LINES, "data.format=messages"],
     ["the fields instr", "messages: messages"]),
    ("instruction", {"d.jsonl": lines({"instruction": 5, "output": "b"})}, LINES,
     [*ROW, "'instruction': expected text"]),
    ("output", {"d.jsonl": lines({"instruction": "a", "output": ["b"]})}, LINES, [*ROW, "'output': expected text"]),
    ("input", {"d.parquet": parquet(GOOD), "d.jsonl": lines({"instruction": "a", "input": {"b": "c"}, "output": "b"})},
     LINES, [*ROW, "field 'input': expected text, found {'b': 'c'}"]),
    ("chat-text", {"d.jsonl": lines({"messages": "hello"})}, LINES,
     [*ROW, "'messages' is not a list of {role, content}"]),
    ("chat-sharegpt", {"d.jsonl": lines({"messages": [{"from": "human", "value": "a"}]})}, LINES,
     [*ROW, "'messages' is not a list of {role, content}"]),
    ("chat-empty", {"d.jsonl": lines(chat(("assistant", "a")), chat())}, LINES,
     ["row 1", "ends with no message: expected"]),
    ("chat-question", {"d.jsonl": lines(chat(("user", "a")))}, LINES,
     [*ROW, "ends with user: expected a message of the ass"]),
    ("chat-role", {"d.jsonl": lines(chat((None, "a")))}, LINES, [*ROW, "not a list of {role, content}, both text"]),
    ("chat-parts", {"d.jsonl": lines(chat(("assistant", [{"text": "a"}])))}, LINES,
     [*ROW, "{role, content}, both text"]),
    ("chat-number", {"d.jsonl": lines(chat(("assistant", 5)))}, LINES, [*ROW, "{role, content}, both text"]),
    ("facts", {"d.jsonl": lines({**HOTPOT, "supporting_facts": "Ann"})}, LINES,
     [*ROW, f"field 'supporting_facts' {NOT_HOTPOT}title and sent_id"]),
    ("context", {"d.jsonl": lines({**HOTPOT, "context": {"title": ["Ann"], "sentences": []}})}, LINES,
     [*ROW, f"field 'context' {NOT_HOTPOT}title and sentences"]),
    ("question", {"d.jsonl": lines({**HOTPOT, "question": 5})}, LINES,
     [*ROW, "field 'question': expected text, found 5"]),
    ("paragraphs", {"d.jsonl": lines({"context": "Ann is ill."})}, [*LINES, "data.format=paragraphs"],
     [*ROW, "context is not as in HotpotQA: expected paragraphs"]),
    ("needle-words", {"d.jsonl": lines(HOTPOT)}, [*LINES, "data.format=needle", "data.needle_words=[9]"],
     ["data.needle_words=9: expected at least 32"]),
    ("needle-count", {"d.jsonl": lines(HOTPOT)}, [*LINES, "data.format=needle", "data.needle_count=99"],
     ["data.needle_count=99: expected 1 to 10"]),
    ("too-long", {"d.jsonl": lines(*GOOD)}, [*LINES, "data.max_length=3"],
     ["data.max_length=3", "none of the", "too long"]),
    ("no-responses", {"d.jsonl": lines(*[{"instruction": "a", "output": " \n"}] * 4)}, LINES,
     ["data.dataset='d.jsonl'", "4 without a response", "expected a response in at least one"]),
]
TEMPLATES: list[Bad] = [
    ("role", {"d.jsonl": lines(chat(("tool", "a"), ("assistant", "b")))}, LINES,
     [*ROW, "unknown role tool", "expected system"]),
    ("tool-calls", {"d.jsonl": lines({"messages": [CALL]})}, LINES,
     [*ROW, "leaves out tool_calls", "expected rows without"]),
    ("function-call",
     {"d.jsonl": lines({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]})}, LINES,
     [*ROW, "leaves out function_call", "expected rows without"]),
    ("reasoning", {"d.jsonl": lines({"messages": [{"role": "assistant", "content": "a", "reasoning_content": "so"}]})},
     LINES, [*ROW, "leaves out reasoning_content", "expected rows without"]),
    ("tools", {"d.jsonl": lines(chat(("assistant", "b"), tools=[{"name": "f"}]))}, LINES,
     [*ROW, "leaves out tools", "expected"]),
    ("tools-text", {"d.jsonl": lines(chat(("assistant", "b"), tools="f"))}, LINES,
     [*ROW, "'tools' is not JSON", "expected a"]),
    ("tools-names", {"d.jsonl": lines(chat(("assistant", "b"), tools=["f"]))}, LINES,
     [*ROW, "'tools' is not a list of func"]),
    ("spelled-and-changed",
     {"d.jsonl": lines(chat(("user", "<|mask|>"), ("assistant", "b"))),
      **tokenizer("{% for m in messages %}{{ m.content | replace('<|mask|>', '') }}{% endfor %}")},
     [*LINES, *TOK], [*ROW, "a message spells a special token", "expected a text without '<|mask|>'"]),
    ("no-response", {"d.jsonl": lines(*GOOD), **tokenizer("{{ messages[0].content }}")}, [*LINES, *TOK],
     ["data.dataset='d.jsonl'", "4 without a response", "expected a response in at least one"]),
    ("no-prefix", {"d.jsonl": lines(*GOOD), **tokenizer("{{ messages | length }}{{ messages[0].content }}")},
     [*LINES, *TOK],
     [*ROW, "the prompt is not how the whole chat begins", "expected a chat template that only appends"]),
    ("type-in-template", {"d.jsonl": lines(*GOOD), **tokenizer("{{ messages[0].content + 1 }}")}, [*LINES, *TOK],
     [*ROW, "the chat template of the tokenizer refuses the chat"]),
    ("no-jinja", {"d.jsonl": lines(*GOOD), **tokenizer("{% for m in messages %}")}, [*LINES, *TOK],
     ["model.tokenizer=", "line 1 of its chat template is not Jinja", "expected a tokenizer with a template"]),
]
TOKENIZERS: list[Bad] = [
    ("number", {}, ["model.tokenizer=5"], ["model.tokenizer=5", "expected text or none"]),
    ("absent", {}, ["model.tokenizer=./absent"], ["model.tokenizer='./absent'", "no such folder"]),
    ("absent-home", {}, ["model.tokenizer='~nobody-here/tok'"], ["~nobody-here/tok", "home directory", "expected a"]),
    ("too-long", {}, ["model.tokenizer=" + "a" * 300], ["model.tokenizer=", "too long", "expected a folder"]),
    ("hub", {}, ["model.tokenizer=nobody/no-such-model"],
     ["model.tokenizer='nobody/no-such-model'", "expected a local folder"]),
    ("hub-letters", {}, ["model.tokenizer='what a name'"],
     ["model.tokenizer='what a name'", "expected a local folder"]),
    ("hub-parts", {}, ["model.tokenizer=a/b/c"], ["model.tokenizer='a/b/c'", "expected a local folder"]),
    ("no-files", {"tok/config.json": "{}"}, TOK, ["model.tokenizer='tok'", "no tokenizer files", "tokenizer.json"]),
    ("a-file", tokenizer(), ["model.tokenizer=tok/tokenizer.json"],
     ["model.tokenizer='tok/tokenizer.json'", "is a file; expected a folder"]),
    ("cut", {**tokenizer(), "tok/tokenizer.json": '{"model":'}, TOK,
     ["'tok'", "tokenizer.json is not JSON", "expected a"]),
    ("of-another-program", {**tokenizer(), "tok/tokenizer.json": '{"a": 1}'}, TOK,
     ["model.tokenizer='tok'", "expected a"]),
    ("config-cut", {**tokenizer(), "tok/tokenizer_config.json": "{"}, TOK,
     ["'tok'", "tokenizer_config.json is not JSON", "expected a"]),
    ("no-end", tokenizer(eos_token=None), TOK,
     ["model.tokenizer='tok'", "neither an eos nor a pad token", "expected one"]),
    ("no-template", tokenizer(chat_template=None), TOK,
     ["model.tokenizer=", "no chat template; expected the tokenizer"]),
    ("vocabulary-small", {}, ["model.tokenizer_vocab_size=262"],
     ["model.tokenizer_vocab_size=262: expected at least 263"]),
    ("vocabulary-text", {}, ["model.tokenizer_vocab_size=big"],
     ["tokenizer_vocab_size='big'", "expected whole number"]),
    ("vocabulary-none", {}, ["model.tokenizer_vocab_size=0"], ["model.tokenizer_vocab_size=0: expected at least 263"]),
    ("vocabulary-larger", {}, ["model.dimensions.vocab_size=9"],
     ["model.dimensions: vocab_size 9", "expected at least", "263"]),
]

# fmt: on
SETTINGS: list[Bad] = [
    (name, {}, [f"data.{setting}"], [f"data.{says}"])
    for name, setting, says in [
        ("format", "format=alpaca", "format='alpaca': expected one of auto, instruction, messages"),
        ("fraction-all", "eval_fraction=1", "eval_fraction=1.0: expected in [0, 1)"),
        ("fraction-negative", "eval_fraction=-0.1", "eval_fraction=-0.1: expected in [0, 1)"),
        ("fraction-text", "eval_fraction=half", "eval_fraction='half': expected number"),
        ("length-none", "max_length=0", "max_length=0: expected at least 1"),
        ("length-number", "max_length=1.5", "max_length=1.5: expected whole number"),
        ("train-size", "train_size=0", "train_size=0: expected at least 1"),
        ("eval-size", "eval_size=-1", "eval_size=-1: expected at least 1"),
        ("processes", "num_proc=0", "num_proc=0: expected at least 1"),
        ("mask", "mask_prompt=1", "mask_prompt=1: expected true or false"),
        ("split", "split=null", "split=None: expected text"),
        ("words", "needle_words=[]", "needle_words=(): expected at least one length"),
        ("words-text", "needle_words=many", "needle_words='many': expected list of whole number"),
        ("paragraphs", "hotpotqa_paragraphs=ten", "hotpotqa_paragraphs='ten': expected one of supporting, all"),
        ("field", "output_field=null", "output_field=None: expected text"),
    ]
]

BAD = [
    (f"{section}-{name}", files, [*overrides, *more], says)
    for section, table, more in [
        ("source", SOURCES, []),
        ("content", CONTENT, []),
        ("field", FIELDS, ["data.eval_fraction=0"]),
        ("template", TEMPLATES, ["data.eval_fraction=0"]),
        ("tokenizer", TOKENIZERS, []),
        ("setting", SETTINGS, []),
    ]
    for name, files, overrides, says in table
]
