"""Each collective as the trainer uses it, by group and type: its values, exactly, and its bandwidth.

Values are small whole numbers, which 16-bit types hold exactly and whose sums over up to 256 ranks they hold as well.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longpo.config import ParallelConfig
from megatron_longpo.doctor.examination import Check
from megatron_longpo.doctor.findings import Line
from megatron_longpo.doctor.ranks import Ranks
from megatron_longpo.runtime import platform, process_groups
from megatron_longpo.runtime.collectives import all_gather_objects, on_rank0

# Bytes of a rank's tensor, and how often it is exchanged; the fastest counts.
_BYTES, _TIMES = {"cuda": 64 * 2**20, "cpu": 2**20}, {"cuda": 6, "cpu": 3}
# GB/s of the busiest link below which something is wrong: over NVLink, over PCIe, between nodes, a tenth to a fifth of what such
# links give; and gloo's, a hundredth, since processes may share a core.
_SLOWEST = {"NVLink": 40.0, "PCIe": 2.0, "network": 1.0, "gloo": 0.0005}
_GIGA = 1e9

HANG = (
    "look at the rank that is named: its machine, its card (nvidia-smi, dmesg for Xid errors), its network; NCCL_DEBUG=INFO "
    "shows how NCCL connects, NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 leave out direct links and InfiniBand"
)
_WRONG = (
    "its values are wrong: do not train on these ranks; try NCCL_P2P_DISABLE=1 (direct links between cards), NCCL_IB_DISABLE=1 "
    "(InfiniBand) or NCCL_ALGO=Ring, and leave out the ranks that are named"
)
_SLOW = {
    "NVLink": "NCCL_DEBUG=INFO shows whether NVLink is used; nvidia-smi nvlink -s shows its links",
    "PCIe": "without NVLink keep tensor_model_parallel_size small; a container needs --ipc=host or a large /dev/shm",
    "network": (
        "NCCL_DEBUG=INFO shows the network that is used: set NCCL_SOCKET_IFNAME and NCCL_IB_HCA; keep tensor and context "
        "parallelism within a node"
    ),
    "gloo": "GLOO_SOCKET_IFNAME names the network that gloo uses; give each process a core (OMP_NUM_THREADS=1)",
}


@dataclass(frozen=True)
class Group:
    """Ranks that exchange.

    Attributes:
        kind: ``TP``, ``CP``, ``DP``, ``PP`` or ``world``.
        group: the process group.
        ranks: their global ranks.
        link: what connects them, a key of the table of slowest bandwidths.
    """

    kind: str
    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    link: str

    @property
    def mine(self) -> int:
        return self.ranks.index(dist.get_rank())

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Exchange:
    """A collective on one type.

    Attributes:
        name: its name.
        dtype: type of the tensors.
        run: exchanges a tensor; returns what arrived.
        make: this rank's tensor, from the group, the number of its elements and their type.
        expected: what should arrive, from the same.
        share: bytes over a rank's busiest link per byte of its tensor.
    """

    name: str
    dtype: torch.dtype
    run: Callable[[Group, Tensor], Tensor]
    make: Callable[[Group, int, torch.dtype], Tensor]
    expected: Callable[[Group, int, torch.dtype], Tensor]
    share: float


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------


def _places(numel: int) -> Tensor:
    return torch.arange(numel, dtype=torch.int32, device=platform.CURRENT.device)


def _bits(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """0 or 1: what rank ``rank`` adds to a sum."""
    return ((_places(numel) * 7 + rank * 5) % 3 == 0).to(dtype)


def _numbers(source: int, target: int, numel: int, dtype: torch.dtype) -> Tensor:
    """0 to 250: what rank ``source`` sends to rank ``target``."""
    return ((_places(numel) + source * 31 + target * 17) % 251).to(dtype)


def _sum_of_bits(group: Group, numel: int, dtype: torch.dtype) -> Tensor:
    total = _bits(0, numel, torch.float32)
    for rank in range(1, group.size):
        total += _bits(rank, numel, torch.float32)
    return total.to(dtype)


def _even(group: Group, numel: int) -> int:
    """Elements of a rank's tensor that the ranks of a group can share."""
    return max(1, numel // group.size) * group.size


def _mine(group: Group, whole: Tensor) -> Tensor:
    return whole.view(group.size, -1)[group.mine]


# --------------------------------------------------------------------------------------------------
# Collectives
# --------------------------------------------------------------------------------------------------


def _all_reduce(group: Group, x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=group.group)
    return total


def _all_reduce_max(group: Group, x: Tensor) -> Tensor:
    largest = x.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group.group)
    return largest


def _all_gather(group: Group, x: Tensor) -> Tensor:
    found = x.new_empty(group.size * x.numel())
    work = dist.all_gather_into_tensor(found, x, group=group.group, async_op=True)
    assert work is not None
    work.wait()
    return found


