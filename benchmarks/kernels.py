"""kernels/ beside its rivals: time over the bare matrix products, extra memory, error of value and
gradient.

    python benchmarks/kernels.py speed      # minutes; without a GPU on the CPU, at a smaller size
    python benchmarks/kernels.py ladder     # errors from large to tiny divergences, bf16
    python benchmarks/kernels.py top_k      # errors of top-K gradients from fat to thin tails
    python benchmarks/kernels.py profile    # time by operator of a KL with a frozen head; CPU
    python benchmarks/kernels.py draw       # tables and figures of the results of the others

Writes results/kernels/. Rivals that are installed take part: TRL (>= 1.16), liger-kernel
(>= 0.8.5), and PyTorch's own full logits, torch.compile and F.linear_cross_entropy.

Times are taken in rounds: in each, every contender runs once, after the bare products of the same
shapes. The median of the ratios is reported. Errors are against float64 from the hidden states on.
Only ratios within a run mean anything, and only on a machine without other work.
"""
from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from kernels import head as head_module  # noqa: E402
from kernels.divergence import Divergence  # noqa: E402
from kernels.head import head_loss, token_stats  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda") if ON_GPU else torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

PRODUCTS = {  # task → matrix products of the size [T, D]·[D, V]
    "KL": 4, "KL, frozen head": 3, "JSD": 4, "log p": 3, "scores": 2,
}
TOP_K, TOP_K_TASK = 20, "KL of the student's top-20 and tail"  # on the ladder only


class Problem(NamedTuple):
    """Leaves of the graph and constants. The loss is the mean over tokens."""

    hidden: Tensor  # [T, D]
    head: Tensor  # [V, D]
    y: Tensor  # [T]
    teacher_hidden: Tensor  # [T, D]; the teacher has the student's head
    task: str

    @property
    def teacher_head(self) -> Tensor:
        return self.head.detach()

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head) if x.requires_grad]

    @property
    def beta(self) -> float:
        return 0.5 if self.task == "JSD" else 1.0

    @property
    def divergence(self) -> Divergence:
        top_k = TOP_K if self.task == TOP_K_TASK else 0
        return Divergence("jsd", beta=self.beta, top_k=top_k)


def problem(tokens: int, vocabulary: int, width: int, dtype: torch.dtype, task: str,
            gap: float = 0.05, peaked: bool = False) -> Problem:
    """Logits of standard deviation 1.5.

    gap: standard deviation of the teacher's hidden states around the student's.
    peaked: the target's logit is raised until its probability is about 0.7, as a language model's
    usually is.
    """
    g = torch.Generator().manual_seed(0)
    head = torch.randn(vocabulary, width, generator=g) / width**0.5
    hidden = 1.5 * torch.randn(tokens, width, generator=g)
    y = torch.randint(vocabulary, (tokens,), generator=g)
    if peaked:
        of_target = head[y]
        raised = math.log(vocabulary) + 2
        hidden += raised * of_target / (of_target**2).sum(-1, keepdim=True)
    teacher_hidden = hidden + gap * torch.randn(tokens, width, generator=g)
    hidden, head, teacher_hidden = (x.to(DEVICE, dtype) for x in (hidden, head, teacher_hidden))
    hidden.requires_grad_(task != "scores")
    head.requires_grad_(task not in ("scores", "KL, frozen head"))
    return Problem(hidden, head, y.to(DEVICE), teacher_hidden, task)


# --------------------------------------------------------------------------------------------------
# the contenders: each takes a Problem and returns the loss, which carries the gradient, or None if
# the task is not for it. Their memory is measured: a name would keep an intermediate alive.
# --------------------------------------------------------------------------------------------------
Contender = Callable[[Problem], Tensor | None]


def this_head_loss(p: Problem) -> Tensor | None:
    count = len(p.y)
    if p.task == "scores":
        return None
    if p.task == "log p":
        surprise = lambda token, _: token.logp / -count
        return head_loss(surprise, p.hidden, p.head, p.y, None)[0]
    distance = lambda token, _: token.kl / count
    return head_loss(distance, p.hidden, p.head, p.y, None, p.teacher_hidden,
                     divergence=p.divergence)[0]


