"""GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), and the variants one formula away.

For a question q, sample a group of G responses o_i from the policy and judge them: r_i. Then

    A_i    = (r_i − mean(r)) / std(r)                                             §4.1.2: outcome supervision
    ρ_i,t  = π_θ(o_i,t | q, o_i,<t) / π_old(o_i,t | q, o_i,<t)
    J(θ)   = E[ 1/G Σ_i 1/|o_i| Σ_t min(ρ A, clip(ρ, 1−ε, 1+ε) A) − β D_KL ]      Eq. 3
    D_KL   = π_ref/π_θ − log(π_ref/π_θ) − 1   at the sampled token                Eq. 4 (the "k3" estimator)

--loss replaces the surrogate or the mean: dr_grpo (2503.20783), dapo (2503.14476), gspo (2507.18071), cispo
(2506.13585); it also brings the settings in VARIANTS below as defaults, and what you type wins over them.

    python grpo.py --demo                                          # the embedded model, three minutes on a laptop
    python grpo.py --model Qwen/Qwen3-0.6B --group_size 8 --beta 0 --lr 3e-6                # one GPU
    torchrun --nproc_per_node=8 grpo.py --model Qwen/Qwen3-8B --sampler vllm           # one machine

Left out on purpose: process supervision and a learnt reward model (a verifier judges outcomes), iterative reference
refresh, a value function, asynchronous sampling. Where the paper is silent: ε = 0.2, unbiased std, a group whose
rewards are all equal has A = 0 (it still counts in the mean), truncated responses are judged as they stand.
The printed objective has no correction for a sampler that is not the trainer; here each token's loss is multiplied by
sg(min(π_old/π_sampler, C)) (--tis), which is 1 where the two agree. Details: docs/grpo.md.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common.chat import chat_ids, load_tokenizer
from common.policy import (
    Micro,
    frozen_copy,
    full_weights,
    load_policy,
    make_optimizer,
    micro_batches,
    optimizer_step,
    score,
)
from common.run import Run, parse, require, within
from common.sampler import Rollout, first_sync, make_sampler
from common.tasks import Problem, load_task, take
from common.verifiers import Verdict, Verifier
from kernels.head import TokenStats, head_loss, token_stats


# ---------------------------------------------------------------------------------------------------------------------
# 1. settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """GRPO. Defaults: the settings of DeepSeekMath §4.2 where it prints them."""

    model: str = "deepseek-ai/deepseek-math-7b-instruct"
    """folder or hub id of a causal LM with a chat template; start and reference"""
    task: str = "gsm8k"
    """a named set (gsm8k, mbpp …), jsonl:FILE, hf:NAME[:CONFIG], gym:NAME, chain, or a mixture: 4*gsm8k+1*mbpp"""
    data_dir: str = ""
    """folder that named sets are read from; empty reads them from the hub"""
    against: str = ""
    """further evaluation sets, joined by commas: training questions that stand in one are removed"""
    fields: str = ""
    """names of the data's fields where they differ, e.g. question=prompt,answer=gold"""
    instruction: str | None = None
    """text added to every maths question; the default asks for \\boxed{}"""
    heldout: int = 256
    """problems set aside for evaluation, never trained on"""

    # the method
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    """surrogate and mean; also brings the defaults in VARIANTS"""
    group_size: int = 64
    """G, responses a question (§4.2)"""
    beta: float = 0.04
    """weight of the KL to the reference (§4.2); 0 drops the reference model"""
    clip_low: float = 0.2
    """ε below 1 in clip(ρ, 1−ε_low, 1+ε_high)"""
    clip_high: float = 0.2
    """ε above 1; larger than clip_low is DAPO's clip-higher"""
    std: bool = True
    """divide advantages by the group's standard deviation"""
    epochs: int = 1
    """passes over the rollouts of a step (§4.2: one update for each exploration)"""
    minibatches: int = 1
    """optimizer updates a pass; each takes an equal share of the questions"""
    dynamic_sampling: int = 0
    """DAPO: refill groups whose rewards are all equal, at most this many rounds; 0 is off"""
    overlong: Literal["keep", "mask", "shape"] = "keep"
    """truncated responses: judged as they stand, out of the loss, or DAPO's soft length penalty"""
    overlong_cache: int = 4096
    """tokens before the limit over which --overlong shape goes from 0 to −1"""
    tis: float = 2.0
    """C in sg(min(π_old/π_sampler, C)), the truncated importance weight of each token; 0 is off"""

    # sampling
    batch_size: int = 16
    """questions a step, over all processes (§4.2: 1,024 responses of 64 a question)"""
    max_tokens: int = 1024
    """limit of a response, in tokens (§4.2)"""
    temperature: float = 1.0
    """of sampling; log-probabilities are scored at the same temperature"""
    top_p: float = 1.0
    """nucleus of sampling; below 1 the sampler's distribution is not the trainer's"""
    thinking: bool = False
    """chat templates with a thinking mode: switch it on"""

    # optimisation
    steps: int = 500
    """exploration stages"""
    lr: float = 1e-6
    """learning rate of AdamW (§4.2), constant after the warm-up"""
    warmup: int = 0
    """steps of linear warm-up"""
    weight_decay: float = 0.0
    """of AdamW"""
    max_norm: float = 1.0
    """gradient norm limit"""

    # the machine
    token_budget: int = 16384
    """padded tokens in a forward pass of training"""
    sampler: Literal["hf", "vllm"] = "hf"
    """engine of the rollouts: the model's Hugging Face code, or vLLM inside each process"""
    sampler_rows: int = 128
    """rollouts that decode at a time; their KV cache must fit"""
    tensor_parallel: int = 1
    """--sampler vllm: ranks that share an engine"""
    vllm_memory: float = 0.4
    """--sampler vllm: share of the GPU's memory for its weights and KV cache"""
    share_prompts: bool = False
    """read a prompt once for all its responses in the update: pays where responses are not much longer than prompts"""
    checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    lora_rank: int = 0
    """train adapters of this rank on a frozen base, with a learning rate of about ten times; 0 trains all weights"""
    lora_alpha: float = 32.0
    """adapters add alpha/rank·B·A to a weight"""
    optimizer_state: Literal["fp32", "bf16", "offload"] = "fp32"
    """AdamW's moments: 8 bytes a trained weight, 4, or 8 in the CPU's memory"""
    workers: int = 4
    """verdicts at a time"""
    allow_unsafe_exec: bool = False
    """run a model's programs without bubblewrap, with your own rights"""

    # the run
    seed: int = 0
    """of data order and sampling"""
    name: str = ""
    """folder under --out; made up from the task and the seed where empty"""
    out: str = "runs"
    """where run folders go"""
    resume: str = ""
    """"auto": go on from this run's last checkpoint, if there is one; or a checkpoint folder"""
    eval_every: int = 20
    """steps between evaluations on the held-out problems"""
    eval_samples: int = 1
    """responses for each held-out problem"""
    eval_only: bool = False
    """evaluate --model and stop"""
    dry_run: bool = False
    """print the plan and the memory it takes, check model, data and engine, and stop"""
    save_every: int = 100
    """steps between checkpoints; the last step is always saved"""
    keep: int = 2
    """checkpoints kept"""
    track: Literal["", "tensorboard", "wandb", "trackio"] = ""
    """also send metrics there"""
    demo: bool = False
    """the embedded model and task, small enough for a laptop: the overrides in DEMO"""


