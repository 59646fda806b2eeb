"""The recipes of examples/recipes: what their commands take, what the planner says of them, and what their step needs.

Whole models are simulated by benchmarks/benchmark_recipes.py, which takes minutes; here they have a layer or two per pipeline
stage, at full width and length. The estimate of memory, which is compared with that, then speaks for whole models.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_longpo.command_line import parse_with_config
from megatron_longpo.commands import evolve
from megatron_longpo.commands.plan import PlanOptions
from megatron_longpo.config import Config
from megatron_longpo.simulation.request import Report
from megatron_longpo.simulation.start import simulate
from tests.support.launch import ROOT


def _benchmark() -> ModuleType:
    name = "benchmark_recipes"
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


benchmark = _benchmark()
RECIPES = {recipe.name: recipe for recipe in benchmark.RECIPES}
each = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def test_every_file_is_in_the_table() -> None:
    folder = ROOT / "examples" / "recipes"
    assert sorted(RECIPES) == sorted(path.stem for path in folder.glob("*.yaml"))
    assert {recipe.model for recipe in RECIPES.values()} == {path.stem for path in (folder / "models").glob("*.json")}


@each
def test_the_row_of_the_readme_is_what_the_planner_says(recipe: Any) -> None:
    """Layout, tokens per second and hours; the peak is that of a simulation that takes minutes."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| [{recipe.name}]("))
    _, tokens, _, layout, _, speed, hours, _ = (cell.strip() for cell in row.strip("|").split("|"))
    plan = recipe.plan()
    assert int(tokens.replace(",", "")) == recipe.length
    assert layout == f"{plan.candidate.describe()}; recomputed: {plan.recompute}"
    planned = plan.config.training.global_batch_size * recipe.length / plan.seconds
    assert float(speed.replace(",", "")) == pytest.approx(planned, rel=0.01, abs=0.5)
    assert float(hours.replace(",", "")) == pytest.approx(recipe.cost().hours, rel=0.01, abs=0.5)


@each
def test_all_settings_are_accepted(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    evolve.evolve(["--config", str(recipe.file), "--check"], prog="megatron-longpo evolve")


@each
def test_the_commands_in_its_head_are_for_it(recipe: Any) -> None:
    head = re.sub(r" \\\n# +", " ", recipe.file.read_text(encoding="utf-8"))
    lines = [line.removeprefix("#   megatron-longpo ") for line in head.splitlines() if line.startswith("#   megatron")]
    plan, check, run = (shlex.split(line) for line in lines)
    file = str(recipe.file.relative_to(ROOT))
    assert (check, run) == (["evolve", "--config", file, "--check"], ["evolve", "--config", file])
    assert plan[0] == "plan"
    options, config = parse_with_config(Config, plan[1:], prog="plan", description="", options=PlanOptions)
    assert options.hf is not None and Path(options.hf).stem == recipe.model
    assert (options.gpus, options.gpu, options.length) == (recipe.gpus, recipe.gpu, recipe.length)
    assert (options.samples, options.num_turns, options.short_tokens) == (recipe.samples, recipe.turns, recipe.chunk)
    assert config.optimizer.optimizer == recipe.config().optimizer.optimizer


@each
def test_the_whole_model_fits_and_no_other_layout_is_much_faster(recipe: Any) -> None:
    search = recipe.search()
    plan, best = recipe.plan(), search.best(1)[0]
    assert plan.memory.total <= benchmark.SHARE * search.machine.memory_bytes
    # Some leave more memory free than the fastest layout does.
    assert plan.seconds <= 1.03 * best.seconds, best.describe()
    assert 0 < recipe.cost().hours < 1000


@pytest.fixture(scope="module")
def reports() -> dict[str, list[Report]]:
    found: dict[str, list[Report]] = {}
    by_card: dict[str, list[Any]] = {}
    for recipe in RECIPES.values():
        # Nothing simulates a CPU; its recipe is simulated on a GPU, with as large chunks of logits.
        by_card.setdefault(recipe.gpu if recipe.machine.device == "cuda" else "a100-80g", []).append(recipe)
    for recipes in by_card.values():
        requests = {recipe.name: recipe.requests(layers_of(recipe)) for recipe in recipes}
        flat = [request for some in requests.values() for request in some]
        answers = iter(simulate(flat, benchmark.card_of(recipes[0].machine), quiet=True))
        found |= {name: [next(answers) for _ in some] for name, some in requests.items()}
    return found


def layers_of(recipe: Any) -> int:
    """One layer; in a pipeline two per stage: virtual stages stay, or the first layer waits in host memory."""
    stages: int = recipe.config().parallel.pipeline_model_parallel_size
    return 1 if stages == 1 else 2 * stages


@pytest.mark.parametrize("name", RECIPES)
def test_its_step_runs_on_simulated_gpus_and_needs_what_is_estimated(
    name: str, reports: dict[str, list[Report]]
) -> None:
    recipe, found = RECIPES[name], reports[name]
    for report in found:
        assert not report.violations
        assert report.tokens >= recipe.length
        assert report.estimate_bytes is not None
        assert 0.99 * report.peak_bytes <= report.estimate_bytes <= 1.05 * report.peak_bytes
    degrees = recipe.config().parallel
    if recipe.gpus == 1:
        assert found[0].layout == "TP 1, PP 1, CP 1, DP 1"
        return
    assert f"TP {degrees.tensor_model_parallel_size} + SP" in found[0].layout
    assert f"CP {degrees.context_parallel_size} {degrees.cp_comm_type}" in found[0].layout
