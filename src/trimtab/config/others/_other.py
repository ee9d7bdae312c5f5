"""What the readers of other tools' configurations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from trimtab.config.yaml_text import show
from trimtab.errors import ConfigError

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
EPOCHS = 1e6
"""More than any run has: the steps decide."""
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw")


@dataclass
class Carried:
    """The settings of another tool's file, while they are carried over.

    A reader takes what it knows out of ``left``; what is there at the end is said to the user.

    Attributes:
        file: where they come from.
        tool: whose file it is.
        left: what has not been looked at, by their key.
        settings: ``dotted.key of ours -> (value, which of their keys said so)``.
        rules: of the plan.
        untold: what is not carried over: ``their key -> why``.
    """

    file: Path
    tool: str
    left: dict[str, Any]
    settings: dict[str, tuple[Any, str]] = field(default_factory=dict)
    rules: list[dict[str, Any]] = field(default_factory=list)
    untold: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, default: Any = None) -> Any:
        """What ``key`` says; it counts as looked at."""
        return self.left.pop(key, default)

    def put(self, ours: str, value: Any, key: str) -> None:
        """Our setting ``ours``, because their ``key`` says so."""
        self.settings[ours] = value, key

    def same(self, table: Mapping[str, str]) -> None:
        """Carry over keys that have the same meaning and the same values: ``theirs -> ours``."""
        for key, ours in table.items():
            if key in self.left:
                self.put(ours, self.take(key), key)

    def default(self, ours: str, value: Any) -> None:
        """What the tool does where its file says nothing, and we would do something else."""
        self.settings.setdefault(ours, (value, f"{self.tool}'s default"))

    def steps(self, key: str, default: int | None = None, passes: int = 1) -> None:
        """Train for as many steps as ``key`` says, each of so many ``passes`` that it counts, however many epochs these
        are; -1 and the like say nothing."""
        why = key if key in self.left else f"{self.tool}'s default"
        if (count := self.take(key, default)) is not None and count > 0:
            self.put("train.max_steps", max(1, count // passes), why)
            self.put("train.epochs", EPOCHS, why)

    def warmup(self, default: float) -> None:
        """The warmup as transformers reads it: the steps where there are any, else the share."""
        steps, share = self.take("warmup_steps"), self.take("warmup_ratio")
        key, said = ("warmup_steps", steps) if steps or share is None else ("warmup_ratio", share)
        if said is None:
            self.default("train.warmup", default)
        else:
            self.put("train.warmup", said or 0, key)

    def choose(self, key: str, ours: str, table: Mapping[Any, Any]) -> None:
        """Carry over one of several words, by ``table``; another one is told."""
        if key in self.left:
            said = self.take(key)
            if isinstance(said, str | int | bool) and said in table:
                self.put(ours, table[said], key)
            else:
                self.tell(key, said, f"here: {', '.join(dict.fromkeys(map(str, table.values())))}")

    def tell(self, key: str, value: Any, why: str) -> None:
        """Say that ``key`` is not carried over."""
        self.untold[key] = f"{show(value)}: {why}"

    def leave(self, table: Mapping[str, str]) -> None:
        """Say of these keys why they are not carried over."""
        for key, why in table.items():
            if key in self.left:
                self.tell(key, self.take(key), why)

    def forget(self, keys: Iterable[str]) -> None:
        """Keys that say what is so here anyway."""
        for key in keys:
            self.left.pop(key, None)

    def numbers(self, table: Mapping[str, str]) -> None:
        """Carry over numbers that may stand there as text, such as ``"1e-5"``. Raises ConfigError for another text."""
        for key, ours in table.items():
            if key in self.left:
                value = self.take(key)
                try:
                    self.put(ours, float(value), key)
                except (TypeError, ValueError):
                    raise ConfigError(f"{self.file}: {key}: expected a number, got {show(value)}") from None

    def low_rank(self, match: str | list[str], options: Mapping[str, str], dora: str) -> dict[str, Any]:
        """A rule for LoRA or DoRA on ``match``: ``options`` are our options by their keys, ``dora`` is the key that
        switches DoRA on; the rank of all these tools is 8 where none is said."""
        rule = {"match": match, "method": "dora" if self.take(dora) else "lora", "rank": 8}
        rule.update({ours: value for key, ours in options.items() if (value := self.take(key))})
        self.rules.append(rule)
        return rule

    def whole(self, names: Iterable[str]) -> None:
        """A rule for each of these modules, which are trained whole."""
        self.rules += [{"match": [name, f"*.{name}"], "method": "full"} for name in names]

    def full(self, key: str, value: Any) -> None:
        """Train every linear layer itself, because ``key`` says so."""
        self.rules.append({"match": "all-linear", "method": "full"})
        self.tell(key, value, "full fine-tuning trains every linear layer here; add rules for other modules")

    def split_off(self, key: str) -> None:
        """Validate on the fraction of the training rows that ``key`` says; where it says none, on rows that are named
        already, or on none."""
        share = self.take(key)
        if isinstance(share, float) and 0 < share < 1:
            self.put("data.validation", share, key)
        elif share:
            self.tell(key, share, "a fraction below 1 is expected here")
        self.settings.setdefault("data.validation", (None, key))

    def finish(self) -> None:
        """Put the rules into the settings, and say what nobody looked at."""
        if self.rules and "adapter" not in self.settings:  # which has a plan of its own
            self.settings["plan"] = self.rules, "the rules"
        for key, value in self.left.items():
            self.tell(key, value, "no setting here has this meaning")
        self.left.clear()


class OtherConfig(ABC):
    """The configurations of one tool."""

    label: ClassVar[str]
    """The tool's name."""
    known_by: ClassVar[str]
    """By which keys its files are known, in words."""

    @abstractmethod
    def knows(self, raw: Mapping[str, Any]) -> bool:
        """Whether ``raw`` is a configuration of this tool."""

    @abstractmethod
    def carry(self, carried: Carried) -> None:
        """Carry over what there is. Raises ConfigError for a kind of training that there is not here."""


def globs(names: Iterable[str]) -> list[str]:
    """Patterns for modules whose names end in these, as PEFT understands a list of target modules."""
    return [f"*.{name}" for name in names]
