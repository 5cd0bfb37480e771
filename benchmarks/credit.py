"""Where each method puts its credit: the same responses under the five files, as one HTML page.

    make look    # the newest run, or assets/chain
    python benchmarks/credit.py runs/NAME/checkpoints/step_000100
    python benchmarks/credit.py MODEL --task gsm8k --max_tokens 512

Samples groups from the model on held-out questions and keeps groups with right and wrong responses.
One wrong and one right response of each are read behind every teacher's prompt, which the method
files make. A row of the page is one quantity of one method; its tokens are coloured by credit on
one scale. Student and teachers have the same weights, those of the checkpoint, as at the start of a
run. The page is a single file without links and opens offline.
"""
from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpo  # noqa: E402
import hsd  # noqa: E402
import rlsd  # noqa: E402
import sdpo  # noqa: E402
import sdzero  # noqa: E402
from common import require  # noqa: E402
from common.microbatches import micro_batches  # noqa: E402
from common.policy import Policy, load_policy  # noqa: E402
from common.report import page  # noqa: E402
from common.rollouts import Batch, Group, Rollouts  # noqa: E402
from common.settings import Setup  # noqa: E402
from kernels.head import Divergence, TokenStats, token_stats  # noqa: E402

GRPO, RLSD, SDPO, HSD, SDZERO = (
    grpo.Args(), rlsd.Args(), sdpo.Args(kl="reverse"), hsd.Args(), sdzero.Args()
)
LIKELIEST = 5  # tokens of student and teacher that the page shows
MOST_BYTES = 400_000  # of the page
MOST_PROMPT = 6000  # characters of a prompt
SHOW = 11  # random stream under the seed


@dataclass
class Args:
    model: tyro.conf.Positional[str] = ""  # a checkpoint; empty: the newest run's, or assets/chain
    task: str = ""  # as the method files take it; empty: the task of the checkpoint's run, or chain
    questions: int = 3  # groups on the page
    search: int = 64  # held-out questions to sample until there are so many mixed groups
    group_size: int = 8  # G, responses per question
    max_tokens: int = 256  # most tokens per response
    tokens: int = 120  # tokens of a response on the page; a longer one is shown about τ
    data_dir: str = ""  # folder of the named data sets
    fields: str = ""  # the data's field names if they differ
    seed: int = 0  # of the samples
    out: str = "runs/credit.html"  # the page


class Reader(NamedTuple):
    """A teacher's context, and the divergence that its method trains."""

    shown: str  # what its prompt has that the student's has not
    divergence: Divergence
    kl: str  # the divergence in the paper's terms; "": the method has none


READERS = {
    "rlsd": Reader("the reference: the final answer", Divergence(), ""),
    "sdpo": Reader("a sibling's solution, or feedback", sdpo.divergence(SDPO), "KL(π‖q), Eq. 1"),
    "answer": Reader("the answer", hsd.divergence(HSD), "KL(q‖π), Eq. 13"),
    "peer": Reader("a successful peer", hsd.divergence(HSD), "KL(q‖π), Eq. 13"),
    "both": Reader("the answer and a successful peer", hsd.divergence(HSD), "KL(q‖π), Eq. 13"),
    "reviser": Reader(
        "its own response and the verdict", sdzero.divergence(SDZERO), "KL(π‖q), Eq. 4"
    ),
}


class Row(NamedTuple):
    """One quantity of one method."""

    method: str
    symbol: str
    scale: str  # "signed" or "kl"
    reader: str  # of READERS; "": no teacher
    words: str  # what is coloured, in one sentence


ROWS = (
    Row("GRPO", "A", "signed", "",
        "The advantage of the whole response, the same at every token (§4.1.2)."),
    Row("RLSD", "Â", "signed", "rlsd",
        "The advantage, of which λ = 0.5 is weighted by w clipped to 1 ± 0.2 (Eq. 15)."),
    Row("RLSD", "log w", "signed", "rlsd",
        "The weight before its clip, w = exp(sign(A)·Δ), coloured by its logarithm (Eq. 13, 14)."),
    Row("SDPO", "KL", "kl", "sdpo",
        "How far the student's next-token distribution is from the teacher's (Eq. 1)."),
    Row("SDPO", "A_t", "signed", "sdpo",
        "How much likelier the teacher finds the sampled token: log q − log π (§2)."),
    Row("HSD", "A_t answer", "signed", "answer",
        "How much likelier the sampled token is once the answer is known (Eq. 2)."),
    Row("HSD", "A_t peer", "signed", "peer",
        "How much likelier the sampled token is beside a successful peer (Eq. 2)."),
    Row("HSD", "A_t both", "signed", "both",
        "How much likelier the sampled token is with answer and peer, the paper's context "
        "(Eq. 2, 9)."),
    Row("SD-Zero", "KL", "kl", "reviser",
        "How far the student is from the reviser, who has read the whole response (Eq. 4)."),
)


