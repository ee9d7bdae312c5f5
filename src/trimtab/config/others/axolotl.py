"""axolotl's YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.config.others._other import ADAMW, SCHEDULES, Carried, OtherConfig, globs
from trimtab.errors import ConfigError
from trimtab.models.chat_template import NAMED


class AxolotlConfig(OtherConfig):
    """Supervised fine-tuning, with or without an adapter."""

    label = "axolotl"
    known_by = "base_model and datasets"

    def knows(self, raw: Mapping[str, Any]) -> bool:
        return "base_model" in raw and ("datasets" in raw or "micro_batch_size" in raw)

    def carry(self, carried: Carried) -> None:
        if kind := carried.take("rl"):
            raise ConfigError(f"{carried.file}: rl: {kind}: only supervised fine-tuning is known here")
        carried.same(
            {
                "base_model": "model.name",
                "revision_of_model": "model.revision",
                "trust_remote_code": "model.trust_remote_code",
                "sequence_len": "data.max_length",
                "micro_batch_size": "train.batch_size",
                "gradient_accumulation_steps": "train.gradient_accumulation",
                "weight_decay": "train.weight_decay",
                "max_grad_norm": "train.max_grad_norm",
                "logging_steps": "train.log_every",
                "save_total_limit": "train.keep_checkpoints",
                "early_stopping_patience": "train.early_stopping",
                "group_by_length": "train.group_by_length",
                "seed": "train.seed",
                "output_dir": "output",
                "load_best_model_at_end": "train.keep_best",
                "eval_batch_size": "evaluation.batch_size",
                "use_tensorboard": "train.tensorboard",
                "lora_model_dir": "adapter",
            }
        )
        carried.numbers(
            {
                "learning_rate": "train.learning_rate",
                "num_epochs": "train.epochs",
                "loraplus_lr_ratio": "train.b_learning_rate_ratio",
            }
        )
        carried.default("train.epochs", 1.0)
        carried.choose("lr_scheduler", "train.schedule", SCHEDULES)
        carried.default("train.schedule", "cosine")
        carried.warmup(0.03)  # of a long run at most 100 steps
        carried.choose(
            "bf16", "train.precision", {True: "bfloat16", "true": "bfloat16", "auto": "auto", False: "float32"}
        )
        if carried.left.get("gradient_checkpointing"):
            carried.put("train.gradient_checkpointing", True, "gradient_checkpointing")
        if carried.take("train_on_inputs"):
            carried.put("train.prompt_loss_weight", 1.0, "train_on_inputs")
        carried.default("train.keep_best", False)
        trackers = {"use_wandb": "wandb", "wandb_project": "wandb", "use_mlflow": "mlflow", "use_comet": "comet_ml"}
        if named := [key for key in trackers if carried.left.get(key)]:
            carried.put("report_to", list(dict.fromkeys(trackers[key] for key in named)), ", ".join(named))
            carried.forget(["use_wandb", "use_mlflow", "use_comet"])
        self._rows(carried)
        self._when(carried)
        carried.steps("max_steps")  # whatever the epochs, of which _when makes fractions
        self._plan(carried)
        if carried.left.get("optimizer") in ADAMW:
            carried.forget(["optimizer"])
        if carried.left.get("chat_template") in NAMED:
            carried.same({"chat_template": "model.chat_template"})
        elif carried.left.get("chat_template") == "jinja":
            carried.same({"chat_template_jinja": "model.chat_template"})
            carried.forget(["chat_template"])
        carried.leave(
            {
                "sample_packing": "rows are not packed to a length; train.padding_free does without padding",
                "flash_attention": "model.attention takes flash attention by itself where it is installed",
                "optimizer": "AdamW is the optimiser",
                "chat_template": "the tokenizer's own chat template is used; model.chat_template names another",
                "special_tokens": "the tokenizer's own are used",
                "wandb_project": "say it in the environment: WANDB_PROJECT",
                "wandb_name": "the tracker gets the name of the run's folder",
            }
        )
        carried.forget(["gradient_checkpointing", "gradient_checkpointing_kwargs", "pad_to_sequence_len", "tf32"])
        carried.forget(["strict", "model_type", "tokenizer_type", "is_llama_derived_model"])
        carried.forget([key for key, value in carried.left.items() if value in (False, "", [], {})])

    def _rows(self, carried: Carried) -> None:
        files = self._named(carried, "datasets")
        if files:
            carried.put("data.train", files, "datasets")
        if tests := self._named(carried, "test_datasets"):
            carried.put("data.validation", tests, "test_datasets")
            carried.forget(["val_set_size"])
            return
        carried.split_off("val_set_size")

    def _named(self, carried: Carried, key: str) -> list[str]:
        names = []
        for number, one in enumerate(carried.take(key) or []):
            said = dict(one)
            name = said.pop("data_files", None) or said["path"]
            said.pop("path", None)
            if isinstance(name, list):
                names += name
                continue
            split = said.pop("split", None)
            names.append(f"{name}:{split}" if split and split != "train" else name)
            said.pop("ds_type", None)
            kind = said.pop("type", None)
            if kind is not None and not isinstance(kind, str):
                said["type"] = kind
            if said:
                carried.tell(f"{key}.{number}", said, "rows are recognised by their keys; see data.form")
        return names

    def _when(self, carried: Carried) -> None:
        epochs = carried.settings["train.epochs"][0]
        for theirs, per_epoch, ours in (
            ("eval_steps", "evals_per_epoch", "train.validate_every"),
            ("save_steps", "saves_per_epoch", "train.save_every"),
        ):
            steps, times = carried.take(theirs), carried.take(per_epoch)
            if steps:
                carried.put(ours, steps, theirs)
            elif times == 1:
                carried.put(ours, "epoch", per_epoch)
            elif times and ours == "train.validate_every":
                carried.put(ours, 1 / (times * epochs), per_epoch)
            elif times:
                carried.tell(per_epoch, times, "train.save_every has epoch, or a number of steps")
        carried.forget(["eval_strategy", "evaluation_strategy", "save_strategy"])

    def _plan(self, carried: Carried) -> None:
        adapter = carried.take("adapter")
        four, eight = carried.take("load_in_4bit"), carried.take("load_in_8bit")
        if four or eight:
            carried.put("quantisation", "nf4" if four else "int8", "load_in_4bit" if four else "load_in_8bit")
        if adapter not in (None, "", "lora", "qlora"):
            raise ConfigError(f"{carried.file}: adapter: {adapter}: lora and qlora are known here, or none")
        if not adapter:
            carried.full("adapter", None)
            return
        targets = carried.take("lora_target_modules")
        linear = carried.take("lora_target_linear") or targets == "all-linear" or not targets
        match = "all-linear" if linear else globs(targets if isinstance(targets, list) else [targets])
        options = {
            "lora_r": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "peft_use_rslora": "rank_stabilised",
        }
        carried.low_rank(match, options, "peft_use_dora")
        carried.whole(carried.take("lora_modules_to_save") or [])
