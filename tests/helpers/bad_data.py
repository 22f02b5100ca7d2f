"""A table of data and tokenizers that cannot be trained on: files, overrides, and what the one line must say."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow
import pyarrow.parquet

from dllm_memdlm.data import train_tokenizer

GOOD = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(4)]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(*turns: tuple[str | None, Any], **beside: Any) -> str:
    return lines({"messages": [{"role": role, "content": content} for role, content in turns], **beside})


def said(**beside: Any) -> str:
    return lines({"messages": [{"role": "assistant", "content": "a", **beside}]})


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


TEXT, CUT = lines(*GOOD), lines(*GOOD)[:-9]

#: Of each row a name, its files or the text of d.jsonl, overrides beside those that take the files, and what is said;
#: bars between parts.
Row = tuple[str, dict[str, bytes | str] | bytes | str, str, str]

# fmt: off
SOURCES: list[Row] = [
    ("none", {}, "data.dataset=''", "data.dataset='' | expected a dataset name or path"),
    ("several", {}, "data.dataset=[a.json,b.json]", "data.dataset='a.json' | no such file"),
    ("shares", TEXT, "data.dataset={d.jsonl: 0}", "data.dataset={'d.jsonl': 0} | expected text or list of"),
    ("stream-held-out", TEXT, "data.streaming=true", "data.eval_fraction=0.2: expected 0 with data.streaming"),
    ("absent-file", {}, "data.dataset=absent.json", "data.dataset='absent.json' | no such file | /absent.json"),
    ("absent-folder", {}, "data.dataset=./absent", "data.dataset='./absent' | no such file or folder | expected a hub"),
    ("absent-at-home", {}, "data.dataset='~/no/such'", "data.dataset='~/no/such' | no such file or folder"),
    ("absent-home", {}, "data.dataset='~nobody-here/a.json'", "~nobody-here | no such file or folder | expected a"),
    ("not-made", {}, "data.dataset=data/hotpotqa.jsonl", "no such file | in a checkout `make data` writes it"),
    ("inline", {}, "data.dataset='{\"output\": \"" + "a" * 300 + "\"}'", "data.dataset= | expected a hub name"),
    ("table-of-text", {"d.tsv": "a,b"}, "", "'d.tsv' | type '.tsv' | expected .json, | .csv, also with .gz, .bz2, .xz"),
    ("packed", {"d.jsonl.gz": b"\x1f\x8b"}, "", "'d.jsonl.gz' | expected a whole file"),
    ("packed-table", {"d.csv.zip": b"PK"}, "", "'d.csv.zip' | type '.zip' | expected .json"),
    ("uneven", {"d.csv": "instruction,output\na,b\na,b,c\n"}, "", "'d.csv' | Expected 2 fields in line 3, saw 3"),
    ("no-suffix", {"rows": "{}"}, "", "'rows' | a file of type '' | expected .json, .jsonl"),
    ("hub", {}, "data.dataset=nobody/no-such", "'nobody/no-such', split 'train' | expected a hub name"),
    ("empty-folder", {"d/": ""}, "", "'./d', split 'train' | any data files | expected a folder with"),
    ("other-files", {"d/a.bin": b"1"}, "", "'./d' | No (supported) data files | expected a folder with"),
    ("script", {"d/d.py": "1"}, "", "'./d' | scripts are no longer supported | expected a folder with"),
    ("saved-in-part", {"d/state.json": '{"_data_files": [{"filename": "a.arrow"}]}', "d/dataset_info.json": "{}"}, "",
     "data.dataset='./d', split 'train' | expected a folder with files of | save_to_disk has written"),
    ("split-of-lines", TEXT, "data.split=dev", "split 'dev' | Unknown split | 'train'"),
    ("split-of-folder", {"d/train.jsonl": TEXT}, "data.split=x", "split 'x' | Unknown split | 'train'"),
    ("eval-split", TEXT, "data.eval_split=dev", "split 'dev' | Unknown split | 'train'"),
    ("slice", TEXT, "data.split='train[x]'", "split 'train[x]' | expected the name of a split"),
    ("all-held-out", lines(GOOD[0]), "data.eval_fraction=0.2", "data.eval_fraction=0.2: leaves no row | or 0"),
]
CONTENT: list[Row] = [
    ("json-empty", {"d.json": ""}, "", "'d.json', split 'train' | is not JSON | expected a list of objects"),
    ("json-no-rows", {"d.json": "[]"}, "", "'d.json' | has no rows; expected at least one"),
    ("json-cut", {"d.json": json.dumps(GOOD)[:-9]}, "", "'d.json' | is not JSON | line 1 column | expected a list of"),
    ("json-numbers", {"d.json": "[1, 2]"}, "", "'d.json' | expected a list of objects"),
    ("json-columns", {"d.json": '{"output": ["b"]}'}, "", "'d.json' | such a list under `data`"),
    ("json-deep", {"d.json": "[" * 99999}, "", "'d.json' | too deeply nested; expected objects"),
    ("json-latin-1", {"d.json": b'[{"output": "\xe9"}]'}, "", "byte 0xe9 in position 13 | expected UTF-8"),
    ("json-utf-16", {"d.json": json.dumps(GOOD).encode("utf-16")}, "", "'d.json' | byte 0xff | expected UTF-8"),
    ("json-types", {"d.json": json.dumps([*GOOD, {"output": 5}])}, "", "row 4: Field output | string vs int64"),
    ("json-types-within", {"d.json": '[{"a": [{"b": "c"}]}, {"a": [{"b": 1}]}]'}, "", "row 1: Field b | expected rows"),
    ("json-surrogate", {"d.json": '[{"output": "\\ud800"}]'}, "", "row 0: | surrogates not allowed; expected rows"),
    ("json-large", {"d.json": f'[{{"output": "a", "n": {10**30}}}]'}, "", "row 0: | int too large | expected rows"),
    ("json-lines-cut", {"d.json": CUT}, "", "'d.json' | line 4 is not JSON | expected one object a line"),
    ("empty", "", "", "'d.jsonl' | has no rows; expected at least one"),
    ("blank", "\n\n \n", "", "'d.jsonl' | has no rows; expected at least one"),
    ("cut", CUT, "", "'d.jsonl' | line 4 is not JSON | expected one object a line"),
    ("commas", TEXT.replace("}", "},"), "", "line 1 is not JSON: Extra data, column | one object"),
    ("python", repr(GOOD[0]), "", "line 1 is not JSON | double quotes | expected one object a line"),
    ("numbers", "1\n2\n", "", "line 1 is 1; expected an object"),
    ("latin-1", TEXT.encode() + b'{"output": "\xe9"}', "", "line 5: | 0xe9 | expected UTF-8"),
    ("types", lines(*GOOD, {"output": ["b"]}), "", "line 5: Field output | string vs list | expected rows that fit"),
    ("texts-and-numbers", lines(*GOOD, {"output": "1"}, {"output": 1}), "", "line 6: Field output | expected rows"),
    ("twice", '{"output": "a", "output": "b"}', "", "line 1: field 'output' stands twice | expected once"),
    ("zeros", TEXT.encode() + b"\0" * 9, "", "line 5 is not JSON | expected one object"),
    ("parquet-empty", {"d.parquet": b""}, "", "'d.parquet' | size is 0 bytes | expected a whole file"),
    ("parquet-no-rows", {"d.parquet": parquet([])}, "", "'d.parquet' | has no rows; expected at least one"),
    ("parquet-text", {"d.parquet": TEXT}, "", "'d.parquet' | magic bytes not found | expected a whole file"),
    ("parquet-cut", {"d.parquet": parquet(GOOD)[:-9]}, "", "magic bytes not found | expected a whole file"),
    ("folder-cut", {"d/a.jsonl": TEXT, "d/b.jsonl": CUT}, "", "'./d' | b.jsonl, line 4 is not JSON"),
    ("folder-columns", {"d/a.jsonl": TEXT, "d/b.jsonl": lines({"a": "b"})}, "",
     "'./d' | a.jsonl and b.jsonl differ in a, instruction, output; expected the same fields"),
    ("folder-types", {"d/a.jsonl": lines({"a": "b"}), "d/b.jsonl": lines({"a": ["b"]})}, "",
     "'./d', split 'train' | Field a | string vs list | expected a folder"),
]
FIELDS: list[Row] = [
    ("stream-tokenizer", TEXT, "data.streaming=true", "model.tokenizer=None: expected one with data.streaming"),
    ("unknown", lines({"text": "a"}), "", "data.format='auto' | the fields text | expected messages, or"),
    ("half", lines({"instruction": "a"}), "", "the fields instruction; | or instruction and output; fields of"),
    ("renamed", TEXT, "data.output_field=answer", "fields instruction, output | or instruction and answer; fields of"),
    ("chat-named", TEXT, "data.format=messages", "data.format='messages' | instruction, output; expected messages, or"),
    ("instruction", lines({"instruction": 5, "output": "b"}), "", "field 'instruction': expected text, found 5"),
    ("output", lines({"instruction": "a", "output": True}), "", "row 0: field 'output': expected text, found True"),
    ("input", lines({"instruction": "a", "input": {"b": 1}, "output": "b"}), "", "expected text, found {'b': 1}"),
    ("chat-text", lines({"messages": "hello"}), "", "row 0: field 'messages' is not a list of {role, content} or {"),
    ("chat-sharegpt", lines({"conversations": [{"from": "human", "value": "a"}]}), "", "conversations' ends with user"),
    ("chat-empty", chat(("assistant", "a")) + chat(), "", "row 1: | ends with no message: expected a message of the"),
    ("chat-question", chat(("user", "a")), "", "row 0: field 'messages' ends with user: expected a message of the ass"),
    ("chat-role", chat((None, "a")), "", "row 0: | not a list of {role, content} or {from,"),
    ("chat-parts", chat(("assistant", [{"type": "image"}])), "", "row 0: a message has the part {'type': 'image'"),
    ("too-long", TEXT, "data.max_length=3", "data.max_length=3: none of the 4 train | from 11 to 11 tokens"),
    ("no-responses", lines({"instruction": "a", "output": " \n"}), "", "1 without a response | expected a resp"),
]
TEMPLATES: list[Row] = [
    ("role", chat(("tool", "a"), ("assistant", "b")), "", "row 0: the chat template | unknown role tool: expected"),
    ("tool-calls", lines({"messages": [CALL]}), "", "row 0: | leaves out tool_calls; expected rows without"),
    ("function-call", said(function_call={"name": "f"}), "", "row 0: | leaves out function_call; expected"),
    ("reasoning", said(reasoning_content="so"), "", "row 0: | leaves out reasoning_content; expected rows without"),
    ("thinking", said(thinking="so"), "", "row 0: | leaves out thinking; expected rows without"),
    ("tools", chat(("assistant", "b"), tools=[{"name": "f"}]), "", "row 0: | leaves out tools; expected rows without"),
    ("tools-text", chat(("assistant", "b"), tools="f"), "", "field 'tools' is not JSON | expected a list of func"),
    ("tools-names", chat(("assistant", "b"), tools=["f"]), "", "row 0: field 'tools' is not a list of functions"),
    ("spelled-and-changed", {"d.jsonl": chat(("user", "<|mask|>"), ("assistant", "b")),
     **tokenizer("{% for m in messages %}{{ m.content | replace('<|mask|>', '') }}{% endfor %}")}, "",
     "row 0: a message spells a special token | expected a text without '<|mask|>'"),
    ("no-response", {"d.jsonl": TEXT, **tokenizer("{{ messages[0].content }}")}, "",
     "data.dataset='d.jsonl' | 4 without a response | expected a response in at least one"),
    ("no-prefix", {"d.jsonl": TEXT, **tokenizer("{{ messages | length }}{{ messages[0].content }}")}, "",
     "row 0: the prompt is not how the whole chat begins | expected a chat template that only appends"),
    ("type-in-template", {"d.jsonl": TEXT, **tokenizer("{{ messages[0].content + 1 }}")}, "",
     "row 0: the chat template of the tokenizer refuses the chat: can only"),
    ("refusal", {"d.jsonl": TEXT, **tokenizer("{{ raise_exception('no\\nway.') }}")}, "", "refuses the chat: no way"),
    ("no-jinja", {"d.jsonl": TEXT, **tokenizer("{% for m in messages %}\n{{ m.content }")}, "",
     "model.tokenizer= | line 2 of its chat template is not Jinja | expected a tokenizer with a template"),
]
TOKENIZERS: list[Row] = [
    ("number", {}, "model.tokenizer=5", "model.tokenizer=5 | expected folder or hub name or none"),
    ("vocabulary-text", {}, "model.tokenizer_vocab_size=big", "tokenizer_vocab_size='big' | expected whole number"),
    ("absent", {}, "model.tokenizer=./absent", "model.tokenizer='./absent' | no such folder; expected"),
    ("absent-home", {}, "model.tokenizer='~nobody-here/tok'", "~nobody-here/tok | no such folder; expected"),
    ("too-long", {}, "model.tokenizer=" + "a" * 300, "model.tokenizer= | expected a local folder"),
    ("hub", {}, "model.tokenizer=nobody/no-such-model", "model.tokenizer='nobody/no-such-model' | expected a"),
    ("no-files", {"tok/config.json": "{}"}, "", "model.tokenizer='tok' | no tokenizer files (tokenizer.json"),
    ("a-file", tokenizer(), "model.tokenizer=tok/tokenizer.json", "'tok/tokenizer.json': no such folder; expected one"),
    ("cut", {**tokenizer(), "tok/tokenizer.json": '{"model":'}, "", "'tok' | tokenizer.json is not JSON | expected a"),
    ("of-another-program", {**tokenizer(), "tok/tokenizer.json": '{"a": 1}'}, "", "model.tokenizer='tok':"),
    ("config-cut", {**tokenizer(), "tok/tokenizer_config.json": "{"}, "", "tokenizer_config.json is not JSON"),
    ("no-end", tokenizer(eos_token=None), "", "model.tokenizer='tok' | neither an eos nor a pad token; expected one"),
    ("no-template", tokenizer(chat_template=None), "", "model.tokenizer= | no chat template; expected the tokenizer"),
    ("vocabulary-small", {}, "model.tokenizer_vocab_size=262", "model.tokenizer_vocab_size=262: expected at least 263"),
    ("vocabulary-larger", {}, "model.dimensions.vocab_size=9", "vocab_size 9 | expected at least | 263"),
]
# fmt: on


def taking(files: dict[str, Any], whole: bool) -> list[str]:
    """The overrides that take files; `whole` holds none of their rows out."""
    data = next((name for name in files if not name.startswith("tok/")), None)
    taken = [f"data.dataset={'./d' if '/' in data else data}"] if data else []
    taken += ["model.tokenizer=tok"] if any(name.startswith("tok/") for name in files) else []
    return taken + ["data.eval_fraction=0"] * whole


#: Of each row a name, the files to write, the overrides, and the parts of the one line on stderr.
BAD = [
    (f"{section}-{name}", files, [*taking(files, whole), *filter(None, [more])], says.split(" | "))
    for section, table, whole in [
        *(("source", SOURCES, False), ("content", CONTENT, False), ("field", FIELDS, True)),
        *(("template", TEMPLATES, True), ("tokenizer", TOKENIZERS, False)),
    ]
    for name, given, more, says in table
    for files in [given if isinstance(given, dict) else {"d.jsonl": given}]
]