class Reading(NamedTuple):
    """One response behind one prompt. [T] counts the response's tokens."""

    prompt: list[int]
    stats: TokenStats  # [T] each; the teacher is the model behind `prompt`
    likeliest: Tensor  # [T, LIKELIEST] token ids of the model behind `prompt`
    logp: Tensor  # [T, LIKELIEST] their log-probabilities, nats


class Shown(NamedTuple):
    """A response on the page."""

    row: int  # of the batch
    tau: int | None  # where it leaves the peer of HSD (Eq. 11)


def main(args: Args) -> None:
    path, known = checkpoint(args)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    settings = settings_of(path, known, args)
    rollouts = Rollouts(settings, one_process())
    policy = load_policy(path, rollouts.run.device, settings.setup)
    rollouts.sync(policy)
    batch = mixed_groups(rollouts, args)
    data = page_data(policy, rollouts, batch, args) | {"model": path, "task": settings.task}
    rollouts.close()
    dist.destroy_process_group()
    html = page(ROOT / "benchmarks" / "credit.html", data)
    size = len(html.encode())
    require(
        size < MOST_BYTES,
        f"the page has {size:,} bytes, more than {MOST_BYTES:,}: lower --tokens or --questions",
    )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    print(f"{out}: {size // 1000} kB; open it in a browser")


# --------------------------------------------------------------------------------------------------
# what is read
# --------------------------------------------------------------------------------------------------
def checkpoint(args: Args) -> tuple[str, dict]:
    """The model's path and the settings that it was trained with, if it is a run's checkpoint."""
    path = args.model
    if not path:
        found = list((ROOT / "runs").glob("*/checkpoints/step_*"))
        found.sort(key=lambda checkpoint: checkpoint.stat().st_mtime)
        path = str([ROOT / "assets" / "chain", *found][-1])
    trainer = Path(path) / "trainer.json"
    if trainer.exists():
        return path, json.loads(trainer.read_text())["args"]
    return path, {}


def settings_of(path: str, known: dict, args: Args) -> grpo.Args:
    """Settings for sampling; data as in the checkpoint's own run unless --task names others."""
    setup = Setup(heldout=args.search, data_dir=args.data_dir, fields=args.fields, seed=args.seed)
    task = args.task or known.get("task", "chain")
    if task == known.get("task"):
        for name in ("data_dir", "fields", "kind", "instruction"):
            if not getattr(setup, name) and name in known:
                setattr(setup, name, known[name])
    return grpo.Args(
        model=path, task=task, group_size=args.group_size, max_tokens=args.max_tokens,
        thinking=known.get("thinking", False), setup=setup,
    )


