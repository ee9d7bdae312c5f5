"""The tables and the chart of the documentation, made of the numbers in benchmarks/results.

    python benchmarks/figures.py            prints every table as Markdown
    python benchmarks/figures.py --chart    writes docs/assets/chart-light.svg and chart-dark.svg

The site's pages name a table, and it is put in while the site is built: no figure is typed in by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"

ARMS = {
    "frozen": "the frozen blocks",
    "lora": "LoRA",
    "dora": "DoRA",
    "mora": "MoRA",
    "full": "full fine-tuning",
    "dense dora": "DoRA, the formula written plainly",
    "peft lora": "LoRA in PEFT",
    "peft dora": "DoRA in PEFT",
}


def results(name: str) -> Any:
    """What a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names and whose others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def over(ratios: dict[str, dict[str, float]], arms: Iterable[str], digits: int = 2) -> str:
    """A row for each arm, a column for each work."""
    cells = [
        [ARMS.get(arm, arm), *(f"{of[arm]:.{digits}f}" if arm in of else "" for of in ratios.values())] for arm in arms
    ]
    return markdown(["", *ratios], cells)


def finance() -> str:
    found = results("finance")["medians"]
    arms = [found[arm] for arm in ("trimtab", "peft")]

    def row(name: str, key: str, form: str) -> list[str]:
        return [name, *(form.format(arm[key]) for arm in arms), f"{arms[0][key] / arms[1][key]:.2f}"]

    rows = [
        row("seconds", "seconds", "{:,.0f}"),
        row("peak memory, GiB", "peak_gib", "{:.1f}"),
        ["accuracy on FPB, FiQA", *(f"{arm['fpb']:.1f}, {arm['fiqa']:.1f}" for arm in arms), ""],
    ]
    return markdown(["", "trimtab", "PEFT with transformers' Trainer", "ours / PEFT's"], rows)


def step() -> str:
    return over({one["dtype"]: one["ratio"] for one in results("step")["found"]}, ARMS)


def tokens() -> str:
    halves = [
        *results("step-tokens")["found"],
        *results("step-tokens-float32")["found"],
        *results("step-8192")["found"],
    ]
    by = {(one["tokens"], one["dtype"]): one["ratio"] for one in halves}
    widths = sorted({width for width, _ in by})
    rows = [
        [name, *(" / ".join(f"{by[width, dtype][arm]:.2f}" for dtype in ("bfloat16", "float32")) for width in widths)]
        for arm, name in ARMS.items()
        if arm not in ("frozen", "full")
    ]
    return markdown(["bfloat16 / float32", *(f"{width:,}" for width in widths)], rows)


def compiled() -> str:
    (one,) = results("step-compiled")["found"]
    rows = [
        [ARMS[arm], f"{one['ratio'][arm]:.2f}", f"{one['ratio'][f'{arm} compiled']:.2f}"]
        for arm in ("frozen", "lora", "dora", "mora")
    ]
    return markdown(["", "plain", "compiled"], rows)


def bounds() -> str:
    of = {one["dtype"]: one["bound"] for one in results("parts")["found"]}
    for file in ("parts-quantised", "parts-quantised-float32"):
        of |= {f"{one['kind']}, {one['dtype']}": one["bound"] for one in results(file)["found"]}
    return over(of, ("lora", "dora", "mora"))


def layer() -> str:
    found = results("layer")["found"]
    widths = sorted({one["tokens"] for one in found})
    rows = []
    for dtype in ("bfloat16", "float32"):
        cells = [dtype]
        for width in widths:
            ratios = [
                one["seconds"]["dora"] / one["seconds"]["dense"]
                for one in found
                if (one["dtype"], one["tokens"]) == (dtype, width) and "dense" in one["seconds"]
            ]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")
        rows.append(cells)
    return markdown(["median (best to worst), by tokens", *(f"{width:,}" for width in widths)], rows)


def speed_up() -> str:
    rows = []
    for one in results("speed_up")["found"]:
        name = f"{ARMS[one['method']]}, PEFT's tensors in {one['adapter']}"
        medians = [statistics.median(one["seconds"][arm]) for arm in ("PEFT", "sped up")]
        floor = f"{one['floor']:.2f}" if "floor" in one else ""
        rows.append([name, *(f"{median:.1f}" for median in medians), f"{one['ratio']:.2f}", floor])
    return markdown(["a training step", "PEFT, s", "sped up, s", "sped up / PEFT", "frozen / PEFT"], rows)


