"""The planner's choice of a layout beside brute force: every layout simulated with the real step, for random cases of few layers.

    python benchmarks/benchmark_layouts.py --cases 20 --results results

No GPU is needed. Of each layout the first rank of its fullest and of its slowest stage is simulated, with as little
recomputation as fits by the simulated peak; its time is what was simulated at the machine's rates. A case takes up to 60
simulations of a second or two. Each result is a file of the folder of results, named by hashes of what was asked and of the
package's code; what is there is not computed again. The table is Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import code_hash
from megatron_longpo.config import Config, OptimizerConfig, TrainingConfig
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.planner.machine import load_machine
from megatron_longpo.planner.search import Plan, Recompute, Search
from megatron_longpo.planner.space import Candidate
from megatron_longpo.planner.verify import request_of, simulated_seconds
from megatron_longpo.planner.workload import made_up
from megatron_longpo.runtime.files import write_atomically
from megatron_longpo.simulation.request import Card
from megatron_longpo.simulation.start import simulate

_ANSWER = 128
# The estimate was up to 8.8% above simulated peaks; each result says how far it was.
_FAR = 1.2


@dataclass(frozen=True)
class Case:
    """A model, a length and some GPUs.

    Attributes:
        search: what is planned.
        length: tokens of the chosen row.
        words: the case in words.
    """

    search: Search
    length: int
    words: str

    @property
    def key(self) -> str:
        """Hash of everything that is asked, and of the code that answers."""
        search = self.search
        parts = (search.config.as_dict(), dataclasses.asdict(search.shape), dataclasses.asdict(search.machine))
        asked = (code_hash(), self.length, _ANSWER, search.world_size, sorted(search.given), *parts)
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def case_of(number: int) -> Case:
    """A random case; the number is its seed."""
    rng = random.Random(number)
    heads, groups = rng.choice(((16, 8), (32, 8), (28, 4), (12, 2), (64, 8), (24, 24)))
    size = 128
    hidden = heads * size
    shape = ModelShape(
        family="llama",
        num_layers=rng.choice((2, 3, 4)),
        hidden_size=hidden,
        ffn_hidden_size=round(hidden * rng.choice((2.5, 3.5)) / 64) * 64,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=size,
        vocab_size=rng.choice((4096, 32000, 150000)),
        layernorm_epsilon=1e-5,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=rng.random() < 0.5,
        rotary_base=1e6,
        max_position_embeddings=131072,
    )
    gpus, length = rng.choice((2, 3, 4, 6)), rng.choice((8192, 32768, 65536))
    config = Config(
        training=TrainingConfig(bf16=True, global_batch_size=rng.choice((6, 12))),
        optimizer=OptimizerConfig(optimizer=rng.choice(("adam", "rmsprop"))),
    )
    machine = load_machine(rng.choice(("a100-80g", "h100-pcie", "l40s", "rtx-4090")))
    machine = dataclasses.replace(machine, gpus_per_node=rng.choice((2, 8)), reserved_gib=0.0)
    workload = made_up(config, shape, length=length, answer=_ANSWER, turns=1, short=1024, samples=None)
    # What waits in host memory is left out: its time is not in what is simulated.
    given = frozenset({"micro_batch_size", "cpu_offloading_num_layers", "optimizer_cpu_offload"})
    search = Search(config, shape, machine, gpus, workload, given)
    # As little memory as makes the layouts recompute or fail: between what the leanest and the fastest need.
    least, most = search.closest().memory.total, search.best(1)[0].memory.total
    leanest = min(least, *(search.memory(c, Recompute(True, 99)).total for c in search.candidates))
    memory = leanest * (most / leanest) ** rng.uniform(0.2, 1.2) / 0.92 * 1.05
    search = dataclasses.replace(search, machine=dataclasses.replace(machine, memory_gib=memory / 2**30))
    words = (
        f"{shape.num_layers} layers of {hidden}, {heads} heads on {groups}, vocabulary {shape.vocab_size}, {length} tokens, "
        f"{gpus} x {machine.name} of {memory / 2**30:.2g} GiB, {machine.gpus_per_node} per node, batch "
        f"{config.training.global_batch_size}, {config.optimizer.optimizer}"
    )
    return Case(search, length, words)


def choices(candidate: Candidate) -> list[Recompute]:
    layers = max(n for rank in candidate.split for n in rank)
    return [Recompute(False), Recompute(True), *(Recompute(True, n) for n in range(1, layers + 1))]


def _next(search: Search, candidate: Candidate, first: int) -> list[tuple[Candidate, int]]:
    """The next ways to recompute that may fit, up to the first that does by its estimate.

    What is estimated far above the memory is not simulated.
    """
    found = []
    for n, choice in enumerate(choices(candidate)):
        total = search.memory(candidate, choice).total
        if n >= first and total <= _FAR * search.usable_bytes:
            found.append((candidate, n))
            if total <= search.usable_bytes:
                break
    return found


@dataclass(frozen=True)
class Found:
    """A layout with the least recomputation that fits by its simulated peak.

    Attributes:
        plan: the plan.
        seconds: time of a step by what was simulated.
    """

    plan: Plan
    seconds: float


def brute_force(case: Case) -> tuple[list[Found], list[float]]:
    """Every layout that fits, fastest first; and of all that was simulated, estimates of memory over peaks."""
    search = case.search
    card = Card(memory_bytes=80 * 2**30, per_node=search.machine.gpus_per_node)
    found: list[Found] = []
    ratios: list[float] = []
    waiting = [items for candidate in search.candidates if (items := _next(search, candidate, 0))]
    while waiting:
        plans = [[search.plan(c, choices(c)[n]) for c, n in items] for items in waiting]
        # The fullest stage and the slowest one.
        asked = [(p, stage) for mine in plans for p in mine for stage in sorted({p.memory.stage, p.time.stage})]
        requests = [request_of(p, search, stage, length=case.length, answer=_ANSWER, turns=1) for p, stage in asked]
        reports = {
            (id(p), stage): report
            for (p, stage), report in zip(asked, simulate(requests, card, quiet=True), strict=True)
        }
        again = []
        for items, mine in zip(waiting, plans, strict=True):
            for plan in mine:
                stage = plan.time.stage
                peak = max(reports[id(plan), each].peak_bytes for each in (plan.memory.stage, stage))
                ratios.append(plan.memory.total / peak)
                if peak <= search.usable_bytes:
                    report = reports[id(plan), stage]
                    found.append(Found(plan, simulated_seconds(plan, search, report, stage=stage)))
                    break
            else:
                candidate, last = items[-1]
                if more := _next(search, candidate, last + 1):
                    again.append(more)
        waiting = again
    return sorted(found, key=lambda item: item.seconds), ratios


def compare(number: int, case: Case) -> dict[str, Any]:
    """One case: the planner's choice, and the best by brute force."""
    found, ratios = brute_force(case)
    result: dict[str, Any] = {
        "case": number,
        "words": case.words,
        "layouts": len(case.search.candidates),
        "fit": len(found),
        "estimate over peak": [min(ratios), max(ratios)] if ratios else [],
    }
    planned = case.search.best(1)
    if not planned or not found:
        # The estimate may be a few percent above the simulated peak: what just fits may be refused.
        return {**result, "planned": bool(planned), "ratio": None}
    choice = planned[0].describe()
    seconds = next((f.seconds for f in found if f.plan.describe() == choice), None)
    if seconds is None:
        # It fits with less recomputation than the planner chose; if it needs more, the choice does not fit.
        layout = planned[0].candidate.describe()
        same = next((f for f in found if f.plan.candidate.describe() == layout), None)
        if same is not None and same.plan.seconds < planned[0].seconds:
            # By what was planned of the difference.
            seconds = same.seconds + planned[0].seconds - same.plan.seconds
    best, least = found[0].plan, found[0].seconds
    return {
        **result,
        "planned": True,
        "choice": choice,
        "seconds": seconds,
        "best": best.describe(),
        "least": least,
        "ratio": None if seconds is None else seconds / least,
        "worst": found[-1].seconds / least,
    }