def one_process() -> SimpleNamespace:
    """What Rollouts needs of a run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ignore = lambda what: None
    return SimpleNamespace(rank=0, world=1, device=device, phase=ignore, collect=ignore)


def mixed_groups(rollouts: Rollouts, args: Args) -> Batch:
    """The first groups with a wrong response and two right ones, each of which has the other as its
    peer. If there are too few of them, one right response is enough."""
    problems = rollouts.task.heldout
    best, enough = [], []
    for start in range(0, len(problems), 8):
        part = problems[start : start + 8]
        groups = rollouts.answer(part, args.group_size, SHOW, range(start, start + len(part)))
        for group in filter(lambda group: 0 < right_of(group) < len(group.verdicts), groups):
            (best if right_of(group) > 1 else enough).append(group)
        if len(best) >= args.questions:
            break
    chosen = [*best, *enough][: args.questions]
    require(
        chosen,
        f"no group of {args.group_size} has right and wrong responses to {len(problems)} "
        "questions: take easier or harder problems, or raise --search or --group_size",
    )
    return Batch(chosen)


def right_of(group: Group) -> int:
    return sum(verdict.reward == 1 for verdict in group.verdicts)


def teacher_prompts(batch: Batch, rollouts: Rollouts) -> tuple[dict, dict, list]:
    """Reader → the teacher's prompt of each rollout, and whether it shows what the reader names
    [Q·G]; and the peer of each rollout."""
    prompts, shows = {}, {}
    everywhere = [True] * len(batch.rollouts)
    prompts["rlsd"], shows["rlsd"] = rlsd.teacher_prompts(batch, rollouts, RLSD), everywhere
    prompts["reviser"], shows["reviser"] = sdzero.teacher_prompts(batch, rollouts), everywhere
    prompts["sdpo"], has_context, _ = sdpo.teacher_prompts(batch, rollouts, 0, SDPO)
    shows["sdpo"] = has_context.flatten().tolist()
    answer_alone = replace(HSD, context="answer")
    prompts["answer"], has_context, _ = hsd.teacher_prompts(batch, rollouts, 0, answer_alone)
    shows["answer"] = has_context.flatten().tolist()
    prompts["both"], _, peers = hsd.teacher_prompts(batch, rollouts, 0, HSD)
    shows["both"] = [peer is not None for peer in peers]
    groups = [Group(replace(g.problem, answer=None), g.rollouts, g.verdicts) for g in batch.groups]
    prompts["peer"], _, same_peers = hsd.teacher_prompts(Batch(groups), rollouts, 0, HSD)
    shows["peer"] = [peer is not None for peer in same_peers]
    return prompts, shows, peers


def choose(batch: Batch, peers: list[int | None]) -> list[list[Shown]]:
    """Of each group the first wrong and the first right response, finished ones first."""
    chosen = []
    G = batch.rewards.shape[1]
    for q, group in enumerate(batch.groups):
        pair = []
        for wanted_right in (False, True):
            rows = [i for i, v in enumerate(group.verdicts) if (v.reward == 1) == wanted_right]
            i = min(rows, key=lambda i: group.rollouts[i].truncated)
            peer, tau = peers[q * G + i], None
            if peer is not None:
                tau = hsd.divergence_point(
                    group.rollouts[i].response_ids, group.rollouts[peer].response_ids
                )
            pair.append(Shown(q * G + i, tau))
        chosen.append(pair)
    return chosen


@torch.no_grad()
def read(policy: Policy, batch: Batch, prompts: list[list[int]], kept: list[bool], reader: Reader,
         rollouts: Rollouts) -> dict[int, Reading]:
    """Rollout of the batch → its Reading behind its prompt, for the rollouts that are kept."""
    settings = rollouts.args
    found = {}
    device = rollouts.run.device
    kept = torch.tensor(kept)
    for micro in micro_batches(prompts, batch.responses, kept, settings.setup, device):
        hidden, head = policy.read(micro)  # [T, D], [V, D]
        student = policy.read(micro.with_prompts(batch.prompts, batch.responses))
        stats = token_stats(
            *student, micro.targets, hidden, head, divergence=reader.divergence,
            temperature=settings.temperature,
        )
        parts = [micro.split(part) for part in stats]
        for row, states in zip(micro.rows, hidden.split(micro.lengths)):
            logits = states.float() @ head.float().T / settings.temperature  # [|o|, V]
            logp, likeliest = logits.log_softmax(-1).topk(LIKELIEST)
            own = TokenStats(*(part[row].float() for part in parts))
            found[row] = Reading(prompts[row], own, likeliest.cpu(), logp.cpu())
    policy.reshard()
    return found


def credit(row: Row, A: float, reading: Reading) -> Tensor:
    """What a row of the page colours, [T], with the method file's own functions.

    A: GRPO's advantage of the response.
    """
    stats = reading.stats
    A = torch.full_like(stats.logp, A)
    if row.method == "GRPO":
        return A
    if row.method == "RLSD":
        seen = rlsd.Inputs(A, None, None, None, stats.teacher_logp)
        w = rlsd.token_credit(stats.logp, seen)
        if row.symbol == "log w":
            return w.log()
        return rlsd.redistribute(A, w, rlsd.lam_at(0, RLSD), RLSD.eps_w)
    if row.scale == "kl":
        return stats.kl
    if row.method == "SDPO":
        return sdpo.sampled_advantage(stats, None, SDPO)
    return hsd.credit(stats)


# --------------------------------------------------------------------------------------------------
# what the page holds
# --------------------------------------------------------------------------------------------------
def page_data(policy: Policy, rollouts: Rollouts, batch: Batch, args: Args) -> dict:
    """All that credit.html draws, as JSON can hold it."""
    prompts, shows, peers = teacher_prompts(batch, rollouts)
    chosen = choose(batch, peers)
    rows = [shown.row for pair in chosen for shown in pair]
    wanted = [i in rows for i in range(len(batch.rollouts))]
    plain = read(policy, batch, batch.prompts, wanted, Reader("", Divergence(), ""), rollouts)
    readings = {}
    for name, reader in READERS.items():
        kept = [here and has for here, has in zip(wanted, shows[name])]
        readings[name] = read(policy, batch, prompts[name], kept, reader, rollouts)
    A = grpo.advantages(batch.rewards, GRPO.std).flatten().tolist()
    words = Words(rollouts.tokenizer)
    questions = []
    for group, pair in zip(batch.groups, chosen):
        responses = []
        for shown in pair:
            mine = {name: found.get(shown.row) for name, found in readings.items()}
            responses.append(response_data(batch, shown, A[shown.row], plain, mine, words, args))
        questions.append({
            "question": group.problem.messages[-1]["content"],
            "answer": group.problem.answer,
            "feedback": group.verdicts[pair[0].row % len(group.verdicts)].feedback[:MOST_PROMPT],
            "right": right_of(group),
            "group": len(group.verdicts),
            "responses": responses,
        })
    return {
        "rows": [row._asdict() for row in ROWS],
        "readers": {name: {"shown": r.shown, "kl": r.kl} for name, r in READERS.items()},
        "range": nice_range(questions),
        "questions": questions,
        "words": words.texts,
    }


class Words:
    """The texts of tokens, each once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.places, self.texts = tokenizer, {}, []

    def place(self, token: int) -> int:
        """Where the token's text is in `texts`."""
        if token not in self.places:
            text = self.tokenizer.decode([token])
            begins_a_word = self.tokenizer.convert_ids_to_tokens(token).startswith("▁")
            if begins_a_word and not text.startswith(" "):  # SentencePiece drops it at a start
                text = " " + text
            self.places[token] = len(self.texts)
            self.texts.append(text)
        return self.places[token]


