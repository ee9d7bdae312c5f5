"""The study of learning rates: the order of its cells, grids that grow at an edge, and what it claims of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import auto_check
import rates_cell
from fit_prior import bests, lines, mean_losses, smooth_best
from rates_page import _PICTURES, _coloured, told, write_rates_page
from rates_results import arm_results, best_place, compared, restore, write_results
from rates_rows import _orders
from rates_study import RateCell, RatesStudy, at_lattice, lattice_index, load_rates_study
from trimtab.config.read import build_config
from trimtab.config.resolve import plan_of
from trimtab.errors import RunError
from trimtab.files import write_json

YAML = Path(__file__).resolve().parents[3] / "studies" / "rates" / "study.yaml"


@pytest.fixture
def study(tmp_path: Path) -> RatesStudy:
    """The study itself, with rows made here and a state and an output of its own."""
    rows = tmp_path / "fpb.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"context": f"Instruction: what?\nInput: Sales rose to {n} .\nAnswer: ", "target": "positive"})
            + "\n"
            for n in range(200)
        ),
        encoding="utf-8",
    )
    own = [f"state={tmp_path / 'state'}", f"output={tmp_path / 'out'}", f"phrasebank={rows}"]
    return load_rates_study(YAML, own)


def finish(study: RatesStudy, cell: RateCell, best: float) -> None:
    """A cell as it would have been found with a loss that is lowest at the lattice place ``best``."""
    loss = 0.3 + 0.05 * (cell.index - best) ** 2 + 0.001 * cell.seed
    found = {"task": cell.task, "arm": cell.arm, "rate": cell.rate, "seed": cell.seed, **study.identity(cell)}
    more = {"loss": loss, "exact": 0.5, "trained": 1, "seconds": 1.0, "processor_seconds": 1.0, "versions": {}}
    write_json(study.file(cell), {**found, **more})


def finish_all(study: RatesStudy, best: Callable[[RateCell], float]) -> list[RateCell]:
    """Every cell that the study asks for, in its order."""
    done = []
    for cell in study.missing():
        finish(study, cell, best(cell))
        done.append(cell)
    return done


def test_every_arm_is_a_run_and_its_plan_can_be(study: RatesStudy) -> None:
    for task, arm in study.pairs:
        settings = {**study.settings(task, arm), "data": {"train": "rows.jsonl"}, "output": "none"}
        plan_of(build_config(settings, Path.cwd(), arm))
    assert {len(study.grid(task, arm)) for task, arm in study.pairs} == {7}


def test_the_first_seed_comes_first_and_its_coarse_grid_before_the_rest(study: RatesStudy) -> None:
    middle = {"adapters": -8.0, "full": -12.0}
    done = finish_all(study, lambda cell: middle[study.said.arms[cell.arm].rates])
    arms = len(study.pairs)
    near = [seed for seed in (2, 3) for _ in range(3 * arms)]
    assert [cell.seed for cell in done] == [1] * 7 * arms + near + [2] * 4 * arms + [3] * 4 * arms
    assert len({(cell.task, cell.arm) for cell in done[: 4 * arms]}) == arms
    assert len(set(done)) == len(done) == 567


@pytest.mark.full
def test_other_seeds_are_followed_to_their_own_best_and_tell_it_before_the_rest_is_done(study: RatesStudy) -> None:
    """The first seed's best is at -9, the second's two places above, the third's in the same place."""
    arm = ("orders", "LoRA r8")
    for index in study.grid(*arm):
        finish(study, RateCell(*arm, index, 1), -9)
    for cell in study.missing():
        finish(study, cell, -12 if "full" in cell.arm else -7 if cell.seed == 2 else -9)
        known = arm_results(study, *arm)
        if len(known["places"]) == 3:
            break
    assert {seed: len(study.losses(*arm, seed)) for seed in (1, 2, 3)} == {1: 7, 2: 5, 3: 3}
    assert known["places"] == pytest.approx({"1": -9, "2": -7, "3": -9})
    assert [point["seeds"] for point in known["curve"]] == [1] * 7, "of seeds that are whole"


