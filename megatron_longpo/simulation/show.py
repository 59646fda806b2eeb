"""A report as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_longpo.simulation.request import Report

_GIB = 2**30
# Order of the picture, from the bottom.
_BOTTOM = ("weights", "gradients", "optimizer", "layer inputs", "queries, keys, values", "attention outputs")


def print_report(report: Report, console: Console, *, most: int = 12) -> None:
    """Print a report; ``most`` lines of each long list."""
    console.print(
        f"{report.layout}; attention: {report.attention}; linear layers: {report.layers}; recompute: {report.recompute}"
    )
    console.print(
        f"{report.tokens:,} tokens per micro batch, {report.micro_batches} micro batch(es); {report.operators:,} operators, "
        f"simulated in {report.seconds:.0f} s"
    )
    _memory(report, console, most)
    work = Table(title="floating-point operations of this rank, TFLOP")
    work.add_column("kind")
    work.add_column("", justify="right")
    for kind, flops in report.flops.items():
        work.add_row(kind, f"{flops / 1e12:,.1f}")
    work.add_row("total", f"{sum(report.flops.values()) / 1e12:,.1f}", style="bold")
    console.print(work)
    if report.exchanges:
        sent = Table(title="bytes that this rank sends")
        for name in ("collective", "group", "calls", "GiB"):
            sent.add_column(name, justify="left" if name in ("collective", "group") else "right")
        for row in report.exchanges:
            sent.add_row(row["collective"], row["group"], str(row["calls"]), f"{row['bytes'] / _GIB:.3f}")
        console.print(sent)
    waits = Table(title=f"the host waits for the GPU {sum(row['times'] for row in report.waits)} times")
    for name in ("times", "why", "where"):
        waits.add_column(name, overflow="fold")
    for row in report.waits[:most]:
        waits.add_row(str(row["times"]), row["what"], row["place"])
    if len(report.waits) > most:
        waits.add_row("", f"and {len(report.waits) - most} more lines", "")
    console.print(waits)
    if report.violations:
        broken = Table(title="what kernels and collectives do not take", style="red")
        for name in ("times", "what", "where"):
            broken.add_column(name, overflow="fold")
        for row in report.violations:
            broken.add_row(str(row["times"]), row["problem"], row["place"])
        console.print(broken)
    else:
        console.print("every kernel and every collective is given what it takes")


def _memory(report: Report, console: Console, most: int) -> None:
    estimate = "" if report.estimate_bytes is None else f"; the estimate was {report.estimate_bytes / _GIB:.2f}"
    memory = Table(
        title=f"peak {report.peak_bytes / _GIB:.2f} GiB in {report.peak['phase']}, at {report.peak['place']} "
        f"({report.peak['operator']}){estimate}",
        caption=f"set-up {report.setup_peak_bytes / _GIB:.2f}; "
        + "; ".join(f"{phase} {live / _GIB:.2f}" for phase, live in report.phases.items())
        + (f"; pinned on the host {report.host_bytes / _GIB:.2f}" if report.host_bytes >= _GIB // 100 else ""),
    )
    memory.add_column("kind")
    memory.add_column("GiB", justify="right")
    for kind, size in report.kinds.items():
        if size >= 0.0005 * report.peak_bytes:
            memory.add_row(kind, f"{size / _GIB:.2f}")
    memory.add_section()
    for place, size in list(report.places.items())[:most]:
        memory.add_row(place, f"{size / _GIB:.2f}", style="dim")
    console.print(memory)


def draw(report: Report, path: Path) -> None:
    """Draw live bytes over the step, by kind, as PNG, SVG or PDF by the file's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = report.curve
    seen = {kind for kinds in curve["kinds"] for kind in kinds}
    order = [k for k in _BOTTOM if k in seen]
    order += sorted(seen - set(order), key=lambda k: -max(kinds.get(k, 0) for kinds in curve["kinds"]))
    rows = [[kinds.get(kind, 0) / _GIB for kinds in curve["kinds"]] for kind in order]
    figure, axis = pyplot.subplots(figsize=(12, 6), constrained_layout=True)
    colors = [pyplot.get_cmap("tab20")(i % 20) for i in range(len(order))]
    axis.stackplot(curve["at"], rows, labels=order, colors=colors, linewidth=0)
    top = max(range(len(curve["at"])), key=lambda i: curve["live"][i])
    axis.axhline(report.peak_bytes / _GIB, color="black", linewidth=0.8, linestyle=":")
    axis.annotate(
        f"{report.peak_bytes / _GIB:.2f} GiB, {report.peak['place']}",
        (curve["at"][top], report.peak_bytes / _GIB),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right" if curve["at"][top] > curve["at"][-1] / 2 else "left",
        fontsize=8,
    )
    for i in range(1, len(curve["at"])):
        if curve["phases"][i] != curve["phases"][i - 1]:
            axis.axvline(curve["at"][i], color="grey", linewidth=0.6)
            axis.text(curve["at"][i], 0, f" {curve['phases'][i]}", rotation=90, fontsize=7, va="bottom")
    axis.set_xlim(curve["at"][0], curve["at"][-1])
    axis.set_ylim(0, 1.08 * report.peak_bytes / _GIB)
    axis.set_xlabel("operator of the step")
    axis.set_ylabel("live GiB")
    axis.set_title(f"{report.layout}, {report.tokens:,} tokens; recompute: {report.recompute}", fontsize=10)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