def response_data(batch: Batch, shown: Shown, A: float, plain: dict, readings: dict, words: Words,
                  args: Args) -> dict:
    rollout, student = batch.rollouts[shown.row], plain[shown.row]
    length = len(rollout.response_ids)
    first = 0
    if shown.tau is not None:  # a third of the window before τ
        first = max(0, min(shown.tau - args.tokens // 3, length - args.tokens))
    window = slice(first, first + args.tokens)
    rows = []
    for row in ROWS:
        reading = readings[row.reader] if row.reader else student
        rows.append(None if reading is None else thousandths(credit(row, A, reading)[window]))
    teachers = {}
    for name, reading in readings.items():
        if reading is not None:
            teachers[name] = {
                "prompt": excerpt(words.tokenizer.decode(reading.prompt)),
                "logp": thousandths(reading.stats.teacher_logp[window]),
                "top": likeliest(reading, window, words),
            }
            if READERS[name].kl:
                teachers[name]["kl"] = thousandths(reading.stats.kl[window])
    return {
        "reward": batch.rewards.flatten()[shown.row].item(),
        "prompt": excerpt(words.tokenizer.decode(rollout.prompt_ids)),
        "tokens": [words.place(token) for token in rollout.response_ids[window]],
        "first": first,
        "length": length,
        "tau": shown.tau,
        "logp": thousandths(student.stats.teacher_logp[window]),
        "top": likeliest(student, window, words),
        "teachers": teachers,
        "rows": rows,
    }


def likeliest(reading: Reading, window: slice, words: Words) -> list[list[int]]:
    """Of each token [place of a word, −log p in 0.01 nats, place, …], the likeliest first."""
    out = []
    for ids, logps in zip(reading.likeliest[window].tolist(), reading.logp[window].tolist()):
        flat = []
        for token, logp in zip(ids, logps):
            flat += [words.place(token), round(-100 * logp)]
        out.append(flat)
    return out


def thousandths(values: Tensor) -> list[int]:
    """Whole numbers are short: the page has several hundred per token."""
    return [round(1000 * value) for value in values.tolist()]


def excerpt(text: str) -> str:
    """The text, without its middle if it is long."""
    if len(text) <= MOST_PROMPT:
        return text
    half = MOST_PROMPT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def nice_range(questions: list[dict]) -> float:
    """The end of the scale: 1, 2, 3, 5 or 10 nats, so that 99 % of all values lie within.

    >>> nice_range([{"responses": [{"rows": [[100, -2500], None]}]}])
    3.0
    """
    sizes = []
    for question in questions:
        for response in question["responses"]:
            for values in filter(None, response["rows"]):
                sizes += map(abs, values)
    sizes.sort()
    wanted = sizes[math.ceil(0.99 * len(sizes)) - 1] / 1000
    return next((end for end in (1.0, 2.0, 3.0, 5.0) if wanted <= end), 10.0)


if __name__ == "__main__":
    main(tyro.cli(Args))