def test_a_grid_grows_where_its_best_is_at_an_edge_and_claims_nothing_if_it_still_is(study: RatesStudy) -> None:
    place = {"LoRA r8": -5.0, "DoRA r8": 20.0}  # one beyond the grid's end, and one out of reach
    finish_all(study, lambda cell: place.get(cell.arm, -9.0))
    assert [len(study.grid("orders", arm)) for arm in ("LoRA r8", "DoRA r8", "MoRA r8")] == [9, 10, 7]
    results = write_results(study)
    found = {(arm["task"], arm["arm"]): arm for arm in results["arms"]}
    assert found["orders", "LoRA r8"]["best"]["rate"] == pytest.approx(at_lattice(-5), rel=0.01)
    assert found["orders", "DoRA r8"]["edge"]
    assert found["orders", "DoRA r8"]["best"] is None
    rows = {(row["task"], row["arm"], row["against"]): row for row in results["compared"]}
    assert rows["orders", "DoRA r8", "full"]["ratio"] is None
    assert "edge" in rows["orders", "DoRA r8", "full"]["why"]
    assert rows["orders", "LoRA r1", "LoRA r8"]["ratio"]["rate"] == pytest.approx(10 ** (-4 / 3), rel=0.02)


@pytest.mark.full
def test_what_is_not_done_is_no_result_and_the_page_shows_what_there_is(study: RatesStudy) -> None:
    for index in study.grid("orders", "LoRA r8"):
        finish(study, RateCell("orders", "LoRA r8", index, 1), -8.4)
    results = write_results(study)
    assert (results["done"], results["of"]) == (7, 567)
    row = next(row for row in results["compared"] if (row["task"], row["arm"]) == ("orders", "LoRA r8"))
    assert row["ratio"] is None
    page = write_rates_page(study.output, results).read_text(encoding="utf-8")
    assert "7 of 567 cells" in page
    assert len(list(study.output.glob("*.png"))) == 4
    assert (study.output / "rates.csv").read_text(encoding="utf-8").count("\n") == 8


def test_an_arm_has_one_colour_in_every_picture_and_each_of_a_picture_its_own() -> None:
    colours: dict[str, set[str]] = {}
    for names in _PICTURES.values():
        found = _coloured(names)
        assert len({*found.values()}) == len(names)
        for name, colour in found.items():
            colours.setdefault(name, set()).add(colour)
    assert all(len(of_arm) == 1 for of_arm in colours.values())


def test_a_ratio_is_told_without_an_exponent() -> None:
    assert told({"rate": 24.1, "low": 1.62, "high": 352.0}) == "24 (1.6 to 350)"
    assert told({"rate": 4.64e-5, "low": None, "high": None}) == "4.6e-05, one seed"
    assert told(None) == "–"


def test_a_cell_of_other_settings_is_refused(study: RatesStudy) -> None:
    cell = RateCell("orders", "full", -12, 1)
    finish(study, cell, -12)
    assert study.done(cell) is not None
    file = study.file(cell)
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "rows": "others"})
    with pytest.raises(RunError, match="other settings"):
        study.done(cell)


