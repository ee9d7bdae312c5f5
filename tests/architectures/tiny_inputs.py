"""Inputs for a tiny model of any architecture, by the names of what its forward pass takes.

``candidates`` gives several sets of inputs, the richest first (text with an image before text alone). The first that
the model takes is used.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from tiny_config import IMAGE, MELS, PATCH, SPECIAL
from torch import Tensor, nn

BATCH, LENGTH, TARGETS = 2, 12, 7


def candidates(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what they are, the inputs)."""
    takes = _Takes(model)
    if takes.main == "input_ids" or "input_ids" in takes.required:
        text = takes.text()
        for kind, beside in takes.beside_text():
            yield f"text and {kind}", {**text, **beside}
        yield "text", text
        yield "text", {**text, "use_cache": False}
        yield "text with a mask", {**text, "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}
        return
    for kind, main in takes.alone():
        yield kind, main
        if takes.decoder():
            yield f"{kind} and text", {**main, **takes.decoder()}
        if "input_ids" in takes.parameters:
            yield f"{kind} and text", {**main, **takes.text()}


def mended(model: Any, inputs: dict[str, Any], message: str) -> dict[str, Any] | None:
    """``inputs`` with as many places for an image (a sound) in its text as an error ``message`` asks for."""
    counts = re.search(r"tokens\D*(\d+)\D+features\D*(\d+)", message) or re.search(r"(\d+)\D+?but \D*(\d+)", message)
    if counts is None or "input_ids" not in inputs:
        return None
    asked = int(counts[2])
    kind = "audio" if "input_features" in inputs or "input_values" in inputs else "image"
    names = [
        f"{kind}_token_id",
        f"{kind}_token_index",
        "image_token_id",
        "image_token_index",
        "media_placeholder_token_id",
    ]
    token = next((value for name in names if isinstance(value := _look(model.config, name), int)), None)
    width = _look(getattr(model.config, "text_config", model.config), "hidden_size") or 1
    if token is None or asked <= 0:
        return None
    if asked > 4000 and asked % width == 0:  # some count numbers, and not rows
        asked //= width
    if asked % BATCH or asked // BATCH > 1000 or asked == int((inputs["input_ids"] == token).sum()):
        return None
    ids = inputs["input_ids"]
    ids = ids[:, (ids == token).sum(1).max() :]
    places = torch.full((BATCH, asked // BATCH), token)
    ids = torch.cat([places, ids], 1)
    made = {**inputs, "input_ids": ids}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        made["mm_token_type_ids"] = (ids == token).long()
    if "attention_mask" in inputs:
        made["attention_mask"] = torch.ones_like(ids)
    return made


class _Takes:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config
        self.parameters = inspect.signature(model.forward).parameters
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.required = [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is inspect.Parameter.empty and parameter.kind not in kinds
        ]
        main = getattr(model, "main_input_name", "input_ids")
        self.main = main if main in self.parameters or not self.required else self.required[0]
        if self.main not in self.parameters and "input_ids" in self.parameters:
            self.main = "input_ids"

    def size(self, *names: str, default: int) -> int:
        """The first of ``names`` that the configuration, or one inside it, says."""
        for name in names:
            value = _look(self.config, name)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return default

    def ids(self, length: int, lowest: int = SPECIAL) -> Tensor:
        vocabulary = (
            min(value for value in _every(self.config, ("vocab_size", "text_vocab_size")) if value)
            if list(_every(self.config, ("vocab_size", "text_vocab_size")))
            else 64
        )
        return torch.randint(min(lowest, max(vocabulary - 8, 0)), vocabulary, (BATCH, length))

    def text(self) -> dict[str, Any]:
        shape = (BATCH, LENGTH)
        made: dict[str, Any] = {"input_ids": self.ids(LENGTH)}
        ends = _look(self.config, "eos_token_id")
        if isinstance(ends, int) and "SequenceClassification" in type(self.model).__name__:
            made["input_ids"][:, -1] = ends  # some look for it
        if "bbox" in self.parameters:
            made["bbox"] = torch.randint(0, 8, (*shape, 4)).sort(-1).values
        if "next_sentence_label" in self.required:
            made["next_sentence_label"] = torch.zeros(BATCH, dtype=torch.long)
        return {**made, **self.decoder(), **self.other_required(made)}

    def decoder(self) -> dict[str, Any]:
        if "SequenceClassification" in type(self.model).__name__:
            return {}
        if "decoder_input_ids" in self.parameters and (
            getattr(self.config, "is_encoder_decoder", False) or "decoder_input_ids" in self.required
        ):
            return {"decoder_input_ids": self.ids(TARGETS)}
        return {}

    def other_required(self, made: dict[str, Any]) -> dict[str, Any]:
        return {name: self.named(name) for name in self.required if name not in made and name in _NAMED}

    def named(self, name: str) -> Any:
        return _NAMED[name](self)

    def beside_text(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What a multimodal model takes beside its text."""
        for kind, name in (("image", "pixel_values"), ("sound", "input_features"), ("sound", "input_values")):
            if name in self.parameters:
                for _, made in self.forms_of(name):
                    yield kind, made

    def alone(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What a model takes that reads no text."""
        if "grid_thw" in self.parameters or "image_grid_thw" in self.required:
            made = self.patches(self.size("num_channels", "in_channels", "in_chans", default=3))
            rows, grid = made["pixel_values"], made["image_grid_thw"]
            patch = self.size("patch_size", "spatial_patch_size", default=PATCH)
            beside = {name: torch.tensor([2] * BATCH) for name in ("merge_sizes",) if name in self.required}
            name = "grid_thw" if "grid_thw" in self.parameters else "image_grid_thw"
            yield "image", {self.main: rows, name: grid, **beside}
            yield "image", {self.main: rows.reshape(len(rows), -1, patch, patch), name: grid, **beside}
        for kind, made in self.forms_of(self.main):
            yield kind, {**made, **self.other_required(made)}
            full = {**made, **self.decoder(), **self.other_required(made)}
            if full.keys() != made.keys():
                yield kind, full

    def forms_of(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The forms in which different models take what they all call ``name``."""
        channels = self.size("num_channels", "in_channels", "in_chans", "num_image_channels", default=3)
        side = self.size("image_size", "img_size", "input_size", default=IMAGE)
        if name in ("pixel_values", "images", "pixel_values_images"):
            if "image_grid_thw" in self.parameters:
                yield "image", self.patches(channels)
            if "image_sizes" in self.parameters:
                sizes = torch.tensor([[side, side]] * BATCH)
                yield "image", {name: torch.randn(BATCH, 3, channels, side, side), "image_sizes": sizes}
                yield "image", {name: torch.randn(BATCH, channels, side, side), "image_sizes": sizes}
            for more in ({}, {"pixel_mask": torch.ones(BATCH, side, side, dtype=torch.long)}):
                if not more or "pixel_mask" in self.parameters:
                    yield "image", {name: torch.randn(BATCH, channels, side, side), **more}
                    yield "image", {name: torch.randn(BATCH, 1, channels, side, side), **more}
            frames = self.size("num_frames", "frames", default=4)
            yield "video", {name: torch.randn(BATCH, frames, channels, side, side)}
            if "pixel_position_ids" in self.parameters or "image_position_ids" in self.parameters:
                yield "image", self.patches(channels)
            yield "image", {name: torch.randn(BATCH, channels, 2 * side, 2 * side)}
            yield "image", {name: torch.randn(BATCH, channels, 224, 224)}
        elif name == "pixel_values_videos":
            frames = self.size("num_frames", "frames", "frames_per_clip", default=4)
            for frame in dict.fromkeys((frames, 8, 16)):
                yield "video", {name: torch.randn(BATCH, frame, channels, side, side)}
        elif name == "input_features":
            mels = self.size("num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", default=MELS)
            long = 2 * self.size("max_source_positions", "max_position_embeddings", default=32)
            for frames in dict.fromkeys((long, 64, 128, 256)):
                yield "sound", {name: torch.randn(BATCH, mels, frames)}
                yield "sound", {name: torch.randn(BATCH, frames, mels)}
                if "input_features_mask" in self.parameters:
                    mask = torch.ones(BATCH, frames, dtype=torch.long)
                    yield "sound", {name: torch.randn(BATCH, frames, mels), "input_features_mask": mask}
                    yield "sound", {name: torch.randn(BATCH, mels, frames), "input_features_mask": mask}
                yield "sound", {name: torch.randn(BATCH, 1, frames, mels)}
        elif name == "input_values":
            for samples in (2400, 16000):
                yield "sound", {name: 0.1 * torch.randn(BATCH, samples)}
                yield "sound", {name: 0.1 * torch.randn(BATCH, 1, samples)}
            frames = self.size("max_length", default=64)
            yield "sound", {name: torch.randn(BATCH, frames, self.size("num_mel_bins", default=MELS))}
        elif name == "past_values":
            yield "series", self.series()
            length = self.size("context_length", "seq_length", default=32)
            columns = self.size("num_input_channels", default=1)
            yield "series", {name: torch.randn(BATCH, length, columns)}
            yield "series", {name: torch.randn(BATCH, length)}
        elif name in _NAMED:
            yield name.replace("_", " "), {name: self.named(name)}
        else:
            width = self.size("hidden_size", "d_model", default=32)
            yield name, {name: torch.randn(BATCH, LENGTH, width)}

    def patches(self, channels: int) -> dict[str, Any]:
        """An image as Qwen2-VL and its kind take it: patches in rows, and how many of them there are."""
        patch = self.size("patch_size", "spatial_patch_size", default=PATCH)
        frames = self.size("temporal_patch_size", default=1)
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        rows = torch.randn(16 * BATCH, channels * frames * patch * patch)
        return {"pixel_values": rows, "image_grid_thw": grid}

    def series(self) -> dict[str, Any]:
        config = self.config
        past = self.size("context_length", default=8) + max(getattr(config, "lags_sequence", None) or [0])
        features = getattr(config, "num_time_features", 0) or 0
        future = self.size("prediction_length", default=4)
        return {
            "past_values": torch.rand(BATCH, past) + 0.5,
            "past_time_features": torch.randn(BATCH, past, features),
            "past_observed_mask": torch.ones(BATCH, past),
            "future_values": torch.rand(BATCH, future) + 0.5,
            "future_time_features": torch.randn(BATCH, future, features),
        }


_NAMED: dict[str, Any] = {
    "input_ids": lambda takes: takes.ids(LENGTH),
    "decoder_input_ids": lambda takes: takes.ids(TARGETS),
    "attention_mask": lambda takes: torch.ones(BATCH, LENGTH, dtype=torch.long),
    "pixel_values": lambda takes: next(takes.forms_of("pixel_values"))[1]["pixel_values"],
    "input_features": lambda takes: next(takes.forms_of("input_features"))[1]["input_features"],
    "input_values": lambda takes: next(takes.forms_of("input_values"))[1]["input_values"],
    "bbox": lambda takes: torch.randint(0, 8, (BATCH, LENGTH, 4)).sort(-1).values,
    "audio_codes": lambda takes: takes.ids(LENGTH)[:, None].repeat(1, takes.size("num_codebooks", default=2), 1),
}


def _look(config: Any, name: str) -> Any:
    """``name`` in ``config``, or in the first configuration inside it that has it."""
    found = next(_every(config, (name,)), None)
    return found


def _every(config: Any, names: tuple[str, ...]) -> Iterator[Any]:
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:
            value = None
        if value is not None:
            yield value
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and value is not config:
            yield from _every(value, names)
