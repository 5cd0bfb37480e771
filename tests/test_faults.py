"""What a run survives: kills, a polite request to stop, gradients that are not finite, a full disk."""
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import CHAIN, ROOT, TASK
from ranks import finish, launch, run_grpo
from test_run import assert_same_run, metrics, weights
from transformers import AutoModelForCausalLM

import grpo
from common.run import rendezvous

STEPS = 4
TINY = [*TASK, "--batch_size", "2", "--group_size", "4", "--heldout", "2", "--eval_every", "2", "--steps", str(STEPS),
        "--save_every", "1"]


def tiny(out, name: str, *flags: str) -> list[str]:
    return [*TINY, "--out", str(out), "--name", name, *flags]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of runs by one and by two ranks that nothing happened to, and the seconds that the latter took."""
    out = tmp_path_factory.mktemp("undisturbed")
    finish(launch(1, out / "log1", run_grpo, tiny(out, "1")), out / "log1")
    start = time.monotonic()
    finish(launch(2, out / "log2", run_grpo, tiny(out, "2")), out / "log2")
    return out, time.monotonic() - start


def rows_of(folder) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(condition, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


MOMENTS = (0.15, 0.4, 0.65)  # of an undisturbed run, about: as it starts, at its first steps, later


def test_a_run_survives_kills_of_any_rank_at_any_moment_bitwise(undisturbed, tmp_path):
    """Two ranks; one is killed about a moment of its run, the other ends by itself, both start again with --resume auto.
    What comes before a kill is kept, so that every attempt is further into the run."""
    whole, seconds = undisturbed
    rng, log = random.Random(0), tmp_path / "log"
    flags = tiny(tmp_path, "killed", "--resume", "auto")
    kills = 0
    for moment in MOMENTS:
        ranks = launch(2, log, run_grpo, flags)
        victim, other = rng.sample(ranks, 2)
        victim.join(rng.uniform(0.9, 1.1) * moment * seconds)
        if victim.exitcode is not None:  # the rest of the run was shorter than that
            finish(ranks, log)
            break
        victim.kill()
        victim.join()
        kills += 1
        other.terminate()  # as torchrun does
        other.join(30)
        assert other.exitcode not in (None, 0), "a rank that lost its peer did not end"
    finish(launch(2, log, run_grpo, flags), log)
    assert kills >= 2
    assert_same_run(whole / "2", tmp_path / "killed", STEPS)
    assert not list((tmp_path / "killed").glob("**/tmp-*"))


def test_a_restarted_rank_does_not_find_where_the_last_attempts_ranks_were(monkeypatch):
    """torchrun's attempts share a store: on one machine they are told apart, on several the user must take care."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchruns = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.port), GROUP_WORLD_SIZE="1",
                     TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_MAX_RESTARTS="3")
    for name, value in torchruns.items():
        monkeypatch.setenv(name, value)
    stores = []
    for attempt in "0011":  # two ranks in each
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        stores.append(rendezvous()[0])
    stores[0].set("address", "here")
    assert [store.check(["address"]) for store in stores] == [True, True, False, False]
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        rendezvous()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    rendezvous()


