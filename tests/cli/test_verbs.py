"""Every verb from outside, as a user meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab
from command_line import forked
from tiny_runs import CHATML, rows, tiny_model, tiny_tokenizer, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.files import read_json, read_jsonl
from trimtab.machine import memory_gib
from trimtab.runs.load import load_run
from trimtab.studies import process
from trimtab.training.run import finetune

VERBS = (
    *("finetune", "plan", "tune", "evaluate", "predict", "generate", "chat", "merge", "export", "analyze", "compare"),
    *("explore", "serve"),
)
IDS = torch.tensor([[5, 40, 60, 7, 80, 33], [9, 12, 300, 200, 4, 50]])
PROGRAM = (sys.executable, "-m", "trimtab")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A finished run with two test sets; each test that changes it works on a copy."""
    from tiny_runs import write_config

    root = tmp_path_factory.mktemp("runs")
    test = {name: str(write_rows(root / f"{name}.jsonl", rows(count))) for name, count in (("one", 9), ("two", 6))}
    train = write_rows(root / "train.jsonl", rows(24))
    yaml = write_config(root / "run.yaml", model_folder, train, data={"test": test}, train={"epochs": 3})
    return finetune(load_config(yaml)).path


# --- help and version


def test_help_imports_no_torch() -> None:
    code = """
import sys
from trimtab.cli import main
for words in ([], *([verb] for verb in sys.argv[1:])):
    sys.argv = ["trimtab", *words, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, words
import os

os.environ |= {"_TRIMTAB_COMPLETE": "complete_bash", "COMP_WORDS": "trimtab finetune --res", "COMP_CWORD": "2"}
try:
    main()
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "transformers", "datasets", "matplotlib", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code, *VERBS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"trimtab {verb} [OPTIONS]" in done.stdout
    assert done.stdout.endswith("\n--resume\n")  # completion, as quick as help
    assert "..." not in done.stdout.split("Commands:")[1].split("Usage:")[0]  # no summary is cut off


def test_version(cli: Any) -> None:
    assert cli("--version").out == f"trimtab {trimtab.__version__}\n"


def test_the_command_line_and_the_processes_of_a_study_keep_few_products(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert cli("--version").code == 0
    assert os.environ["LRU_CACHE_CAPACITY"] == os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"

    def called() -> None:
        raise InterruptedError

    monkeypatch.setattr(process, "keep_few_products", called)
    with pytest.raises(InterruptedError):  # before anything else is done there
        process._main()


@pytest.mark.full
def test_libraries_keep_their_chatter_to_themselves(make_yaml: Callable[..., Path]) -> None:
    # torchao and bitsandbytes, which transformers imports where they are installed, tell what kernels they have not.
    done = subprocess.run([*PROGRAM, "plan", str(make_yaml())], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- finetune


def test_finetune_when_piped(cli: Any, make_yaml: Callable[..., Path], tmp_path: Path) -> None:
    test = write_rows(tmp_path / "harbour.jsonl", rows(9))
    yaml = make_yaml(data={"test": str(test), "validation": 0.25})
    result = cli("finetune", yaml, "train.log_every=2", "plan.0.rank=2", "output=there")
    assert result.code == 0, result.err
    assert "\x1b" not in result.out + result.err
    assert "\r" not in result.out + result.err
    for line in (
        r"24 training rows of the form 'completion'",
        r"answers are a closed set of 3: calm, storm, watch",
        r"6 rows split off for validation, 18 left to train on",
        r"completion\.jsonl, row \d+: \d+ tokens, \d+ trained",
        r"Answer:\[\[ \w+<\|eos\|>\]\]",
        r"7 modules adapted: [\d,]+ of [\d,]+ parameters trained",
        r"step 2/5  loss \d+\.\d{4}  [\d,]+ tokens/s  \d:\d\d left  \d\.\d\d GiB",
        r"step 5: validation loss \d\.\d{4}, accuracy \d+\.\d %, macro F1 \d+\.\d %",
        r"accuracy +9 +\d+\.\d % +\d+\.\d %",
        r"adapter \([\d.]+ kB\): there/adapter",
        r"report: there/report\.html",
        r"try it: trimtab generate there \$'Message: .+\\nAnswer:'",
    ):
        assert re.search(line, result.out), line
    assert read_json(tmp_path / "there" / "plan.json")["rules"][0]["options"]["rank"] == 2


def test_interrupted_by_ctrl_c_and_resumed(cli: Any, make_yaml: Callable[..., Path], tmp_path: Path) -> None:
    yaml = make_yaml(train={"epochs": 2000, "learning_rate": 1e-4, "max_steps": 12000})
    metrics = tmp_path / "run" / "metrics.jsonl"
    said = tmp_path / "out.txt", tmp_path / "err.txt"
    process, ended = forked("finetune", yaml, out=said[0], err=said[1]), 0
    for _ in range(1200):
        ended = os.waitpid(process, os.WNOHANG)[0]
        if ended or (metrics.is_file() and metrics.read_text().count("\n") > 2):
            break
        time.sleep(0.1)
    assert not ended, said[1].read_text()
    os.kill(process, signal.SIGINT)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    out, err = (file.read_text() for file in said)
    assert code == 130, err
    assert "interrupted: finishing this step and saving a checkpoint" in out
    assert f"Go on with: trimtab finetune {tmp_path / 'run' / 'config.yaml'} --resume" in err
    assert "Traceback" not in err
    done = read_json(tmp_path / "run" / "summary.json")
    assert done["status"] == "interrupted"
    assert (tmp_path / "run" / "report.html").is_file()
    assert [row["step"] for row in read_jsonl(metrics)] == list(range(1, done["steps"] + 1))

    # As the message says, but for the number of steps, which may not change: that is refused.
    result = cli("finetune", tmp_path / "run" / "config.yaml", "train.max_steps=10", "--resume")
    assert result.code == 1
    assert result.matches(r"train\.max_steps was 12,?000, now 10")
    result = cli("generate", tmp_path / "run", "hello")
    assert result.code == 1
    assert result.matches(r"has no adapter yet\. Let it finish first: trimtab finetune .* --resume")


@pytest.mark.usefixtures("bare_runs")
@pytest.mark.parametrize("width", [80, 150])
def test_finetune_on_a_terminal(
    cli: Any, make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """What is left on the screen of a terminal: the live line neither wraps nor stays behind twice."""
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": str(width), "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    result = cli("finetune", make_yaml(count=60, data={"validation": 0.3}, train={"epochs": 2}))
    assert result.code == 0, result.err
    assert "\x1b[2K" in result.out  # it was live
    screen = _screen(result.out)
    live = [line for line in screen if line.startswith("  training ")]
    assert len(live) == 1, "\n".join(screen)
    assert len(live[0]) <= width
    assert re.search(r"━ 22/22 loss \d\.\d{4}  [\d,]+ tokens/s  0:00 left  \d\.\d\d GiB$", live[0])
    assert sum("validation loss" in line for line in screen) == 2


def _screen(text: str) -> list[str]:
    """The few escape codes that rich writes, obeyed: up, erase line, carriage return; colours are left out."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            if part[-1] == "A":
                row -= int(part[2:-1] or 1)
            elif part == "\x1b[2K":
                lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