def this_token_stats(p: Problem) -> Tensor:
    if p.task == "log p":
        return -token_stats(p.hidden, p.head, p.y).logp.mean()
    stats = token_stats(p.hidden, p.head, p.y, p.teacher_hidden, divergence=p.divergence)
    return stats.kl.mean()


def full_logits(p: Problem) -> Tensor | None:
    """What SDPO (lasgroup/SDPO 229d137, under autocast) and OPSD (siyan-zhao/OPSD 8ae338d) run:
    logits in the model's dtype, log-softmax and all after it in fp32."""
    if p.task == TOP_K_TASK:
        return None
    if p.task == "log p":
        return F.cross_entropy((p.hidden @ p.head.T).float(), p.y)
    student = F.log_softmax((p.hidden @ p.head.T).float(), -1)
    teacher = F.log_softmax((p.teacher_hidden @ p.teacher_head.T).float(), -1)
    if p.task == "scores":  # also the log-probability and the entropy, as the others
        student.gather(-1, p.y[:, None])
        (student.exp() * student).sum(-1)
    return divergence(student, teacher, p.beta).mean()


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Of log-probabilities [T, V], per token [T]: KL(student‖teacher) at beta 1, else the JSD."""
    if beta == 1:
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    m = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
    return (beta * F.kl_div(m, teacher, reduction="none", log_target=True)
            + (1 - beta) * F.kl_div(m, student, reduction="none", log_target=True)).sum(-1)


def full_logits_top_k(p: Problem) -> Tensor | None:
    """SDPO's top-K and tail: the tail's probability is 1 minus that of the K, whose logarithm is
    kept below −1e-7."""
    if p.task != TOP_K_TASK:
        return None
    student_logits = p.hidden @ p.head.T
    teacher_logits = p.teacher_hidden @ p.teacher_head.T
    index = student_logits.topk(TOP_K).indices
    buckets = []  # of the student, of the teacher: log-probabilities [T, K + 1]
    for logits in (student_logits, teacher_logits):
        log_sum = logits.float().logsumexp(-1, keepdim=True)
        kept = logits.gather(-1, index).float() - log_sum
        mass = kept.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
        tail = (-mass.expm1()).log()
        buckets.append(torch.cat([kept, tail], -1))
    return divergence(*buckets, 1.0).mean()


compiled_full_logits = torch.compile(full_logits)


def compiled_chunks(p: Problem) -> Tensor:
    """The compiled full logits of 1,024 tokens at a time (of 256 on a CPU), each chunk's backward
    at once."""
    size = 1024 if ON_GPU else 256
    total = torch.zeros((), device=DEVICE)
    for start in range(0, len(p.y), size):
        c = slice(start, start + size)
        part = p._replace(hidden=p.hidden[c], y=p.y[c], teacher_hidden=p.teacher_hidden[c])
        loss = compiled_full_logits(part) * (len(part.y) / len(p.y))
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
    return total


def trl(p: Problem) -> Tensor | None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    if p.task in ("log p", TOP_K_TASK):
        return None
    inputs = p.hidden, p.head, None, p.teacher_hidden, p.teacher_head, None, p.beta
    return ChunkedDivergenceFunction.apply(*inputs)[0].mean()


def liger_chunked(p: Problem) -> Tensor | None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    if p.task not in ("KL", "JSD", "KL, frozen head"):
        return None
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, p.beta, compiled=ON_GPU)
    return loss(p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.y)


def liger_fused(p: Problem) -> Tensor | None:
    import liger_kernel.ops.fused_linear_jsd as module

    if not ON_GPU:
        if not INTERPRETED:
            raise RuntimeError("its Triton kernels need a GPU")
        # on a CPU it rounds the logits to bf16, which on a GPU it does not: give it the products
        # that it has there
        module._project_to_float32 = lambda x, w: x.float() @ w.float().T
    if p.task not in ("KL", "JSD", "KL, frozen head"):
        return None
    inputs = p.hidden, p.head, p.teacher_hidden, p.teacher_head, None, p.beta
    return module.LigerFusedLinearJSDFunction.apply(*inputs)


def linear_cross_entropy(p: Problem) -> Tensor | None:
    if p.task != "log p":
        return None
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(p.hidden, p.head, p.y, options=options)


CONTENDERS: dict[str, Contender] = {
    "this code, head_loss": this_head_loss,
    "this code, token_stats": this_token_stats,
    "full logits": full_logits,
    "full logits, torch.compile": compiled_full_logits,
    "chunks of logits, torch.compile": compiled_chunks,
    "TRL ChunkedDivergenceFunction": trl,
    "Liger LigerFusedLinearJSDLoss": liger_chunked,
    "Liger fused_linear_jsd": liger_fused,
    "F.linear_cross_entropy": linear_cross_entropy,
}
LADDER: dict[str, Contender] = {
    "this code": this_head_loss,
    "TRL ChunkedDivergenceFunction": trl,
    "Liger fused_linear_jsd": liger_fused,
    "Liger LigerFusedLinearJSDLoss": liger_chunked,
    "full logits as in SDPO and OPSD": full_logits,
    "full logits, top-20 and tail as in SDPO": full_logits_top_k,
}


# --------------------------------------------------------------------------------------------------
# what is measured
# --------------------------------------------------------------------------------------------------
class Outcome(NamedTuple):
    loss: float
    gradients: list[Tensor]  # of the leaves


def run(contender: Contender, p: Problem) -> Outcome | None:
    """None if the task is not for it."""
    for x in p.leaves:
        x.grad = None
    loss = contender(p)
    if loss is None:
        return None
    if loss.requires_grad:
        loss.backward()
    return Outcome(loss.item(), [x.grad for x in p.leaves])


def truth(p: Problem) -> Outcome:
    """In float64 from the hidden states on, by the definition."""
    hidden, head = p.hidden.detach().double(), p.head.detach().double()
    hidden.requires_grad_(p.hidden.requires_grad)
    head.requires_grad_(p.head.requires_grad)
    log_p = F.log_softmax(hidden @ head.T, -1)
    if p.task == "log p":
        loss = -log_p.gather(-1, p.y[:, None]).mean()
    else:
        log_q = F.log_softmax(p.teacher_hidden.double() @ p.teacher_head.double().T, -1)
        if p.task == TOP_K_TASK:
            log_p, log_q = top_and_tail(log_p, log_q, TOP_K)
        loss = divergence(log_p, log_q, p.beta).mean()
    leaves = [x for x in (hidden, head) if x.requires_grad]
    gradients = []
    if leaves:
        gradients = list(torch.autograd.grad(loss, leaves))
    return Outcome(loss.item(), gradients)


def top_and_tail(log_p: Tensor, log_q: Tensor, k: int) -> list[Tensor]:
    """Log-probabilities of the student's k likeliest entries and of all others as one, [T, k + 1]:
    the student's and the teacher's."""
    index = log_p.topk(k).indices
    others = torch.ones_like(log_p).scatter(-1, index, 0) > 0
    both = []
    for x in (log_p, log_q):
        tail = x.where(others, -torch.inf).logsumexp(-1, keepdim=True)
        both.append(torch.cat([x.gather(-1, index), tail], -1))
    return both


def errors(got: Outcome, right: Outcome) -> dict[str, float]:
    """Relative; of the gradients in the Frobenius norm, the largest of them."""
    of_gradients = []
    for gradient, right_gradient in zip(got.gradients, right.gradients):
        off = (gradient.double() - right_gradient).norm()
        of_gradients.append((off / right_gradient.norm()).item())
    return {
        "value_error": abs(got.loss / right.loss - 1),
        "gradient_error": max(of_gradients, default=float("nan")),
    }


def products(p: Problem) -> Callable[[], None]:
    """The bare matrix products of a task: logits into memory that is there, gradients into new
    memory, as for all."""
    with torch.no_grad():
        z = torch.empty(len(p.y), len(p.head), dtype=p.head.dtype, device=DEVICE)

    def go() -> None:
        with torch.no_grad():
            torch.mm(p.hidden, p.head.T, out=z)
            if p.task != "log p":
                torch.mm(p.teacher_hidden, p.head.T, out=z)
            if p.task != "scores":
                p.hidden.grad = z @ p.head
            if p.task in ("KL", "JSD", "log p"):
                p.head.grad = z.T @ p.hidden

    return go


def seconds(go: Callable[[], object]) -> float:
    wait_for_gpu()
    start = time.perf_counter()
    go()
    wait_for_gpu()
    return time.perf_counter() - start


def wait_for_gpu() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def extra_bytes(go: Callable[[], object], p: Problem) -> int:
    """The most memory in use at a time while `go` runs, beyond what was in use and the gradients
    it returns."""
    gc.collect()
    for x in (p.hidden, p.head):
        x.grad = None
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        go()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the resident set's peak (Linux)
        before = resident("VmRSS")
        go()
        peak = resident("VmHWM")
    gradients = sum(x.grad.nbytes for x in (p.hidden, p.head) if x.grad is not None)
    return peak - before - gradients


def resident(field: str) -> int:
    """Bytes of this process, by a field of Linux's status file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


