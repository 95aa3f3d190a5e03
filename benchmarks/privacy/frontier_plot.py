"""The frontier as a picture: tokens recovered against quality, a panel a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.privacy.frontier import Outcome

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
MARKERS = "oXsD^vP*<>hp"
GOAL = 0.2
"""Share of tokens recovered that the goal allows."""
LOST = 0.02
"""Of the best quality of a task, what the goal allows to lose."""


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the picture; colours are cuts, markers mechanisms, sizes the strength."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks, cuts, kinds = (
        list(dict.fromkeys(values))
        for values in (
            (one.task for one in outcomes),
            sorted(one.cut for one in outcomes),
            (one.mechanism for one in outcomes),
        )
    )
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(5 * len(tasks) + 2.6, 4.6), squeeze=False, layout="constrained"
    )
    for panel, task in zip(axes[0], tasks, strict=True):
        _panel(panel, [one for one in outcomes if one.task == task], cuts, kinds)
    _legend(figure, cuts, kinds)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(panel: Any, outcomes: Sequence[Outcome], cuts: Sequence[Any], kinds: Sequence[str]) -> None:
    measure = "rougeL" if "rougeL" in outcomes[0].quality else "accuracy"
    best = max(one.quality[measure] for one in outcomes)
    for one in outcomes:
        recovered, quality = next(iter(one.recovered.values())), one.quality[measure]
        colour, marker = COLOURS[cuts.index(one.cut) % len(COLOURS)], MARKERS[kinds.index(one.mechanism) % len(MARKERS)]
        panel.scatter(recovered, quality, s=70, c=colour, marker=marker, edgecolors="white", linewidths=0.6, zorder=3)
        left = recovered > 0.85
        panel.annotate(
            _short(one.setting),
            (recovered, quality),
            (-6 if left else 6, 3),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=6.5,
            color="#444444",
        )
    low, high = panel.get_ylim()
    panel.set(xlim=(-0.04, 1.04), ylim=(low, max(high, best * 1.03)), title=outcomes[0].task)
    panel.axhspan(best - LOST, panel.get_ylim()[1], xmax=(GOAL + 0.04) / 1.08, color="#009e73", alpha=0.13, lw=0)
    panel.set_xlabel("tokens recovered by the best attack, share")
    panel.set_ylabel("ROUGE-L of greedy answers" if measure == "rougeL" else "held-out accuracy")
    panel.grid(alpha=0.25)


def _short(setting: str) -> str:
    return setting.replace("epsilon", "ε").replace(" a vector", "").replace(" × rms", "×")


def _legend(figure: Any, cuts: Sequence[Any], kinds: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def dot(marker: str, colour: str, label: str) -> Any:
        return Line2D([], [], marker=marker, color=colour, linestyle="", label=label)

    shown = [dot("o", COLOURS[number % len(COLOURS)], f"cut {cut}") for number, cut in enumerate(cuts)]
    shown += [dot(MARKERS[number % len(MARKERS)], "#555555", kind) for number, kind in enumerate(kinds)]
    shown.append(
        Patch(color="#009e73", alpha=0.13, label=f"goal: ≤ {GOAL:.0%} recovered,\n≤ {100 * LOST:.0f} points lost")
    )
    figure.legend(handles=shown, loc="outside right center", fontsize=8, frameon=False)
