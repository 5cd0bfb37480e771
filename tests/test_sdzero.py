"""sdzero.py: the weighted likelihood of phase 1, the KL of phase 2 against brute force, traces that survive a kill."""
import json
import os
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN, TASK, policy_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import assert_same_run, metrics, weights

import sdzero
from common import checkpoints
from common.chat import load_tokenizer
from common.sampler import Rollout
from common.settings import parse
from common.tasks import Problem, load_task
from common.tasks.lazy import Lazy, picked
from common.tasks.mixtures import blend
from common.verifiers.pool import Verifier
from common.verifiers.thoughts import final_part

V, D = 9, 4
f64 = dict(dtype=torch.float64)


def some_trace(init=3, control=2, revised=4, **other) -> sdzero.Trace:
    t = dict(id="q", r=0, right=True, prompt_ids=[1], init_ids=[2] * init, control_ids=[3] * control,
             revised_ids=list(range(revised)), text="")
    return sdzero.Trace(**{**t, **other})


@pytest.mark.parametrize("terms", ["both", "generation", "revision"])
def test_one_weighted_forward_is_both_likelihoods(terms, one_process):
    """Eq. 3 with weights 1, 1, 2 against L_generation and L_revision computed one after the other."""
    g = torch.Generator().manual_seed(0)
    trace = some_trace()
    T = 9
    hidden, head = (torch.randn(n, D, generator=g, **f64) for n in (T, V))
    targets = torch.randint(0, V, (T,), generator=g)
    h1, w1 = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    share = sdzero.token_share([T], "sum")
    inputs = sdzero.Inputs(torch.tensor(sdzero.trace_weights(trace, terms), **f64) * share)
    total, _ = policy_loss(h1, w1, targets, sdzero.srt_loss, inputs)
    total.backward()
    h2, w2 = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logp = torch.log_softmax(h2 @ w2.T, -1)[torch.arange(T), targets]
    generation, revision = -logp.sum(), -logp[5:].sum()  # y_init and P_r are the first five tokens
    expected = {"both": generation + revision, "generation": generation, "revision": revision}[terms]
    expected.backward()
    for a, b in ((total, expected), (h1.grad, h2.grad), (w1.grad, w2.grad)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("flags", [{}, {"kl": "forward"}, {"kl": "mixed"}, {"mean": "token"}, {"kl": "mixed", "top_k": 3},
                                   {"temperature": 0.7}], ids=str)
def test_equation_4_equals_brute_force(flags, one_process):
    args = sdzero.Args(**flags)
    g = torch.Generator().manual_seed(1)
    lengths = [4, 2, 5]
    T = sum(lengths)
    hidden, teacher_hidden = (torch.randn(T, D, generator=g, **f64) for _ in range(2))
    head, teacher_head = (torch.randn(V, D, generator=g, **f64) for _ in range(2))
    targets = torch.randint(0, V, (T,), generator=g)
    h1, w1 = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    inputs = sdzero.Inputs(torch.full((T,), sdzero.token_share(lengths, args.mean), **f64))
    total, _ = policy_loss(h1, w1, targets, sdzero.loss, inputs, [(teacher_hidden, teacher_head)],
                           divergence=sdzero.divergence(args), temperature=args.temperature)
    total.backward()
    h2, w2 = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    zs, zt = h2 @ w2.T / args.temperature, teacher_hidden @ teacher_head.T / args.temperature
    L = torch.zeros((), **f64)
    for t in range(T):
        chosen = sorted(range(V), key=lambda v: -float(zt[t, v]))[: args.top_k or V]  # the teacher's, renormalised
        p, q = torch.softmax(zs[t, chosen], -1), torch.softmax(zt[t, chosen], -1)
        reverse = sum(a * (a.log() - b.log()) for a, b in zip(p, q))
        forward = sum(b * (b.log() - a.log()) for a, b in zip(p, q))
        L = L + {"reverse": reverse, "forward": forward, "mixed": 0.5 * reverse + 0.5 * forward}[args.kl]
    L = L / (T if args.mean == "token" else len(lengths))
    L.backward()
    for a, b in ((total, L), (h1.grad, h2.grad), (w1.grad, w2.grad)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_the_end_token_of_the_first_copy_is_stripped_and_of_the_second_kept():
    tokenizer = load_tokenizer(CHAIN)
    end = tokenizer.eos_token_id
    rollouts = SimpleNamespace(tokenizer=tokenizer, ends=[end])
    stopped, cut = Rollout([7, 8], [5, 6, end], [0.0] * 3, "stop", ""), Rollout([7, 8], [5, 6], [0.0] * 2, "length", "")
    for r in (0, 1):
        control = tokenizer.encode(f"\n\n{sdzero.CONTROL[r]}\n\n", add_special_tokens=False)
        assert sdzero.reviser_prompt(stopped, r, rollouts) == [7, 8, 5, 6, *control]
        assert sdzero.reviser_prompt(cut, r, rollouts) == [7, 8, 5, 6, *control]
        assert end not in control
    assert stopped.response_ids[-1] == end  # what the teacher is made to say again is left as it is


class Stop(Exception):
    pass


def test_a_run_judges_what_follows_its_control_phrases(tmp_path, monkeypatch):
    def verifier(restarts, **settings):
        raise Stop(restarts)

    monkeypatch.setattr("common.rollouts.Verifier", verifier)
    with pytest.raises(Stop) as stop:
        run(tmp_path, "--name", "judged")
    torch.distributed.destroy_process_group()
    restarts, = stop.value.args
    assert set(sdzero.CONTROL.values()) <= set(restarts)


def test_the_answer_is_taken_after_the_last_control_phrase():
    wrong, right = "I think \\boxed{4}.", "It is \\boxed{5}."
    text = f"{wrong}\n\n{sdzero.CONTROL[0]}\n\n{right}\n\n{sdzero.CONTROL[1]}\n\nSo 5 it is."
    assert final_part(text, sdzero.RESTARTS).strip() == "So 5 it is."
    assert final_part(wrong, sdzero.RESTARTS) == wrong
    verifier, problem = Verifier(1, restarts=sdzero.RESTARTS), Problem("p", [], answer="5")
    responses = [f"{right}\n\n{sdzero.CONTROL[0]}\n\nIt is six.", f"{wrong}\n\n{sdzero.CONTROL[0]}\n\nThe answer is 5", wrong]
    rewards = [v.reward for v in verifier([problem] * 3, responses)]
    verifier.close()
    assert rewards == [0.0, 1.0, 0.0]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.booleans(), st.integers(0, 5)), max_size=40),
       st.integers(1, 20), st.floats(0, 1), st.integers(1, 4))
