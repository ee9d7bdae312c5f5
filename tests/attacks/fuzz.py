"""Feeds every reader damaged and hostile files, and keeps what does not end as it should.

    python tests/attacks/fuzz.py --minutes 60 --keep findings      # all readers in turn
    python tests/attacks/fuzz.py --minutes 5 --only yaml --only gguf

Good files are the seeds, and hypothesis draws what becomes of them. A reader gives a value or raises an error of ours.
A finding is any other exception, an end of the process, or more than a minute; of those at one place the smallest is
kept in the folder, as the files that it takes and a traceback. At the end there is a table of runs and findings.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from trimtab.errors import TrimtabError
from trimtab.reading import within

SECONDS = 60.0
Files = dict[str, bytes]
"""What lies in a folder, by name."""

# What becomes of a file ---------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 1.5, -0.0, 10**6, 10**9, 2**31, 2**53, 2**63, 2**64, 10**30, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        -(2**63),
        "",
        " ",
        "a",
        "\x00",
        "\ud800",
        "\x1b[2J",
        "\u202e",
        "../../x",
        "/dev/zero",
    ),
    *("a" * 5000, "9" * 5000, "1e-5", "*.q_proj", "<b>", "{{ 1 / 0 }}", "{% for", "~", "a/b", "é"),
    *([], {}, [[]], [{}], {"": 1}, {"a": {"b": [1, 2]}}, [None], [1, "a", None]),
]
PIECES = [
    *(
        b"\x00",
        b"\xff",
        b"\xff\xfe",
        b"\n",
        b"\r\n",
        b"\t",
        b'"',
        b"'",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"- ",
        b"&a ",
    ),
    *(
        b"*a",
        b"<<: *a",
        b"!!bool ",
        b"!!timestamp ",
        b"!!python/object:os.system ",
        b"!!binary ",
        b"? ",
        b"|",
        b">",
        b"#",
    ),
    *(
        b"%",
        b"@",
        b"---\n",
        b"1e999",
        b"NaN",
        b"0x",
        b"9" * 5000,
        b"[" * 200,
        b"{a: " * 150,
        b"\x1b[2J",
        b"\xed\xa0\x80",
    ),
    *(
        "\u2028\u202e".encode(),
        b"{{",
        b"}}",
        b"{%",
        b"\\u0000",
        b"\\ud800",
        b"null",
        b"true",
        b"-1",
        b"=",
        b";",
        b"\x85",
    ),
]


def spoiled_bytes(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """``data`` after one to four accidents: cut, changed, doubled, or with something put into it."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(out)))
        end = min(len(out), at + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["cut", "remove", "insert", "change", "double", "number", "end"]))
        if kind == "cut":
            del out[at:]
        elif kind == "remove":
            del out[at:end]
        elif kind == "insert":
            out[at:at] = draw(st.sampled_from(PIECES))
        elif kind == "change" and at < len(out):
            out[at] = draw(st.integers(0, 255))
        elif kind == "double":
            out[at:at] = out[at:end] * draw(st.integers(1, 3))
        elif kind == "number":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            out[at : at + size] = draw(
                st.sampled_from([0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**63, 2**64 - 1])
            ).to_bytes(8, "little")[:size]
        else:
            out += draw(st.sampled_from(PIECES))
    return bytes(out)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in items for place in places(one, (*path, key)))]


