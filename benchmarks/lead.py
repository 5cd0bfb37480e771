"""Does the teacher's lead predict the gain? One point per method and model, from the comparisons' runs.

    python benchmarks/lead.py        # after benchmarks/compare.py; reads results/compare/*/runs.json

Lead: how much more often the teacher is right than the student on the same questions, in step 0
(`teacher/lead`; of SD-Zero, its revisions against its first attempts). Gain: held-out
pass@1 of the last evaluation less that of the first, without hints. Writes results/compare/lead.json,
lead.md and lead.png.
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
            gains = [run["pass"][-1] - run["pass"][0] for run in runs]
            found.append({
                "grid": grid, "method": method, "lead": np.mean([run["lead"] for run in runs]),
                "gain": np.mean(gains), "least": min(gains), "most": max(gains),
            })
    return found


def main() -> None:
    out = ROOT / "results" / "compare"
    found = points(out)
    (out / "lead.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = ["| model and task | method | teacher's lead | gain, lowest and highest seed |", "|---|---|---|---|"]
    for p in sorted(found, key=lambda p: (p["grid"], -p["lead"])):
        lines.append(
            f"| {MODELS[p['grid']]} | {p['method']} | {p['lead']:+.2f} "
            f"| {p['gain']:+.2f} ({p['least']:+.2f} to {p['most']:+.2f}) |"
        )
    (out / "lead.md").write_text("\n".join(lines) + "\n")
    draw(found, out / "lead.png")
    print("\n".join(lines))


def draw(found: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for i, (grid, title) in enumerate(MODELS.items()):
        mine = [p for p in found if p["grid"] == grid]
        if not mine:
            continue
        x, y = [p["lead"] for p in mine], [p["gain"] for p in mine]
        bars = [[p["gain"] - p["least"] for p in mine], [p["most"] - p["gain"] for p in mine]]
        axis.errorbar(x, y, bars, fmt="osD"[i], color=f"C{i}", capsize=2, label=title)
        for p in mine:
            name = p["method"].partition(" (1")[0].partition(" (0")[0]
            axis.annotate(
                name, (p["lead"], p["gain"]), xytext=(4, 4), textcoords="offset points", fontsize=7
            )
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set(
        xlabel="teacher's lead in step 0: right more often than the student by",
        ylabel="gain in held-out pass@1, without hints",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
