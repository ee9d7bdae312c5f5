"""LLaMA-Factory's YAML or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trimtab.config.others._other import ADAMW, SCHEDULES, Carried, OtherConfig, globs
from trimtab.errors import ConfigError
from trimtab.reading import read_text


class LlamaFactoryConfig(OtherConfig):
    """Supervised fine-tuning (``stage: sft``)."""

    label = "LLaMA-Factory"
    known_by = "model_name_or_path and stage or finetuning_type"

    def knows(self, raw: Mapping[str, Any]) -> bool:
        return "model_name_or_path" in raw and ("stage" in raw or "finetuning_type" in raw)

    def carry(self, carried: Carried) -> None:
        if (stage := carried.take("stage", "sft")) != "sft":
            raise ConfigError(f"{carried.file}: stage: {stage}: only sft is known here")
        carried.same(
            {
                "model_name_or_path": "model.name",
                "model_revision": "model.revision",
                "trust_remote_code": "model.trust_remote_code",
                "cutoff_len": "data.max_length",
                "per_device_train_batch_size": "train.batch_size",
                "per_device_eval_batch_size": "evaluation.batch_size",
                "gradient_accumulation_steps": "train.gradient_accumulation",
                "weight_decay": "train.weight_decay",
                "max_grad_norm": "train.max_grad_norm",
                "logging_steps": "train.log_every",
                "save_total_limit": "train.keep_checkpoints",
                "load_best_model_at_end": "train.keep_best",
                "seed": "train.seed",
                "output_dir": "output",
                "adapter_name_or_path": "adapter",
            }
        )
        carried.numbers(
            {
                "learning_rate": "train.learning_rate",
                "num_train_epochs": "train.epochs",
                "loraplus_lr_ratio": "train.b_learning_rate_ratio",
            }
        )
        carried.steps("max_steps")
        for ours, value in (
            ("train.learning_rate", 5e-5),
            ("train.epochs", 3.0),
            ("train.batch_size", 8),
            ("data.max_length", 2048),
            ("train.keep_best", False),
        ):
            carried.default(ours, value)
        carried.choose("lr_scheduler_type", "train.schedule", SCHEDULES)
        carried.warmup(0)
        if carried.take("bf16"):
            carried.put("train.precision", "bfloat16", "bf16")
        if carried.take("train_on_prompt"):
            carried.put("train.prompt_loss_weight", 1.0, "train_on_prompt")
        if carried.left.get("report_to") not in (None, "none", [], ["none"], "all"):
            carried.same({"report_to": "report_to"})
        if carried.left.get("template") not in (None, "", "default", "empty"):
            carried.put("data.form", "chat", "template")
        self._rows(carried)
        self._when(carried)
        self._plan(carried)
        if carried.left.get("optim") in ADAMW:
            carried.forget(["optim"])
        carried.leave(
            {
                "template": "the tokenizer's own chat template is used; model.chat_template names another",
                "packing": "rows are not packed to a length; train.padding_free does without padding",
                "optim": "AdamW is the optimiser",
                "flash_attn": "model.attention takes flash attention by itself where it is installed",
                "report_to": "name each tracker",
            }
        )
        carried.forget(["do_train", "do_eval", "overwrite_cache", "overwrite_output_dir", "preprocessing_num_workers"])
        carried.forget(["dataloader_num_workers", "plot_loss", "save_only_model", "ddp_timeout", "dataset_dir"])
        carried.forget([key for key, value in carried.left.items() if value in (False, "", "none", [], {})])

    def _rows(self, carried: Carried) -> None:
        folder = carried.file.parent / str(carried.left.get("dataset_dir") or "data")
        most = carried.take("max_samples")
        for key, ours in (("dataset", "data.train"), ("eval_dataset", "data.validation")):
            said = carried.take(key) or []
            names = [name.strip() for name in said.split(",")] if isinstance(said, str) else said
            files = [self._file(carried, folder, key, name) for name in names]
            known = [file for file in files if file]
            if most and (len(known) > 1 or key == "eval_dataset"):  # so many of each
                known = [f"{file}[:{most}]" for file in known]
            elif most:
                carried.put("data.train_limit", most, "max_samples")
            if known:
                carried.put(ours, known, key)
        carried.split_off("val_size")

    def _file(self, carried: Carried, folder: Any, key: str, name: str) -> str | None:
        """The rows that their ``dataset_info.json`` knows by ``name``."""
        table = folder / "dataset_info.json"
        try:
            entry = json.loads(read_text(table))[name]
        except (OSError, ValueError, KeyError, TypeError):
            carried.tell(f"{key} {name}", name, f"not in {table}; name the file of its rows with --train")
            return None
        if columns := entry.get("columns"):
            carried.tell(f"{key} {name}", columns, "rows are recognised by their keys; rename the columns")
        if "file_name" in entry:
            return str(folder / entry["file_name"])
        hub = entry.get("hf_hub_url")
        return f"{hub}:{entry['split']}" if hub and entry.get("split") else hub

    def _when(self, carried: Carried) -> None:
        for word, ours in (("eval", "train.validate_every"), ("save", "train.save_every")):
            steps = carried.take(f"{word}_steps")
            strategy = carried.take(f"{word}_strategy") or carried.take("evaluation_strategy" if word == "eval" else "")
            if strategy == "epoch":
                carried.put(ours, "epoch", f"{word}_strategy")
            elif steps:
                carried.put(ours, steps, f"{word}_steps")

    def _plan(self, carried: Carried) -> None:
        if bits := carried.take("quantization_bit"):
            if bits in (4, 8):
                carried.put("quantisation", "nf4" if bits == 4 else "int8", "quantization_bit")
            else:
                carried.tell("quantization_bit", bits, "4 (nf4) and 8 (int8) are what there is")
        carried.forget(["quantization_method"])
        kind = carried.take("finetuning_type", "lora")
        if kind == "full":
            carried.full("finetuning_type", kind)
            return
        if kind != "lora":
            raise ConfigError(f"{carried.file}: finetuning_type: {kind}: lora and full are known here")
        target = carried.take("lora_target", "all")
        names = [name.strip() for name in target.split(",")] if isinstance(target, str) else target
        match = "all-linear" if "all" in names else globs(names)
        options = {
            "lora_rank": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "use_rslora": "rank_stabilised",
        }
        carried.low_rank(match, options, "use_dora")
        extra = carried.take("additional_target") or []
        carried.whole(name.strip() for name in (extra.split(",") if isinstance(extra, str) else extra))