VARIANTS = {  # what belongs to each formula; of DAPO, the settings of its §4.1 too
    "grpo": {},
    "dr_grpo": dict(std=False, beta=0.0),
    "dapo": dict(clip_high=0.28, beta=0.0, group_size=16, batch_size=512, minibatches=16, dynamic_sampling=8,
                 overlong="shape", max_tokens=20480, warmup=20),
    "gspo": dict(clip_low=3e-4, clip_high=4e-4, beta=0.0),
    "cispo": dict(beta=0.0),
}
DEMO = dict(model="assets/chain", task="chain", group_size=8, batch_size=16, minibatches=1, max_tokens=64, beta=0.0,
            overlong_cache=16, share_prompts=True, lr=1e-4, warmup=0, steps=80, eval_every=10, eval_samples=2,
            save_every=40)


def presets(args: Args) -> dict:
    return {**VARIANTS[args.loss], **(DEMO if args.demo else {})}


# ---------------------------------------------------------------------------------------------------------------------
# 2. rewards and advantages
# ---------------------------------------------------------------------------------------------------------------------
def shaped_rewards(rewards: Tensor, lengths: Tensor, args: Args) -> Tensor:
    """DAPO: verdicts of 0 and 1 are rewards of −1 and 1 (Eq. 7), plus the soft overlong punishment (Eq. 13): 0 up to
    L_max − L_cache, then linear to −1 at L_max. All [Q, G]."""
    return 2 * rewards - 1 + ((args.max_tokens - args.overlong_cache - lengths) / args.overlong_cache).clamp(-1, 0)


