"""The best plans as a picture: time by part and memory by part, on a light and on a dark page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_longpo.planner.report import Result
from megatron_longpo.planner.timing import PARTS

_GIB = 2**30
_THEMES = {
    "light": {"page": "#ffffff", "text": "#24292f", "line": "#d0d7de"},
    "dark": {"page": "#0d1117", "text": "#e6edf3", "line": "#30363d"},
}
# Readable on both pages, and told apart without red and green (Okabe and Ito's, with lighter and darker ones).
# fmt: off
_COLORS = (
    "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#f0e442", "#d55e00", "#cc79a7",
    "#8c6bb1", "#a6761d", "#999999", "#66c2a5", "#c7a8d8", "#7f7f7f", "#b3de69", "#1b4f72",
)
# fmt: on


def draw(result: Result, path: Path, theme: str) -> None:
    """Draw the best plans as PNG, SVG or PDF by the file's suffix.

    Args:
        result: what was found, with at least one plan.
        path: the picture.
        theme: ``light`` or ``dark``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = _THEMES[theme]
    settings: Any = {
        "figure.facecolor": colors["page"],
        "axes.facecolor": colors["page"],
        "savefig.facecolor": colors["page"],
        "text.color": colors["text"],
        "axes.labelcolor": colors["text"],
        "xtick.color": colors["text"],
        "ytick.color": colors["text"],
        "axes.edgecolor": colors["line"],
        "grid.color": colors["line"],
        # Letters as letters, so that a picture in text is small.
        "svg.fonttype": "none",
        "svg.hashsalt": "plan",
    }
    with pyplot.rc_context(settings):
        plans = result.plans
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(14, 1.8 + 0.5 * len(plans)), sharey=True, constrained_layout=True
        )
        names = [f"{plan.candidate.describe()}\nrecompute {plan.recompute}" for plan in plans]
        places = range(len(plans))
        for axis, rows, unit in (
            (left, [plan.time.parts for plan in plans], 1.0),
            (right, [plan.memory.parts() for plan in plans], float(_GIB)),
        ):
            begins = [0.0] * len(plans)
            parts = [
                name for name in rows[0] if max(row[name] for row in rows) > 0.003 * max(sum(r.values()) for r in rows)
            ]
            for part in parts:
                sizes = [row[part] / unit for row in rows]
                number = PARTS.index(part) if part in PARTS else list(rows[0]).index(part)
                axis.barh(places, sizes, left=begins, color=_COLORS[number % len(_COLORS)], label=part, height=0.7)
                begins = [b + s for b, s in zip(begins, sizes, strict=True)]
            axis.grid(axis="x", linewidth=0.5)
            axis.set_axisbelow(True)
            axis.legend(
                loc="lower center",
                bbox_to_anchor=(0.5, 1.0),
                ncols=4,
                fontsize=8,
                frameon=False,
                labelcolor=colors["text"],
            )
        left.set_yticks(places, names, fontsize=8)
        left.invert_yaxis()
        left.set_xlabel("seconds per step")
        right.set_xlabel("GiB per GPU at the peak")
        right.axvline(result.search.machine.memory_gib, color=colors["text"], linewidth=1, linestyle=":")
        # The date would make the same picture another file.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=110, metadata=metadata)
        pyplot.close(figure)
