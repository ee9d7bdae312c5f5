"""Makes the digits: two small networks pretrained on the pictures of 0 to 4, and the pictures of 5 to 9 as rows.

    python examples/digits/make.py              # about 40 seconds on one core; writes examples/digits/made/

scikit-learn brings the pictures, so nothing is downloaded. The same seed makes the same files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from trimtab.files import write_jsonl

MADE = Path(__file__).resolve().parent / "made"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KNOWN = 5  # the first five are what the networks are pretrained on
PARTS = {"train": 200, "validation": 100, "test": None}  # rows of 5 to 9; None: those left
STEPS = {"vit": 1000, "resnet": 300}
BATCH = 64
SIZES = {"vit": 16, "resnet": 32}  # pixels that a network sees on each side; the pictures have 8


def pictures() -> tuple[list[Image.Image], NDArray[np.int64]]:
    """The 1,797 grey pictures of 8 by 8 pixels, shuffled, and their digits."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    grey = (found.images[order] * (255 / 16)).round().astype(np.uint8)
    return [Image.fromarray(one) for one in grey], found.target[order].astype(np.int64)


def network(name: str) -> Any:
    """A network of that name, with random weights and a class for each of the known digits."""
    labels = {
        "id2label": dict(enumerate(WORDS[:KNOWN])),
        "label2id": {word: at for at, word in enumerate(WORDS[:KNOWN])},
    }
    if name == "vit":
        width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        return ViTForImageClassification(ViTConfig(image_size=SIZES[name], patch_size=4, **width, **labels))
    # Its batch norms hold running statistics, which no adapter may change.
    shape = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, **labels))


def processor(name: str) -> Any:
    """What makes of a picture the numbers that the network takes: three channels, from -1 to 1."""
    side, half = SIZES[name], [0.5, 0.5, 0.5]
    size = {"height": side, "width": side}
    return ViTImageProcessorPil(
        size=size, image_mean=half, image_std=half, do_convert_rgb=True, resample=Image.Resampling.NEAREST
    )


def pretrain(model: Any, x: Tensor, y: Tensor, steps: int) -> None:
    """AdamW on batches drawn at random, the rate going down to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]).logits, y[rows]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def make(folder: Path, steps: dict[str, int] = STEPS) -> dict[str, float]:
    """Write all of it to ``folder``; gives the accuracy of each network on 100 pictures of 0 to 4 kept back."""
    images, digits = pictures()
    known, others = np.flatnonzero(digits < KNOWN), np.flatnonzero(digits >= KNOWN)
    found = {}
    for name in STEPS:
        torch.manual_seed(0)
        model = network(name)
        processor(name).save_pretrained(folder / name)
        # Read back, as everybody else will read it.
        read = AutoImageProcessor.from_pretrained(folder / name)
        x = read([images[at] for at in known], return_tensors="pt").pixel_values
        y = torch.tensor(digits[known])
        pretrain(model, x[100:], y[100:], steps[name])
        with torch.no_grad():
            found[name] = float((model(x[:100]).logits.argmax(1) == y[:100]).float().mean())
        model.save_pretrained(folder / name)

    begin = 0
    for part, count in PARTS.items():
        rows = []
        for at in others[begin : None if count is None else begin + count]:
            word = WORDS[digits[at]]
            path = folder / "images" / part / word / f"{at:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images[at].save(path)
            rows.append({"image": str(path.relative_to(folder)), "label": word})
        write_jsonl(folder / f"{part}.jsonl", rows)
        begin += count or 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=MADE, metavar="FOLDER", help="where to write (default: %(default)s)")
    said = parser.parse_args()
    for name, accuracy in make(said.to).items():
        print(f"{said.to / name}: {accuracy:.0%} of 100 pictures of 0 to 4 that it was not trained on")
    print(f"{said.to}: images/PART/CLASS/*.png and PART.jsonl of 5 to 9, with PART one of {', '.join(PARTS)}")


if __name__ == "__main__":
    main()