def advantages(rewards: Tensor, std: bool) -> Tensor:
    """Group-relative advantages of rewards [Q, G].

    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), std=False)
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True)
    # GRPO §4.1.2: A_i = (r_i − mean(r)) / std(r); rewards that are all equal have no signal; rounding must not make one
    return torch.where(spread > 1e-6, centred / spread if std else centred, torch.zeros(()))


def token_weights(lengths: Tensor, kept: Tensor, args: Args) -> Tensor:
    """The weight of each token of a rollout in the batch's mean, [Q, G], for lengths [Q, G] in tokens and kept [Q, G]
    (0 takes a rollout out). Counts go over all ranks, so any split of a batch gives the same loss."""
    kept = kept.float()
    if args.loss in ("dapo", "cispo"):  # 1/Σ_i|o_i|: all tokens of a group alike; then the mean over groups
        share = kept / (kept * lengths).sum(1, keepdim=True).clamp(min=1)
        count = (kept.sum(1) > 0).sum()
    else:  # 1/|o_i|, or for Dr. GRPO one over the generation limit; then the mean over responses
        share = kept / (args.max_tokens if args.loss == "dr_grpo" else lengths)
        count = kept.sum()
    count = count.double()
    dist.all_reduce(count)
    return share / count.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# 3. the loss
# ---------------------------------------------------------------------------------------------------------------------
class Tokens(NamedTuple):
    """What the loss needs to know of each response token, all [T]."""

    advantage: Tensor
    weight: Tensor  # from token_weights
    sampler_logp: Tensor  # log π_sampler
    old_logp: Tensor | None  # log π_old; None where π_old is the policy itself (one update a step)
    ref_logp: Tensor | None  # log π_ref; None without a reference
    rollout: Tensor  # which rollout the token belongs to, 0 … R−1


BOUND = 20.0  # nats: up to here a log ratio is exponentiated as it is


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x); beyond BOUND the tangent of exp at BOUND goes on. There the value still rises, and
    the slope stays at exp(BOUND): the gradient of one token can neither overflow nor vanish."""
    inside = x.clamp(max=BOUND)
    return torch.where(x > BOUND, inside.exp() * (1 + x - BOUND), inside.exp())


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Eq. 4: π_ref/π_θ − log(π_ref/π_θ) − 1 ≥ 0. Its value estimates KL(π_θ‖π_ref); differentiated as it stands, on
    samples of π_θ, its gradient is that of the other direction, KL(π_ref‖π_θ)."""
    log_ratio = ref_logp - logp
    inside = log_ratio.clamp(max=BOUND).expm1()  # expm1: small ratios keep their digits
    return torch.where(log_ratio > BOUND, bounded_exp(log_ratio) - 1, inside) - log_ratio


def loss(token: TokenStats, batch: Tokens, args: Args) -> Tensor:
    """The loss of each token [T]; their sum is −J (Eq. 3) of the batch."""
    old_logp = token.logp.detach() if batch.old_logp is None else batch.old_logp
    log_ratio = token.logp - old_logp  # log ρ_i,t
    if args.loss == "gspo":  # log s_i = 1/|o_i| Σ_t log ρ_i,t, the same for every token of a rollout
        log_ratio = rollout_mean(log_ratio, batch.rollout)
    ratio, A = bounded_exp(log_ratio), batch.advantage
    if args.loss == "cispo":  # sg(min(ρ, 1+ε_high)) A log π_θ: a clipped token keeps its gradient
        surrogate = ratio.detach().clamp(max=1 + args.clip_high) * A * token.logp
    else:  # Eq. 3
        surrogate = torch.minimum(ratio * A, ratio.clamp(1 - args.clip_low, 1 + args.clip_high) * A)
    per_token = -surrogate
    if batch.ref_logp is not None:
        per_token = per_token + args.beta * k3(token.logp, batch.ref_logp)
    if args.tis > 0:  # truncated importance sampling: the rollouts are the sampler's, not π_old's
        per_token = per_token * (old_logp - batch.sampler_logp).exp().clamp(max=args.tis).detach()
    return batch.weight * per_token


def rollout_mean(x: Tensor, rollout: Tensor) -> Tensor:
    """Each token's value becomes the mean over its rollout. x, rollout [T].

    >>> rollout_mean(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0, 0, 1]))
    tensor([2., 2., 7.])
    """
    lengths = torch.bincount(rollout)
    return (torch.zeros(len(lengths), dtype=x.dtype, device=x.device).index_add(0, rollout, x) / lengths)[rollout]


# ---------------------------------------------------------------------------------------------------------------------
# 4. the loop
# ---------------------------------------------------------------------------------------------------------------------
class Group(NamedTuple):
    """A question, its G responses and their verdicts."""

    problem: Problem
    rollouts: list[Rollout]
    verdicts: list[Verdict]

    @property
    def mixed(self) -> bool:
        """Whether the verifier's rewards differ; where they do not, every advantage made of them is 0."""
        return len({v.reward for v in self.verdicts}) > 1


