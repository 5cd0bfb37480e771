"""A run from the outside: resume, crashes, damaged checkpoints, and what a user's mistakes look like."""
import dataclasses
import importlib
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import CHAIN, GROUPS, MEASURED, ROOT, interrupted
from ranks import another_port, finish, launch
from ranks import run_grpo as grpo_in_a_rank
from test_house import ALGORITHMS
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import grpo
from common import checkpoints, log, report, rollouts
from common import run as runs
from common.log import reduce_over_ranks
from common.run import Run
from common.settings import Setup, parse
from common.verifiers import Verdict
from common.verifiers.pool import Verifier

SMALL = [*GROUPS, "--eval_every", "2"]


def run_grpo(out, *flags: str) -> None:
    grpo.main(parse(grpo.Args, grpo.presets, [*SMALL, "--out", str(out), *flags]))


def metrics(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


def weights(folder, step: int) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / f"step_{step:06d}").state_dict()


def teacher_gaps(folder, step: int) -> tuple[float, float]:
    """The largest distance of a checkpoint's teacher from the embedded model, and from the checkpoint's student."""
    with tempfile.TemporaryDirectory() as place:
        dcp_to_torch_save(folder / "checkpoints" / f"step_{step:06d}" / "state", f"{place}/state.pt")
        teacher = torch.load(f"{place}/state.pt", weights_only=False)["teacher"]
    start = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32).state_dict()
    far = lambda other: max((teacher[f"lm.{n}"] - w).abs().max().item() for n, w in other.items() if f"lm.{n}" in teacher)
    return far(start), far(weights(folder, step))


def assert_same_run(a, b, step: int) -> None:
    assert metrics(a) == metrics(b)
    wa, wb = weights(a, step), weights(b, step)
    assert all(torch.equal(wa[n], wb[n]) for n in wa)


def assert_same_report(a, b) -> None:
    """What the report is made of, beside the metrics."""
    assert (a / "heldout.jsonl").read_text() == (b / "heldout.jsonl").read_text()
    first_examples = [(run / "example.jsonl").read_text().splitlines()[0] for run in (a, b)]
    assert first_examples[0] == first_examples[1]


FOUR_STEPS = ["--steps", "4", "--save_every", "2"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a run `r` of four steps with checkpoints after two and four. Nothing may be written to it."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "draw_curves", log.draw_curves)
        patch.setattr(runs, "write_report", report.write_report)
        run_grpo(out, *FOUR_STEPS, "--name", "r", "--track", "tensorboard")
    return out


def test_a_run_leaves_what_the_readme_promises(finished_run):
    run = finished_run / "r"
    promised = {"args.json", "metrics.jsonl", "rollouts.jsonl", "curves.png", "checkpoints", "report.html"}
    assert {p.name for p in run.iterdir()} >= promised
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG") and list((run / "tensorboard").iterdir())
    assert json.loads((run / "args.json").read_text())["steps"] == 4
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert ["heldout/pass@1" in row for row in rows] == [True, False, True, False, True]
    wanted = {"reward/mean", "grad_norm", "entropy", "clip_frac", "frac_zero_std", "frac_truncated", "length/mean",
              "mismatch/kl", "mismatch/max_abs_dlogp", "mismatch/tis"}
    assert wanted <= rows[0].keys() and rows[0]["mismatch/max_abs_dlogp"] < 1e-4
    times = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"time/sample", "time/verify", "time/score", "time/update"} <= times.keys()
    folder = run / "checkpoints" / "step_000002"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Compute 23+45."}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    dumped = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])
    assert dumped.keys() >= {"step", "id", "response", "reward"}


def test_four_steps_are_two_and_a_resume_and_two_bitwise(finished_run, tmp_path):
    """As a shorter run leaves its folder."""
    run_grpo(tmp_path, "--steps", "2", "--name", "parts")
    run_grpo(tmp_path, "--steps", "4", "--name", "parts", "--resume", "auto")
    assert_same_run(finished_run / "r", tmp_path / "parts", 4)