def spoiled_value(draw: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with one to three of the values inside replaced, removed, renamed, or put into the place of another."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        known = places(value)
        path = known[draw(st.integers(0, len(known) - 1))]
        new = copy.deepcopy(draw(st.sampled_from(VALUES)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                value = new
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["set", "set", "remove", "rename", "move", "nest"]))
        if kind == "set":
            holder[path[-1]] = new
        elif kind == "remove":
            del holder[path[-1]]
        elif kind == "rename" and isinstance(holder, dict):
            name = draw(st.sampled_from(["", "x", "\x1b", "a.b", "model", "method", "A" * 300, "../x", "self"]))
            holder[name] = holder.pop(path[-1])
        elif kind == "move":
            holder[path[-1]] = copy.deepcopy(_at(value, draw(st.sampled_from(known))))
        else:
            holder[path[-1]] = [holder[path[-1]]] * draw(st.integers(0, 3))
    return value


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def spoiled_json(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """A JSON text, or each line of one, spoiled as a value; now and then as bytes."""
    if draw(st.integers(0, 3)) == 0:
        return spoiled_bytes(draw, data)
    lines = data.splitlines() if b"\n{" in data.strip() else [data]
    at = draw(st.integers(0, len(lines) - 1))
    with suppress(ValueError):
        text = json.dumps(spoiled_value(draw, json.loads(lines[at])), ensure_ascii=draw(st.booleans()))
        lines[at] = text.encode("utf-8", "surrogatepass")
    return b"\n".join(lines) + b"\n" * draw(st.integers(0, 1))


def spoiled_safetensors(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """A header spoiled as JSON, with its length right again; or bytes."""
    if draw(st.integers(0, 2)) == 0:
        return spoiled_bytes(draw, data)
    length = int.from_bytes(data[:8], "little")
    header = spoiled_json(draw, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def spoiled_yaml(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """A YAML text spoiled as a value, or as bytes."""
    import yaml

    if draw(st.booleans()):
        return spoiled_bytes(draw, data)
    try:
        value = spoiled_value(draw, yaml.safe_load(data))
    except (yaml.YAMLError, ValueError):  # spoiled once before
        return spoiled_bytes(draw, data)
    try:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=draw(st.booleans())).encode("utf-8", "replace")
    except (yaml.YAMLError, UnicodeError):
        return json.dumps(value).encode()


SPOILERS: list[tuple[str, Callable[..., bytes]]] = [
    (".yaml", spoiled_yaml),
    (".json", spoiled_json),
    (".jsonl", spoiled_json),
    (".safetensors", spoiled_safetensors),
]


def spoiled_files(draw: Callable[[Any], Any], files: Files, targets: list[str]) -> Files:
    """``files`` with one of ``targets`` spoiled, or gone, or empty, or in the place of another."""
    files = dict(files)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(targets))
        kind = draw(st.integers(0, 19))
        if kind == 0 and len(targets) > 1:
            files.pop(name, None)
        elif kind == 1:
            files[name] = draw(st.sampled_from([b"", b"\n", b"null", b"[]", b"{}", b"\x00" * 64]))
        elif kind == 2 and len(targets) > 1:
            files[name] = files.get(draw(st.sampled_from(targets)), b"")
        elif name in files:
            spoil = next((spoil for end, spoil in SPOILERS if name.endswith(end)), spoiled_bytes)
            files[name] = spoil(draw, files[name])
    return files


# The readers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """One way into the library: what it reads, and the files that it reads well."""

    read: Callable[[Path], object]
    seeds: Callable[[], list[Files]]
    targets: Callable[[Files], list[str]] = field(default=lambda files: list(files))


def folder_files(folder: Path) -> Files:
    """What a folder holds, its own folders, too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def made(make: Callable[[Path], object]) -> Files:
    """What ``make`` writes into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        return folder_files(Path(folder))


RUN_YAML = b"""model: {name: ./model, dtype: auto, add_tokens: ["<tool>"], attention: sdpa}
data: {train: [rows.jsonl, {path: more.csv, weight: 2}], validation: 0.1, test: {a: test.jsonl}, max_length: 64}
plan:
  - {match: "*.q_proj", layers: "outer:2", method: dora, rank: 8, alpha: 16}
  - {match: ["*.v_proj", lm_head], method: mora, rank: 8}
train: {epochs: 1.5, learning_rate: 1e-4, warmup: 0.1, validate_every: epoch, seed: 3, precision: float32}
quantisation: none
evaluation: {max_new_tokens: 8}
output: out
"""
STUDY_YAML = b"""reference: lora
base: {model: ./model, data: {train: a.jsonl, test: b.jsonl}, train: {epochs: 1}}
arms:
  lora: {plan: [{match: all-linear, method: lora, rank: 4}]}
  dora: {plan: [{match: all-linear, method: dora, rank: 4}]}
seeds: [0, 1]
"""
EXPLORE_YAML = b"""base:
  {model: ./model, data: {train: a.jsonl}, train: {max_steps: 5, learning_rate: 1e-3, metric: loss}}
budget: 2000
groups: {attention: {match: ["*.q_proj"]}, mlp: {match: ["*.up_proj"], layers: "outer:1"}}
methods: [lora, dora]
trials: 4
"""
OTHERS: list[Files] = [
    {"other.yaml": b"base_model: a/b\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_modules: [q_proj]\n"
     b"datasets: [{path: rows.jsonl, type: alpaca}]\nmicro_batch_size: 2\nnum_epochs: 3\nlearning_rate: 0.0002\n"
     b"val_set_size: 0.05\nsequence_len: 512\n"},
    {"other.yaml": b"model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\nlora_target: all\nlora_rank: 8\n"
     b"dataset: own\ntemplate: llama3\ncutoff_len: 512\nlearning_rate: 1.0e-4\nnum_train_epochs: 3.0\n",
     "dataset_info.json": b'{"own": {"file_name": "rows.json", "columns": {"prompt": "q"}}}'},
    {"other.yaml": b"model: ./here\ntrain: true\nfine_tune_type: dora\ndata: data\nnum_layers: 8\nbatch_size: 4\n"
     b"iters: 100\nlearning_rate: 1e-5\n"
     b"lora_parameters: {keys: [self_attn.q_proj], rank: 8, scale: 20.0, dropout: 0.0}\n"},
    {"other.json": b'{"peft_type": "LORA", "base_model_name_or_path": "a/b", "r": 8, "lora_alpha": 16,'
     b' "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "bias": "none",'
     b' "task_type": "CAUSAL_LM", "use_dora": false}'},
]  # fmt: skip


def read_run_yaml(folder: Path) -> object:
    from trimtab.config.read import load_config, to_yaml

    return to_yaml(load_config(folder / "run.yaml"))


def read_study_yaml(folder: Path) -> object:
    from trimtab.config.search import load_explore
    from trimtab.studies.study_cells import load_study

    return (
        load_study(folder / "study.yaml") if (folder / "study.yaml").exists() else load_explore(folder / "explore.yaml")
    )


def read_override(folder: Path) -> object:
    from trimtab.config.read import load_config

    words = (folder / "words.txt").read_bytes().decode("utf-8", "replace").split("\n")
    (folder / "run.yaml").write_bytes(RUN_YAML)
    return load_config(folder / "run.yaml", words)


def read_other(folder: Path) -> object:
    from trimtab.config.others import carry_over

    return carry_over(next(folder.glob("other.*"), folder / "other.yaml"))


@cache
def llama() -> Any:
    from tiny_runs import tiny_model

    return tiny_model()


def adapter_seeds() -> list[Files]:
    import trimtab
    from adapter_tools import trained
    from tiny_runs import tiny_model

    rules = trimtab.Rule
    plans = [
        [rules(match="*.q_proj", method="dora", rank=2)],
        [rules(match="*.q_proj", method="lora", rank=2, bias=True), rules(match="*.v_proj", method="lora", rank=3)],
        [rules(match="*.q_proj", method="mora", rank=2), rules(match="*.v_proj", method="full")],
        [rules(match="model.layers.*", method="serial", bottleneck=2)],
    ]
    made_seeds = []
    for plan in plans:
        with suppress(TrimtabError):
            made_seeds.append(
                made(lambda folder, plan=plan: trimtab.save_adapter(trained(tiny_model(), *plan), folder))
            )
    assert len(made_seeds) >= 3
    plain = dict(made_seeds[0])  # as PEFT itself writes it: without a header of ours
    name = "adapter_model.safetensors"
    length = int.from_bytes(plain[name][:8], "little")
    header = json.loads(plain[name][8 : 8 + length])
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header).encode()
    return [*made_seeds, plain | {name: len(text).to_bytes(8, "little") + text + plain[name][8 + length :]}]


def read_adapter(folder: Path) -> object:
    import trimtab

    model = llama()
    try:
        return trimtab.load_adapter(model, folder)
    finally:
        with suppress(TrimtabError):
            trimtab.detach(model)


def model_seeds() -> list[Files]:
    from tiny_runs import CHATML, tiny_model, tiny_tokenizer

    def write(folder: Path) -> None:
        tiny_tokenizer(CHATML).save_pretrained(folder)
        tiny_model(len(tiny_tokenizer())).save_pretrained(folder)

    def write_parts(folder: Path) -> None:
        tiny_tokenizer(CHATML).save_pretrained(folder)
        tiny_model(len(tiny_tokenizer())).save_pretrained(folder, max_shard_size="60KB")

    return [made(write), made(write_parts)]


def read_model(folder: Path) -> object:
    from trimtab.models.locate import locate
    from trimtab.models.model_files import Weights, load_tokenizer
    from trimtab.runs.load import load_fitting

    source = locate(str(folder))
    load_tokenizer(source)
    Weights(folder)
    return load_fitting(source, "float32")


def read_tokenizer(folder: Path) -> object:
    from trimtab.data.tokens import encode_prompt
    from trimtab.models.chat_template import turn_end
    from trimtab.models.locate import locate
    from trimtab.models.model_files import load_tokenizer

    tokenizer = load_tokenizer(locate(str(folder)))
    return turn_end(tokenizer), encode_prompt("the pilot asks, at noon: 12 berths", tokenizer)


def gguf_seeds() -> list[Files]:
    from tiny_gguf import write_gguf

    return [made(lambda folder: write_gguf(folder / "tiny.gguf"))]


def read_gguf(folder: Path) -> object:
    from trimtab.models.gguf import gguf_config
    from trimtab.models.locate import locate

    os.environ["TRIMTAB_CACHE"] = str(folder / "cache")
    return gguf_config(Path(locate(str(folder / "tiny.gguf")).location))


def read_whole_gguf(folder: Path) -> object:
    from trimtab.models.load import load_model
    from trimtab.models.locate import locate

    os.environ["TRIMTAB_CACHE"] = str(folder / "cache")
    return load_model(locate(str(folder / "tiny.gguf")))


@cache
def tokenizer() -> Any:
    from tiny_runs import tiny_tokenizer

    return tiny_tokenizer()


def row_seeds() -> list[Files]:
    from tiny_runs import rows

    forms = ("completion", "finlora", "alpaca", "chat", "text", "multiple_choice")
    seeds = [{"rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows(3, form)).encode()} for form in forms]
    more = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                      {"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}], "tools": [{"name": "f"}]},
        {"question": "a", "answer": 7}, {"instruction": "a", "context": "b", "response": "c"},
    ]  # fmt: skip
    seeds += [{"rows.jsonl": (json.dumps(row) + "\n").encode()} for row in more]
    seeds.append({"rows.json": json.dumps(rows(3)).encode()})
    seeds.append({"rows.csv": b'prompt,completion\na,"b, c"\nd,e\n'})
    seeds.append({"rows.tsv": b"prompt\tcompletion\na\tb\n"})
    seeds.append({"rows.txt": b"a line\nanother\n"})
    seeds.append(made(_parquet))
    seeds.append(made(_packed))
    return seeds


def _parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    from tiny_runs import rows

    parquet.write_table(pyarrow.Table.from_pylist(rows(3)), folder / "rows.parquet")


def _packed(folder: Path) -> None:
    import gzip

    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 3))


def read_rows(folder: Path) -> object:
    from trimtab.data.forms import read_examples
    from trimtab.data.tokens import encode_all

    name = next((file.name for file in folder.iterdir()), "rows.jsonl")
    return encode_all(list(read_examples(name, tokenizer(), root=folder)), tokenizer(), 64)


def template_seeds() -> list[Files]:
    from tiny_runs import CHATML

    more = [
        "{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for m in messages %}{{ m.role }}: "
        "{{ m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}",
        "{% set ns = namespace(n=0, x='a') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.x = ns.x ~ ns.x %}{{ ns.n }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endif %}{% endfor %}",
        "{% macro f(x) %}{{ x | trim | replace('a', 'b') | upper }}{% endmacro %}"
        "{% for m in messages %}{{ f(m.content) }}"
        "{{ '%s' % m.role }}{{ 'a' * 3 }}{{ range(3) | list | join(',') }}{% endfor %}",
    ]
    return [{"template": text.encode()} for text in (CHATML, *more)]


def read_template(folder: Path) -> object:
    from tiny_runs import tiny_tokenizer
    from trimtab.data.forms import read_examples

    file = folder / "template"
    template = file.read_bytes().decode("utf-8", "replace") if file.exists() else ""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    return list(read_examples("rows.jsonl", tiny_tokenizer(template), root=folder))


def run_seeds() -> list[Files]:
    import known_runs

    def write(folder: Path) -> None:
        known_runs.run.__wrapped__(folder)

    def write_open(folder: Path) -> None:
        known_runs.open_run.__wrapped__(folder)

    def write_exam(folder: Path) -> None:
        known_runs.exam_run.__wrapped__(folder)

    return [made(write), made(write_open), made(write_exam)]


def read_run(folder: Path) -> object:
    from trimtab.reports.run.run_page import write_run_page
    from trimtab.runs.folder import RunFolder

    place = next((one for one in sorted(folder.iterdir()) if one.is_dir()), folder)
    RunFolder(place).read_summary()
    return write_run_page(place)


def study_seeds() -> list[Files]:
    studies = Path(__file__).parents[2] / "studies"
    return [
        {"results.json": (studies / "folding" / "results.json").read_bytes()},
        {"explore.json": (studies / "mixing" / "nuance-explore" / "explore.json").read_bytes()},
    ]


def read_study(folder: Path) -> object:
    from trimtab.reports.search.search_page import write_explore_page
    from trimtab.reports.study.study_page import write_study_page

    if (folder / "explore.json").exists():
        return write_explore_page(folder)
    return write_study_page(folder)


def only(*ends: str) -> Callable[[Files], list[str]]:
    return lambda files: [name for name in files if name.endswith(ends)]


READERS = {
    "yaml": Reader(read_run_yaml, lambda: [{"run.yaml": RUN_YAML}]),
    "overrides": Reader(read_override, lambda: [
        {"words.txt": b"train.epochs=2\nplan.0.rank=8\ndata.test=x.jsonl\nmodel.name=a/b\nplan.0.match=*.q_proj"}]),
    "study": Reader(read_study_yaml, lambda: [{"study.yaml": STUDY_YAML}, {"explore.yaml": EXPLORE_YAML}]),
    "others": Reader(read_other, lambda: OTHERS),
    "adapters": Reader(read_adapter, adapter_seeds),
    "model": Reader(read_model, model_seeds, only("config.json", ".safetensors", "index.json")),
    "tokenizer": Reader(read_tokenizer, model_seeds, only("tokenizer.json", "tokenizer_config.json", ".jinja")),
    "gguf": Reader(read_gguf, gguf_seeds),
    "whole gguf": Reader(read_whole_gguf, gguf_seeds),
    "rows": Reader(read_rows, row_seeds),
    "templates": Reader(read_template, template_seeds),
    "runs": Reader(read_run, run_seeds),
    "studies": Reader(read_study, study_seeds),
}  # fmt: skip


# Trying them --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of one reader's runs; ``findings``: where it went wrong -> the smallest files that do it."""

    runs: int = 0
    accepted: int = 0
    refused: int = 0
    findings: dict[str, tuple[Files, str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


@cache
def seeds_of(name: str) -> list[Files]:
    return READERS[name].seeds()


def place_of(error: BaseException) -> str:
    """Where an error comes from: the last line of ours on the way, and what it is."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/trimtab/" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
    return f"{type(error).__name__} in {where}"


def attempt(reader: Reader, files: Files, tally: Tally, current: Path | None = None) -> None:
    """Let ``reader`` read ``files`` in a new folder."""
    if current is not None:
        write_files(current, files)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        write_files(Path(place), files)
        tally.runs += 1
        faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
        try:
            with warnings.catch_warnings(), within("it", seconds=SECONDS):
                warnings.simplefilter("ignore")
                reader.read(Path(place))
            tally.accepted += 1
        except TrimtabError as error:
            tally.refused += 1
            said = str(error)
            if len(said) > 20_000 or "\x1b" in said:
                note(tally, "an error that is too long, or acts", files, said[:500])
        except Exception as error:
            note(tally, place_of(error), files, "".join(traceback.format_exception(error))[-6000:])
        finally:
            faulthandler.cancel_dump_traceback_later()


def note(tally: Tally, place: str, files: Files, said: str) -> None:
    size = sum(map(len, files.values()))
    tally.counts[place] += 1
    if place not in tally.findings or size < sum(map(len, tally.findings[place][0].values())):
        tally.findings[place] = files, said


def write_files(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def fuzz(name: str, runs: int, tally: Tally, *, seed: int, current: Path | None = None) -> None:
    """``runs`` runs of the reader ``name``."""
    reader, seeds = READERS[name], seeds_of(name)

    @given(st.data())
    @settings(
        max_examples=runs, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), derandomize=False,
    )  # fmt: skip
    def one(data: Any) -> None:
        files = data.draw(st.sampled_from(seeds))
        attempt(reader, spoiled_files(data.draw, files, reader.targets(files)), tally, current)

    from hypothesis import seed as seeded

    seeded(seed)(one)()


def table(tallies: dict[str, Tally]) -> str:
    lines = ["| reader | runs | accepted | refused | findings |", "| --- | ---: | ---: | ---: | --- |"]
    for name, one in tallies.items():
        told = "; ".join(f"{place} ({count})" for place, count in one.counts.most_common()) or "none"
        lines.append(f"| {name} | {one.runs:,} | {one.accepted:,} | {one.refused:,} | {told} |")
    return "\n".join(lines)


def work(names: list[str], until: float, keep: Path, seed: int) -> None:
    """Fuzz until the time is over, in one process; its figures are on disk after each round."""
    import resource

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
    tallies = {name: Tally() for name in names}
    per_round = dict.fromkeys(names, 20)
    while time.time() < until:
        for name in names:
            if time.time() > until:
                break
            current = keep / "current" / name.replace(" ", "-")
            shutil.rmtree(current, ignore_errors=True)
            start, seed = time.time(), seed + 1
            fuzz(name, per_round[name], tallies[name], seed=seed, current=current)
            shutil.rmtree(current, ignore_errors=True)
            # Each reader gets the same time.
            per_round[name] = max(5, min(2000, round(per_round[name] * 15 / max(0.1, time.time() - start))))
            save(tallies, keep)
    save(tallies, keep)


def save(tallies: dict[str, Tally], keep: Path) -> None:
    for name, tally in tallies.items():
        for place, (files, said) in tally.findings.items():
            folder = keep / name.replace(" ", "-") / "".join(char if char.isalnum() else "-" for char in place)
            shutil.rmtree(folder, ignore_errors=True)
            write_files(folder, {**files, "TRACEBACK": said.encode("utf-8", "replace")})
    figures = {name: [one.runs, one.accepted, one.refused, dict(one.counts)] for name, one in tallies.items()}
    (keep / f"figures.{os.getpid()}.json").write_text(json.dumps(figures), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--keep", type=Path, default=Path("findings"))
    parser.add_argument("--only", action="append", choices=list(READERS))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--until", type=float, default=None, help=argparse.SUPPRESS)
    said = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nobody is asked for a model of a name that was drawn
    names = said.only or list(READERS)
    said.keep.mkdir(parents=True, exist_ok=True)
    if said.until is not None:
        work(names, said.until, said.keep, said.seed)
        return
    until, seed = time.time() + 60 * said.minutes, random.randrange(2**31) if said.seed is None else said.seed
    died = 0
    # A process that ends (a crash, no memory) leaves its files as they are, and another goes on.
    while time.time() < until:
        words = [f"--until={until}", f"--keep={said.keep}", f"--seed={seed + 1_000_000 * died}"]
        words += [f"--only={name}" for name in names]
        ended = subprocess.run([sys.executable, __file__, *words], check=False)
        if ended.returncode:
            died += 1
            for left in (said.keep / "current").glob("*"):
                shutil.move(left, said.keep / f"died-{died}-{left.name}")
    tallies = {name: Tally() for name in names}
    for file in said.keep.glob("figures.*.json"):
        for name, (runs, accepted, refused, counts) in json.loads(file.read_text("utf-8")).items():
            one = tallies.setdefault(name, Tally())
            one.runs, one.accepted, one.refused = one.runs + runs, one.accepted + accepted, one.refused + refused
            one.counts.update(counts)
    print(table(tallies))
    print(f"processes that ended by themselves: {died}")


if __name__ == "__main__":
    main()
