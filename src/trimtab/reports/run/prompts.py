"""What the prompts of a test set have in common, so that a page can show it once and each row's own words after.

Most prompts are a template with one thing filled in: an instruction of two lines, the row's text, "Answer:". Shown
whole, ten rows are ten copies of the instruction.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# A line in this share of the prompts belongs to the template. Low, as a template may come in a few variants; and only
# where there are enough prompts for a repetition to mean something.
_SHARE = 0.15
_ENOUGH = 5


@dataclass(frozen=True)
class Template:
    """The lines that prompts repeat, most frequent first, and what every remaining text begins and ends with."""

    lines: tuple[str, ...] = ()
    prefix: str = ""
    suffix: str = ""

    def own_words(self, prompt: str) -> str:
        """``prompt`` without the template; the whole prompt where nothing else would be left."""
        rest = _without(prompt, self.lines).removeprefix(self.prefix).removesuffix(self.suffix)
        return rest.strip() or prompt.strip()

    def __bool__(self) -> bool:
        return bool(self.lines or self.prefix or self.suffix)


def template(prompts: Sequence[str]) -> Template:
    """The template of ``prompts``; an empty one where they are few, have nothing in common or are all but the same."""
    if len(prompts) < _ENOUGH:
        return Template()
    seen = Counter(line for prompt in prompts for line in set(prompt.splitlines()) if line.strip())
    often = [line for line, times in seen.items() if times >= max(2, _SHARE * len(prompts))]
    # Among equals in the order of the alphabet, since a set has no order of its own.
    lines = tuple(sorted(often, key=lambda line: (-seen[line], line)))
    rests = [rest for prompt in prompts if (rest := _without(prompt, lines))]
    if 2 * len(rests) < len(prompts):
        return Template()
    if len(set(rests)) == 1:
        return Template(lines)
    # Up to a mark that ends a label ("Input:", "[INST]"): questions that all begin with "What is" keep those words.
    label = re.match(r".*[:>|\]}]\s*", _common_start(rests), re.DOTALL)
    prefix = label[0] if label else ""
    end = _common_start([rest[len(prefix) :][::-1] for rest in rests])[::-1]
    label = re.search(r"[<\[{|].*|^.*:\s*$", end, re.DOTALL)
    return Template(lines, prefix, label[0] if label else "")


def _without(prompt: str, lines: Sequence[str]) -> str:
    return "\n".join(line for line in prompt.splitlines() if line not in lines).strip()


def _common_start(texts: Sequence[str]) -> str:
    """What all ``texts`` begin with, in whole words."""
    # The first and the last in order differ soonest.
    first, last = min(texts), max(texts)
    differ = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return re.sub(r"\w+$", "", first[: next(differ, min(len(first), len(last)))])