@pytest.mark.full
def test_auto_is_held_against_the_best_of_whole_grids_alone(study: RatesStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates that auto finds are 1e-3 here, and every training's loss is that of the bowl around the best place."""

    class Known:
        made = 0

        def __init__(self, study: RatesStudy) -> None: ...

        def find_rate(self, cell: RateCell, budget: float) -> Any:
            return SimpleNamespace(rate=1e-3, likely=1e-3, cost=0.0)

        def run(self, cell: RateCell, rate: float) -> dict[str, Any]:
            Known.made += 1
            loss = 0.3 + 0.05 * (lattice_index(rate) + 9) ** 2 + 0.001 * cell.seed
            loss_of = None if cell.arm == "full" else loss
            return {"seed": cell.seed, "rate": rate, "loss": loss_of, **study.identity(cell)}

    monkeypatch.setattr(rates_cell, "Trainings", Known)
    assert list(auto_check.settings(study, 0.15, ["orders"])) == []
    finish_all(study, lambda cell: -12 if "full" in cell.arm else -9)
    rows = {row["arm"]: row for row in auto_check.settings(study, 0.15, ["orders"])}
    assert len(rows) == 14
    assert rows["LoRA r8"]["auto_over"] == pytest.approx(0)
    assert rows["LoRA r8"]["fixed_over"] == pytest.approx(0.05)  # 5e-4 is one place below
    assert rows["full"]["auto_over"] == 99.0  # diverged
    assert len(rows["LoRA r8"]["trained"]) == 6
    first = replace(study, said=study.said.model_copy(update={"seeds": [1]}))
    (one, *_) = auto_check.settings(first, 0.15, ["orders"])
    assert len(one["auto_rates"]) == 1
    assert one["trained"] == rows["LoRA r8"]["trained"], "of the other seeds, too, to go on from"
    made = Known.made
    auto_check.run(str(YAML), f"state={study.state}", f"output={study.output}", f"phrasebank={study.said.phrasebank}")
    assert Known.made == made  # kept
    auto = json.loads((study.output / "auto.json").read_text(encoding="utf-8"))
    assert auto["close"] == {"auto": 13, "fixed": 0}
    with pytest.raises(RunError, match="no setting's grid"):
        auto_check.run(str(YAML), "seeds=4", f"state={study.state}", f"phrasebank={study.said.phrasebank}")
    page = write_rates_page(study.output, write_results(study), auto).read_text(encoding="utf-8")
    assert "<code>auto</code> in 13, 5e-4 in 0 of 14 settings" in page
    assert "diverged" in page
    assert (study.output / "rates-auto.png").is_file()


def test_a_best_rate_of_all_seeds_is_one_with_the_two_beside_it() -> None:
    grid = range(-12, -5)
    whole = {index: 0.4 + 0.02 * (index + 9) ** 2 for index in grid}
    some = {index: whole[index] for index in (-10, -9, -8)}
    assert auto_check._best(grid, [whole, some]) == -9
    assert auto_check._best(grid, [whole, {**some, -8: 0.1}]) is None, "-7 may be lower still"
    assert auto_check._best(grid, [some, some]) is None
    assert auto_check._best(grid, [whole, {}]) is None


def test_the_likely_rates_are_a_line_through_what_arms_of_all_sizes_say(study: RatesStudy) -> None:
    """Here the best rate of LoRA falls with the root of alpha, and another task and other steps play no part."""
    place = {"LoRA r1": -8 + 1.5 * math.log10(8), "LoRA r64": -8 - 1.5 * math.log10(8)}
    for task, arm in study.pairs:
        for index in study.grid(task, arm):
            best = place.get(arm, -8.0) if task == "sentiment" else -11.0
            finish(study, RateCell(task, arm, index, 1), best)
    found = bests(study, "sentiment")
    assert set(found) == {"lora", "dora", "mora", "full"}
    three = [found["lora"][arm] for arm in ("LoRA r1", "LoRA r8", "LoRA r64")]
    assert [size for size, _ in three] == [1 / 8, 1, 8]
    base, power = lines({"lora": three})
    assert (base["lora"], power) == pytest.approx((at_lattice(-8), 0.5), rel=0.02)
    assert lines({"lora": three[1:2]}) == ({"lora": pytest.approx(at_lattice(-8), rel=0.02)}, 0.0)


def test_methods_share_the_power_and_have_bases_of_their_own() -> None:
    """Arms of one size alone say nothing about the power, and those of more sizes say more."""
    steep = [(size, 2e-3 / size**0.8) for size in (1 / 8, 1.0, 8.0)]
    flat = [(size, 1e-3 / size**0.2) for size in (1 / 8, 1.0, 8.0)]
    bases, power = lines({"lora": steep, "mora": flat, "full": [(1.0, 1e-4), (1.0, 4e-4)]})
    assert power == pytest.approx(0.5)
    assert bases == pytest.approx({"lora": 2e-3, "mora": 1e-3, "full": 2e-4})
    assert lines({"lora": steep, "mora": flat[:2]})[1] > 0.6


def test_a_seed_that_is_lower_everywhere_draws_no_rate_down_that_it_alone_has() -> None:
    bowl = {index: 0.4 + 0.02 * (index + 9) ** 2 for index in range(-12, -5)}
    low = {index: bowl[index] - 0.2 for index in (-8, -7, -6)}
    found = mean_losses([bowl, low])
    assert found == pytest.approx({index: loss - 0.1 for index, loss in bowl.items()})
    assert smooth_best(found) == pytest.approx(-9)
    assert mean_losses([bowl, {**low, -6: math.inf}])[-6] == math.inf
    assert mean_losses([bowl, {}]) == pytest.approx(bowl)
    assert mean_losses([{-9: math.inf}]) == {-9: math.inf}


def test_one_lucky_rate_moves_the_smooth_best_little() -> None:
    losses = {index: 0.4 + 0.02 * (index + 9) ** 2 for index in range(-12, -5)}
    assert smooth_best(losses) == pytest.approx(-9)
    assert abs(smooth_best({**losses, -7: 0.35}) + 9) < 0.9  # the lowest loss by itself would say -7
    assert smooth_best({-9: 0.4, -7: math.inf, -8: 0.3}) == -8


@pytest.mark.parametrize("best", [-8.0, -7.7, -6.5])
def test_the_best_place_is_the_bottom_of_a_parabola(best: float) -> None:
    losses = {index: 1 + (index - best) ** 2 for index in range(-12, -5)}
    assert best_place(losses) == pytest.approx(best)
    assert best_place({**losses, -6: float("inf")}) == pytest.approx(best if best < -7 else -7.0)


def test_rates_and_places_lead_to_each_other_and_orders_are_right() -> None:
    assert [lattice_index(at_lattice(index)) for index in range(-20, 3)] == list(range(-20, 3))
    assert compared({}, ["orders"]) == []
    rows: list[Any] = list(_orders())
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(row["completion"].count(";") == 3 for row in rows)


def elsewhere(study: RatesStudy, folder: Path) -> RatesStudy:
    """The study with the same rows and published results, and a state in which nothing is done."""
    own = [f"state={folder}", f"output={study.output}", f"phrasebank={study.said.phrasebank}"]
    return load_rates_study(YAML, own)


def test_what_is_published_is_gone_on_from_on_another_machine(study: RatesStudy, tmp_path: Path) -> None:
    for index in study.grid("orders", "LoRA r8"):
        finish(study, RateCell("orders", "LoRA r8", index, 1), -8.4)
    diverged = study.file(RateCell("orders", "LoRA r8", -6, 1))
    write_json(diverged, {**json.loads(diverged.read_text(encoding="utf-8")), "loss": None})
    before = write_results(study)
    trained = [{"by": "auto", "seed": 1, "rate": 0.002, "loss": 0.4, "cost": 0.0}]
    setting = {"task": "orders", "arm": "LoRA r8", "best_rate": at_lattice(-8), "trained": trained}
    write_json(study.output / "auto.json", {"budget": 0.15, "settings": [setting]})

    other = elsewhere(study, tmp_path / "other")
    assert restore(other) == 8
    assert restore(other) == 0
    assert write_results(other) == before
    assert other.losses("orders", "LoRA r8", 1)[-6] == math.inf
    cell = RateCell("orders", "LoRA r8", -8, 1)
    kept = json.loads(other.beside(cell, "auto", 0.15).read_text(encoding="utf-8"))
    assert (kept["rate"], kept["loss"], kept["settings"]) == (0.002, 0.4, study.identity(cell)["settings"])
    assert other.done(cell) is not None


def test_published_results_of_other_settings_or_rows_are_not_gone_on_from(study: RatesStudy, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no published results"):
        restore(study)
    finish(study, RateCell("orders", "full", -12, 1), -12)
    published = write_results(study)
    file = study.output / "rates.json"
    write_json(file, {**published, "rows": {**published["rows"], "orders": "others"}})
    with pytest.raises(RunError, match=r"full on orders at 0\.0001, seed 1 was trained with other settings or rows"):
        restore(elsewhere(study, tmp_path / "rows"))
    said = published["said"]
    base = {**said["base"], "train": {**said["base"]["train"], "max_steps": 31}}
    write_json(file, {**published, "said": {**said, "base": base}})
    with pytest.raises(RunError, match="other settings or rows"):
        restore(elsewhere(study, tmp_path / "settings"))