# --- evaluate


def test_evaluate_a_run_again(cli: Any, run: Path) -> None:
    (run / "report.html").unlink()
    before = {name: read_json(run / "evaluation" / f"{name}.after.json") for name in ("one", "two")}
    result = cli("evaluate", run, "--batch-size", "1")
    assert result.code == 0, result.err
    assert "\x1b" not in result.out
    assert result.out.count("predicted") == 2  # two confusion tables
    assert (run / "report.html").is_file()
    for name, old in before.items():
        new = read_json(run / "evaluation" / f"{name}.after.json")
        assert {key: new[key] for key in ("rows", "confusion", "accuracy")} == {
            key: old[key] for key in ("rows", "confusion", "accuracy")
        }
        assert new["perplexity"] == pytest.approx(old["perplexity"], rel=1e-5)


def test_evaluate_other_rows(cli: Any, run: Path, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", rows(9))
    two = write_rows(tmp_path / "b.jsonl", rows(5, answers=("calm", "storm")))  # too few to look like a closed set
    kept = (run / "evaluation" / "one.after.json").read_text()
    result = cli("evaluate", run, "--data", one, "--data", two, "--limit", "4")
    assert result.code == 0, result.err
    folder = tmp_path / "runs" / "evaluate"
    found = read_json(folder / "evaluation" / "b.after.json")
    assert (found["kind"], found["rows"], found["choices"]) == ("choice", 4, ["calm", "storm", "watch"])
    predictions = list(read_jsonl(folder / "predictions" / "a.after.jsonl"))
    assert [row["row"] for row in predictions] == [1, 2, 3, 4]
    assert predictions[0].keys() == {"row", "prompt", "answer", "predicted", "correct", "scores"}
    assert result.out.rstrip().endswith("results and predictions: runs/evaluate")

    result = cli("evaluate", run, "--limit", "2", "--out", "here")
    assert read_json(tmp_path / "here" / "evaluation" / "one.after.json")["rows"] == 2
    assert (run / "evaluation" / "one.after.json").read_text() == kept


def test_evaluate_rows_by_the_form_that_is_named(cli: Any, model_folder: Path, tmp_path: Path) -> None:
    asked = "Please choose the correct answer to the question: Which?\n\nAnswer1: fog Answer2: wind\n\nAnswer format: x"
    row = {"instruction": asked, "output": "the correct answer is answer2", "answer": "answer2"}
    data = write_rows(tmp_path / "exam.jsonl", [row] * 4)
    result = cli("evaluate", model_folder, "--data", data, "--form", "multiple_choice", "--out", "here")
    assert result.code == 0
    assert "accuracy by likelihood per character" in result.out
    found = read_json(tmp_path / "here" / "evaluation" / "exam.before.json")
    assert (found["kind"], found["rows"], found["chance"]) == ("multiple_choice", 4, 0.5)
    result = cli("evaluate", model_folder, "--data", data, "--form", "multiple_choices")
    assert result.code == 1
    assert "Did you mean 'multiple_choice'?" in result.err


def test_evaluate_the_base_and_a_model(cli: Any, run: Path, model_folder: Path, tmp_path: Path) -> None:
    data = run.parent / "one.jsonl"
    for words, stage, like in (
        ([run, "--base"], "before", "before"),
        ([model_folder], "before", "before"),
        ([model_folder, "--adapter", run / "adapter"], "after", "after"),
    ):
        result = cli("evaluate", *words, "--data", data, "--choices", "calm, storm,watch", "--out", "here")
        assert result.code == 0, result.err
        found = read_json(tmp_path / "here" / "evaluation" / f"one.{stage}.json")
        # A model by its name is measured in this machine's own precision; the run was in float32.
        wanted = read_json(run / "evaluation" / f"one.{like}.json")
        assert found["choices"] == ["calm", "storm", "watch"]
        assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=0.05)


