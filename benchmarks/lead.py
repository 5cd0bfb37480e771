"""Does the teacher's lead predict the gain? One point per method and model.

    python benchmarks/lead.py        # after benchmarks/compare.py

Lead: how much more often the teacher is right than the student on the same questions, at step 0
(`teacher/lead`; of SD-Zero, its revisions against its first attempts). Gain: held-out pass@1 of the
last evaluation less that of the first, without hints. Reads results/compare/*/runs.json. Writes
results/compare/lead.json, lead.md and lead.png.
"""
from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODELS = {  # grid → its model and task
    "chain": "embedded model, sums",
    "smollm2": "SmolLM2-135M, the larger of two numbers",
    "qwen": "Qwen2.5-Coder-0.5B, products",
}


def points(folder: Path) -> list[dict]:
    """grid, method, lead, gain: means over seeds; and the gain's lowest and highest seed."""
    found = []
    for grid in MODELS:
        path = folder / grid / "runs.json"
        if not path.exists():
            continue
        for method, runs in json.loads(path.read_text())["runs"].items():
            if not runs or any(run.get("lead") is None for run in runs):
                continue
            lead = np.mean([run["lead"] for run in runs])
            found.append(point(grid, method, lead, [run["pass"] for run in runs]))
    return found


def point(grid: str, method: str, lead: float, scores: list[list[float]]) -> dict:
    """scores: held-out pass@1 of each evaluation, by seed."""
    gains = [row[-1] - row[0] for row in scores]
    return {
        "grid": grid, "method": method, "lead": float(lead), "gain": float(np.mean(gains)),
        "least": min(gains), "most": max(gains),
    }


def main() -> None:
    out = ROOT / "results" / "compare"
    found = points(out)
    (out / "lead.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        "| model and task | method | teacher's lead | gain, lowest and highest seed |",
        "|---|---|---|---|",
    ]
    for p in sorted(found, key=lambda p: (p["grid"], -p["lead"])):
        lines.append(
            f"| {MODELS[p['grid']]} | {p['method']} | {p['lead']:+.2f} "
            f"| {p['gain']:+.2f} ({p['least']:+.2f} to {p['most']:+.2f}) |"
        )
    (out / "lead.md").write_text("\n".join(lines) + "\n")
    draw(found, out / "lead.png")
    print("\n".join(lines))


def labels(points: list[dict]) -> list[tuple[tuple[float, float], list[str]]]:
    """Places and the names to write there; points that lie close together share a label.

    >>> a = {"method": "A (135M)", "lead": 0.5, "gain": 0.2}
    >>> labels([a, {**a, "method": "B", "lead": 0.51}, {**a, "method": "C", "gain": 0.4}])
    [((0.5, 0.2), ['A', 'B']), ((0.5, 0.4), ['C'])]
    """
    found: list[tuple[tuple[float, float], list[str]]] = []
    for p in points:
        name = p["method"].partition(" (1")[0].partition(" (0")[0]
        for (lead, gain), names in found:
            if abs(p["lead"] - lead) < 0.1 and abs(p["gain"] - gain) < 0.06:
                names.append(name)
                break
        else:
            found.append(((p["lead"], p["gain"]), [name]))
    return found


def draw(found: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for i, (grid, title) in enumerate(MODELS.items()):
        mine = [p for p in found if p["grid"] == grid]
        if not mine:
            continue
        x = [p["lead"] for p in mine]
        y = [p["gain"] for p in mine]
        bars = [[p["gain"] - p["least"] for p in mine], [p["most"] - p["gain"] for p in mine]]
        axis.errorbar(x, y, bars, fmt="^osD"[i], color=f"C{i}", capsize=2, label=title)
        for place, names in labels(mine):
            # to the right these names would run into other points
            left = grid == "qwen" or (grid == "chain" and place[0] < 0.5)
            axis.annotate(
                "\n".join(names), place, xytext=(-6 if left else 5, 0), textcoords="offset points",
                fontsize=7, va="center", ha="right" if left else "left",
            )
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.margins(x=0.3, y=0.15)
    axis.set(
        xlabel="teacher's lead before training: right more often than the student by",
        ylabel="gain in held-out pass@1, without hints",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