def choose_groups(groups: list[Group], share: int) -> list[Group]:
    """`share` of the groups, the mixed ones if not all fit, in the order of the questions: the log
    shows the first groups, which must not be a selection."""
    mixed_first = sorted(range(len(groups)), key=lambda i: not groups[i].mixed)
    return [groups[i] for i in sorted(mixed_first[:share])]


def main(args: Args) -> None:
    within(args, group_size=(2, 1e5), beta=(0, 1e3), clip_low=(0, 1), clip_high=(0, 1e3), tis=(0, 1e3), epochs=(1, 1e3),
           minibatches=(1, 1e5), dynamic_sampling=(0, 1e3), overlong_cache=(1, 1e6))
    require(not args.dynamic_sampling or args.tensor_parallel == 1, "--dynamic_sampling: ranks that share an engine "
            "(--tensor_parallel) cannot sample different numbers of rounds")
    run = Run(args, "grpo")
    require(args.batch_size % (run.world * args.minibatches) == 0, f"--batch_size {args.batch_size} questions do not "
            f"divide into {run.world} process(es) × {args.minibatches} minibatch(es)")
    require(args.overlong != "shape" or args.overlong_cache < args.max_tokens, "--overlong_cache "
            f"{args.overlong_cache} must be below --max_tokens {args.max_tokens}, before which the punishment begins")
    require(not (args.share_prompts and args.checkpointing), "--share_prompts keeps keys and values, which "
            "--checkpointing would drop: take one of them")
    task = load_task(args.task, heldout=args.heldout, fields=args.fields, instruction=args.instruction,
                     data_dir=args.data_dir, against=args.against)
    tokenizer = load_tokenizer(args.model, args.thinking, [*task.heldout, *task.train])
    verifier = Verifier(args.workers, allow_unsafe_exec=args.allow_unsafe_exec)
    verifier.check([*task.heldout, *task.train][run.rank :: run.world])  # a bad reference ends here, not in step 900
    run.check_lengths(tokenizer, [*task.heldout, *task.train])
    if args.dry_run:
        return run.plan(task, tokenizer, verifier, group=args.group_size, updates=args.epochs * args.minibatches,
                        copies=int(args.beta > 0), steps=args.steps)
    policy = load_policy(args.model, run.device, checkpointing=args.checkpointing, lora_rank=args.lora_rank,
                         lora_alpha=args.lora_alpha, share_prompts=args.share_prompts)
    reference = frozen_copy(policy, args.model, run.device) if args.beta > 0 else None
    optimizer = make_optimizer(policy, args.optimizer_state, lr=args.lr, weight_decay=args.weight_decay)
    sampler = make_sampler(args, tokenizer, run.device)
    run.begin(*task.notes, context=sampler.context)
    first_step = run.resume(policy, optimizer)
    # on a resume the first rollouts must be the resumed policy's
    first_sync(sampler, policy, chat_ids(tokenizer, task.heldout[0].messages, args.thinking))

    def judged_groups(problems: list[Problem], n: int, seed: tuple[int, ...], keys: range) -> list[Group]:
        with run.timer("sample"):
            prompts = [chat_ids(tokenizer, p.messages, args.thinking) for p in problems]
            groups = sampler.sample(prompts, n, seed=seed, keys=keys, max_tokens=args.max_tokens,
                                    temperature=args.temperature, top_p=args.top_p)
        with run.timer("verify"):
            verdicts = verifier([p for p in problems for _ in range(n)], [o.text for g in groups for o in g])
        return [Group(p, g, verdicts[i * n : i * n + n]) for i, (p, g) in enumerate(zip(problems, groups))]

    def evaluate() -> dict:
        """Held-out problems, without hints, each rank every world-th of them."""
        mine = range(run.rank, len(task.heldout), run.world)
        with run.timer("evaluate"):
            groups = judged_groups([task.heldout[i] for i in mine], args.eval_samples, (args.seed, 1), mine)
        return {"heldout/pass@1": [v.reward for g in groups for v in g.verdicts],
                "heldout/length": [len(o.response_ids) for g in groups for o in g.rollouts]}

    def explore(step: int) -> list[Group]:
        """This rank's share of the questions as groups. With dynamic sampling, groups whose rewards
        are all equal are replaced while rounds are left; those that remain then fill the share, so
        that a step always ends."""
        share, rounds = args.batch_size // run.world, args.dynamic_sampling + 1
        groups: list[Group] = []
        for round in range(rounds):
            start = ((step * rounds + round) * run.world + run.rank) * share
            problems = take(task.train, args.seed, start, share)
            keys = range(start, start + share)
            groups += judged_groups(problems, args.group_size, (args.seed, 0), keys)
            if sum(g.mixed for g in groups) >= share:
                break
        return choose_groups(groups, share)

    if args.eval_only:
        run.log(first_step, evaluate())
        return run.finish(sampler, verifier)

    for step in run.steps(first_step, args.steps):
        metrics: dict = evaluate() if step % args.eval_every == 0 else {}
        groups = explore(step)
        rollouts = [o for g in groups for o in g.rollouts]
        prompts, responses = [o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts]
        rewards = torch.tensor([[v.reward for v in g.verdicts] for g in groups])  # [Q, G]
        lengths = torch.tensor([[float(len(o.response_ids)) for o in g.rollouts] for g in groups])
        truncated = torch.tensor([[o.truncated for o in g.rollouts] for g in groups])
        shaped = shaped_rewards(rewards, lengths, args) if args.overlong == "shape" else rewards
        A = advantages(shaped, args.std)
        kept = ~truncated if args.overlong == "mask" else torch.ones_like(truncated)

        sampler.rest()
        with run.timer("score"):
            old_logp = ref_logp = None
            if args.epochs * args.minibatches > 1:  # else π_old is the policy that the update's own forward sees
                old_logp = [s.logp for s in score(policy, prompts, responses, args.token_budget, args.temperature)]
            if reference is not None:
                ref_logp = [s.logp for s in score(reference, prompts, responses, args.token_budget, args.temperature)]

        with run.timer("update"):
            collected: dict[str, list[Tensor]] = {}
            for _ in range(args.epochs):
                order = torch.randperm(len(groups)) if args.minibatches > 1 else torch.arange(len(groups))
                for part in order.chunk(args.minibatches):
                    weight = torch.zeros_like(A)
                    weight[part] = token_weights(lengths[part], kept[part], args)
                    # without a reference, a response whose advantage is 0 has no gradient: it need not be read
                    rows = [q * args.group_size + i for q in part.tolist() for i in range(args.group_size)
                            if weight[q, i] > 0 and (reference is not None or A[q, i] != 0)]
                    for micro in micro_batches(prompts, responses, rows, args.token_budget, run.device,
                                               args.share_prompts):
                        batch = Tokens(advantage=micro.spread(A.flatten()), weight=micro.spread(weight.flatten()),
                                       sampler_logp=micro.gather([o.logprobs for o in rollouts]),
                                       old_logp=None if old_logp is None else micro.gather(old_logp),
                                       ref_logp=None if ref_logp is None else micro.gather(ref_logp),
                                       rollout=micro.rollout)
                        total, stats = policy(micro, head(micro, batch, args))
                        (total * run.world).backward()  # FSDP averages over ranks; the weights are already global
                        for name, value in diagnostics(stats, batch, args).items():
                            collected.setdefault(name, []).append(value)
                    lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
                    optimizer_step(policy, optimizer, lr, args.max_norm, metrics)

        with run.timer("sync"):
            sampler.load(full_weights(policy))

        metrics |= {"reward/mean": rewards, "length/mean": lengths, "length/max": lengths, "frac_truncated": truncated,
                    "frac_zero_std": [not g.mixed for g in groups], "frac_all_right": rewards.mean(1) == 1,
                    "lr": lr, **{name: torch.cat(parts) for name, parts in collected.items()}}
        if step == first_step:
            best = max(range(len(rollouts)), key=lambda i: A.flatten()[i])
            run.show(tokenizer, prompts[best], responses[best], f"advantage {A.flatten()[best]:.3f}")
        run.log(step, metrics, [dict(id=g.problem.id, response=o.text, finish=o.finish_reason, reward=v.reward,
                                     feedback=v.feedback) for g in groups[:2] for o, v in zip(g.rollouts, g.verdicts)])
        if run.due(step + 1, args.steps):  # at intervals, at the end, and where SIGTERM asks to stop
            run.save(step + 1, policy, optimizer, tokenizer)
        if run.stopping:
            return run.finish(sampler, verifier)

    run.log(args.steps, evaluate())
    run.finish(sampler, verifier)


