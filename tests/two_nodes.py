"""Training on two nodes that are network namespaces of this machine (Linux, root): ``python -m tests.two_nodes FOLDER [STEPS]``.

The nodes are joined by a veth pair. First all packets are lost for twenty seconds, which the run has to survive. Then all of
node 1 is killed: node 0 names it and goes on alone, since one node is enough. Last node 1 comes back, and both finish. The
samples of all steps are compared with those of an undisturbed run. It takes minutes, so it is not among the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_longpo.training.metrics import read_metrics
from tests.support.data import make_data
from tests.support.launch import PYTHON, ROOT, environment
from tests.support.models import make_model

# So many that node 1 comes back before the end: on an idle machine one node does 30 per second.
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 3000
NODES = ("longpo0", "longpo1")


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2."""
    for name in NODES:
        ip("netns", "add", name)
    ip("link", "add", "longpo-a", "netns", NODES[0], "type", "veth", "peer", "name", "longpo-a", "netns", NODES[1])
    try:
        for number, name in enumerate(NODES, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "longpo-a")
            for device in ("lo", "longpo-a"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in NODES:
            ip("netns", "del", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def lose_packets(seconds: float) -> None:
    """Let all packets of both nodes go to an address that nobody has: not every kernel has ``tc netem``."""
    others = {NODES[0]: "10.77.0.2", NODES[1]: "10.77.0.1"}
    for name, other in others.items():
        neighbour = ["neigh", "replace", other, "lladdr", "02:00:00:00:00:99", "dev", "longpo-a", "nud", "permanent"]
        ip("-n", name, *neighbour)
    time.sleep(seconds)
    for name, other in others.items():
        ip("-n", name, "neigh", "del", other, "dev", "longpo-a")


def start(folder: Path, node: int) -> subprocess.Popen[bytes]:
    launcher = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=5", "--rdzv-backend=c10d", "--rdzv-id=longpo"]
    launcher += ["--rdzv-endpoint=10.77.0.1:29500", f"--local-addr=10.77.0.{node + 1}"]
    # Both have the name of this machine, so torchrun cannot tell which of them is meant.
    launcher += [f"--rdzv-conf=is_host={'false' if node else 'true'}"]
    training = [
        "--data-path",
        folder / "data",
        "--load",
        folder / "ckpt",
        "--save",
        folder / "run",
        "--objective",
        "sft",
    ]
    training += ["--global-batch-size", "4", "--train-iters", STEPS, "--save-interval", "20", "--keep-last", "3"]
    training += ["--no-tensorboard", "--plot-interval", "100000"]
    line = [
        PYTHON,
        "-m",
        "torch.distributed.run",
        *launcher,
        "-m",
        "tests.support.meddling_training",
        *map(str, training),
    ]
    extra = {"MEDDLE": "nothing", "MEDDLE_LEDGER": str(folder / "ledger.jsonl"), "GLOO_SOCKET_IFNAME": "longpo-a"}
    # torchrun 2.13 does not publish the address of its shared store again to a node that comes later.
    extra["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with open(folder / f"node{node}.log", "ab") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", NODES[node], *line],
            stdout=log,
            stderr=log,
            env=environment(**extra),
            cwd=ROOT,
            start_new_session=True,
        )


def step_of(folder: Path) -> int:
    records = read_metrics(folder / "run" / "metrics.jsonl")
    return int(records[-1]["step"]) if records else 0


def wait_for(folder: Path, step: int, what: str, seconds: float = 600) -> None:
    began = time.monotonic()
    while step_of(folder) < step:
        if time.monotonic() - began > seconds:
            raise SystemExit(f"{what}: still at step {step_of(folder)} after {seconds:.0f} s")
        time.sleep(0.5)
    print(f"{what}: step {step_of(folder)} after {time.monotonic() - began:.0f} s", flush=True)


def wait_for_both(folder: Path, node: subprocess.Popen[bytes], seconds: float = 600) -> None:
    """Wait until the run of two processes goes on: node 0's log names its layout."""
    began = time.monotonic()
    while (folder / "node0.log").read_text(encoding="utf-8").count("on 2 process(es)") < 2:
        if time.monotonic() - began > seconds or node.poll() is not None:
            raise SystemExit(f"node 1 has not come back after {time.monotonic() - began:.0f} s; see {folder}/node1.log")
        time.sleep(0.5)


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    make_model("llama", folder / "hf", num_hidden_layers=2)
    convert = [
        PYTHON,
        "-m",
        "megatron_longpo.cli",
        "convert",
        "import",
        "--hf",
        folder / "hf",
        "--output",
        folder / "ckpt",
    ]
    subprocess.run([str(word) for word in convert], check=True, cwd=ROOT, env=environment())
    make_data(folder / "data", 24, longest=60)
    with network():
        nodes = [start(folder, 0), start(folder, 1)]
        try:
            wait_for(folder, 5, "two nodes train")
            lose_packets(20)
            wait_for(folder, step_of(folder) + 5, "after 20 s without packets")
            assert all(node.poll() is None for node in nodes)
            os.killpg(nodes[1].pid, signal.SIGKILL)
            before = step_of(folder)
            wait_for(folder, before + 30, "node 0 alone, after node 1 was killed")
            nodes[1] = start(folder, 1)
            before = step_of(folder)
            wait_for_both(folder, nodes[1])
            print(f"node 1 is back after step {before}: both train", flush=True)
            wait_for(folder, STEPS, "both to the end", seconds=3600)
            print(f"exit status of both launchers: {[node.wait(120) for node in nodes]}", flush=True)
        finally:
            for node in nodes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(node.pid, signal.SIGKILL)
    used: dict[int, list[int]] = {}
    for step, numbers in map(json.loads, (folder / "ledger.jsonl").read_text().splitlines()):
        assert used.setdefault(step, numbers) == numbers, f"step {step}"
    flat = [number for step in sorted(used) for number in used[step]]
    assert len(used) == STEPS
    epochs = [sorted(flat[start : start + 24]) for start in range(0, len(flat), 24)]
    # The last one may be a part of one.
    assert all(epoch == list(range(24)) for epoch in epochs[: len(flat) // 24]) and len(set(epochs[-1])) == len(
        epochs[-1]
    )
    print(f"{STEPS} steps, {len(flat)} samples: each of 24 once per epoch")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
