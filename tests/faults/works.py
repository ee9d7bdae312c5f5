"""The works that are killed: a run, a study, a merge, an adapter's save and `trimtab init`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from faults.trials import Work, fork, wait
from tiny_runs import rows, write_config, write_model, write_rows

PLAN = [{"match": "all-linear", "method": "dora", "rank": 2, "alpha": 4, "dropout": 0.1}]
KINDS = ("run", "study", "merge", "merge over another", "save", "save over another", "init")


def trimtab(*words: object) -> Callable[[], int]:
    """The command line with these words: it gives the exit code."""

    def call() -> int:
        from trimtab.cli import main

        sys.argv = ["trimtab", *map(str, words)]
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def first_of(*calls: Callable[[], int]) -> Callable[[], int]:
    """What a user tries one after the other until one does it."""
    return lambda: next((code for call in calls if not (code := call())), 1)


class Scene:
    """A folder with a tiny model, rows, and the works over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model", num_hidden_layers=1)
        train = write_rows(folder / "train.jsonl", rows(20))
        self.test = write_rows(folder / "test.jsonl", rows(6))
        settings = {
            "plan": PLAN,
            "data": {"test": {"harbour": str(self.test)}, "validation": 0.2},
            "train": {"epochs": 1, "batch_size": 4, "save_every": 2, "keep_checkpoints": 1, "average": 0.5},
        }
        self.yaml = write_config(folder / "run.yaml", self.model, train, **settings)
        self._settings = settings

    def work(self, kind: str, *, within: Path | None = None) -> Work:
        """The work of that kind, which writes ``within`` a folder (by default one of its own)."""
        (home := within or self.folder / kind.replace(" ", "-")).mkdir(exist_ok=True)
        make: Callable[[Path, Path], Work] = getattr(self, f"_{kind.replace(' ', '_')}")
        return make(home, home / "out")

    def _run(self, home: Path, out: Path) -> Work:
        start = trimtab("finetune", self.yaml, f"output={out}")
        resume = trimtab("finetune", self.yaml, f"output={out}", "--resume")

        def is_finished() -> int:
            from trimtab.runs.folder import RunFolder

            return int(RunFolder(out).status != "finished")

        return Work("run", out, start, first_of(resume, start, is_finished))

    def _study(self, home: Path, out: Path) -> Work:
        run = yaml.safe_load(self.yaml.read_text(encoding="utf-8"))
        run.pop("output")
        arms = {"dora": {"plan": run.pop("plan")}, "untrained": {"train": {"epochs": 0}}}
        file = home / "study.yaml"
        file.write_text(
            yaml.safe_dump({"base": run, "arms": arms, "reference": "dora", "seeds": [0], "keep": "adapters"}),
            encoding="utf-8",
        )
        compare = trimtab("compare", file, "--out", out)
        return Work("study", out, compare, compare)

    def finished_run(self) -> Path:
        """A run that is done."""
        if not (run := self.folder / "finished").exists():
            log = self.folder / "finished.log"
            if wait(fork(trimtab("finetune", self.yaml, f"output={run}", "train.max_steps=2"), log)):
                raise RuntimeError(log.read_text(encoding="utf-8"))
        return run

    def _merge(self, home: Path, out: Path) -> Work:
        words = ("merge", self.finished_run(), out / "merged")
        return Work("merge", out, trimtab(*words), trimtab(*words, "--overwrite"), prepare=out.mkdir)

    def _merge_over_another(self, home: Path, out: Path) -> Work:
        def prepare() -> None:
            shutil.copytree(self.model, out / "merged")

        merge = trimtab("merge", self.finished_run(), out / "merged", "--overwrite")
        return Work("merge over another", out, merge, merge, prepare=prepare)

    def _save(self, home: Path, out: Path) -> Work:
        return Work("save", out, self._saving(out, "lora"), self._saving(out, "lora"))

    def _save_over_another(self, home: Path, out: Path) -> Work:
        old = self.folder / "old"
        if not old.exists() and wait(fork(self._saving(old, "mora"), self.folder / "old.log")):
            raise RuntimeError((self.folder / "old.log").read_text(encoding="utf-8"))

        def again() -> int:
            # Whenever the save was killed, a whole adapter can be loaded: the old one or the new one.
            from trimtab.adapters.placing import read_adapter

            methods = {entry.method for entry in read_adapter(out).values()}
            return self._saving(out, "lora")() if methods in ({"mora"}, {"lora"}) else 1

        def prepare() -> None:
            shutil.copytree(old, out)

        return Work("save over another", out, self._saving(out, "lora"), again, prepare=prepare)

    def _saving(self, folder: Path, method: str) -> Callable[[], int]:
        def call() -> int:
            from trimtab.cli.exits import exit_code

            return exit_code(lambda: self._save_one(folder, method))

        return call

    def _save_one(self, folder: Path, method: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from trimtab import Rule, attach, save_adapter, trainable_parameters

        model = AutoModelForCausalLM.from_pretrained(self.model)
        torch.manual_seed(0)
        attach(model, Rule(match="*.q_proj", method=method, rank=2))
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.normal_()
        save_adapter(model, folder)

    def _init(self, home: Path, out: Path) -> Work:
        def prepare() -> None:
            out.mkdir()

        words = (
            "init",
            out / "run.yaml",
            "--model",
            self.model,
            "--train",
            self.test,
            "--test",
            "none",
            "--method",
            "lora",
        )
        return Work("init", out, trimtab(*words), trimtab(*words, "--overwrite"), prepare=prepare)
