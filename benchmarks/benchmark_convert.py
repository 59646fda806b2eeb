"""Measure conversion against a plain copy on the same disk: seconds, GB/s and peak memory of import, verify and export.

A random model of real shapes is written (by default those of a 1.5B model, about 3 GB). It is imported, compared bit by bit and
exported. Because the speed of a disk varies, its safetensors are copied tensor by tensor right before each of these steps,
which gives the ceiling. Everything runs in processes of its own.

    python benchmarks/benchmark_convert.py --folder /path/on/the/disk --output convert
    python benchmarks/benchmark_convert.py --folder DIR --processes 2        (import and export by torchrun)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common import CONVERT

SIZES = {
    # Qwen2.5-1.5B.
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
}


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(
        prog="benchmark_convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="new folder on the disk to measure; needs four times the model")
    parser.add_argument("--size", choices=("1.5b",), default="1.5b")
    parser.add_argument("--layers", type=int, help="number of layers, if not the model size's (for a quick try)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of everything; medians are reported")
    parser.add_argument("--processes", type=int, default=1, help="processes of import and export")
    parser.add_argument("--output", help="prefix of the result files OUTPUT.json and OUTPUT.md")
    parser.add_argument("--copy", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.copy:
        print(f"copy: done in {copy(Path(a.copy[0]), Path(a.copy[1])):.3f} s")
        return
    folder = Path(a.folder)
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(a.size, a.layers)
    # In a separate process, because the peak of a child is never below what its parent once had.
    with ProcessPoolExecutor(1) as pool:
        size, largest = pool.submit(make, folder / "hf", config).result()
    print(f"model: {size / 1e9:.2f} GB, our largest tensor {largest / 1e9:.2f} GB", flush=True)
    names = ("import", "verify", "export")
    seconds: dict[str, list[float]] = {n: [] for n in names}
    memory: dict[str, list[float]] = {n: [] for n in names}
    copies: dict[str, list[float]] = {n: [] for n in names}
    for _ in range(a.repeats):
        for name in ("ckpt", "back"):
            shutil.rmtree(folder / name, ignore_errors=True)
        plain = [sys.executable, __file__, "--folder", a.folder, "--copy", str(folder / "hf"), str(folder / "copied")]
        commands = {
            "import": [
                *(*launch(a.processes), CONVERT, "import", "--no-verify"),
                *("--hf", folder / "hf", "--output", folder / "ckpt"),
            ],
            "verify": [
                *(*launch(a.processes), CONVERT, "verify", "--no-logits"),
                *("--checkpoint", folder / "ckpt", "--hf", folder / "hf"),
            ],
            "export": [
                *(*launch(a.processes), CONVERT, "export", "--no-verify"),
                *("--checkpoint", folder / "ckpt", "--output", folder / "back", "--max-shard-size", "1GB"),
            ],
        }
        for name, command in commands.items():
            touch_disk(folder, size * 4 // 3)
            copies[name].append(watched("copy", plain)[0])
            shutil.rmtree(folder / "copied")
            touch_disk(folder, size * 4 // 3)
            taken, peak = watched(name, list(map(str, command)))
            seconds[name].append(taken)
            memory[name].append(peak)
            print(
                f"{name}: {taken:.2f} s, {size / 1e9 / taken:.2f} GB/s, peak {peak:.2f} GB; copy {copies[name][-1]:.2f} s",
                flush=True,
            )
    report(a, size, largest, seconds, memory, copies)


def touch_disk(folder: Path, size: int) -> None:
    """Write and remove more than will be written next.

    The first write to a block of a virtual disk can be five times slower than later ones, which would favour whichever side
    gets used blocks.
    """
    block = os.urandom(2**24)
    with open(folder / "filler", "wb", buffering=0) as stream:
        for _ in range(size // len(block) + 1):
            stream.write(block)
        os.fsync(stream.fileno())
    (folder / "filler").unlink()
    os.sync()


def launch(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]


def config_of(size: str, layers: int | None) -> dict[str, Any]:
    hidden, ffn, depth, heads, groups, vocabulary, tied = SIZES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    }


def make(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Write a random model in bf16; return its size and that of our largest tensor, in bytes."""
    import torch

    from megatron_longpo.checkpoint.huggingface import LazyTensor, plan_shards, shard_name, write_index, write_shard
    from megatron_longpo.conversion.fused import fused_tensors
    from megatron_longpo.model.families import shape_from_hf

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shape = shape_from_hf(config, "config")
    described, largest = [], 0
    for fused in fused_tensors(shape):
        largest = max(largest, fused.numel * torch.bfloat16.itemsize)
        for name, sizes in zip(fused.names, fused.entry.their_shapes(shape), strict=True):
            described.append(LazyTensor(name, sizes, torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    shards = plan_shards(described, 10**9)
    for number, shard in enumerate(shards):
        values = (torch.randn(t.shape, generator=generator, dtype=torch.bfloat16) for t in shard)
        write_shard(folder / shard_name(number, len(shards)), shard, values)
    write_index(folder, shards)
    return sum(t.bytes for t in described), largest


def copy(source: Path, target: Path) -> float:
    """Copy safetensors files tensor by tensor, as simply as possible; return the seconds."""
    import torch
    from safetensors import safe_open

    target.mkdir()
    began = time.monotonic()
    for path in sorted(source.glob("*.safetensors")):
        with open(target / path.name, "wb", buffering=0) as stream, safe_open(str(path), "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                value = tensors.get_tensor(name)
                stream.write(value.view(-1).view(torch.uint8).numpy().data)
            os.fsync(stream.fileno())
    return time.monotonic() - began


def watched(name: str, command: list[str]) -> tuple[float, float]:
    """Run a command.

    Returns:
        The seconds that the command reports for its work, which exclude the start of programs, and the largest resident set
        among its processes in GB, as the system recorded it.
    """
    # Earlier writes must not slow down this command.
    os.sync()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(command, stdout=out, stderr=error)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        error.seek(0)
        # The last matching line; progress lines come before it.
        found = re.findall(rf"^{name}: .*? in ([\d.]+) s", out.read(), re.MULTILINE)
        if process.returncode or not found:
            sys.exit(f"error: {name} failed: {error.read()[-3000:]}")
    return float(found[-1]), usage.ru_maxrss * 1024 / 1e9


def report(
    a: argparse.Namespace,
    size: int,
    largest: int,
    seconds: dict[str, list[float]],
    memory: dict[str, list[float]],
    copies: dict[str, list[float]],
) -> None:
    """Print the table: medians, the rate relative to the copy made just before, and memory beyond the largest tensor."""
    lines = [
        f"{size / 1e9:.2f} GB, {a.processes} process(es), {a.repeats} run(s); largest tensor {largest / 1e9:.2f} GB.",
        "",
        "| | s | GB/s | copy s | rate relative to the copy | peak memory per process, GB | beyond the largest tensor, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        s, m, c = float(np.median(times)), max(memory[name]), float(np.median(copies[name]))
        rate = float(np.median(np.array(copies[name]) / np.array(times)))
        lines.append(
            f"| {name} | {s:.2f} | {size / 1e9 / s:.2f} | {c:.2f} | {rate:.2f} | {m:.2f} | {m - largest / 1e9:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if a.output:
        Path(f"{a.output}.md").write_text(text, encoding="utf-8")
        content = {
            "bytes": size,
            "largest": largest,
            "seconds": seconds,
            "copies": copies,
            "peak_gb": memory,
            "processes": a.processes,
        }
        Path(f"{a.output}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
