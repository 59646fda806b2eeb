"""Time of a collective over the links that its group uses.

Ranks are numbered as megatron-core does: tensor parallel ranks are neighbours, then context, data and pipeline parallel ones.
A group is described by its size and by the distance between its members, so nothing here grows with the world.

Sizes are those of nccl-tests: for a ring over n ranks, each rank sends (n - 1) / n of the whole for an all-gather or a
reduce-scatter, and twice that for an all-reduce (Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication
Operations in MPICH", 2005, section 3). NCCL also has a double binary tree for all-reduces, with the logarithm of the nodes as
its number of steps (Sanders, Speck, Traeff, 2009); the faster one counts, as in NCCL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_longpo.planner.machine import Machine

# Point-to-point sends of an all-to-all that NCCL has under way at once.
_CHANNELS = 8


@dataclass(frozen=True)
class Group:
    """Ranks that exchange.

    Attributes:
        size: number of ranks.
        stride: distance between neighbours, in ranks of the world.
        machine: links.
    """

    size: int
    stride: int
    machine: Machine

    @property
    def per_node(self) -> int:
        """Members in one node."""
        return max(1, min(self.size, self.machine.gpus_per_node // self.stride))

    @property
    def nodes(self) -> int:
        return math.ceil(self.size / self.per_node)

    @property
    def _ring_bytes_per_s(self) -> float:
        """What passes each rank of a ring. Between nodes every member has an adapter of its own, and there is a ring for each."""
        node = self.machine.node_link_gb_per_s * 1e9
        if self.nodes == 1:
            return node
        across = self.per_node * self.machine.network_gb_per_s * 1e9
        return min(node, across) if self.per_node > 1 else across

    @property
    def _ring_latency(self) -> float:
        """Of all steps once around."""
        inside, across = self.machine.node_link_latency_us * 1e-6, self.machine.network_latency_us * 1e-6
        hops = self.nodes if self.nodes > 1 else 0
        return max(0, self.size - 1 - hops) * inside + min(hops, self.size - 1) * across

    def gather(self, whole_bytes: float, calls: float = 1) -> float:
        """Seconds of all-gathers or reduce-scatters of ``whole_bytes`` together."""
        if self.size == 1 or not whole_bytes:
            return 0.0
        return calls * self._ring_latency + whole_bytes * (self.size - 1) / self.size / self._ring_bytes_per_s

    def all_reduce(self, whole_bytes: float, calls: float = 1) -> float:
        """Seconds of all-reduces of ``whole_bytes`` together."""
        if self.size == 1 or not whole_bytes:
            return 0.0
        steps = 2 * math.ceil(math.log2(self.nodes)) * self.machine.network_latency_us * 1e-6 if self.nodes > 1 else 0.0
        steps += 2 * (self.per_node - 1) * self.machine.node_link_latency_us * 1e-6
        tree = calls * steps + 2 * whole_bytes / self._ring_bytes_per_s
        return min(2 * self.gather(whole_bytes, calls), tree)

    def all_to_all(self, own_bytes: float, calls: float = 1) -> float:
        """Seconds of all-to-alls in which each rank has ``own_bytes`` together, of which 1 / n stays with it."""
        if self.size == 1 or not own_bytes:
            return 0.0
        each = own_bytes / self.size
        inside = (self.per_node - 1) * each / (self.machine.node_link_gb_per_s * 1e9)
        across = (self.size - self.per_node) * each / (self.machine.network_gb_per_s * 1e9)
        latency = self.machine.network_latency_us if self.nodes > 1 else self.machine.node_link_latency_us
        return calls * math.ceil((self.size - 1) / _CHANNELS) * latency * 1e-6 + max(inside, across)

    def send(self, size_bytes: float, calls: float = 1) -> float:
        """Seconds of sends to a neighbour; the slowest pair of neighbours counts."""
        if self.size == 1 or not size_bytes:
            return 0.0
        inside = self.nodes == 1
        rate = self.machine.node_link_gb_per_s if inside else self.machine.network_gb_per_s
        latency = self.machine.node_link_latency_us if inside else self.machine.network_latency_us
        return calls * latency * 1e-6 + size_bytes / (rate * 1e9)

    @property
    def link(self) -> str:
        """The link that limits the group, in words."""
        return "the links of a node" if self.nodes == 1 else "the network"
