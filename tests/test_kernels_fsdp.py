"""Two ranks, weights sharded by FSDP2: head_loss and token_stats inside the policy's forward see whole weights, and the
gradients of both ranks together are those of one process with full logits."""

import torch
import torch.distributed as dist
from ranks import finish, launch
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.microbatches import Micro
from common.policy import Policy, from_first_rank, make_mesh, shard
from kernels.head import token_stats

WORLD, LENGTH = 2, 9


def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                                        tie_word_embeddings=True))


def sharded(lm: Qwen3ForCausalLM) -> Policy:
    cpu = torch.device("cpu")
    return shard(Policy(lm), cpu, make_mesh(cpu, "machine"), from_first_rank)


def full_logits_gradient(ids: torch.Tensor, hinted: torch.Tensor) -> dict[str, torch.Tensor]:
    """of Σ (kl + ¼·log p) over the tokens of all ranks, by PyTorch's log_softmax alone."""
    lm = model().double()
    lp = lm(input_ids=ids).logits.log_softmax(-1)
    with torch.no_grad():
        lq = lm(input_ids=hinted).logits.log_softmax(-1)
    loss = (lp.exp() * (lp - lq)).sum() + 0.25 * lp.gather(-1, ids[..., None]).sum()
    loss.backward()
    return {name: p.grad for name, p in lm.named_parameters()}


def on_each_rank() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ids, hinted = torch.randint(61, (2, WORLD, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = full_logits_gradient(ids, hinted)
    targets = ids[rank]
    row = lambda tokens: Micro([0], [LENGTH], tokens[rank : rank + 1], torch.arange(LENGTH), targets)
    loss = lambda stats, _: stats.kl + 0.25 * stats.logp
    for per_response in (False, True):
        student, teacher = (sharded(model()) for _ in range(2))
        # a teacher of its own, as an EMA is: hidden states and head out of its own forward
        seen = [teacher.read(row(hinted))]
        teacher_hidden, _ = seen[0]
        total, _ = student(row(ids), loss, None, seen, per_response=per_response)
        total.backward()
        for name, p in student.lm.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), expected[name].float(), rtol=1e-4, atol=1e-5)
        try:  # outside of the forward the weight is one rank's share, and that is said
            token_stats(teacher_hidden, student.lm.get_output_embeddings().weight, targets)
        except TypeError as error:
            assert "DTensor" in str(error)
        else:
            raise AssertionError("a DTensor went through")
    dist.destroy_process_group()


def test_sharded_weights_of_two_ranks(tmp_path):
    finish(launch(WORLD, tmp_path / "log", on_each_rank), tmp_path / "log")