@settings(deadline=None)
def test_only_verified_revisions_enter_within_the_caps(rows, kept, wrong_share, per_question):
    traces = [some_trace(id=str(q), r=r, right=right, revised=n) for q, r, right, n in rows]
    args = sdzero.Args(kept_traces=kept, wrong_share=wrong_share, per_question=per_question)
    chosen = sdzero.select(traces, args)
    assert all(t.right for t in chosen) and len(chosen) <= kept
    assert len({(t.id, tuple(t.init_ids), tuple(t.revised_ids)) for t in chosen}) == len(chosen)
    for q in range(4):
        assert sum(t.id == str(q) for t in chosen) <= per_question
    wrong = sum(t.r == 0 for t in chosen)
    if 0 < wrong_share < 1 and chosen:
        assert len(chosen) - wrong <= round(wrong * (1 - wrong_share) / wrong_share)
    if all(n == 1 for n in Counter(q for q, _, right, _ in rows if right).values()):  # nothing to cap or to drop
        passed = [r for _, r, right, _ in rows if right]
        assert wrong == min(passed.count(0), round(kept * wrong_share))
        if wrong_share == 0:
            assert len(chosen) == min(passed.count(1), kept)


def test_every_trace_that_ends_right_is_kept_by_default():
    """The paper's filter, up to --kept_traces, in the order of the questions."""
    few = [some_trace(id=str(i), r=int(i >= 400)) for i in range(9400)]
    assert sdzero.select(few, sdzero.Args(kept_traces=10**6)) == few
    assert sdzero.select(few, sdzero.Args()) == few[:6000]
    assert len(sdzero.select(few, sdzero.Args(wrong_share=0.5))) == 800
    none_corrected = few[400:]
    assert sdzero.select(none_corrected, sdzero.Args(kept_traces=10**6)) == none_corrected
    half_right = [some_trace(id=str(i), right=i % 2 == 0) for i in range(10)]
    assert sdzero.select(half_right, sdzero.Args()) == half_right[::2]