def head(micro: Micro, batch: Tokens, args: Args):
    """What the policy does with hidden states [T, D] and the head's weight [V, D]: → (loss, TokenStats)."""

    def fused(hidden: Tensor, weight: Tensor) -> tuple[Tensor, TokenStats]:
        if args.loss == "gspo":  # a ratio of whole responses: all tokens' statistics first, then the loss
            stats = token_stats(hidden, weight, micro.targets, temperature=args.temperature)
            return loss(stats, batch, args).sum(), TokenStats(*(x.detach() for x in stats))
        return head_loss(lambda token, part: loss(token, part, args), hidden, weight, micro.targets, batch,
                         temperature=args.temperature)

    return fused


def diagnostics(token: TokenStats, batch: Tokens, args: Args) -> dict[str, Tensor]:
    """Per-token metrics of an update [T]; the log takes their mean (or their maximum)."""
    old_logp = token.logp if batch.old_logp is None else batch.old_logp
    gap = old_logp - batch.sampler_logp  # log π_old/π_sampler, 0 where sampler and trainer agree
    log_ratio, A = token.logp - old_logp, batch.advantage
    if args.loss == "gspo":
        log_ratio = rollout_mean(log_ratio, batch.rollout)
    ratio = bounded_exp(log_ratio)
    clipped = ((ratio > 1 + args.clip_high) & (A > 0)) | ((ratio < 1 - args.clip_low) & (A < 0))
    if args.loss == "cispo":  # bounds the weight whatever the sign of A
        clipped = ratio > 1 + args.clip_high
    near = gap.clamp(max=BOUND)
    out = {"entropy": token.entropy, "clip_frac": clipped.float(),
           "mismatch/kl": near.expm1() - near, "mismatch/max_abs_dlogp": gap.abs(),
           "mismatch/tis": near.exp().clamp(max=args.tis or torch.inf)}
    if batch.ref_logp is not None:
        out["kl_ref"] = k3(token.logp, batch.ref_logp)
    return out


if __name__ == "__main__":
    main(parse(Args, presets))