def step_memory() -> str:
    (one,) = results("step-memory")["found"]
    return over({"GiB": one["peak_rise_gib"]}, ARMS)


def inference() -> str:
    (one,) = results("inference")["found"]
    names = {
        "lora": "LoRA beside the weights",
        "dora": "DoRA",
        "mora": "MoRA",
        "lora serving": "LoRA inside `trimtab.for_inference`",
        "dora serving": "DoRA there",
        "mora serving": "MoRA there",
        "peft lora": "LoRA in PEFT",
        "peft dora": "DoRA in PEFT",
        "dora merged": "DoRA merged",
    }
    ratios = one["ratio"]
    rows = [[name, f"{ratios['decode'][arm]:.2f}", f"{ratios['prefill'][arm]:.2f}"] for arm, name in names.items()]
    return markdown(["over the bare model", "a token of decoding", "512 tokens at once"], rows)


def latency() -> str:
    one = results("latency")["found"][0]
    names = {"serial 64": "serial block", "parallel 64": "parallel block", "lora merged": "LoRA merged"}
    rows = [[name, *(f"{ratios[arm]:.2f}" for ratios in one["ratio"].values())] for arm, name in names.items()]
    return markdown(["over the bare blocks", *one["ratio"]], rows)


def startup() -> str:
    seconds = {arm: statistics.median(times) for arm, times in results("startup")["found"]["seconds"].items()}
    every = seconds["... and every public name"] - seconds["import torch"]
    rows = [
        ["`trimtab --help`", f"{seconds['trimtab --help']:.2f}"],
        ["every public name of `import trimtab`, beyond `import torch`", f"{max(every, 0):.2f}"],
        *(
            [f"{verb}: ours / PEFT's", f"{seconds[f'{verb}, trimtab']:.2f} / {seconds[f'{verb}, PEFT']:.2f}"]
            for verb in ("attach", "load")
        ),
    ]
    return markdown(["SmolLM2-135M, DoRA on all projections", "seconds"], rows)


def memory() -> str:
    real: dict[str, list[float]] = {}
    for one in results("memory")["found"]:
        real.setdefault("real rows of many lengths" if one["data"] else "rows of one length", []).append(one["ratio"])
    rows = [[kind, str(len(of)), f"{min(of):.2f}", f"{max(of):.2f}"] for kind, of in real.items()]
    return markdown(["measured peak / estimate of `trimtab plan`", "settings", "lowest", "highest"], rows)


def quantised() -> str:
    arms = ("lora", "dora", "frozen compiled", "lora compiled", "dora compiled")
    found = results("quantised")["found"]
    rows = {kind: found[kind]["ratio"] for kind in ("int8", "nf4")}
    names = {"frozen compiled": "compiled: the frozen blocks", "lora compiled": "LoRA", "dora compiled": "DoRA"}
    lines = [[names.get(arm, ARMS.get(arm, arm)), *(f"{of[arm]:.2f}" for of in rows.values())] for arm in arms]
    for label, file in (("a block of Llama-3.1-8B's shape", "quantised-8b"), ("float32", "quantised-float32")):
        of = results(file)["found"]
        lines += [
            [f"{label}: {ARMS[arm]}", *(f"{of[kind]['ratio'][arm]:.2f}" for kind in ("int8", "nf4"))]
            for arm in ("lora", "dora")
        ]
    return markdown(["over the frozen quantised blocks", "int8", "nf4"], lines)


def experts() -> str:
    found = results("experts")["found"]
    of = {f"{one['dtype']}, {one['implementation'].replace('_mm', '')}": one["ratio"] for one in found}
    return over(of, ("lora", "dora", "peft lora"))


def kinds() -> str:
    names = {
        "patches": "patch embedding of a vision transformer",
        "resnet": "residual network, its first blocks",
        "resnet-deep": "residual network, its last blocks",
        "speech": "convolutions of a speech encoder",
        "video": "convolutions in three dimensions",
    }
    found = results("kinds")["found"]
    arms = ("lora", "dora", "peft lora", "peft dora")
    rows = [
        [name, *(f"{found[kind][arm]:.2f}" if arm in found[kind] else "" for arm in arms)]
        for kind, name in names.items()
    ]
    return markdown(["over the bare layers", *(ARMS[arm] for arm in arms)], rows)