# --------------------------------------------------------------------------------------------------
# speed
# --------------------------------------------------------------------------------------------------
def speed(args: argparse.Namespace) -> None:
    tokens, vocabulary, widths, dtype = 2048, 49_152, [576], torch.float32
    if ON_GPU:
        tokens, vocabulary, widths, dtype = 8192, 151_936, [2560, 4096], torch.bfloat16
    tokens = args.tokens or tokens
    vocabulary = args.vocabulary or vocabulary
    rows = []
    for width in args.width or widths:
        for task in PRODUCTS:
            p = problem(tokens, vocabulary, width, dtype, task)
            small = problem(32, vocabulary, width, dtype, task)
            rows += speed_of_task(p, small, args.rounds)
            write(args, "speed", {
                "tokens": tokens, "vocabulary": vocabulary, "dtype": str(dtype), "rows": rows,
            })


def speed_of_task(p: Problem, small: Problem, rounds: int) -> list[dict]:
    """A row for each contender: its errors on the small problem, its memory and times on p."""
    right, floor = truth(small), products(p)
    rows, going = [], {}
    for name, contender in CONTENDERS.items():
        row = {
            "task": p.task, "width": p.hidden.shape[1], "products": PRODUCTS[p.task], "name": name,
        }
        try:
            got = run(contender, small)
            if got is None:
                continue
            row |= errors(got, right)
            run(contender, p)  # compilation, caches
            row["extra_bytes"] = extra_bytes(partial(run, contender, p), p)
            going[name] = contender
        except (ImportError, RuntimeError) as error:  # a rival that is not or cannot run here
            lines = str(error).strip().splitlines() or [type(error).__name__]
            row["cannot"] = lines[0][:120]
        rows.append(row)
        print(row, flush=True)
    add_times(rows, going, floor, p, rounds)
    return rows