def _reduce_scatter(group: Group, x: Tensor) -> Tensor:
    mine = x.new_empty(x.numel() // group.size)
    work = dist.reduce_scatter_tensor(mine, x, group=group.group, async_op=True)
    assert work is not None
    work.wait()
    return mine


def _all_to_all(group: Group, x: Tensor) -> Tensor:
    found = torch.empty_like(x)
    work = dist.all_to_all_single(found, x, group=group.group, async_op=True)
    assert work is not None
    work.wait()
    return found


def _broadcast(group: Group, x: Tensor) -> Tensor:
    found = x.clone()
    dist.broadcast(found, src=group.ranks[0], group=group.group)
    return found


def _send_receive(group: Group, x: Tensor) -> Tensor:
    """To the next rank, from the one before: as pipeline stages do, all at once on CUDA, with tags on gloo."""
    after, before = group.ranks[(group.mine + 1) % group.size], group.ranks[group.mine - 1]
    found = torch.empty_like(x)
    if platform.CURRENT.is_cuda:
        operations = [
            dist.P2POp(dist.isend, x, after, group.group),
            dist.P2POp(dist.irecv, found, before, group.group),
        ]
        works: list[Any] = dist.batch_isend_irecv(operations)
    else:
        works = [dist.irecv(found, src=before, group=group.group, tag=1)]
        works.append(dist.isend(x, dst=after, group=group.group, tag=1))
    for work in works:
        work.wait()
    return found


_Make = Callable[[Group, int, torch.dtype], Tensor]


def _exchanges(kind: str, size: int) -> list[Exchange]:
    """What the trainer does in a group of a number of ranks, in the types in which it does it."""
    half, full = torch.bfloat16, torch.float32
    once, twice = (size - 1) / size, 2 * (size - 1) / size

    def own_bits(group: Group, numel: int, dtype: torch.dtype) -> Tensor:
        return _bits(group.mine, numel, dtype)

    def own_numbers(group: Group, numel: int, dtype: torch.dtype) -> Tensor:
        return _numbers(group.mine, 0, numel, dtype)

    def all_numbers(group: Group, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.stack([_numbers(rank, 0, numel, dtype) for rank in range(group.size)])

    def reduce_(dtype: torch.dtype) -> Exchange:
        return Exchange("all_reduce", dtype, _all_reduce, own_bits, _sum_of_bits, twice)

    def gather(dtype: torch.dtype) -> Exchange:
        flat: _Make = lambda g, n, t: all_numbers(g, n, t).flatten()  # noqa: E731
        return Exchange("all_gather", dtype, _all_gather, own_numbers, flat, size - 1.0)

    def scatter(dtype: torch.dtype) -> Exchange:
        mine: _Make = lambda g, n, t: _mine(g, _sum_of_bits(g, n, t))  # noqa: E731
        return Exchange("reduce_scatter", dtype, _reduce_scatter, own_bits, mine, once)

    def pass_on(dtype: torch.dtype) -> Exchange:
        before: _Make = lambda g, n, t: _numbers((g.mine - 1) % g.size, 0, n, t)  # noqa: E731
        return Exchange("send and receive", dtype, _send_receive, own_numbers, before, 1.0)

    def traded(group: Group, numel: int, dtype: torch.dtype, *, sent: bool) -> Tensor:
        pairs = [(group.mine, rank) if sent else (rank, group.mine) for rank in range(size)]
        return torch.cat([_numbers(source, target, numel // size, dtype) for source, target in pairs])

    trade = Exchange(
        "all_to_all",
        half,
        _all_to_all,
        functools.partial(traded, sent=True),
        functools.partial(traded, sent=False),
        once,
    )
    largest: _Make = lambda g, n, t: all_numbers(g, n, t).amax(0)  # noqa: E731
    of_first: _Make = lambda _, n, t: _numbers(0, 0, n, t)  # noqa: E731
    return {
        "TP": [
            reduce_(half),
            Exchange("all_reduce (largest)", full, _all_reduce_max, own_numbers, largest, twice),
            gather(half),
            scatter(half),
        ],
        "CP": [trade, gather(half), scatter(full), reduce_(full)],
        "DP": [scatter(full), gather(half), reduce_(full)],
        "PP": [pass_on(half), pass_on(full)],
        "world": [reduce_(full), Exchange("broadcast", torch.int32, _broadcast, own_numbers, of_first, 1.0)],
    }[kind]


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------


def collective_checks(parallel: ParallelConfig, *, world_size: int, local_size: int, links: str) -> list[Check]:
    """A check per kind of group.

    Args:
        parallel: degrees of a run. Where they are all 1 or do not fit the world, each kind of group gets all ranks, TP those of a
            node.
        world_size: number of ranks.
        local_size: ranks of a node.
        links: what connects the cards of a node.
    """
    degrees = {
        "TP": parallel.tensor_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
    }
    used = degrees["TP"] * degrees["CP"] * degrees["PP"]
    is_given = used > 1 and world_size % used == 0
    checks = []
    for kind in ("world", "TP", "CP", "DP", "PP"):
        if is_given:
            of_kind = dict(degrees)
        else:
            own = min(local_size, world_size) if kind == "TP" else world_size
            of_kind = {**dict.fromkeys(degrees, 1), **({kind: own} if kind in degrees else {})}
        size = of_kind.get(kind, world_size // (of_kind["TP"] * of_kind["PP"]) if kind == "DP" else world_size)
        if size == 1:
            continue
        run = functools.partial(_check_group, kind=kind, degrees=of_kind, local_size=local_size, links=links)
        checks.append(Check(f"collectives over {kind}", run, HANG))
    return checks


def _check_group(ranks: Ranks, *, kind: str, degrees: dict[str, int], local_size: int, links: str) -> Iterator[Line]:
    ranks.at(f"making the {kind} groups")
    parallel = process_groups.set_up(tensor=degrees["TP"], pipeline=degrees["PP"], context=degrees["CP"])
    group = _group_of(kind, parallel, local_size, links)
    for exchange in _exchanges(kind, group.size):
        yield _check_exchange(ranks, group, exchange)
    if kind == "world":
        ranks.at("collectives over world: objects")
        found = all_gather_objects(f"rank {dist.get_rank()}")
        told = on_rank0(lambda: "rank 0")
        right = found == [f"rank {r}" for r in range(ranks.world_size)] and told == "rank 0"
        yield Line("objects over world", "pass" if right else "fail", "" if right else f"{found[:4]}, {told}", _WRONG)
    ranks.at(f"ending the {kind} groups")
    process_groups.destroy_groups()


def _group_of(kind: str, parallel: process_groups.Parallel, local_size: int, links: str) -> Group:
    group: Any = {
        "TP": lambda: parallel.tensor_group,
        "CP": lambda: parallel.context_group,
        "DP": lambda: parallel.dp_cp_group,
        "PP": lambda: parallel.pipeline_group,
        "world": lambda: dist.group.WORLD,
    }[kind]()
    ranks = tuple(dist.get_process_group_ranks(group))
    return Group(kind, group, ranks, link_of(ranks, local_size, links, on_cuda=platform.CURRENT.is_cuda))


def link_of(ranks: Sequence[int], local_size: int, links: str, *, on_cuda: bool) -> str:
    """What connects ranks, a key of the table of slowest bandwidths.

    Args:
        ranks: global ranks.
        local_size: ranks of a node.
        links: links of a node's cards, as ``DeviceFacts`` has them.
        on_cuda: whether they are on GPUs.
    """
    if not on_cuda:
        return "gloo"
    if len({rank // local_size for rank in ranks}) > 1:
        return "network"
    # The slowest link of a group counts, and some cards of a node may be without NVLink.
    kinds = [kind.split()[0] for kind in links.split(", ") if kind]
    return "NVLink" if kinds and all(kind.startswith("NV") for kind in kinds) else "PCIe"


def _check_exchange(ranks: Ranks, group: Group, exchange: Exchange) -> Line:
    kind = "cuda" if platform.CURRENT.is_cuda else "cpu"
    short = str(exchange.dtype).removeprefix("torch.")
    name = f"{exchange.name} over {group.kind}, {short}"
    ranks.at(name)
    count = _even(
        group, _BYTES[kind] // exchange.dtype.itemsize // (group.size if exchange.name == "all_gather" else 1)
    )
    given = exchange.make(group, count, exchange.dtype)
    times, wrong = [], 0
    for _ in range(_TIMES[kind]):
        platform.CURRENT.synchronize()
        clock = time.monotonic()
        found = exchange.run(group, given)
        platform.CURRENT.synchronize()
        times.append(time.monotonic() - clock)
        wrong += int((found != exchange.expected(group, count, exchange.dtype)).sum())
    rate = exchange.share * given.numel() * given.element_size() / min(times) / _GIGA
    figures = {"gigabytes_per_second": rate}
    if wrong:
        share = wrong / (found.numel() * len(times))
        return Line(
            name, "fail", f"{share:.0%} of the values are wrong, on {group.size} ranks", _WRONG, figures=figures
        )
    detail = f"{rate:.3g} GB/s on {group.size} ranks ({group.link})"
    if rate < _SLOWEST[group.link]:
        expected = f"{detail}; such links give at least {_SLOWEST[group.link]:g}"
        return Line(name, "slow", expected, _SLOW[group.link], figures=figures)
    return Line(name, "pass", detail, figures=figures)