def test_the_demo_keeps_its_even_mix():
    assert parse(sdzero.Args, sdzero.presets, ["--demo"]).wrong_share == 0.5
    assert parse(sdzero.Args, sdzero.presets, []).wrong_share is None


ROLES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END{% endfor %}"
NAMES = "{% for m in messages %}{{ m.role }}: {{ m.content }}END{% endfor %}"


@pytest.mark.parametrize("template, end, expected", [
    (ROLES, "<|im_end|>", "<|im_end|>"), (ROLES, "\n <|im_end|>\n", "<|im_end|>"), (NAMES, "<|im_end|>", "<|im_end|>"),
    (NAMES, "", "<|endoftext|>"), (NAMES, "\n", "<|endoftext|>"), (NAMES, " stop", "<|endoftext|>"),
    (ROLES, "", "<|im_start|>"), (ROLES, "\n", "<|im_start|>")])
def test_an_answer_of_the_data_ends_as_the_template_ends_a_turn(template, end, expected):
    """Also if the tokenizer's eos is another token. If the template ends no turn, the next one's token does (as with
    GLM-4), and if there is none, it is the eos."""
    tokenizer = load_tokenizer(CHAIN)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = template.replace("END", end)
    rollouts = SimpleNamespace(tokenizer=tokenizer, ends=[tokenizer.eos_token_id], chat_ids=lambda messages: [7])
    trace = sdzero.given_solution(Problem("p", [], answer="2", solution="1+1=2"), rollouts)
    assert trace.revised_ids[-1] == tokenizer.convert_tokens_to_ids(expected) and trace.right


def test_the_mix_is_even_where_there_is_enough():
    traces = [some_trace(id=str(i), r=i % 2) for i in range(100)]
    chosen = sdzero.select(traces, sdzero.Args(kept_traces=40, wrong_share=0.5))
    assert len(chosen) == 40 and sum(t.r == 0 for t in chosen) == 20


def test_the_schedule_of_phase_1_warms_up_and_ends_at_zero():
    args = sdzero.Args(srt_lr=1.0, srt_warmup=0.1)
    lr = [sdzero.srt_lr(u, 100, args) for u in range(100)]
    assert lr[0] == pytest.approx(0.1) and max(lr) == 1.0 and lr[-1] < 0.001
    assert all(a <= b for a, b in zip(lr[:10], lr[1:10])) and all(a >= b for a, b in zip(lr[10:], lr[11:]))


def test_the_batch_of_phase_1_must_divide_only_if_there_is_a_phase_1():
    sdzero.check(sdzero.Args(phase="sd", srt_batch=4), world=8)
    with pytest.raises(SystemExit, match="--srt_batch 4 does not divide into 8"):
        sdzero.check(sdzero.Args(phase="srt", srt_batch=4), world=8)