def add_times(rows: list[dict], going: dict[str, Contender], floor: Callable[[], None],
              p: Problem, rounds: int) -> None:
    """Times of each contender and its ratio to the bare products, into its row.

    going: the contenders that have run. floor: the bare products.
    """
    floors: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in going}
    floor()
    for _ in range(rounds):
        floors.append(seconds(floor))
        for name, contender in going.items():
            times[name].append(seconds(partial(run, contender, p)))
    for row in rows:
        if row["name"] not in times:
            continue
        mine = times[row["name"]]
        ratio = statistics.median(a / b for a, b in zip(mine, floors))
        row |= {
            "seconds": mine, "floor_seconds": floors, "load": os.getloadavg()[0],
            "over_floor": ratio,
        }
        print(f"{row['task']:>16} {row['name']:<34} {ratio:.3f} x products", flush=True)


def speed_table(numbers: dict) -> list[str]:
    dtype = numbers["dtype"].removeprefix("torch.")
    lines = [
        f"T = {numbers['tokens']:,}, V = {numbers['vocabulary']:,}, {dtype}. Time is a multiple of "
        "the task's bare matrix products in the same round (median of the rounds); memory is "
        "beyond the inputs and the gradients that are returned; errors are relative to float64.",
        "",
        "| task | D | | time | extra memory | value error | gradient error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in numbers["rows"]:
        cells = [row["task"], str(row["width"]), row["name"], *speed_cells(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def speed_cells(row: dict) -> list[str]:
    if "over_floor" not in row:
        return [row["cannot"], "", "", ""]
    gradient = ""
    if not math.isnan(row["gradient_error"]):
        gradient = f"{row['gradient_error']:.1e}"
    return [
        f"{row['over_floor']:.2f} × {row['products']} products",
        f"{row['extra_bytes'] / 2**20:,.0f} MiB", f"{row['value_error']:.1e}", gradient,
    ]


# --------------------------------------------------------------------------------------------------
# ladder: bf16 hidden states and head; the teacher comes closer and closer
# --------------------------------------------------------------------------------------------------
GAPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
TITLES = {"KL": "KL(student‖teacher)", "JSD": "JSD, β = ½", TOP_K_TASK: TOP_K_TASK}


def ladder(args: argparse.Namespace) -> None:
    tokens, vocabulary = args.tokens or 16, args.vocabulary or 151_936
    width = (args.width or [512])[0]
    if not ON_GPU:  # what CUDA gets: dz rounded to bf16 for the products
        head_module.dz_dtype = lambda hidden: hidden.dtype
    rows = ladder_rows(tokens, vocabulary, width)
    if not ON_GPU and not INTERPRETED:
        rows += ladder_rows_of_interpreter()
    if args.to_stdout:
        print(json.dumps(rows))
        return
    write(args, "ladder", {
        "tokens": tokens, "vocabulary": vocabulary, "width": width, "dtype": "bfloat16",
        "rows": rows,
    })


def ladder_rows(tokens: int, vocabulary: int, width: int) -> list[dict]:
    rows = []
    for task, gap in product(TITLES, GAPS):
        p = problem(tokens, vocabulary, width, torch.bfloat16, task, gap, peaked=True)
        right = truth(p)
        for name, contender in LADDER.items():
            if not runs_here(name):
                continue
            row = {"task": task, "name": name, "gap": gap, "divergence": right.loss}
            try:
                got = run(contender, p)
                if got is None:
                    continue
                row |= errors(got, right)
            except ImportError as error:
                row["cannot"] = str(error)
            rows.append(row)
            print(row, flush=True)
    return rows


def runs_here(name: str) -> bool:
    """Without a GPU, Liger's Triton kernels run in a process of the interpreter's."""
    return ON_GPU or INTERPRETED == (name == "Liger fused_linear_jsd")


def ladder_rows_of_interpreter() -> list[dict]:
    command = [sys.executable, __file__, "ladder", "--to_stdout", *sys.argv[2:]]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def ladder_table(numbers: dict) -> list[str]:
    lines = [
        f"bf16 hidden states and head, {numbers['tokens']} tokens, V = {numbers['vocabulary']:,}, "
        f"D = {numbers['width']}. Relative error of the mean divergence / of its gradient (dX or "
        "dW, the larger; bf16 gradients cannot be better than 0.2 %).",
    ]
    for task, title in TITLES.items():
        rows = [row for row in numbers["rows"] if row["task"] == task]
        # a rival that was not installed has no row
        names = dict.fromkeys(row["name"] for row in rows if "value_error" in row)
        rows.sort(key=lambda row: row["divergence"])
        rungs = sorted({row["divergence"] for row in rows})
        heads = " | ".join(f"{x:.1e}" for x in rungs)
        lines += ["", f"| {title} | {heads} |", "|---" * (len(rungs) + 1) + "|"]
        for name in names:
            cells = [ladder_cell(row) for row in rows if row["name"] == name]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def ladder_cell(row: dict) -> str:
    if "value_error" not in row:
        return row["cannot"]
    return f"{row['value_error']:.1e} / {row['gradient_error']:.1e}"


def ladder_figure(numbers: dict, path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True, sharey=True)
    rows = [row for row in numbers["rows"] if row["task"] == "KL" and "value_error" in row]
    rows.sort(key=lambda row: row["divergence"])
    for name, marker in zip(LADDER, "oDs^v"):
        mine = [row for row in rows if row["name"] == name]
        if not mine:  # it was not installed
            continue
        x = [row["divergence"] for row in mine]
        style = {"marker": marker, "label": name, "linewidth": 1.2, "zorder": 2}
        if name == "this code":
            style |= {"linewidth": 2.5, "zorder": 3}
        for axis, field in zip(axes, ("value_error", "gradient_error")):
            axis.plot(x, [row[field] for row in mine], **style)
    for axis, title in zip(axes, ("error of the value", "error of the gradient")):
        axis.set(xscale="log", yscale="log", title=title,
                 xlabel="KL(student‖teacher), nats per token")
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.grid(alpha=0.3)
    rounding = 2**-9
    axes[1].axhline(rounding, color="0.6", linewidth=0.8, linestyle="--")
    axes[1].annotate("bf16 rounding", (1, rounding), (-4, -6), xycoords=("axes fraction", "data"),
                     textcoords="offset points", ha="right", va="top", color="0.4", fontsize=9)
    axes[0].set_ylabel("relative to float64 from the hidden states")
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="lower center", ncol=2, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    figure.savefig(path, dpi=150)


# --------------------------------------------------------------------------------------------------
# top-K: the gradient as the student's tail gets thinner
# --------------------------------------------------------------------------------------------------
KS = (1, 20, 100)
TAILS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)  # the student's mass outside of the K
TOP_K_DIVERGENCES = {
    "reverse": Divergence("reverse_kl"),
    "forward": Divergence("forward_kl"),
    "jsd": Divergence("jsd", beta=0.5),
    "mixed": Divergence("mixed_kl", beta=0.5),
    "clipped": Divergence("forward_kl", clip=0.05),
}


class Sure(NamedTuple):
    """One token per tail of TAILS: a student with all other mass on K entries, and a teacher."""

    hidden: Tensor  # [T, D]
    head: Tensor  # [V, D]
    y: Tensor  # [T]
    teacher_hidden: Tensor  # [T, D]


def top_k(args: argparse.Namespace) -> None:
    vocabularies = [1_024, 151_936]
    if args.vocabulary:
        vocabularies = [args.vocabulary]
    rows = []
    for vocabulary, k, peaked in product(vocabularies, KS, (True, False)):
        if k == 1 and not peaked:  # one entry is always peaked
            continue
        p = sure(vocabulary, k, peaked)
        for name, d in TOP_K_DIVERGENCES.items():
            rows += top_k_rows(p, d._replace(top_k=k), name, peaked)
            print(rows[-1], flush=True)
    write(args, args.name, {"rows": rows})


def sure(vocabulary: int, k: int, peaked: bool) -> Sure:
    """Two coordinates of the hidden states stand for the likeliest entry and for the K; the others
    are noise. A peaked student has e^10 times as much on its mode as on others of the K."""
    width, count = 32, len(TAILS)
    g = torch.Generator().manual_seed(0)
    head = torch.randn(vocabulary, width, generator=g, dtype=torch.float64) / width**0.5
    head[:, :2] = 0
    members = torch.randperm(vocabulary, generator=g)[:k]
    mode = members[0]
    head[members, 1] = 1
    head[mode, 0] = 1
    hidden = torch.randn(count, width, generator=g, dtype=torch.float64)
    hidden[:, 0] = 10.0 if peaked else 0.0
    hidden[:, 1] = 0
    z = hidden @ head.T
    outside = torch.ones(vocabulary, dtype=torch.bool).index_fill(0, members, False)
    lead = z[:, members].logsumexp(-1) - z[:, outside].logsumexp(-1)
    tails = torch.tensor(TAILS, dtype=torch.float64)
    hidden[:, 1] = torch.log((1 - tails) / tails) - lead
    teacher = hidden + 0.2 * torch.randn(count, width, generator=g, dtype=torch.float64)
    return Sure(hidden.float().requires_grad_(), head.float(), mode.expand(count), teacher.float())


def top_k_rows(p: Sure, d: Divergence, name: str, peaked: bool) -> list[dict]:
    """A row for each dtype of dz and each tail: relative errors of dz and of d_hidden."""
    head = p.head.double()
    right = top_k_truth(p, d)
    right_hidden = right @ head
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        dz = top_k_dz(p, d, dtype)
        dz_error = (dz - right).norm(dim=-1) / right.norm(dim=-1)
        off = dz @ head - right_hidden
        hidden_error = off.norm(dim=-1) / right_hidden.norm(dim=-1)
        for i, tail in enumerate(TAILS):
            rows.append({
                "vocabulary": len(p.head), "k": d.top_k, "peaked": peaked, "divergence": name,
                "dz": str(dtype).removeprefix("torch."), "tail": tail,
                "dz_error": dz_error[i].item(), "d_hidden_error": hidden_error[i].item(),
            })
    return rows


def top_k_truth(p: Sure, d: Divergence) -> Tensor:
    """dz [T, V] of the divergence, float64 from the hidden states on, by autograd."""
    head = p.head.double()
    z = (p.hidden.detach().double() @ head.T).requires_grad_()
    log_p = z.log_softmax(-1)
    log_q = (p.teacher_hidden.double() @ head.T).log_softmax(-1)
    a, b = top_and_tail(log_p, log_q, d.top_k)
    forward, reverse = b.exp() * (b - a), a.exp() * (a - b)
    if d.kind == "jsd":
        m = ((a.exp() + b.exp()) / 2).log()
        kl = (b.exp() * (b - m) + a.exp() * (a - m)) / 2
    elif d.kind == "reverse_kl":
        kl = reverse
    elif d.kind == "forward_kl":
        kl = forward.clamp(max=d.clip or math.inf)
    else:
        kl = d.beta * reverse + (1 - d.beta) * forward
    return torch.autograd.grad(kl.sum(), z)[0]


def top_k_dz(p: Sure, d: Divergence, dtype: torch.dtype) -> Tensor:
    """dz [T, V] of the kernels' own logits, each entry rounded to dtype."""
    z, zt = p.hidden.detach() @ p.head.T, p.teacher_hidden @ p.head.T
    settings = head_module.Settings((1.0,), d, 1.0)
    chunk = head_module.Chunk(z, zt, p.y, settings)
    zeros = torch.zeros(len(p.y))
    upstream = head_module.Upstream(zeros, None, zeros + 1, zeros)
    dz = torch.empty_like(z, dtype=dtype)
    chunk.gradient(upstream, dz)
    return dz.double()


def top_k_table(numbers: dict) -> list[str]:
    rows, tails = numbers["rows"], TAILS[::-1]
    sizes = sorted({row["vocabulary"] for row in rows})
    lines = [
        "Relative error of dz / of d_hidden of one token, the largest over vocabularies of "
        + " and ".join(f"{size:,}" for size in sizes) + " and over peaked and flat students. "
        "Student's top K and tail; the truth is float64 from the hidden states. bfloat16: dz is "
        "rounded as for bf16 hidden states on CUDA.",
    ]
    for dtype in ("float32", "bfloat16"):
        heads = " | ".join(f"{tail:.0e}" for tail in tails)
        lines += ["", f"| dz in {dtype}, student's tail: | {heads} |"]
        lines.append("|---" * (len(tails) + 1) + "|")
        for name, k in product(TOP_K_DIVERGENCES, KS):
            only = {"dz": dtype, "divergence": name, "k": k}
            of_dz = top_k_worst(rows, "dz_error", **only)
            of_hidden = top_k_worst(rows, "d_hidden_error", **only)
            cells = [f"{of_dz[tail]:.0e} / {of_hidden[tail]:.0e}" for tail in tails]
            lines.append(f"| {name}, K = {k} | " + " | ".join(cells) + " |")
    return lines


def top_k_worst(rows: list[dict], field: str, **only) -> dict[float, float]:
    """The largest error at each tail."""
    worst: dict[float, float] = {}
    for row in rows:
        if all(row[key] == value for key, value in only.items()):
            worst[row["tail"]] = max(row[field], worst.get(row["tail"], 0.0))
    return worst


def top_k_figure(after: dict, before: dict, path: Path) -> None:
    """The worst divergence of each K, before and after, dz in fp32 and in bf16."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharex=True, sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16")):
        for k, color, marker in zip(KS, ("C0", "C1", "C2"), "os^"):
            for when, numbers, line in (("before", before, "--"), ("now", after, "-")):
                worst = top_k_worst(numbers["rows"], "dz_error", dz=dtype, k=k)
                axis.plot(list(worst), list(worst.values()), line, color=color, marker=marker,
                          markersize=5, label=f"K = {k}, {when}")
        axis.set(xscale="log", yscale="log", title=f"dz in {dtype}",
                 xlabel="student's mass outside of the K")
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of a token's dz, worst divergence")
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="lower center", ncol=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=150)


# --------------------------------------------------------------------------------------------------
# profile
# --------------------------------------------------------------------------------------------------
KINDS = {  # of operators
    "matrix products": ("addmm", "mm"),
    "exponentials and logarithms": ("exp", "expm1", "log", "log1p", "xlogy"),
    "bounds": ("clamp",),
    "sums and maxima": ("sum", "amax", "argmax"),
    "other arithmetic": ("mul", "sub", "add", "div", "addcmul", "neg"),
}
REST = "the rest: views, allocation, Python"


def profile(args: argparse.Namespace) -> None:
    """The self time of the operators of `head_loss` with a frozen head, one thread."""
    torch.set_num_threads(1)
    tokens, vocabulary = args.tokens or 2048, args.vocabulary or 49_152
    width = (args.width or [576])[0]
    p = problem(tokens, vocabulary, width, torch.float32, "KL, frozen head")
    this_head_loss(p).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        this_head_loss(p).backward()
    spent = dict.fromkeys([*KINDS, REST], 0.0)  # seconds
    for event in seen.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    of_products = spent["matrix products"]
    shares = {kind: round(value / of_products, 3) for kind, value in spent.items()}
    write(args, "profile", {"seconds": spent, "over the products": shares})
    print(shares)


def kind_of(event: str) -> str:
    operator = event.removeprefix("aten::").rstrip("_")
    for kind, operators in KINDS.items():
        if operator in operators:
            return kind
    return REST


# --------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------
def write(args: argparse.Namespace, what: str, numbers: dict) -> None:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                          text=True)
    packages = {name: version_of(name) for name in ("torch", "triton", "trl", "liger-kernel")}
    about = {
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
        "commit": head.stdout.strip(), "device": device(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "packages": packages,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{what}-{DEVICE.type}.json"
    path.write_text(json.dumps(about | numbers, indent=1) + "\n")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device() -> str:
    if ON_GPU:
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line for line in lines if line.startswith("model name"))
    return f"{model.split(':')[1].strip()}, {os.cpu_count()} cores"


def draw(args: argparse.Namespace) -> None:
    for path in sorted(args.out.glob("*.json")):
        numbers = json.loads(path.read_text())
        if path.name.startswith(("topk-training", "top_k_before", "profile")):
            continue
        if path.name.startswith("speed"):
            lines = speed_table(numbers)
        elif path.name.startswith("top_k"):
            lines = top_k_table(numbers)
        else:
            lines = ladder_table(numbers)
        text = "\n".join([*lines, "", source_of(numbers)]) + "\n"
        path.with_suffix(".md").write_text(text)
        print(text)
        if path.name.startswith("ladder"):
            ladder_figure(numbers, path.with_suffix(".png"))
        if path.name.startswith("top_k"):
            before = path.with_name(path.name.replace("top_k", "top_k_before"))
            if before.exists():  # of the machine on which it was measured
                top_k_figure(numbers, json.loads(before.read_text()), path.with_suffix(".png"))


def source_of(numbers: dict) -> str:
    """The machine, versions, commit and command behind a table."""
    there = [f"{name} {version}" for name, version in numbers["packages"].items() if version]
    return (f"{numbers['device']}; {', '.join(there)}; commit {numbers['commit']}; "
            f"`{numbers['command']}`")


def pyplot():
    """Imported late: an environment with the rivals need not have it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main() -> None:
    commands = {"speed": speed, "ladder": ladder, "top_k": top_k, "profile": profile, "draw": draw}
    rounds = 10 if ON_GPU else 3
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=list(commands))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--width", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kernels")
    parser.add_argument("--name", default="top_k", help="top_k: of the file it writes")
    parser.add_argument("--to_stdout", action="store_true",
                        help="ladder: print JSON instead of writing it")
    args = parser.parse_args()
    commands[args.what](args)


if __name__ == "__main__":
    main()
