"""Where a privileged teacher's credit lies: HSD's Fig. 1, Fig. 5 and Tables 4 and 5 in small, on any model and task.

    python benchmarks/localisation.py                                                       # the embedded model
    python benchmarks/localisation.py --model MODEL --task gsm8k --questions 64 --max_tokens 512

Samples groups, takes the failed responses that have a successful peer in their group, and reads each response behind
four prompts: the student's own, with the answer (OPSD on the bare answer), with the worked solution (OPSD), and with
answer and peer (HSD). Credit is A_t = log π(o_t | context) − log π(o_t | question) at the sampled token, Eq. 2.
"hybrid" is the mean of the answer's credit and the GRPO advantage of the response: one reading of GRPO+OPSD, which the
paper does not define. Mass is the share of Σ|A| that lies within w tokens of the first divergence τ from the peer: the
share of the whole response, and of the ±50 tokens about τ, because the paper does not say which. Writes results/localisation/NAME.{json,png,md}.
"""
from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import tyro

import hsd
from common.chat import as_text, chat_ids, load_tokenizer
from common.policy import load_policy, score
from common.rollouts import Group
from common.sampler import HFSampler
from common.settings import Setup
from common.tasks import load_task
from common.verifiers.pool import Verifier

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {"peer": "peer: the answer and a peer (HSD)", "answer": "answer: the bare answer (OPSD)",
         "solution": "solution: the worked solution (OPSD)",
         "hybrid": "hybrid: mean of the answer's credit and GRPO's advantage (a reading of GRPO+OPSD)"}
WIDTHS = (2, 4, 8, 16, 32)


@dataclass
class Args:
    name: str = "chain"  # name of the result files
    model: str = "assets/chain"  # folder or hub id
    task: str = "chain"  # task, as for the method files
    data_dir: str = ""  # folder of the named sets
    questions: int = 256  # groups sampled
    group_size: int = 8  # G
    max_tokens: int = 64  # most tokens per response
    failures: int = 512  # failed responses with a peer, at most (the paper: 512)
    token_budget: int = 16384  # padded tokens per forward pass
    seed: int = 0  # random seed of questions and samples


