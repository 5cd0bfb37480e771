"""The first rank reads the weights; the others get their shards from it, and copies are made from shards."""
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CHAIN, at_most
from ranks import finish, launch
from test_architectures import Family, by_itself, family, random_model
from transformers import AutoModelForCausalLM

from common.microbatches import micro_batches
from common.policy import frozen_copy, full_weights, load_policy
from common.settings import Setup

CPU = torch.device("cpu")
PROMPT, RESPONSE = [5, 6, 7, 8], [9, 10, 11]


FAMILIES = {"tied": None, "experts": "glm4_moe", "tower": "gemma3"}


def checkpoints(folder: Path, names: list[str]) -> list[dict]:
    """Some models, each with what it must be after loading, told by transformers alone. `bare` is the same without
    weights: a rank that opened its file would end the run."""
    found = []
    for name in names:
        path = folder / name
        if FAMILIES[name] is None:
            path.symlink_to(CHAIN)
        else:
            random_model(family(FAMILIES[name]), path)
        bare = folder / f"{name}, bare"
        shutil.copytree(path, bare, ignore=shutil.ignore_patterns("*.safetensors"))
        assert not list(bare.glob("*.safetensors")) and list(path.glob("*.safetensors"))
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        found.append({
            "paths": (str(path), str(bare)), "parameters": dict(lm.named_parameters()), "buffers": dict(lm.named_buffers()),
            "logp": by_itself(lm, PROMPT, RESPONSE), "tied": tied(lm), "ranks": (0,) if name == "tower" else (0, 2),
        })
    return found


def loads(file: str) -> None:
    """On each rank: every model is whole, and so is its copy, whatever it is sharded over."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for case in torch.load(file, weights_only=False):
        path = case["paths"][rank > 0]
        for lora in case["ranks"]:
            totals = []
            for over in ("machine", "all"):
                policy = load_policy(path, CPU, Setup(shard=over, lora_rank=lora))
                copy = frozen_copy(policy, CPU)
                totals += [as_expected(policy, case), as_expected(copy, case)]
            assert all(torch.equal(total, totals[0]) for total in totals)
            assert tied(policy.lm) == tied(copy.lm) == case["tied"]
    dist.destroy_process_group()


def tied(lm) -> bool:
    return lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def as_expected(model, case: dict) -> torch.Tensor:
    """Parameters, buffers and the loss of one response are the plain model's; → the loss."""
    weights = dict(full_weights(model))
    for name, expected in case["parameters"].items():
        assert torch.equal(weights[name], expected), name
    buffers = dict(model.lm.named_buffers())
    assert buffers.keys() == case["buffers"].keys()
    for name, expected in case["buffers"].items():
        assert buffers[name].dtype == expected.dtype and torch.equal(buffers[name], expected), name
    micro, = micro_batches([PROMPT], [RESPONSE], None, at_most(100), CPU)
    stats = model.stats(micro, 1.0)
    torch.testing.assert_close(stats.logp, case["logp"], atol=1e-4, rtol=0)
    model.reshard()
    return stats.logp


@pytest.mark.parametrize("world, names", [(2, ["experts", "tower"]), (4, ["tied"])])
def test_every_rank_has_the_weights_that_the_first_one_read(world, names, tmp_path):
    """Tied weights, experts, buffers that a checkpoint holds and that it does not, a frozen base with adapters; on one
    machine and on two."""
    torch.save(checkpoints(tmp_path, names), tmp_path / "cases.pt")
    finish(launch(world, tmp_path / "log", loads, str(tmp_path / "cases.pt"), local_world=2), tmp_path / "log")


def ends(paths: tuple[str, str], folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with pytest.raises(SystemExit) as end:
        load_policy(paths[rank], CPU, Setup())
    Path(f"{folder}/{rank}").write_text(end.value.code)


def test_a_model_that_the_first_rank_refuses_ends_all_ranks_with_the_same_words(tmp_path):
    path = random_model(Family("granite", dict(family("granite").config, logits_scaling=8.0)), tmp_path / "model")
    log = tmp_path / "log"
    finish(launch(2, log, ends, (path, "/nowhere"), str(tmp_path)), log)
    assert "transforms its logits" in (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