# --- generate


def test_generate(cli: Any, run: Path) -> None:
    prompt = rows(1)[0]["prompt"]
    model = load_run(run)
    ids = model.reader(prompt.rstrip(" "), return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = model.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    text = model.reader.decode(wanted, skip_special_tokens=True).strip()

    result = cli("generate", run, prompt, "--max-new-tokens", "6")
    assert (result.code, result.out.strip()) == (0, text)
    assert cli("generate", run, "-", "--max-new-tokens", "6", stdin=prompt + "\n").out == result.out
    assert cli("generate", run, prompt, "--base", "--max-new-tokens", "6").out != result.out
    drawn = [
        cli("generate", run, prompt, "--temperature", "3", "--seed", seed, "--max-new-tokens", "6").out
        for seed in "112"
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_system_message_that_the_template_leaves_out_is_refused(cli: Any, tmp_path: Path) -> None:
    silent = CHATML.replace("for message in messages %}", "for message in messages if message['role'] != 'system' %}")
    deaf, model = tmp_path / "deaf", tiny_model()
    model.save_pretrained(deaf)
    tiny_tokenizer(silent).save_pretrained(deaf)
    talk = [{"role": "user", "content": "fog"}]
    write_rows(tmp_path / "talks.jsonl", [{"messages": talk}])
    for words in (["fog", "--chat"], ["--chat", "--file", str(tmp_path / "talks.jsonl")]):
        result = cli("generate", deaf, *words, "--system", "Be brief.")
        assert result.code == 1, result
        assert "the chat template leaves the system message out" in result.err
        assert cli("generate", deaf, *words, "--max-new-tokens", "2").code == 0
    said = cli("chat", deaf, "--system", "Be brief.", stdin="fog\n")
    assert "the chat template leaves the system message out" in said.err


def test_lines_of_windows_are_asked_without_their_ends(cli: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_bytes(b"\xef\xbb\xbffog?\r\n\r\nwind?\r\n")
    result = cli("generate", run, "--file", tmp_path / "questions.txt", "--jsonl", "--max-new-tokens", "2")
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["fog?", "wind?"]


@pytest.mark.filterwarnings("ignore:.*nothing is stored of")  # it has more layers
def test_an_adapter_of_another_model_is_told(cli: Any, run: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", initializer_range=0.3)
    data = write_rows(tmp_path / "few.jsonl", rows(4))
    own = load_config(run / "config.yaml").model.name
    for words in (["generate", "fog"], ["evaluate", "--data", str(data), "--out", str(tmp_path / "figures")]):
        for model, told in ((other, True), (own, False)):
            result = cli(words[0], model, *words[1:], "--adapter", run / "adapter")
            assert result.code == 0, result
            said = f"the adapter says that it was made for {Path(own).name}, and the model is {other}"
            assert (said in " ".join((result.out + result.err).split())) == told, result


def test_generate_streams(run: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.cli.verbs.generate as verb

    pieces: list[str] = []
    monkeypatch.setattr(verb, "_say", pieces.append)
    result = cli("generate", run, "Message: fog over berth", "--base", "--max-new-tokens", "40", "--temperature", "5")
    assert len(pieces) > 1
    assert result.out == "\n"


def test_generate_answers_for_every_prompt(run: Path, cli: Any, model_folder: Path, tmp_path: Path) -> None:
    prompts = [row["prompt"].rstrip() for row in rows(3)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompt.replace("\n", " ") for prompt in prompts), encoding="utf-8")
    said = [cli("generate", run, prompt, "--max-new-tokens", "4").out for prompt in prompts]
    several = cli("generate", run, *prompts, "--max-new-tokens", "4")
    assert several.out == "".join(said)
    assert several.err.count("/3] Message:") == 3
    file = write_rows(tmp_path / "asked.jsonl", [{"prompt": prompt} for prompt in prompts])
    result = cli("generate", run, "--file", file, "--jsonl", "--max-new-tokens", "4")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    assert [line["answer"] for line in lines] == [text.strip() for text in said]
    assert {type(line["ended"]) for line in lines} == {bool}
    of_model = cli("generate", model_folder, "--file", "prompts.txt", "--max-new-tokens", "2")
    assert (of_model.code, of_model.err.count("/3] Message:")) == (0, 3)
    assert cli("generate", run, "fog", "--file", "prompts.txt").code == 2
    assert cli("generate", run).code == 2


def test_generate_with_a_system_message(run: Path, cli: Any) -> None:
    refused = cli("generate", run, "fog", "--system", "be brief", "--plain")
    assert refused.code == 1
    assert refused.matches(r"--system: .*--chat")
    assert cli("generate", run, "fog", "--system", "be brief").code == 0  # as completion rows have it, before the text
    with_system = cli("generate", run, "fog", "--system", "tug at noon", "--chat", "--max-new-tokens", "6")
    assert with_system.code == 0
    assert with_system.out != cli("generate", run, "fog", "--chat", "--max-new-tokens", "6").out


@pytest.mark.full
@pytest.mark.usefixtures("bare_runs")
def test_generate_with_the_templates_of_training(
    cli: Any, make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trimtab.asking as asking

    seen: list[str] = []
    original = asking.encode_prompt

    def spy(prompt: str, tokenizer: Any) -> list[int]:
        seen.append(prompt)
        return original(prompt, tokenizer)

    monkeypatch.setattr(asking, "encode_prompt", spy)
    for form, begins in (
        ("chat", "<|im_start|>user\nfog<|im_end|>\n<|im_start|>assistant\n"),
        ("alpaca", "Below is an"),
    ):
        folder = finetune(load_config(make_yaml(form, form=form, train={"max_steps": 1}))).path
        assert cli("generate", folder, "fog", "--max-new-tokens", "2").code == 0
        assert seen[-1].startswith(begins)
        assert "fog" in seen[-1]
        assert cli("generate", folder, "fog", "--plain", "--max-new-tokens", "2").code == 0
        assert seen[-1] == "fog"
        assert cli("generate", folder, "fog", "--chat", "--max-new-tokens", "2").code == 0
        assert seen[-1].startswith("<|im_start|>user\nfog")


@pytest.mark.parametrize("prompt", ["", " \n", "-"])
def test_generate_from_nothing(cli: Any, run: Path, prompt: str) -> None:
    result = cli("generate", run, prompt)
    assert result.code == 1
    assert result.matches("the prompt is empty")


def test_a_prompt_beyond_the_model(cli: Any, run: Path) -> None:
    result = cli("generate", run, "fog " * 300)
    assert result.code == 1
    assert result.matches(r"the prompt has \d+ tokens, and the model has 256 positions; shorten it")


# --- merge


def test_merge(cli: Any, run: Path, tmp_path: Path) -> None:
    result = cli("merge", run, "merged")
    assert result.code == 0, result.err
    assert "merged 7 modules into merged" in result.out
    assert "trimtab" not in (tmp_path / "merged" / "config.json").read_text()  # an ordinary folder
    ours, plain = load_run(run).model, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(load_run(run).reader)

    assert cli("merge", run, "merged").code == 1
    result = cli("merge", run, "merged", "--dtype", "bfloat16", "--overwrite")
    assert result.code == 0, result.err
    assert re.search(r"to bfloat16: \d\.\de-0\d of its norm", result.out)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    (tmp_path / "merged" / "plans").mkdir()
    (tmp_path / "merged" / "plans" / "notes.txt").write_text("mine")
    (tmp_path / "merged" / "model-00002-of-00002.safetensors").write_text("of another one")
    assert cli("merge", run, "merged", "--overwrite").code == 0
    assert (tmp_path / "merged" / "plans" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "merged" / "model-00002-of-00002.safetensors").exists()
    assert cli("merge", run, run, "--overwrite").code == 1  # no model, so never replaced
    assert (run / "adapter").is_dir()


# --- plan

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.full
def test_plan_of_an_8b_model_needs_its_config_alone(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a machine with room for it: otherwise nine cheaper runs would be estimated as well.
    monkeypatch.setattr("trimtab.memory.estimate.available_memory", lambda device: 2**40)
    model = tmp_path / "llama-8b"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    rule = "{match: all-linear, method: dora, rank: 16}"
    (tmp_path / "run.yaml").write_text(f"model: llama-8b\ndata: {{train: nowhere.jsonl}}\nplan: [{rule}]\n")
    before = memory_gib()
    result = cli("plan", "run.yaml", "--json")
    assert result.code == 0, result.err
    assert memory_gib() - before < 0.5  # the weights are 16 GB
    plan = json.loads(result.out)
    assert plan["total_parameters"] == 8_030_261_248  # as published
    out_in = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
    assert plan["trainable_parameters"] == 32 * sum(16 * (out + inner) + out for out, inner in out_in)


def test_plan_in_tables(cli: Any, make_yaml: Callable[..., Path], two_blocks: Path) -> None:
    yaml = make_yaml(
        model={"name": str(two_blocks)},
        plan=[{"match": "*.q_proj", "method": "lora"}, {"match": "*.v_proj", "method": "mora", "layers": 0}],
    )
    result = cli("plan", yaml, "--modules", "plan.0.rank=4")
    assert result.code == 0, result.err
    assert re.search(r"1 +lora +\*\.q_proj +all +rank 4 +2 +512", result.out)
    assert re.search(r"model\.layers\.0\.self_attn\.v_proj +mora +2 +16 x 32", result.out)
    assert "model.layers.1.self_attn.v_proj" not in result.out
    assert "\x1b" not in result.out
    assert not list(yaml.parent.glob("run/*"))
    assert re.search(r"^not reached by any rule: [\d,]+ numbers in \d kinds: .*Linear [\d,]+", result.out, re.MULTILINE)
    without = cli("plan", yaml)
    assert "self_attn" not in without.out
    narrow = cli("plan", yaml, "plan.0.match=all-linear", "plan.0.rank=20")  # v_proj has 16 outputs
    assert narrow.code == 0, narrow.err
    assert re.search(r"^rank lowered to the largest that fits: .*k_proj 16, ", narrow.out, re.MULTILINE)


# --- analyze


def test_analyze(cli: Any, run: Path, model_folder: Path, tmp_path: Path) -> None:
    result = cli("analyze", model_folder, run, "--out", tmp_path / "moved", "--match", "*.down_proj", "--no-spectra")
    assert result.code == 0, result.err
    assert "correlation of dM and dD" in result.out
    assert re.search(r"adapter\s+dora\s+down_proj\s+1\s", result.out)
    names = {file.name for file in (tmp_path / "moved").iterdir()}
    assert names == {"changes.csv", "changes.json", "changes.html", "changes.png", "changes.svg"}
    wrong = cli("analyze", model_folder, tmp_path)
    assert wrong.code == 1
    assert "expected a model folder" in wrong.err