EVERYTHING = ["--minibatches", "2", "--epochs", "2", "--beta", "0.04", "--dynamic_sampling", "1"]


def test_two_steps_with_everything_are_one_and_a_resume_and_one_bitwise(tmp_path):
    """As a kill leaves the folder."""
    run_grpo(tmp_path, "--steps", "2", "--save_every", "1", "--name", "whole", *EVERYTHING)
    interrupted(tmp_path / "whole", "parts", 1)
    run_grpo(tmp_path, "--steps", "2", "--name", "parts", "--resume", "auto", *EVERYTHING)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 2)
    assert_same_report(tmp_path / "whole", tmp_path / "parts")


def whole_part_and_resumed(out: str) -> None:
    """On each rank: a run, a resume of a copy that ends earlier, and a run without any signal."""
    flags = [*SMALL, "--out", out]
    grpo_in_a_rank([*flags, *FOUR_STEPS, "--name", "whole"])
    another_port()
    if os.environ["RANK"] == "0":  # the other waits for it
        interrupted(Path(out) / "whole", "parts", 2)
    grpo_in_a_rank([*flags, *FOUR_STEPS, "--name", "parts", "--resume", "auto"])
    another_port()
    model = Path(out) / "model"
    if os.environ["RANK"] == "0":
        unfinished = shutil.copytree(CHAIN, f"{model}.tmp")
        (Path(unfinished) / "generation_config.json").write_text('{"eos_token_id": 0}')  # not what ends a turn
        os.rename(unfinished, model)
    while not model.exists():
        time.sleep(0.1)
    grpo_in_a_rank([*flags, "--model", str(model), "--max_tokens", "2", "--steps", "1", "--name", "zero"])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    finish(launch(2, out / "log", whole_part_and_resumed, str(out)), out / "log")
    return out


def test_four_steps_are_two_and_a_resume_and_two_bitwise_in_two_processes(two_processes):
    assert_same_run(two_processes / "whole", two_processes / "parts", 4)
    assert_same_report(two_processes / "whole", two_processes / "parts")
    assert "resumed from" in (two_processes / "log").read_text()


def test_the_manifest_lists_the_files_of_both_processes(two_processes):
    folder = two_processes / "whole" / "checkpoints" / "step_000004"
    written = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    listed = json.loads((folder / "manifest.json").read_text())
    assert len([name for name in written if name.endswith(".distcp")]) == 2
    assert listed.keys() == written - {"manifest.json"}  # each rank's files and the first one's


def test_a_checkpoint_ends_a_response_where_training_did(two_processes):
    """The start's own end token and that of the chat template."""
    folder = two_processes / "zero" / "checkpoints" / "step_000001"
    own = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert set(GenerationConfig.from_pretrained(folder).eos_token_id) == {0, own}


def test_groups_with_equal_rewards_are_counted_and_change_nothing(two_processes):
    """A model that cannot answer in two tokens: every reward is 0, no gradient, no NaN, no hang in two processes."""
    rows = metrics(two_processes / "zero")
    assert rows[0]["frac_zero_std"] == 1 and rows[0]["frac_truncated"] == 1 and rows[0]["grad_norm"] == 0
    start = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32).state_dict()
    assert all(torch.equal(w, start[n]) for n, w in weights(two_processes / "zero", 1).items())


def test_a_kill_in_the_middle_of_a_checkpoint_resumes_from_the_previous_one(finished_run, tmp_path):
    """SIGKILL at the moment the second checkpoint has files but is not complete."""
    flags = [*SMALL, "--out", str(tmp_path), *FOUR_STEPS, "--name", "killed"]
    process, = launch(1, tmp_path / "log", grpo_in_a_rank, flags)
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.time() + 120
    while time.time() < deadline and not (checkpoints / "tmp-step_000004" / "state").exists():
        assert process.is_alive(), "the run ended before it could be killed"
    process.kill()
    process.join()
    if (checkpoints / "step_000004").exists():  # the machine was faster than this test: undo the finished one
        shutil.rmtree(checkpoints / "step_000004")
    assert (checkpoints / "step_000002").exists()
    (checkpoints / "tmp-step_000003").mkdir()  # of a kill that no later save overwrites
    run_grpo(tmp_path, *FOUR_STEPS, "--name", "killed", "--resume", "auto")
    assert not list(checkpoints.glob("tmp-*"))
    assert_same_run(finished_run / "r", tmp_path / "killed", 4)