def parity() -> str:
    lines = {
        "outputs, same start": "outputs_before",
        "outputs after 10 steps of AdamW on each side": "outputs_after",
        "gradients, same start": "gradients_before",
        "gradients after 10 steps": "gradients_after",
        "outputs, our folder in PEFT": "ours_in_peft",
        "outputs, PEFT's folder in ours": "peft_in_ours",
    }
    found = {one["variant"]: one for one in results("parity")}
    rows = [[name, *(f"{found[variant][key]:.1e}" for variant in ("lora", "dora"))] for name, key in lines.items()]
    return markdown(["largest difference, relative to the largest value", "LoRA", "DoRA"], rows)


def llama_cpp() -> str:
    found = results("llama-cpp")["found"]
    names = {"the base alone": "the base without the adapter", "gguf-lora": "the base and `gguf-lora`"}
    names |= {kind: f"`gguf --type {kind}`" for kind in ("f16", "q8_0")} | {"own": "`gguf`, in the base's own Q4_1"}
    lines = [
        [
            names.get(name, name),
            *(f"{100 * of[key]:.1f} %" for key in ("same answers", "same steps")),
            f"{of['mean difference of log-probabilities']:.3f}",
        ]
        for name, of in found.items()
    ]
    return markdown(["llama.cpp with", "same answers", "same steps", "mean difference of log-probabilities"], lines)


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        *(finance, step, tokens, compiled, bounds, layer, step_memory, inference, latency, startup),
        *(memory, quantised, experts, kinds, llama_cpp, parity, speed_up),
    )
}


def chart(dark: bool) -> str:
    """A whole job, ours and PEFT's, as bars: seconds on the left, memory on the right."""
    found = results("finance")["medians"]
    text, faint, bar, rival = (
        ("#e6edf3", "#9198a1", "#7aa2ff", "#4a5261") if dark else ("#1f2328", "#59636e", "#3f51b5", "#c4c9d2")
    )
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 150" role="img" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="14">',
        "<title>Time and memory of a fine-tuning job, trimtab and PEFT</title>",
    ]
    panels = (("seconds", "seconds", "{:,.0f} s", 0), ("peak memory", "peak_gib", "{:.1f} GiB", 385))
    for title, key, form, left in panels:
        largest = max(found[arm][key] for arm in found)
        parts.append(f'<text x="{left + 70}" y="22" fill="{faint}" font-size="13">{title}</text>')
        for row, (arm, name, colour) in enumerate((("trimtab", "trimtab", bar), ("peft", "PEFT", rival))):
            y, width = 36 + 40 * row, 225 * found[arm][key] / largest
            weight = ' font-weight="600"' if arm == "trimtab" else ""
            parts += [
                f'<text x="{left + 60}" y="{y + 19}" fill="{text}" text-anchor="end"{weight}>{name}</text>',
                f'<rect x="{left + 70}" y="{y}" width="{width:.1f}" height="28" rx="3" fill="{colour}"/>',
                f'<text x="{left + 78 + width:.1f}" y="{y + 19}" fill="{text}"{weight}>'
                f"{form.format(found[arm][key])}</text>",
            ]
    what = results("finance")["what"]
    caption = (
        f"SmolLM2-135M, DoRA of rank {what['rank']}, {what['steps']} steps of {what['batch_size']} rows, "
        f"{what['dtype']}, {results('finance')['machine']['cores']} processor cores"
    )
    parts += [f'<text x="70" y="140" fill="{faint}" font-size="13">{caption}</text>', "</svg>"]
    return "\n".join(parts) + "\n"


def charts() -> dict[Path, str]:
    """The chart's files and what is in them."""
    return {ASSETS / f"chart-{'dark' if dark else 'light'}.svg": chart(dark) for dark in (False, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chart", action="store_true", help="write the chart of the first screen")
    if parser.parse_args().chart:
        for path, drawn in charts().items():
            path.write_text(drawn, "utf-8")
        return
    for name, table in TABLES.items():
        print(f"## {name}\n\n{table()}\n")


if __name__ == "__main__":
    main()
