"""What a YAML may say, what overrides change, and what every mistake is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from source_paths import paths
from trimtab.config.read import load_config, to_yaml
from trimtab.config.run import DEFAULT_PLAN, RunConfig
from trimtab.errors import ConfigError
from trimtab.models.chat_template import CHATML

SMALLEST = "model: smollm2-135m\ndata: {train: rows.jsonl}\n"


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, list(overrides))


def refused(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, without the folder's name."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


# Reading


def test_the_smallest_file_gets_the_documented_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, SMALLEST)
    assert config.model.name == "smollm2-135m"
    assert (config.model.dtype, config.model.attention, config.model.trust_remote_code) == ("auto", "auto", False)
    assert config.data.validation == 0.1
    assert config.data.test == {}
    assert config.plan == ({"match": "all-linear", "layers": "all", "method": "dora", "rank": 16, "alpha": 32},)
    assert (config.train.epochs, config.train.learning_rate, config.train.warmup) == (3.0, 5e-4, 0.03)
    assert config.train.magnitude_learning_rate is None
    assert config.evaluation.before
    assert config.output == Path.cwd() / "runs" / "run"


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("5E-4", 5e-4), ("1.e-3", 1e-3), (".5e-3", 5e-4), ("+1e-2", 1e-2), ("1", 1.0)]
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    assert load(tmp_path, SMALLEST + f"train: {{learning_rate: {text}}}").train.learning_rate == value
    assert load(tmp_path, SMALLEST, f"train.learning_rate={text}").train.learning_rate == value


@pytest.mark.parametrize("text", ["2026-11-30", "2026-11-30 12:00:00", "010", "12:30", "1:30:00"])
def test_dates_times_and_leading_zeros_are_texts(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, f"model: m\ndata: {{train: x, choices: [{text!r}, b]}}\noutput: {text}")
    assert config.output.name == text
    assert load(tmp_path, to_yaml(config)).data.choices == (text, "b")
    [line] = refused(tmp_path, f"model: m\ndata: {{train: x}}\ntrain: {{max_steps: {text}}}")
    assert line == f'run.yaml: train.max_steps: expected a whole number, got "{text}".'


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("1_000", 1000), ("0x10", 16), ("+7", 7), ("0b11", 3)])
def test_whole_numbers_are_numbers(tmp_path: Path, text: str, value: int) -> None:
    assert load(tmp_path, SMALLEST + f"train: {{seed: {text}}}").train.seed == value


def test_one_path_or_several(tmp_path: Path) -> None:
    config = load(tmp_path, "model: m\ndata: {train: [a.jsonl, b.csv], validation: v.jsonl, test: t/fpb_test.jsonl}")
    assert paths(config.data.train) == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv"))
    assert paths(config.data.validation) == (str(tmp_path / "v.jsonl"),)
    assert paths(config.data.test) == {"fpb_test": str(tmp_path / "t" / "fpb_test.jsonl")}


def test_a_single_test_set_gets_a_name_that_a_file_can_have(tmp_path: Path) -> None:
    config = load(tmp_path, 'model: m\ndata: {train: a.jsonl, test: "my rows (2).jsonl"}')
    assert paths(config.data.test) == {"my-rows-2": str(tmp_path / "my rows (2).jsonl")}


def test_test_sets_by_name(tmp_path: Path) -> None:
    config = load(tmp_path, "model: m\ndata: {train: a.jsonl, test: {fpb: f.jsonl, hub: owner/rows}}")
    assert paths(config.data.test) == {"fpb": str(tmp_path / "f.jsonl"), "hub": "owner/rows"}


def test_paths_in_the_file_are_relative_to_it_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    train = "[../x.jsonl, bare, rows/missing, a/missing.csv, owner/name, 'owner/name/config:train[:9]']"
    config = load(tmp_path, f"model: tiny\ndata: {{train: {train}}}\noutput: out")
    assert config.model.name == str(tmp_path / "tiny")
    assert paths(config.data.train) == (
        str(tmp_path.parent / "x.jsonl"),
        str(tmp_path / "bare"),
        str(tmp_path / "rows" / "missing"),
        str(tmp_path / "a" / "missing.csv"),
        "owner/name",
        "owner/name/config:train[:9]",
    )
    assert config.output == elsewhere / "out"
    assert load(tmp_path, "model: a.gguf\ndata: {train: x.jsonl}").model.name == str(tmp_path / "a.gguf")
    assert load(tmp_path, "model: owner/name\ndata: {train: x.jsonl}").model.name == "owner/name"
    assert load(tmp_path, "model: ~/a\ndata: {train: x.jsonl}").model.name == str(Path.home() / "a")


def test_a_link_keeps_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "blob")
    assert load(tmp_path, "model: model.gguf\ndata: {train: x.jsonl}").model.name == str(tmp_path / "model.gguf")


# Overrides


def test_overrides_reach_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load(
        tmp_path,
        SMALLEST,
        "train.learning_rate=1e-4",
        "plan.0.rank=8",
        "plan.0.match=*.q_proj",
        "model.dtype=float32",
        "data.train.0=here.jsonl",
        "data.test.fpb=fpb.jsonl",
        "data.choices=['yes', 'no']",
        "train.max_steps=5",
        "train.max_steps=",
        "output=out=1",
    )
    assert config.train.learning_rate == 1e-4
    assert config.plan[0]["rank"] == 8
    assert config.plan[0]["match"] == "*.q_proj"
    assert (config.model.name, config.model.dtype) == ("smollm2-135m", "float32")
    assert paths(config.data.train) == (str(elsewhere / "here.jsonl"),)  # as any path on a command line
    assert paths(config.data.test) == {"fpb": str(elsewhere / "fpb.jsonl")}
    assert config.data.choices == ("yes", "no")
    assert config.train.max_steps is None
    assert config.output == elsewhere / "out=1"
    assert DEFAULT_PLAN[0]["rank"] == 16  # the default itself is untouched


def test_an_override_may_replace_a_whole_section(tmp_path: Path) -> None:
    config = load(tmp_path, SMALLEST, "model=owner/other", "data={train: owner/rows, validation: null}")
    assert config.model.name == "owner/other"
    assert paths(config.data.train) == ("owner/rows",)
    assert config.data.validation is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train", "command line: expected key.sub=value, got 'train'."),
        ("=3", "command line: expected key.sub=value, got '=3'."),
        ("train..epochs=3", "command line: expected key.sub=value, got 'train..epochs=3'."),
        ("plan.1.rank=8", "command line: plan is a list of 1, counted from 0; it has no '1'."),
        ("plan.x.rank=8", "command line: plan is a list of 1, counted from 0; it has no 'x'."),
        ("model.name.x=1", "command line: model.name is \"smollm2-135m\", which has no key 'x'."),
        ("train.epoch=3", "command line: train.epoch: unknown key. Did you mean 'epochs'?"),
        ("train.epochs=many", 'command line: train.epochs: expected a number, got "many".'),
        ("trian.epochs=3", "command line: trian: unknown key. Did you mean 'train'?"),
        ("train.epochs=[", "command line: train.epochs:1: expected the node content, but found '<stream end>'."),
    ],
)
def test_a_wrong_override_is_told_as_one(tmp_path: Path, override: str, message: str) -> None:
    assert refused(tmp_path, SMALLEST, override) == [message]


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rte: 1e-5}", "train.learning_rte: unknown key. Did you mean 'learning_rate'?"),
        ("trian: {epochs: 1}", "trian: unknown key. Did you mean 'train'?"),
        ("train: {tune: {budgte: 0.3}}", "train.tune.budgte: unknown key. Did you mean 'budget'?"),
        ("train: {budget: 0.3}", "train.budget: unknown key. Did you mean 'train.tune.budget'?"),
        ("learning_rate: 1e-5", "learning_rate: unknown key. Did you mean 'train.learning_rate'?"),
        (
            "evaluation: {zzz: 1}",
            "evaluation.zzz: unknown key. Known here: before, batch_size, max_new_tokens, static_cache, limit.",
        ),
        ("train: 3", "train: expected a mapping, got 3."),
        ("train: null", "train: expected a mapping, got null."),
        ("train: {epochs: true}", "train.epochs: expected a number, got true."),
        ("train: {epochs: -1}", "train.epochs: expected at least 0, got -1."),
        (
            "train: {learning_rate: .nan}",
            "train.learning_rate: expected a number above 0, such as 5e-4, or auto, got NaN.",
        ),
        ("train: {max_steps: '3'}", 'train.max_steps: expected a whole number, got "3".'),
        ("train: {batch_size: 1.5}", "train.batch_size: expected a whole number, got 1.5."),
        ("train: {average: 2}", "train.average: expected at most 1, got 2."),
        (
            "train: {schedule: linea}",
            "train.schedule: expected 'linear', 'cosine' or 'constant', got \"linea\". Did you mean 'linear'?",
        ),
        (
            "train: {warmup: 1.0}",
            "train.warmup: expected a fraction of all steps below 1, or a whole number of steps, got 1.0.",
        ),
        (
            "train: {warmup: false}",
            "train.warmup: expected a fraction of all steps below 1, or a whole number of steps, got false.",
        ),
        (
            "train: {validate_every: 0}",
            "train.validate_every: expected epoch, a whole number of steps, or a fraction of all steps below 1, got 0.",
        ),
        ("train: {save_every: 0.5}", "train.save_every: expected epoch, or a whole number of steps, got 0.5."),
        ("plan: []", "plan: expected a list of rules, got []."),
        ("plan: {match: a, method: lora}", 'plan: expected a list of rules, got {"match": "a", "method": "lora"}.'),
        ("plan: [3]", "plan.0: expected a mapping, got 3."),
        ("plan: [{match: a}]", "plan.0: the rule has no 'method'"),
        ("plan: [{match: a, methd: b}]", "plan.0: the rule has no 'method' (is 'methd' a slip?)"),
        ("plan: [{method: lora}]", "plan.0: the rule has no 'match'"),
        (
            "plan: [{method: lora, match: [1]}]",
            "plan.0: 'match' is expected to be a pattern of module names or a list of them, got [1]",
        ),
        ("plan: [{method: 3, match: a}]", "plan.0: 'method' is expected to be the name of a method, got 3"),
        ("output: ''", 'output: expected a path, got "".'),
    ],
)
def test_a_wrong_value_names_the_key_what_was_expected_and_what_came(tmp_path: Path, text: str, message: str) -> None:
    assert refused(tmp_path, SMALLEST + text) == ["run.yaml: " + message]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "{}",
            "data.train: missing. Rows to train on: a path or a hub id (owner/name:split), a mapping of path, weight, "
            "form and columns, or a list of them. Ways to name files and parts of them: see how-to, rows from several "
            "places.",
        ),
        (
            "{train: 3}",
            "data.train: expected a path or a hub id, or a list of them, got 3.",
        ),
        (
            "{train: []}",
            "data.train: expected a path or a hub id, or a list of them, got [].",
        ),
        (
            "{train: x, validation: 1}",
            "data.validation: expected a fraction between 0 and 1, a path or a hub id, a list of them, or null for "
            "none, got 1.",
        ),
        (
            "{train: x, test: {a: 3}}",
            "data.test.a: expected a path or a hub id, or a list of them, got 3.",
        ),
        (
            "{train: x, test: {a/b: o/c}}",
            "data.test: expected names made of letters, digits, '.', '_' and '-', not 'a/b', got {\"a/b\": \"o/c\"}.",
        ),
        ("{train: x, choices: [a]}", 'data.choices: expected two or more different answers, got ["a"].'),
        ("{train: x, choices: [a, a]}", 'data.choices: expected two or more different answers, got ["a", "a"].'),
        (
            "{train: x, choices: [yes, no]}",
            "data.choices: expected auto, null, or a list of answers, each a text (YAML reads yes, no and 1 as other "
            'than text: write "yes", "no", "1"), got [true, false].',
        ),
    ],
)
def test_wrong_data(tmp_path: Path, data: str, message: str) -> None:
    assert refused(tmp_path, f"model: m\ndata: {data}") == ["run.yaml: " + message]


def test_text_that_yaml_takes_for_a_number(tmp_path: Path) -> None:
    lines = refused(tmp_path, "model: {name: m, revision: 12e3}\ndata: {train: x}")
    assert lines == [
        "run.yaml: model.revision: expected text, got 12000.0. To mean it as text, put it in quotes.",
    ]


def test_every_problem_is_listed(tmp_path: Path) -> None:
    lines = refused(tmp_path, "model: {}\ndata: {tran: x}\ntrain: {seed: -1}", "train.epochs=-1")
    assert [line.split(" ", 3)[:3] for line in lines] == [
        ["run.yaml:", "model.name:", "missing."],
        ["run.yaml:", "data.train:", "missing."],
        ["run.yaml:", "data.tran:", "unknown"],
        ["command", "line:", "train.epochs:"],
        ["run.yaml:", "train.seed:", "expected"],
    ]


def test_stopping_early_needs_validation(tmp_path: Path) -> None:
    lines = refused(tmp_path, SMALLEST + "train: {early_stopping: 2}", "data.validation=null")
    assert lines == ["run.yaml: train.early_stopping: needs validation rows, but data.validation is null"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\ndata: {train: x}\nmodel: b", "run.yaml:3: the key 'model' appears twice."),
        ("model: a\ndata:\n  train: x\n  train: y", "run.yaml:4: the key 'train' appears twice."),
        ("model: [a", "run.yaml:1: expected ',' or ']', but got '<stream end>'."),
        (
            "model: m\ndata: {train: x}\nplan: [{match: *.q_proj, method: lora}]",
            "run.yaml:3: expected alphabetic or numeric character, but found '.'. A text that starts with * needs "
            'quotes: "*.q_proj".',
        ),
        ("", "run.yaml: expected keys such as 'model:' and 'data:', got null"),
        ("- model: a", "run.yaml: expected keys such as 'model:' and 'data:', got [{\"model\": \"a\"}]"),
        ("model: !!timestamp 2024-13-45", "run.yaml:1: month must be in 1..12."),
        ("model: !!python/name:os.system x", "run.yaml:1: could not determine a constructor for the tag"),
    ],
)
def test_text_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    [line] = refused(tmp_path, text)
    assert line.startswith(message)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "finance.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"finanse\.yaml: no such file\. Did you mean 'finance\.yaml'\?"):
        load_config(tmp_path / "finanse.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="expected text in UTF-8"):
        load_config(tmp_path / "run.yaml")


# The resolved configuration


def test_the_resolved_text_loads_back_equal_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(
        tmp_path,
        "model: ./tiny\ndata:\n  train: [a.jsonl, owner/rows]\n  validation: v.jsonl\n  test: {t: t.jsonl}\n"
        '  choices: ["1e-5", "yes", "null", " x: y", "3", "é"]\n'
        "plan:\n- {match: ['*.q_proj', '*.v_proj'], layers: 'outer:4', method: mora, rank: 8}\n"
        "- {match: all-linear, method: lora, rank: 4, alpha: 1e-3}\n"
        "train: {learning_rate: 1e-7, warmup: 100, validate_every: 0.25, save_every: 50, average: 0.5}\n",
    )
    copy = tmp_path / "somewhere" / "else" / "config.yaml"
    copy.parent.mkdir(parents=True)
    copy.write_text(to_yaml(config), encoding="utf-8")
    monkeypatch.chdir(copy.parent)
    again = load_config(copy)
    assert again == config
    assert isinstance(again.train.warmup, int)  # a number of steps, not a fraction
    assert to_yaml(again) == to_yaml(config)


def test_text_for_a_folder_moves_with_its_rows(tmp_path: Path) -> None:
    """Paths are written as seen from the folder; names of the hub and numbers stay as they are."""
    here = tmp_path / "here"
    (here / "study" / "tiny").mkdir(parents=True)
    config = load(
        here,
        "model: ./study/tiny\ndata: {train: [study/a.jsonl, owner/rows], validation: 0.2, test: {t: ../t.jsonl}}\n",
    )
    text = to_yaml(config, beside=here / "study")
    assert str(tmp_path) not in text.split("output:")[0]
    (here / "study" / "best.yaml").write_text(text, encoding="utf-8")
    assert load_config(here / "study" / "best.yaml") == config
    there = here.rename(tmp_path / "there")
    moved = load_config(there / "study" / "best.yaml")
    assert moved.model.name == str(there / "study" / "tiny")
    assert paths(moved.data.train) == (str(there / "study" / "a.jsonl"), "owner/rows")
    assert paths(moved.data.test) == {"t": str(tmp_path / "t.jsonl")}
    assert moved.data.validation == 0.2


def test_the_configuration_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.epochs = 1.0  # type: ignore[misc]


def test_every_key_is_described() -> None:
    sections: list[type[BaseModel]] = [RunConfig]
    while sections:
        section = sections.pop()
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                sections.append(field.annotation)


def test_torch_is_not_imported() -> None:
    code = "import sys, trimtab.config.read; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Chat templates

JINJA = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_chat_template_is_a_text_a_file_or_a_name_and_is_text_once_read(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(JINJA + "\n{# ours #}", encoding="utf-8")
    for said, text in (("own.jinja", JINJA + "\n{# ours #}"), ("chatml", CHATML)):
        config = load(tmp_path, f"model: {{name: m, chat_template: {said}}}\ndata: {{train: rows.jsonl}}\n")
        assert config.model.chat_template == text
        (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
        assert load_config(tmp_path / "again.yaml") == config
    assert load(tmp_path, SMALLEST, f"model.chat_template='{JINJA}'").model.chat_template == JINJA
    assert load(tmp_path, SMALLEST).model.chat_template is None


def test_a_chat_template_that_is_not_there_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    def mistakes(said: str) -> str:
        return " ".join(refused(tmp_path, f"model: {{name: m, chat_template: {said}}}\ndata: {{train: rows.jsonl}}\n"))

    (tmp_path / "empty.jinja").write_text("no template at all", encoding="utf-8")
    (tmp_path / "other.jinja").write_bytes(b"{{ \xff }}")
    assert "Did you mean 'chatml'?" in mistakes("chatlm")
    assert "Did you mean 'other.jinja'?" in mistakes("othr.jinja")
    assert "holds no Jinja template" in mistakes("empty.jinja")
    assert "expected text in UTF-8" in mistakes("other.jinja")
    assert "model.chat_template" in mistakes("''")


def test_a_source_is_a_path_or_says_more_and_is_written_as_short_as_it_was(tmp_path: Path) -> None:
    text = (
        "model: m\ndata:\n  columns: {prompt: question}\n"
        "  train: [a.jsonl, {path: 'd/*.csv[10%:]', weight: 2, form: alpaca}, {path: owner/rows, columns: {}}]\n"
        "  validation: {path: v.jsonl.gz}\n  test: [t.jsonl, {path: u.csv, columns: {text: body}}]\n"
    )
    config = load(tmp_path, text)
    first, second, third = config.data.train
    assert (first.weight, first.form, first.columns) == (1.0, None, None)
    assert (second.path, second.weight, second.form) == (str(tmp_path / "d" / "*.csv[10%:]"), 2.0, "alpaca")
    settled = config.data.settled(config.data.train)
    assert [source.columns for source in settled] == [{"prompt": "question"}, {"prompt": "question"}, {}]
    assert [source.form for source in settled] == ["auto", "alpaca", "auto"]
    assert paths(config.data.test) == {"t": str(tmp_path / "t.jsonl"), "u": str(tmp_path / "u.csv")}
    said = config.model_dump(mode="json")["data"]
    assert said["train"][0] == str(tmp_path / "a.jsonl")
    assert said["train"][1] == {"path": second.path, "weight": 2.0, "form": "alpaca"}
    assert said["test"]["t"] == str(tmp_path / "t.jsonl")
    assert third.path == "owner/rows"
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml").data == config.data


def test_overrides_reach_into_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "model: m\ndata: {train: [{path: a.jsonl}], test: {t: {path: b.jsonl}}}\n"
    config = load(tmp_path, text, "data.train.0.form=alpaca", "data.train.0.weight=2", "data.test.t.form=chat")
    [source] = config.data.train
    assert (source.path, source.form, source.weight) == (str(tmp_path / "a.jsonl"), "alpaca", 2.0)
    assert config.data.test["t"][0].form == "chat"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{train: [a, {path: b, wieght: 2}]}", "data.train.1.wieght: unknown key. Did you mean 'weight'?"),
        ("{train: {path: b, weight: 0}}", "data.train.0.weight: expected more than 0, got 0.0."),
        ("{train: {path: b, form: alpacca}}", "data.train.0.form: expected one of auto, "),
        ("{train: [a, 3]}", "data.train.1: expected a path, a hub id, or a mapping such as {path: rows.jsonl,"),
        ("{train: [{weight: 2}]}", "data.train.0.path: missing. A file, a pattern"),
        (
            "{train: a, test: {t: {path: b, weight: 2}}}",
            "data.test.t: expected no weight: rows that are measured count",
        ),
        ("{train: a, test: [x/t.csv, y/t.csv]}", "data.test: two test sets would be named 't'; name them: {one: ..."),
        ("{train: a, columns: [b]}", "data.columns: expected a mapping of our keys to columns, such as {prompt:"),
    ],
)
def test_a_wrong_source_names_its_place(tmp_path: Path, data: str, message: str) -> None:
    [line] = refused(tmp_path, f"model: m\ndata: {data}")
    assert line.startswith("run.yaml: " + message)
