"""mlx-lm's YAML (``mlx_lm.lora --config``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.config.others._other import Carried, OtherConfig, globs
from trimtab.errors import ConfigError, TrimtabError


class MlxConfig(OtherConfig):
    """LoRA, DoRA or all weights on the last blocks of a model. Its scale is ``alpha / rank`` here."""

    label = "mlx-lm"
    known_by = "model, and iters or lora_parameters"

    def knows(self, raw: Mapping[str, Any]) -> bool:
        return "model" in raw and ("iters" in raw or "lora_parameters" in raw or "fine_tune_type" in raw)

    def carry(self, carried: Carried) -> None:
        carried.same(
            {
                "model": "model.name",
                "batch_size": "train.batch_size",
                "max_seq_length": "data.max_length",
                "grad_checkpoint": "train.gradient_checkpointing",
                "seed": "train.seed",
            }
        )
        carried.numbers({"learning_rate": "train.learning_rate"})
        for ours, value in (
            ("train.batch_size", 4),
            ("train.learning_rate", 1e-5),
            ("data.max_length", 2048),
            ("train.keep_best", False),
        ):
            carried.default(ours, value)
        if not carried.take("mask_prompt"):
            carried.put("train.prompt_loss_weight", 1.0, "mask_prompt")
        self._rows(carried)
        self._steps(carried)
        self._schedule(carried)
        self._plan(carried)
        if carried.left.get("optimizer") == "adamw":
            carried.forget(["optimizer"])
        carried.leave(
            {
                "optimizer": "AdamW is the optimiser",
                "adapter_path": "the adapter lies in the run's folder, output",
                "resume_adapter_file": "adapter: FOLDER begins from an adapter, ours or PEFT's, not mlx-lm's",
                "report_to": "trackers are named as transformers does: report_to: [wandb]",
                "val_batches": "all validation rows are used",
                "test_batches": "evaluation.limit is in rows",
            }
        )
        carried.forget(["train", "test"])
        carried.forget([key for key, value in carried.left.items() if value in (False, "", [], {})])

    def _rows(self, carried: Carried) -> None:
        said = carried.take("data")
        if not isinstance(said, str):
            if said is not None:
                carried.tell("data", said, "name the rows with --train")
            carried.put("data.validation", None, "data")
            return
        folder = carried.file.parent / Path(said).expanduser()
        if not folder.is_dir():
            carried.put("data.train", [said], "data")
            return
        carried.put("data.train", [str(folder / "train.jsonl")], "data")
        valid, test = folder / "valid.jsonl", folder / "test.jsonl"
        carried.put("data.validation", [str(valid)] if valid.is_file() else None, "data")
        if test.is_file():
            carried.put("data.test", str(test), "data")

    def _steps(self, carried: Carried) -> None:
        """Steps, which are passes there: so many of them make one of ours."""
        passes = carried.take("grad_accumulation_steps") or 1
        if passes != 1:
            carried.put("train.gradient_accumulation", passes, "grad_accumulation_steps")
        for key, ours in (
            ("steps_per_report", "train.log_every"),
            ("steps_per_eval", "train.validate_every"),
            ("save_every", "train.save_every"),
        ):
            if count := carried.take(key):
                carried.put(ours, max(1, round(count / passes)), key)
        carried.steps("iters", 1000, passes)

    def _schedule(self, carried: Carried) -> None:
        said = carried.take("lr_schedule")
        carried.default("train.warmup", 0)
        if not isinstance(said, dict):
            carried.default("train.schedule", "constant")
            return
        kinds = {"cosine_decay": "cosine", "linear_schedule": "linear"}
        if said.get("name") not in kinds:
            carried.tell("lr_schedule", said, "linear, cosine and constant are what there is")
            return
        carried.put("train.schedule", kinds[said["name"]], "lr_schedule")
        if said.get("warmup"):
            carried.put("train.warmup", said["warmup"], "lr_schedule")
        if len(said.get("arguments") or []) > 2 and said["arguments"][2]:
            carried.tell("lr_schedule.arguments", said["arguments"], "the rate falls to 0 at the last step")

    def _plan(self, carried: Carried) -> None:
        kind = carried.take("fine_tune_type", "lora")
        if kind not in ("lora", "dora", "full"):
            raise ConfigError(f"{carried.file}: fine_tune_type: {kind}: lora, dora and full are known here")
        said = carried.take("lora_parameters") or {}
        keys = said.get("keys")
        rule: dict[str, Any] = {"match": globs(keys) if keys else "all-linear", "method": kind}
        if layers := self._layers(carried):
            rule["layers"] = layers
        if kind != "full":
            rule["rank"] = said.get("rank", 8)
            rule["alpha"] = float(said.get("scale", 20.0)) * rule["rank"]
            if said.get("dropout"):
                rule["dropout"] = said["dropout"]
        carried.rules.append(rule)

    def _layers(self, carried: Carried) -> str | None:
        last = carried.take("num_layers", carried.take("lora_layers", 16))
        if last == -1:
            return None
        from trimtab.models.locate import locate
        from trimtab.models.model_files import load_config_only

        try:
            config = load_config_only(locate(carried.settings["model.name"][0], carried.file.parent))
            count = config.get_text_config().num_hidden_layers
        except (TrimtabError, AttributeError, KeyError):
            carried.tell(
                "num_layers", last, "the last blocks; the model is not here, so name them on the rule: 'layers'"
            )
            return None
        return None if last >= count else f"{count - last}-{count - 1}"