@pytest.mark.parametrize("victim", ["model.safetensors", "state/__0_0.distcp", "trainer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(victim, damage, finished_run, tmp_path):
    out = tmp_path / "runs"
    shutil.copytree(finished_run, out)
    file = out / "r" / "checkpoints" / "step_000004" / victim
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    with pytest.raises(SystemExit, match=re.escape(victim)):
        run_grpo(out, "--steps", "5", "--name", "r", "--resume", "auto")
    torch.distributed.destroy_process_group()


def test_a_copy_that_a_user_keeps_beside_the_checkpoints_stays(tmp_path, monkeypatch, one_process):
    """It is not one of the two that a run keeps, nor the one that it goes on from."""
    monkeypatch.setattr(checkpoints, "training_state", lambda *_: {})
    monkeypatch.setattr(checkpoints, "save_model", lambda *_: None)
    monkeypatch.setattr(checkpoints.dcp, "save", lambda _, checkpoint_id: checkpoint_id.mkdir(parents=True))
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    place = tmp_path / "checkpoints"
    for name in ("step_000001-best", "step_000009-old"):
        (place / name).mkdir(parents=True)
    for step in (1, 2, 3):
        checkpoints.save(place / f"step_{step:06d}", None, None, None, tokenizer, {"step": step}, None)
    left = sorted(folder.name for folder in place.iterdir())
    assert left == ["step_000001-best", "step_000002", "step_000003", "step_000009-old"]
    assert checkpoints.last(tmp_path).name == "step_000003"


def test_going_back_past_later_checkpoints_is_refused_until_they_are_moved(finished_run, tmp_path):
    """They would be resumed, or kept in place of the new ones."""
    shutil.copytree(finished_run / "r", tmp_path / "r")
    folder = tmp_path / "r" / "checkpoints"
    back = ["--steps", "3", "--name", "r", "--resume", str(folder / "step_000002")]
    with pytest.raises(SystemExit, match=r"step_000004 is later than .*step_000002"):
        run_grpo(tmp_path, *back)
    torch.distributed.destroy_process_group()
    assert len(metrics(tmp_path / "r")) == 5  # nothing was dropped
    (folder / "step_000004").rename(tmp_path / "aside")
    run_grpo(tmp_path, *back)
    assert (folder / "step_000003").exists() and len(metrics(tmp_path / "r")) == 4


@pytest.mark.parametrize("mixed_of_four, rounds, left", [(1, 3, 0.25), (2, 2, 0.0), (4, 1, 0.0), (0, 3, 1.0)])
def test_dynamic_sampling_refills_up_to_its_rounds_and_then_takes_what_it_has(mixed_of_four, rounds, left, tmp_path, monkeypatch):
    """Of each four groups that are sampled the first few have mixed rewards."""
    starts, judged = [], []
    take = lambda *args, real=rollouts.take: (starts.append(args[2]), real(*args))[1]
    monkeypatch.setattr(rollouts, "take", take)

    def verdicts(self, problems, texts):
        if len(texts) == 4:  # the held-out problems
            return [Verdict(0.0)] * 4
        judged.append(len(texts))
        return [Verdict(float(i % 4 == 0 and i // 4 < mixed_of_four)) for i in range(len(texts))]

    monkeypatch.setattr(Verifier, "__call__", verdicts)
    monkeypatch.setattr(Verifier, "check", lambda *_: None)
    run_grpo(tmp_path, "--steps", "1", "--name", "refill", "--dynamic_sampling", "2", "--max_tokens", "4")
    row = metrics(tmp_path / "refill")[0]
    assert len(judged) == rounds and len(set(starts)) == len(starts) == rounds and row["frac_zero_std"] == left


def test_a_checkpoint_is_resumed_with_the_adapters_it_was_trained_with(finished_run, tmp_path):
    checkpoint = str(finished_run / "r" / "checkpoints" / "step_000004")
    with pytest.raises(SystemExit, match="was trained with --lora_rank 0") as error:
        run_grpo(tmp_path, "--resume", checkpoint, "--lora_rank", "4")
    torch.distributed.destroy_process_group()
    assert "\n" not in str(error.value)


def test_eval_only_evaluates_and_trains_nothing_and_a_new_run_does_not_touch_an_old_one(finished_run):
    before = (finished_run / "r" / "metrics.jsonl").read_bytes()
    trained = finished_run / "r" / "checkpoints" / "step_000004"
    run_grpo(finished_run, "--eval_only", "--model", str(trained), "--name", "r")
    row, = metrics(finished_run / "r-2")
    assert row["heldout/pass@1"] == metrics(finished_run / "r")[-1]["heldout/pass@1"]
    assert not list((finished_run / "r-2" / "checkpoints").iterdir())
    assert (finished_run / "r" / "metrics.jsonl").read_bytes() == before


def first_edition(folder) -> None:
    """What a checkpoint of the first edition has beside its state."""
    folder.mkdir()
    args = dataclasses.asdict(parse(grpo.Args, grpo.presets, SMALL)) | {"workers": 4, "keep": 2}
    (folder / "trainer.json").write_text(json.dumps({"step": 1, "method": "grpo", "args": args}))
    digest = checkpoints.checksum(folder / "trainer.json")
    (folder / "manifest.json").write_text(json.dumps({"trainer.json": digest}))


MISTAKES = {
    "missing model": (["--model", "/nowhere/model"], "no such folder"),
    "folder without a model": (["--model", "EMPTY"], "no config.json"),
    "missing task file": (["--task", "jsonl:/nowhere.jsonl"], "no such file"),
    "broken line": (["--task", "jsonl:BROKEN"], r"broken.jsonl, line 2: not JSON"),
    "missing field": (["--task", "jsonl:NOFIELD"], r"nofield.jsonl, line 1: field 'answer' is missing"),
    "empty dataset": (["--task", "jsonl:BLANK"], "0 different problems"),
    "unknown source": (["--task", "nothing"], "unknown source 'nothing'"),
    "too few problems": (["--heldout", "100000", "--task", "jsonl:ONE"], "100000 are to be held out"),
    "prompt longer than the context": (["--max_tokens", "5000"], "exceed the model's context of 1024"),
    "group of one": (["--group_size", "1"], "--group_size 1: advantages compare"),
    "batch not divisible": (["--minibatches", "3"], "do not divide into 1 process"),
    "resume from nothing": (["--resume", "EMPTY"], "no manifest.json"),
    "temperature out of range": (["--temperature", "0"], "--temperature 0.0"),
    "negative learning rate": (["--lr", "-1"], "--lr -1.0"),
    "clip out of range": (["--clip_low", "1.5"], "--clip_low 1.5"),
    "first-edition checkpoint": (["--resume", "FIRST"], "of the first edition, whose state this"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_ends_with_one_clear_line(mistake, tmp_path):
    flags, words = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": \n')
    (tmp_path / "nofield.jsonl").write_text('{"question": "1+1?"}\n')
    (tmp_path / "blank.jsonl").write_text("")
    (tmp_path / "one.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    first_edition(tmp_path / "first")
    places = {"FIRST": "first", "EMPTY": "empty", "BROKEN": "broken.jsonl", "NOFIELD": "nofield.jsonl", "BLANK": "blank.jsonl",
              "ONE": "one.jsonl"}
    for name, file in places.items():
        flags = [f.replace(name, str(tmp_path / file)) for f in flags]
    try:
        with pytest.raises(SystemExit) as error:
            run_grpo(tmp_path / "runs", "--steps", "1", *flags)
        assert re.search(words, str(error.value)) and str(error.value).startswith("error: ")
        assert "\n" not in str(error.value)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("flags", [["--no_such_flag", "1"], ["--steps", "many"], ["--loss", "ppo"]])
def test_a_flag_that_does_not_exist_or_fit_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as error:
        parse(grpo.Args, grpo.presets, flags)
    assert error.value.code == 2
    assert flags[0].strip("-") in capsys.readouterr().err or flags[-1] in capsys.readouterr().err


@pytest.mark.parametrize("name", ALGORITHMS)
def test_help_explains_every_flag_the_methods_own_first(name, capsys):
    """The shared flags form a group of their own; a flag's comment is its explanation."""
    module = importlib.import_module(name)
    with pytest.raises(SystemExit):
        parse(module.Args, module.presets, ["--help"])
    shown = re.sub(r"[│─╭╮╰╯\s]+", " ", capsys.readouterr().out)
    own, title, shared = shown.partition(" setup options ")
    assert title
    for part, text, file in ((module.Args, own, f"{name}.py"), (Setup, shared, "common/settings.py")):
        source = (ROOT / file).read_text()
        for field in part.__dataclass_fields__.keys() - {"setup"}:
            comment, = re.findall(rf"^    {field}: .*?  # (.*)$", source, re.MULTILINE)
            assert f"--{field.replace('_', '-')} " in text or f"--{field.replace('_', '-')}, " in text
            assert re.sub(r"\s+", "", comment) in re.sub(r"\s+", "", text), field


def test_steps_run_over_two_phases_and_a_resume_skips_what_is_done(tmp_path, one_process):
    """A checkpoint at the end of each phase, and of what is due between; each step in its own random state."""
    drawn, saved = {}, []

    def phases(first_step: int) -> list[int]:
        run = object.__new__(Run)
        run.setup = Setup(save_every=2)
        run.rank, run.world, run.folder = 0, 1, tmp_path
        run.first_step = run.step = first_step
        run.asked = run.stopping = False
        run.without_update = 0
        run.save = lambda: saved.append(run.step)
        done = []
        for first, last in ((0, 3), (3, 6)):
            for step in run.steps(first, last):
                assert run.step == step
                done.append(step)
                random_number = torch.rand(()).item()
                assert drawn.setdefault(step, random_number) == random_number
        assert run.step == 6
        return done

    assert phases(0) == [0, 1, 2, 3, 4, 5] and saved == [2, 3, 4, 6]
    assert len(set(drawn.values())) == 6
    for first_step in (2, 3, 4, 6):
        saved.clear()
        assert phases(first_step) == list(range(first_step, 6))
        assert saved == [step for step in (2, 3, 4, 6) if step > first_step]


def metrics_of_a_rank(out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    metrics = {
        "mean": [torch.tensor([[1.0, 2.0], [3.0, 6.0]]), [4]] if rank == 0 else [[20.0]],
        "length/max": [torch.tensor([3.0]), [7.0]] if rank == 0 else [[], torch.tensor([5.0])],
        "bools": [[True, False]] if rank == 0 else [torch.tensor([True, True])],
        "only on the second": [[]] if rank == 0 else [[8.0]],
        "nowhere": [torch.empty(0)],
        "max of nothing": [[]],
    }
    Path(f"{out}/{rank}").write_text(json.dumps(reduce_over_ranks(metrics)))
    dist.destroy_process_group()


def test_a_metric_is_the_mean_over_all_values_of_all_ranks_and_max_their_maximum(tmp_path):
    """Not a mean of means; a metric that has no value anywhere is left out."""
    finish(launch(2, tmp_path / "log", metrics_of_a_rank, str(tmp_path)), tmp_path / "log")
    rows = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert rows[0] == rows[1] == {
        "mean": 6.0, "length/max": 7.0, "bools": 0.75, "only on the second": 8.0,
    }


@pytest.mark.parametrize("name", list(grpo.VARIANTS))
def test_every_variant_trains_from_one_command(name, tmp_path):
    run_grpo(tmp_path, "--loss", name, "--steps", "1", "--name", name)
    row = metrics(tmp_path / name)[0]
    assert row["grad_norm"] > 0 and row["lr"] == 1e-4