def main(args: Args) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(args.model)
    problems = load_task(args.task, heldout=1, data_dir=args.data_dir).train[: args.questions]
    sampler, policy = HFSampler(args.model, tokenizer, device), load_policy(args.model, device, Setup())
    prompts = [chat_ids(tokenizer, p.messages) for p in problems]
    groups = sampler.sample(prompts, args.group_size, seed=(args.seed,), keys=range(len(prompts)),
                            max_tokens=args.max_tokens)
    verifier = Verifier()
    verdicts = verifier([p for p in problems for _ in range(args.group_size)], [o.text for g in groups for o in g])
    verifier.close()

    cases = []  # failed responses with a peer
    for q, (problem, group) in enumerate(zip(problems, groups)):
        judged = verdicts[q * args.group_size : (q + 1) * args.group_size]
        R, rng, whole = [v.reward for v in judged], random.Random(q), Group(problem, group, judged)
        peers = [hsd.choose_peer(whole, i, "uniform", rng) for i in range(len(R))]
        for o, r, j in zip(group, R, peers):
            if r < 1 and j is not None:
                tau = hsd.divergence_point(o.response_ids, group[j].response_ids)
                if tau is not None:
                    spread = torch.tensor(R).std().item()
                    cases.append((problem, o, group[j], tau, sum(R) / len(R), (r - sum(R) / len(R)) / spread))
    cases = cases[: args.failures]
    responses = [o.response_ids for _, o, _, _, _, _ in cases]
    read = lambda before: score(policy, before, responses, Setup(token_budget=args.token_budget))
    plain = read([o.prompt_ids for _, o, _, _, _, _ in cases])
    credit: dict[str, list[torch.Tensor]] = {}
    for kind in ("peer", "answer", "solution"):
        if kind == "solution" and any(p.solution is None for p, *_ in cases):
            continue
        settings = hsd.Args(context=kind)
        peers = [as_text(tokenizer, peer.text) for _, _, peer, *_ in cases]
        shown = [chat_ids(tokenizer, hsd.teacher_chat(p, peer, settings)) for (p, *_), peer in zip(cases, peers)]
        credit[kind] = [(a - b).cpu() for a, b in zip(read(shown), plain)]
    credit["hybrid"] = [0.5 * a + 0.5 * case[5] for a, case in zip(credit["answer"], cases)]

    taus, rates = [c[3] for c in cases], [c[4] for c in cases]
    result = {"command": "python benchmarks/localisation.py " + " ".join(sys.argv[1:]), "args": asdict(args),
              "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                                       text=True).stdout.strip(),
              "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})" if device.type == "cpu"
              else torch.cuda.get_device_name(), "failures": len(cases), "median_tau": sorted(taus)[len(taus) // 2],
              "mean_length": sum(map(len, responses)) / len(responses), "kinds": {}}
    for kind, values in credit.items():
        found = [localisation(a, tau) for a, tau in zip(values, taus)]
        mean = lambda name, rows: sum(r[name] for r in rows if name in r) / max(1, sum(name in r for r in rows))
        bins = {b: [f for f, p in zip(found, rates) if keep(p)] for b, keep in
                (("easy", lambda p: p > 0.5), ("medium", lambda p: 0.2 <= p <= 0.5), ("hard", lambda p: p < 0.2))}
        result["kinds"][kind] = {
            "mean_abs": sum(a.abs().sum() for a in values).item() / sum(map(len, values)),
            **{name: mean(name, found) for name in found[0] | {"credit/before_tau": 0, "credit/after_tau": 0}},
            **{f"peak/{b}": [mean("credit/at_tau", rows), len(rows)] for b, rows in bins.items()},
            "by_offset": by_offset(values, taus), "by_position": by_position(values)}
    folder = ROOT / "results" / "localisation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    (folder / f"{args.name}.md").write_text(table(result))
    draw(result, folder / f"{args.name}.png")
    print(table(result))
    dist.destroy_process_group()


def localisation(credit: torch.Tensor, tau: int) -> dict[str, float]:
    """How |A_t| (Eq. 2; credit [|o|], nats) of one response is distributed about τ (§5.3, App. E.3, Table 5).

    mass/w8 is the share of the whole response's |A| that lies within 8 tokens of τ; mass50/w8 the share of what lies
    within 50 tokens of τ: the paper does not state its denominator, and its own numbers fit the second.
    If teacher and student agree at all of these tokens, the share has no entry.
    """
    size = credit.abs()
    offset = (torch.arange(len(size)) - tau).abs()
    total, near = size.sum(), size[offset <= 50].sum()
    out = {"credit/at_tau": size[tau], "credit/before_tau": size[:tau].mean() if tau else None,
           "credit/after_tau": size[tau + 1 :].mean() if tau + 1 < len(size) else None}
    for w in (2, 4, 8, 16, 32):
        inside = size[offset <= w].sum()
        if total > 0:
            out[f"mass/w{w}"] = inside / total
        if near > 0:
            out[f"mass50/w{w}"] = inside / near
    return {name: float(value) for name, value in out.items() if value is not None}


def by_offset(credit: list[torch.Tensor], taus: list[int], before: int = 30, after: int = 50) -> list[list[float]]:
    """[offset from τ, mean |A|, responses] for every offset that some response has."""
    rows = []
    for d in range(-before, after + 1):
        values = [a[tau + d].abs().item() for a, tau in zip(credit, taus) if 0 <= tau + d < len(a)]
        if values:
            rows.append([d, sum(values) / len(values), len(values)])
    return rows


def by_position(credit: list[torch.Tensor], bins: int = 20) -> list[float]:
    """Mean |A| in 20 bins of t/|o| (Fig. 1)."""
    sums, counts = torch.zeros(bins), torch.zeros(bins)
    for a in credit:
        bin_of = torch.arange(len(a)) * bins // len(a)
        sums.index_add_(0, bin_of, a.abs())
        counts.index_add_(0, bin_of, torch.ones(len(a)))
    return (sums / counts.clamp(min=1)).tolist()


def table(result: dict) -> str:
    head = ["teacher sees", "mean \\|A\\|", "at τ", "before τ", "after τ", *(f"±{w}" for w in WIDTHS),
            *(f"±{w} of ±50" for w in WIDTHS)]
    lines = [f"{result['failures']} failed responses with a peer, mean length {result['mean_length']:.1f} tokens, median "
             f"τ {result['median_tau']}. `{result['command'].strip()}`, commit {result['commit']}, {result['hardware']}.",
             "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind, row in result["kinds"].items():
        cells = [f"{row[k]:.3f}" for k in ("mean_abs", "credit/at_tau", "credit/before_tau", "credit/after_tau")]
        cells += [f"{100 * row[f'{m}/w{w}']:.0f} %" for m in ("mass", "mass50") for w in WIDTHS]
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    lines += ["", "| peak \\|A_τ\\| | easy (pass > 0.5) | medium | hard (< 0.2) |", "|---|---|---|---|"]
    for kind, row in result["kinds"].items():
        peaks = [f"{row[f'peak/{b}'][0]:.2f} ({row[f'peak/{b}'][1]})" for b in ("easy", "medium", "hard")]
        lines.append("| " + " | ".join([kind, *peaks]) + " |")
    return "\n".join(lines) + "\n"


def draw(result: dict, path: Path) -> None:
    figure, (a, b, c) = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
    for i, (kind, row) in enumerate(result["kinds"].items()):
        style = {"label": SHOWN[kind], "linestyle": "--" if kind == "hybrid" else "-", "linewidth": 2.6 - 0.5 * i}
        a.plot([(t + 0.5) / 20 for t in range(20)], row["by_position"], **style)
        shown = [r for r in row["by_offset"] if r[2] >= 0.1 * result["failures"]]
        b.plot([r[0] for r in shown], [r[1] for r in shown], **style)
        c.plot(range(len(WIDTHS)), [row[f"mass/w{w}"] for w in WIDTHS], marker="osD^"[i], markersize=5, **style)
    a.set(title="|A| along the response", xlabel="t / |o|", ylabel="mean |A|, nats", yscale="log")
    b.set(title="|A| about the first divergence τ", xlabel="t − τ", ylabel="mean |A|, nats")
    b.axvline(0, color="grey", linewidth=0.8, zorder=1)
    c.set(title="share of Σ|A| within ±w of τ", xlabel="w", ylabel="of the whole response", ylim=(0, 1.02))
    c.set_xticks(range(len(WIDTHS)), [str(w) for w in WIDTHS])
    for axis in (a, b, c):
        axis.grid(alpha=0.3)
    figure.legend(*a.get_legend_handles_labels(), loc="outside lower center", ncol=2, frameon=False)
    figure.suptitle(f"{result['args']['name']}: failed responses with a successful peer, by what the teacher sees", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))
