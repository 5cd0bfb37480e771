"""The log: metrics averaged over ranks, trackers, curves."""
from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

PROJECT = "self-distillation"  # in W&B and trackio
PANELS = {  # what a reader looks at first
    "heldout/pass@1": "held-out pass@1",
    "reward/mean": "training reward",
    "entropy": "entropy (nats)",
    "length/mean": "response length (tokens)",
    "grad_norm": "gradient norm",
    "time/update": "seconds per step",
}
PHASES = ("sample", "verify", "score", "update", "sync")


def reduce_over_ranks(metrics: dict[str, list]) -> dict[str, float]:
    """Each metric's mean over all values of all ranks, or the maximum if its name has "max".

    A metric without values on any rank is left out. A collective: every rank must have the same
    metric names in the same order.
    """
    out = {}
    for name in metrics:
        values = torch.cat([as_column(part) for part in metrics[name]])
        if "max" in name:
            top = values.new_tensor(-torch.inf)
            if len(values):
                top = values.max()
            dist.all_reduce(top, dist.ReduceOp.MAX)
            if top != -torch.inf:
                out[name] = top.item()
            continue
        total = torch.stack([values.sum(), values.new_tensor(len(values))])
        dist.all_reduce(total)
        if total[1] > 0:
            out[name] = (total[0] / total[1]).item()
    return out


def as_column(values: Tensor | list) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).flatten().cpu()


def make_tracker(package: str, folder: Path, step: int, config: dict) -> Callable[[dict], None]:
    """Return a function that sends a row of metrics to the tracker that --track names.

    A run that resumes after `step` steps continues its record, whose id is in the run's folder.
    """
    if package == "tensorboard":
        return tensorboard(folder, step)
    module = importlib.import_module(package)
    file = folder / f"{package}.id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    key = file.read_text()
    if package == "wandb":  # settings may change: --resume itself does
        module.init(
            project=PROJECT, name=folder.name, id=key, resume="allow", config=config,
            allow_val_change=True,
        )
    else:  # trackio identifies a run by its name
        module.init(project=PROJECT, name=f"{folder.name}-{key}", resume="allow", config=config)

    def write(row: dict) -> None:
        values = {name: value for name, value in row.items() if name != "step"}
        module.log(values, step=int(row["step"]))

    return write


def tensorboard(folder: Path, step: int) -> Callable[[dict], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)  # hides rows to come again

    def write(row: dict) -> None:
        for name in row.keys() - {"step"}:
            writer.add_scalar(name, row[name], int(row["step"]))
        writer.flush()  # a resumed run does not write rows before its checkpoint again

    return write


def draw_curves(history: list[dict], path: Path, title: str) -> None:
    """curves.png: one panel per entry of PANELS."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (key, label) in zip(axes, PANELS.items()):
        rows = [row for row in history if key in row]
        steps = [row["step"] for row in rows]
        if not rows:
            axis.set_axis_off()
        elif key == "time/update":
            seconds = [[row.get(f"time/{phase}", 0.0) for row in rows] for phase in PHASES]
            axis.stackplot(steps, seconds, labels=PHASES)
            axis.legend(fontsize=8, loc="upper right")
        else:
            marker = "o" if len(rows) < 30 else None
            axis.plot(steps, [row[key] for row in rows], marker=marker)
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylim(0, 1)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
