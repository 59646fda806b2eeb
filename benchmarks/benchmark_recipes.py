"""Plan and simulate every recipe of examples/recipes: the table of the README, and proof that each one fits its GPUs.

    python benchmarks/benchmark_recipes.py --output recipes
    python benchmarks/benchmark_recipes.py --only glm4 --output recipes

No GPU is needed; a simulation of whole models takes one to three minutes of a core, and is kept in OUTPUT/NAME-HASH.json, with a
hash of what was simulated and of the package's code. Rerun the same command to resume. ``--layers 2`` cuts the models, as the
tests do.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

from common import code_hash
from megatron_longpo.config import Config, from_dict
from megatron_longpo.evolution.settings import read_evolution
from megatron_longpo.model.logprobs import default_chunk_bytes
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.planner.costs import RunCost, cost_of
from megatron_longpo.planner.machine import Machine, load_machine
from megatron_longpo.planner.search import Plan, Search
from megatron_longpo.planner.verify import card_of
from megatron_longpo.planner.workload import made_up
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.runtime.tables import markdown_table
from megatron_longpo.simulation.data import read_shape
from megatron_longpo.simulation.request import Report, Request
from megatron_longpo.simulation.start import simulate

FOLDER = Path(__file__).parent.parent / "examples" / "recipes"
_ANSWER = 1024
# Largest share of a card's memory that tensors may take.
SHARE = 0.92


@dataclass(frozen=True)
class Recipe:
    """A recipe, and what its file does not say.

    Attributes:
        name: name of the file.
        model: name of the published configuration.
        gpu, gpus: what it is for.
        samples: samples of the run; the paper's, where it has one.
        turns, chunk: turns of a sample, and tokens of their chunks.
        published: what the authors needed and reached (arXiv 2502.13922).
    """

    name: str
    model: str
    gpu: str
    gpus: int
    samples: int
    turns: int = 4
    chunk: int = 24000
    published: str = ""

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.yaml"

    @property
    def machine(self) -> Machine:
        return load_machine(self.gpu)

    @property
    def round_name(self) -> str:
        (only,) = read_evolution(self.file).rounds
        return only.name

    def config(self) -> Config:
        """The training's configuration."""
        (only,) = read_evolution(self.file).rounds
        return from_dict(only.settings["train"], str(self.file))

    @property
    def length(self) -> int:
        length = self.config().data.seq_length
        assert length is not None
        return length

    def shape(self, layers: int | None = None) -> ModelShape:
        """Shape of the model, cut to some layers if asked for."""
        shape = read_shape(str(FOLDER / "models" / f"{self.model}.json"), Config(), flag="hf")
        return shape if layers is None else shape.replace(num_layers=layers)

    def search(self) -> Search:
        config, shape = self.config(), self.shape()
        workload = made_up(
            config,
            shape,
            length=self.length,
            answer=_ANSWER // 2,
            turns=self.turns,
            short=self.chunk,
            samples=self.samples,
        )
        return Search(config, shape, self.machine, self.gpus, workload)

    def plan(self) -> Plan:
        """What the planner says of the recipe's own layout."""
        return self.search().as_configured()

    def cost(self) -> RunCost:
        return cost_of(self.plan(), self.search(), samples=self.samples)

    def requests(self, layers: int | None = None) -> list[Request]:
        """Simulations of the first rank of the first and of the last pipeline stage."""
        config = self.config()
        if self.machine.device == "cpu":
            config = _of_cpu(self.plan().config)
        stages = config.parallel.pipeline_model_parallel_size
        if layers is not None:
            config = _cut(config, layers // stages)
        shape = dataclasses.asdict(self.shape(layers))
        return [
            Request(
                config=config.as_dict(),
                world_size=self.gpus,
                rank=rank,
                shape={key: value for key, value in shape.items() if key != "weights_hash"},
                tokens=self.length,
                answer_tokens=_ANSWER // 2,
                turns=self.turns,
            )
            for rank in sorted({0, self.gpus // stages * (stages - 1)})
        ]


def _of_cpu(config: Config) -> Config:
    """A configuration that keeps on a simulated GPU what it keeps on a CPU, whose chunks of logits are smaller."""
    model = dataclasses.replace(config.model, logprob_chunk_bytes=default_chunk_bytes(on_cuda=False))
    return dataclasses.replace(config, model=model)


def _cut(config: Config, layers: int) -> Config:
    """A configuration for so many layers per pipeline stage, one per virtual stage, or two where one waits in host memory."""
    parallel, training = config.parallel, config.training
    offloaded = training.cpu_offloading_num_layers
    if parallel.virtual_pipeline_model_parallel_size is not None:
        virtual = max(1, layers // (2 if offloaded else 1))
        parallel = dataclasses.replace(parallel, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None)
        layers //= virtual
    if offloaded:
        training = dataclasses.replace(training, cpu_offloading_num_layers=min(offloaded, layers - 1) or None)
    return dataclasses.replace(config, parallel=parallel, training=training)


_A800 = "8 x A800-80G, 4401 tokens/s", "16 x A800-80G, 4120 tokens/s", "16 x A800-80G, 2744 tokens/s"
RECIPES = [
    Recipe("mistral_7b_128k", "Mistral-7B-Instruct-v0.2", "a100-80g", 8, 45000, published=_A800[0]),
    Recipe("mistral_7b_256k", "Mistral-7B-Instruct-v0.2", "a100-80g", 16, 16000, published=_A800[1]),
    Recipe("mistral_7b_512k", "Mistral-7B-Instruct-v0.2", "a100-80g", 16, 2500, published=_A800[2]),
    Recipe("qwen2.5_7b_128k", "Qwen2.5-7B-Instruct", "a100-80g", 8, 32000, published="14 GPUs of 80 GB"),
    Recipe("llama3.1_8b_256k", "Llama-3.1-8B-Instruct", "a100-80g", 8, 16000),
    Recipe("glm4_9b_1m", "glm-4-9b-chat-1m-hf", "h100-sxm", 32, 2500),
    Recipe("qwen2.5_72b_128k", "Qwen2.5-72B-Instruct", "h100-sxm", 64, 32000),
    Recipe("llama3.1_70b_128k", "Llama-3.1-70B-Instruct", "h100-sxm", 64, 32000),
    Recipe("smollm2_135m_8k", "SmolLM2-135M-Instruct", "cpu", 1, 500, turns=1, chunk=1500),
]


def main() -> None:
    """Simulate what is not there yet, and write the table."""
    parser = argparse.ArgumentParser(
        prog="benchmark_recipes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("recipes"), help="folder of the simulations and the table")
    parser.add_argument("--only", default="", help="only recipes whose names contain this")
    parser.add_argument("--layers", type=int, help="cut the models to so many layers per pipeline stage")
    a = parser.parse_args()
    a.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for recipe in RECIPES:
        if a.only not in recipe.name:
            continue
        reports = simulated(recipe, a.output, a.layers)
        rows.append(row_of(recipe, reports))
        print(" | ".join(rows[-1]), flush=True)
    table = "\n".join(markdown_table(HEAD, rows)) + "\n"
    write_atomically(a.output / "table.md", table.encode())
    print(table)


HEAD = ("recipe", "tokens", "GPUs", "layout", "peak, GB", "tokens/s", "hours", "the authors")


def simulated(recipe: Recipe, folder: Path, layers: int | None) -> list[Report]:
    """Reports of a recipe, from the folder if those of the same simulation are there."""
    stages = recipe.config().parallel.pipeline_model_parallel_size
    requests, card = recipe.requests(None if layers is None else layers * stages), card_of(recipe.machine)
    # The planner chooses what is simulated, and has no part in it.
    words = [code_hash("planner"), card.as_json(), *(request.as_json() for request in requests)]
    asked = hashlib.sha256("\n".join(words).encode())
    path = folder / f"{recipe.name}{'' if layers is None else f'-{layers}'}-{asked.hexdigest()[:12]}.json"
    if not path.exists():
        reports = simulate(requests, card, quiet=True)
        for report in reports:
            report.curve, report.kernels = {}, []
        write_atomically(path, "".join(report.as_json(indent=None) + "\n" for report in reports).encode())
    return [Report.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row_of(recipe: Recipe, reports: list[Report]) -> list[str]:
    plan, cost = recipe.plan(), recipe.cost()
    tokens = plan.config.training.global_batch_size * recipe.length / plan.seconds
    peak, memory = max(report.peak_bytes for report in reports) / 2**30, recipe.machine.memory_gib
    problems = [v["problem"] for report in reports for v in report.violations]
    if problems or peak > SHARE * memory:
        raise SystemExit(f"error: {recipe.name} needs {peak:.1f} of {memory:.1f} GiB; {problems}")
    return [
        f"[{recipe.name}](examples/recipes/{recipe.name}.yaml)",
        f"{recipe.length:,}",
        f"{recipe.gpus} x {recipe.gpu}" if recipe.machine.device == "cuda" else "one CPU core",
        f"{plan.candidate.describe()}; recomputed: {plan.recompute}",
        f"{peak:.1f} of {memory:.0f}",
        f"{tokens:,.0f}",
        f"{cost.hours:,.0f}",
        recipe.published,
    ]


if __name__ == "__main__":
    main()