def test_torchrun_restarts_a_killed_rank_and_stops_on_sigterm_and_the_run_goes_on_bitwise(undisturbed, tmp_path):
    """A kill under torchrun --max-restarts; after the restart SIGTERM to torchrun; then --resume auto."""
    whole, _ = undisturbed
    folder, log = tmp_path / "r", tmp_path / "log"
    flags = tiny(tmp_path, "r", "--resume", "auto", "--steps", "60")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3",
               "tests/ranks.py", *flags]
    with open(log, "w") as f:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=f, stderr=f, env={**os.environ, "PYTHONPATH": str(ROOT)})
    children = lambda: {int(p) for p in open(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read().split()}
    saved = lambda: max((int(p.name[5:]) for p in folder.glob("checkpoints/step_*")), default=0)
    try:
        wait_for(lambda: rows_of(folder) >= 1, "the first step")
        time.sleep(random.Random(1).random())
        ranks, before = children(), saved()
        assert len(ranks) == 2
        os.kill(min(ranks), signal.SIGKILL)
        wait_for(lambda: len(children() - ranks) == 2, "the restart")
        wait_for(lambda: saved() > before + 1, "a step after the restart")
        assert len(children()) == 2 and not children() & ranks
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(60)
    finally:
        launcher.kill()
    done = rows_of(folder)
    assert launcher.returncode == 1  # its own SignalException, whatever its ranks ended with
    assert "stopped; --resume auto goes on" in log.read_text() and "SIGTERM" in log.read_text()
    assert (folder / "checkpoints" / f"step_{done:06d}").exists() and done < 60
    if done < STEPS:  # it stopped within the steps of the undisturbed run: go on to its end
        finish(launch(2, log, run_grpo, tiny(tmp_path, "r", "--resume", "auto")), log)
        assert_same_run(whole / "2", folder, STEPS)
    else:
        assert metrics(folder)[:STEPS] == metrics(whole / "2")[:STEPS]


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_ends_the_step_checkpoints_exits_0_and_the_run_goes_on_bitwise(world, undisturbed, tmp_path):
    """Two ranks: SIGTERM to one of them alone stops both after the same step."""
    whole, _ = undisturbed
    folder, log = tmp_path / "r", tmp_path / "log"
    ranks = launch(world, log, run_grpo, tiny(tmp_path, "r", "--save_every", "1000"))
    wait_for(lambda: rows_of(folder) >= 1, "the first step")
    ranks[-1].terminate()
    finish(ranks, log)
    steps = rows_of(folder)
    assert 1 <= steps < STEPS and "heldout/pass@1" in metrics(folder)[0] and "stopped" in log.read_text()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{steps:06d}"]
    finish(launch(world, log, run_grpo, tiny(tmp_path, "r", "--resume", "auto")), log)
    assert_same_run(whole / str(world), folder, STEPS)


def test_a_handler_of_sigterm_does_not_outlive_its_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run_grpo(tiny(tmp_path, "r", "--steps", "1", "--max_tokens", "2"))
    assert signal.getsignal(signal.SIGTERM) == before


def tear(folder) -> None:
    """What a kill in the middle of a line leaves of both logs."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(folder / name, "a") as f:
            f.write('{"step": 3, "response": "a } in a text }')


def test_a_line_that_a_kill_cut_short_is_dropped_and_no_other(undisturbed, tmp_path):
    """Wherever the cut: also behind a brace within the line, and before there is any checkpoint."""
    shutil.copytree(undisturbed[0] / "1", tmp_path / "r")
    folder = tmp_path / "r"
    last = sorted((folder / "checkpoints").iterdir())[-1]
    rollouts = (folder / "rollouts.jsonl").read_text()
    tear(folder)
    run_grpo(tiny(tmp_path, "r", "--resume", "auto"))
    assert_same_run(undisturbed[0] / "1", folder, STEPS)
    assert (folder / "rollouts.jsonl").read_text() == rollouts and last.exists()
    shutil.rmtree(folder / "checkpoints")
    tear(folder)
    run_grpo(tiny(tmp_path, "r", "--resume", "auto"))
    assert_same_run(undisturbed[0] / "1", folder, STEPS)
    assert (folder / "rollouts.jsonl").read_text() == rollouts


def poisoned(steps: set[int], original=grpo.advantages):
    """grpo.advantages whose n-th call gives NaN, for n in `steps`."""
    calls = iter(range(10**6))
    return lambda *args: original(*args) * (math.nan if next(calls) in steps else 1.0)


def poison_rank_1(argv: list[str]) -> None:
    grpo.advantages = poisoned({1, 2} if os.environ["RANK"] == "1" else set())
    run_grpo(argv)


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_and_counted_on_all(tmp_path):
    log = tmp_path / "log"
    finish(launch(2, log, poison_rank_1, tiny(tmp_path, "r")), log)
    rows = metrics(tmp_path / "r")
    assert [row["skipped_updates"] for row in rows[:4]] == [0, 1, 1, 0]
    assert ["grad_norm" in row for row in rows[:4]] == [True, False, False, True]
    folders = sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir())
    assert folders == ["step_000001", "step_000004"]
    after = weights(tmp_path / "r", 4)
    assert all(w.isfinite().all() for w in after.values())
    start = AutoModelForCausalLM.from_pretrained(CHAIN, dtype=torch.float32).state_dict()
    assert any(not torch.equal(w, start[n]) for n, w in after.items())


def test_a_run_without_a_finite_gradient_stops_and_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "advantages", poisoned(set(range(1, 99))))
    with pytest.raises(SystemExit) as error:
        run_grpo(tiny(tmp_path, "r", "--steps", "50"))
    torch.distributed.destroy_process_group()
    assert re.fullmatch(r"error: 5 steps in a row without an update.*checkpoint is \S*/r/checkpoints/step_000001: .*",
                        str(error.value))
    assert len(metrics(tmp_path / "r")) == 6
    assert max(p.name for p in (tmp_path / "r" / "checkpoints").iterdir()) == "step_000001"


def test_a_full_disk_is_told_in_words_and_the_previous_checkpoint_stands(undisturbed, tmp_path):
    """The system's own error at a real write: files must not grow beyond a limit."""
    shutil.copytree(undisturbed[0] / "1", tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / f"step_{STEPS:06d}")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(SystemExit) as error:
            run_grpo(tiny(tmp_path, "r", "--resume", "auto"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        torch.distributed.destroy_process_group()
    assert re.fullmatch(r"error: \S*/step_000004 could not be written \(.* GiB free\); the last complete checkpoint "
                        r"is \S*/step_000003: make room and go on with --resume auto", str(error.value))
    run_grpo(tiny(tmp_path, "r", "--resume", "auto"))
    assert_same_run(undisturbed[0] / "1", tmp_path / "r", STEPS)


def test_metrics_that_cannot_be_written_are_told_in_words(tmp_path, monkeypatch):
    def full(metrics):
        (tmp_path / "r" / "metrics.jsonl").symlink_to("/dev/full")  # no write to it finds room
        return {}

    monkeypatch.setattr("common.run.reduce_over_ranks", full)
    with pytest.raises(SystemExit, match=r"^error: \S*/r/metrics.jsonl could not be written \(.*No space left on device"):
        run_grpo(tiny(tmp_path, "r"))
    torch.distributed.destroy_process_group()