SMALL = [*TASK, "--srt_questions", "8", "--kept_traces", "12", "--srt_batch", "4", "--srt_epochs", "1",
         "--srt_max_tokens", "32", "--sd_questions", "8", "--batch_size", "4", "--eval_every", "3"]


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """A collection of several batches, and every checkpoint kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdzero, "COLLECT_BATCH", 2)
        patch.setattr(checkpoints, "KEPT", 100)
        yield


def run(out, *flags):
    sdzero.main(parse(sdzero.Args, sdzero.presets, [*SMALL, "--out", str(out), *flags]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_batches):
    out = tmp_path_factory.mktemp("whole")
    run(out, "--name", "whole", "--rounds", "2", "--save_every", "1")
    return out / "whole"


def test_both_phases_have_a_mixtures_proportions():
    """Also if its problems are made as they are needed, part after part."""
    made = [Lazy(100, lambda i, name=name: Problem(f"{name}{i}", [])) for name in "ab"]
    places = blend([3.0, 1.0], [[(k, i) for i in range(100)] for k in (0, 1)])
    args = sdzero.Args(srt_questions=40, sd_questions=60)
    for phase in sdzero.split_questions(picked(made, places), args):
        assert sum(p.id[0] == "a" for p in phase) == pytest.approx(0.75 * len(phase), abs=1)


def test_the_logged_loss_of_phase_1_does_not_depend_on_the_micro_batches(tmp_path):
    first = []
    for budget in ("200", "100000"):
        run(tmp_path, "--name", budget, "--phase", "srt", "--token_budget", budget)
        first.append(metrics(tmp_path / budget)[0]["srt/loss"])
    assert first[0] == pytest.approx(first[1], rel=1e-4)


def updates(folder) -> int:
    return sum(row["phase"] == 1 for row in metrics(folder) if "phase" in row)


def test_both_phases_run_and_report(whole):
    rows = metrics(whole)
    n = updates(whole)
    assert n >= 1 and sum(row.get("phase") == 2 for row in rows) == 4  # 8 questions by 4, twice
    assert {"srt/loss", "budget/loss_tokens"} <= rows[0].keys()
    assert {"kl/right", "kl/wrong", "teacher/copies_wrong", "teacher/entropy", "revise/pass@1", "heldout/length",
            "budget/sampled_tokens"} <= rows[n].keys()
    assert (whole / "traces.jsonl").exists()


def test_the_phases_never_share_a_question(whole):
    phase1 = {row["id"] for row in map(json.loads, (whole / "traces.jsonl").read_text().splitlines()) if "id" in row}
    phase2 = {row["id"] for row in map(json.loads, (whole / "rollouts.jsonl").read_text().splitlines())}
    heldout = {p.id for p in load_task("chain:3", heldout=4).heldout}
    assert phase1 and phase2 and not phase1 & phase2 and not (phase1 | phase2) & heldout


def test_collection_counts_what_it_sampled(whole):
    traces, batches, _ = sdzero.read_traces(whole / "traces.jsonl")
    assert len(batches) == 4 and sum(b["generations"] for b in batches) == 8 + 24 and len(traces) == 24
    inits = {(t.id, tuple(t.init_ids)) for t in traces}
    assert sum(b["sampled_tokens"] for b in batches) >= sum(len(t.revised_ids) for t in traces) + len(inits)


def test_the_teacher_is_the_student_after_phase_1_and_after_a_sync_bitwise(whole):
    """The teacher's weights in a checkpoint against the student's at the moment of the copy."""
    n = updates(whole)

    def teacher(step: int) -> dict[str, torch.Tensor]:
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        out = whole / f"state-{step}.pt"
        dcp_to_torch_save(whole / "checkpoints" / f"step_{step:06d}" / "state", out)
        return torch.load(out, weights_only=False)["teacher"]

    for at, copied_from in ((n + 1, n), (n + 2, n), (n + 3, n + 2), (n + 4, n + 2)):
        student = weights(whole, copied_from)
        found = teacher(at)
        assert all(torch.equal(found[f"lm.{name}"], w) for name, w in student.items() if f"lm.{name}" in found), at
        assert sum(f"lm.{name}" in found for name in student) > 40


@pytest.mark.parametrize("stop", ["srt", "boundary", "sd"])
def test_a_resume_in_either_phase_is_bitwise(stop, whole, tmp_path):
    """From a checkpoint in phase 1, at the boundary, and in phase 2, to the end of the undisturbed run."""
    n = updates(whole)
    step = {"srt": 1, "boundary": n, "sd": n + 1}[stop]
    target = tmp_path / "whole"
    target.mkdir()
    for name in ("traces.jsonl", "metrics.jsonl", "rollouts.jsonl"):
        (target / name).write_bytes((whole / name).read_bytes())
    checkpoint = whole / "checkpoints" / f"step_{step:06d}"
    run(tmp_path, "--name", "whole", "--rounds", "2", "--resume", str(checkpoint))
    assert_same_run(whole, target, n + 4)


def test_a_kill_in_the_middle_of_the_collection_goes_on_where_it_stopped(whole, tmp_path, monkeypatch):
    """The batches that are done are on the disk, and are not sampled again."""
    asked, real = [], sdzero.collect_batch

    def killed_in_the_third(problems, keys, *rest):
        asked.append(keys[0])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(problems, keys, *rest)

    monkeypatch.setattr(sdzero, "collect_batch", killed_in_the_third)
    flags = ["--name", "killed", "--phase", "srt", "--srt_epochs", "1"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *flags)
    torch.distributed.destroy_process_group()
    path = tmp_path / "killed" / "traces.jsonl"
    kept = path.read_bytes()
    assert kept.count(b'"batch"') == 2
    with open(path, "ab") as f:  # what a kill in the middle of an append leaves
        f.write(json.dumps(some_trace()._asdict()).encode() + b'\n{"id": "half a li')
    run(tmp_path, *flags, "--resume", "auto")
    assert asked == [0, 2, 4, 4, 6]
    assert path.read_bytes().startswith(kept) and path.read_bytes() == (whole / "traces.jsonl").read_bytes()


@pytest.mark.parametrize("flag, new", [("--revisions", "8"), ("--srt_questions", "9"), ("--srt_max_tokens", "32"),
                                       ("--seed", "1"), ("--heldout", "5"), ("--baseline", "sft")])
def test_a_collection_goes_on_with_its_own_settings_only(flag, new, tmp_path):
    flags = ["--name", "changed", "--srt_max_tokens", "2", "--phase", "srt"]
    with pytest.raises(SystemExit, match="no trace is left"):
        run(tmp_path, *flags)
    torch.distributed.destroy_process_group()
    with pytest.raises(SystemExit, match=r"traces.jsonl was begun with other settings .*: go on with those"):
        run(tmp_path, *flags, flag, new, "--resume", "auto")
    torch.distributed.destroy_process_group()


def test_a_collection_goes_on_under_another_spelling_of_the_models_folder(tmp_path):
    flags = ["--name", "spelt", "--srt_max_tokens", "2", "--phase", "srt"]
    for more in ([], ["--model", os.path.relpath(CHAIN), "--resume", "auto"]):
        with pytest.raises(SystemExit, match="no trace is left"):
            run(tmp_path, *flags, *more)
        torch.distributed.destroy_process_group()


def test_traces_of_another_run_are_used_as_they_are(whole, tmp_path):
    run(tmp_path, "--name", "again", "--phase", "srt", "--traces", str(whole / "traces.jsonl"))
    n = updates(whole)
    a, b = weights(tmp_path / "again", n), weights(whole, n)
    assert all(torch.equal(a[k], b[k]) for k in a) and not (tmp_path / "again" / "traces.jsonl").exists()


@pytest.mark.parametrize("baseline", ["rft", "sft"])
def test_baselines_train_on_their_own_data(baseline, tmp_path):
    run(tmp_path, "--name", baseline, "--phase", "srt", "--baseline", baseline)
    traces, batches, _ = sdzero.read_traces(tmp_path / baseline / "traces.jsonl")
    assert all(not t.init_ids and not t.control_ids for t in traces) and metrics(tmp_path / baseline)[0]["grad_norm"] > 0
    assert sum(b["generations"] for b in batches) == (32 if baseline == "rft" else 0)


def test_phase_2_alone_starts_from_the_model_as_it_is(tmp_path):
    """At a learning rate of 0 every weight stays."""
    from transformers import AutoModelForCausalLM

    run(tmp_path, "--name", "sd", "--phase", "sd", "--lr", "0")
    assert [row["phase"] for row in metrics(tmp_path / "sd")[:-1]] == [2, 2]
    start = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32).state_dict()
    assert all(torch.equal(w, start[name]) for name, w in weights(tmp_path / "sd", 2).items())


def test_the_phases_share_no_question_of_a_mixture_either(tmp_path):
    """A mixture comes part by part and repeats parts of large weight; both phases see all parts, and never the same question."""
    run(tmp_path, "--name", "mixed", "--task", "1*chain:3+3*chain:4", "--srt_max_tokens", "40", "--srt_questions", "12",
        "--sd_questions", "24", "--eval_every", "9")
    lines = (tmp_path / "mixed" / "traces.jsonl").read_text().splitlines()
    asked = {row["id"] for row in map(json.loads, lines) if "id" in row}
    later = {row["id"] for row in map(json.loads, (tmp_path / "mixed" / "rollouts.jsonl").read_text().splitlines())}
    three = {p.id for p in load_task("chain:3", heldout=0).train}
    assert not asked & later and asked & three and asked - three and later & three and later - three


def test_every_held_out_sample_that_is_asked_for_counts(tmp_path):
    run(tmp_path, "--name", "many", "--eval_only", "--eval_samples", "3")
    assert (metrics(tmp_path / "many")[0]["heldout/pass@1"] * 12) % 1 == pytest.approx(0, abs=1e-9)
    run(tmp_path, "--name", "one", "--eval_only")
    assert metrics(tmp_path / "many")[0]["heldout/pass@1"] != metrics(tmp_path / "one")[0]["heldout/pass@1"]


def test_traces_that_this_runs_questions_are_in_are_refused(whole, tmp_path):
    for flags in (["--srt_questions", "4"], ["--heldout", "100"]):  # then phase 2 or the held-out set has some of them
        with pytest.raises(SystemExit, match="of its questions are held out or phase 2's"):
            run(tmp_path, "--name", "leaky", "--traces", str(whole / "traces.jsonl"), *flags)
        torch.distributed.destroy_process_group()


def test_a_checkpoint_under_another_name_does_not_collect_anew(whole, tmp_path):
    with pytest.raises(SystemExit, match="does not hold all the traces"):
        run(tmp_path, "--name", "other", "--rounds", "2", "--resume", str(whole / "checkpoints" / "step_000001"))
    torch.distributed.destroy_process_group()


def test_no_right_revision_ends_with_advice(tmp_path):
    with pytest.raises(SystemExit, match=r"no trace is left.* 0 of 24 end right.*raise --revisions.*--wrong_share None"):
        run(tmp_path, "--name", "none", "--srt_max_tokens", "2")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("flags, words", [
    (["--srt_questions", "4000", "--sd_questions", "4000"], "the phases take 8,000 different questions and there are"),
    (["--baseline", "rft"], "add --phase srt"), (["--traces", "/nowhere.jsonl"], "no such file"),
    (["--max_tokens", "900"], "--max_tokens 900.*read twice"), (["--srt_max_tokens", "900"], "--srt_max_tokens 900.*read twice"),
    (["--revisions", "0"], "--revisions 0: must be above 0"), (["--phase", "srt", "--baseline", "rft", "--traces", "t.jsonl"], "leave out --traces")])
def test_a_mistake_ends_with_one_clear_line(flags, words, tmp_path):
    try:
        with pytest.raises(SystemExit) as error:
            run(tmp_path, "--name", "m", *flags)
        assert re.search(words, str(error.value)) and "\n" not in str(error.value)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