def missed(result: dict[str, Any]) -> str:
    """Why a case has no ratio, in words."""
    if result["planned"]:
        return "missed: the choice does not fit by simulation"
    return f"missed: refused, {result['fit']} fit by simulation" if result["fit"] else "neither finds one that fits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20, help="number of cases")
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), help="which part of how many, for several processes"
    )
    parser.add_argument("--results", type=Path, help="folder that results are kept in, and taken from")
    a = parser.parse_args()
    if a.results is not None:
        if a.results.is_file():
            sys.exit(f"error: --results {a.results} is a file, which earlier versions wrote; name a folder")
        a.results.mkdir(parents=True, exist_ok=True)
    print("| case | layouts, fitting | the planner's choice | the best by simulation | ratio | the worst |")
    print("|---|---|---|---|---|---|")
    for number in range(a.part[0], a.cases, a.part[1]):
        case = case_of(number)
        path = a.results / f"{number}-{case.key}.json" if a.results is not None else None
        if path is not None and path.exists():
            r = json.loads(path.read_text(encoding="utf-8"))
        else:
            r = compare(number, case)
            if path is not None:
                write_atomically(path, (json.dumps(r) + "\n").encode())
        choice, best = r.get("choice", "nothing fits"), r.get("best", "nothing fits")
        ratio = f"{missed(r)} | " if r["ratio"] is None else f"{r['ratio']:.3f} | {r['worst']:.2f}"
        same = "the same" if best == choice else best
        print(f"| {r['words']} | {r['layouts']}, {r['fit']} | {choice} | {same} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
