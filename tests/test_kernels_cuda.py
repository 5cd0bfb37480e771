"""kernels/ on a real GPU, against the oracles of test_kernels.py and test_kernels_digits.py on the CPU in float64.

What the interpreter of Triton cannot show: compiled kernels, bf16 products with fp32 results, chunks that wait for each
other. Run `pytest tests/test_kernels_cuda.py` on a machine with one.
"""
import pytest
import test_kernels as laws
import test_kernels_digits as digits
import torch
from torch import Tensor

from common.sampler import draw
from kernels import head as head_module
from kernels.divergence import Divergence
from kernels.head import head_loss, token_stats

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def moved(case, device: str = "cuda"):
    """A case of either module on another device; its hidden states and head are leaves again."""
    placed = []
    for name, part in zip(case._fields, case):
        if not isinstance(part, Tensor):
            placed.append(type(part)(*(x.to(device) for x in part)))
        elif name in ("hidden", "head"):
            placed.append(part.detach().to(device).requires_grad_())
        else:
            placed.append(part.to(device))
    return type(case)(*placed)


def on_gpu(c: laws.Case, divergence: Divergence, temperature: float = 1.0) -> list[tuple]:
    """(loss, stats, gradients) of both modes, brought back."""
    found = laws.both_modes(moved(c), divergence, temperature)
    return [(loss.cpu(), [x.cpu() for x in stats], [g.cpu() for g in of]) for loss, stats, of in found]


def agrees(c: laws.Case, divergence: Divergence, value: float, gradient: float, temperature: float = 1.0) -> None:
    """value: tolerance of the statistics, relative to the largest; gradient: of the gradients, in the Frobenius norm."""
    expected = laws.oracle(*c[:5], divergence, temperature)
    loss = laws.weighted(expected, c.weights).sum()
    right = laws.gradients(loss, c)
    for loss_here, stats, found in on_gpu(c, divergence, temperature):
        for name, x, y in zip(laws.TokenStats._fields, stats, expected):
            laws.close(x, y, value, name)
        assert abs(loss_here - loss) <= value * laws.weighted(expected, c.weights).abs().sum()
        for x, y in zip(found, right):
            assert x.dtype == c.hidden.dtype
            assert (x.double() - y.double()).norm() <= gradient * y.double().norm()


@pytest.mark.parametrize("vocabulary", [1, 31, 1024, 1025, 5003])
@pytest.mark.parametrize("name", laws.DIVERGENCES)
def test_fp32_values_and_gradients_are_those_of_full_logits_in_float64(name, vocabulary):
    agrees(laws.case(9, vocabulary), laws.DIVERGENCES[name], 1e-5, 1e-5, temperature=1.3)


@pytest.mark.parametrize("name", laws.DIVERGENCES)
def test_bf16_statistics_keep_fp32_and_gradients_round_once(name):
    c = laws.case(33, 4099, width=64, dtype=torch.bfloat16)
    agrees(c, laws.DIVERGENCES[name], 1e-5, 4e-3)  # bf16 rounds to 2e-3


@pytest.mark.parametrize("name", ["reverse", "jsd", "student's top-5 and tail (SDPO)"])
@pytest.mark.parametrize("chunk", [1, 3, 8, 40])
def test_chunks_and_the_groups_that_share_a_product_change_nothing(monkeypatch, name, chunk):
    c = laws.case(40, 2000, width=32, dtype=torch.bfloat16)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", dict.fromkeys(("cuda", "cpu"), chunk * 4 * 2000))
    agrees(c, laws.DIVERGENCES[name], 1e-5, 4e-3)


def test_a_vocabulary_of_151936_in_chunks_of_the_default_size():
    g = torch.Generator("cuda").manual_seed(0)
    tokens, vocabulary, width = 2600, 151_936, 256  # three chunks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    head = (normal(vocabulary, width) / width**0.5).bfloat16().requires_grad_()
    hidden = (2 * normal(tokens, width)).bfloat16().requires_grad_()
    teacher = (hidden.detach() + 0.2 * normal(tokens, width)).bfloat16()
    y = torch.randint(vocabulary, (tokens,), generator=g, device="cuda")
    loss, stats = head_loss(lambda token, _: token.kl - 0.1 * token.logp, hidden, head, y, None, teacher)
    found = torch.autograd.grad(loss, (hidden, head))
    right = [torch.zeros_like(x, dtype=torch.float64) for x in (hidden, head)]
    wide = head.detach().double()
    for start in range(0, tokens, 325):
        part = slice(start, start + 325)
        h, w = hidden[part].detach().double().requires_grad_(), wide.requires_grad_()
        lp, lq = (h @ w.T).log_softmax(-1), (teacher[part].double() @ wide.detach().T).log_softmax(-1)
        kl = (lp.exp() * (lp - lq)).sum(-1)
        logp = lp.gather(-1, y[part, None])[:, 0]
        laws.close(stats.kl[part], kl, 1e-4)
        laws.close(stats.logp[part], logp, 1e-5)
        d_hidden, d_head = torch.autograd.grad((kl - 0.1 * logp).sum(), (h, w))
        right[0][part] = d_hidden
        right[1] += d_head
    for x, r in zip(found, right):
        assert (x.double() - r).norm() <= 4e-3 * r.norm()


@pytest.mark.parametrize("k", [1, 20, 100])
@pytest.mark.parametrize("name", digits.DIVERGENCES)
def test_every_entry_of_a_top_k_gradient_keeps_its_digits(monkeypatch, name, k):
    on_the_cpu = digits.ours

    def ours(c: digits.Case, d: Divergence, way: str) -> list[Tensor]:
        return [x.cpu() for x in on_the_cpu(moved(c), d, way)]

    monkeypatch.setattr(digits, "ours", ours)
    c = digits.confident(k)
    for support in ("student", "teacher"):
        for tail in (True, False):
            d = digits.DIVERGENCES[name]._replace(top_k=k, support=support, tail=tail)
            digits.holds(c, k, d, "head_loss", digits.TOLERANCE["fp32"])
    digits.holds(c, k, digits.DIVERGENCES[name], "token_stats", digits.TOLERANCE["fp32"])


@pytest.mark.parametrize("name", laws.DIVERGENCES)
def test_identical_models_give_exactly_0(name):
    c = moved(laws.case(7, 3001, dtype=torch.bfloat16))
    loss, stats = head_loss(lambda token, _: token.kl, *c[:3], None, c.hidden, divergence=laws.DIVERGENCES[name])
    assert loss == 0 and not stats.kl.any() and not any(g.any() for g in laws.gradients(loss, c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(dtype):
    c = moved(laws.case(300, 5003, width=64, dtype=dtype))
    first, second = (laws.both_modes(c, laws.DIVERGENCES["jsd"]) for _ in range(2))
    for (_, stats, of), (_, right, right_of) in zip(first, second):
        assert all(torch.equal(a, b) for a, b in zip((*stats, *of), (*right, *right_of)))


def test_a_nan_that_does_not_count_does_no_harm():
    c = moved(laws.case(6, 2000, dtype=torch.bfloat16))
    with torch.no_grad():
        c.hidden[2] = torch.nan
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], device="cuda")
    loss, stats = head_loss(laws.weighted, *c[:3], laws.Weights(weight, weight, weight), *c[3:5])
    d_hidden, d_head = laws.gradients(loss, c)
    assert stats.logp[2].isnan() and not d_hidden[2].any()
    assert d_hidden.isfinite().all() and d_head.isfinite().all()


def test_no_token_gives_no_gradient():
    c = moved(laws.case(0, 12, dtype=torch.bfloat16))
    for loss, _, (d_hidden, d_head) in laws.both_modes(c, Divergence()):
        assert loss == 0 and d_hidden.shape == (0, 8) and not d_head.any()


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.7, 0), (1.0, 20), (0.8, 50)])
@pytest.mark.parametrize("rows", [1, 64])
def test_the_token_drawn_is_where_the_number_falls_in_float64(rows, top_p, top_k):
    """Up to 1e-6 of the mass: the card's log-softmax is fp32."""
    g = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, 8000, generator=g)
    uniform = torch.rand(rows, generator=g, dtype=torch.float64)
    token, logp = (x.cpu() for x in draw(logits.cuda(), uniform.cuda(), 0.8, top_p, top_k))
    for z, u, chosen, log_p in zip(logits.double(), uniform, token, logp):
        p = (z / 0.8).softmax(0)
        if top_k:
            p = p.where(p >= p.sort().values[-top_k], 0)
            p = p / p.sum()
        if top_p < 1:
            order = p.argsort(descending=True)
            p[order[p[order].cumsum(0) - p[order] >= top_p]] = 0
            p = p / p.sum()
        end = p[: chosen + 1].sum()
        assert end - p[chosen] - 1e-6 <= u <= end + 1e-6
        assert abs(log_p - p[chosen].log()) < 1e-4


def test_log_probabilities_without_a_teacher_are_those_of_float64():
    c = laws.case(50, 9001, width=64, dtype=torch.bfloat16)
    expected = (c.hidden.double() @ c.head.double().T).log_softmax(-1).gather(-1, c.y[:, None])[:, 0]
    m = moved(c)
    laws.close(token_stats(m.hidden, m.head, m.y).logp.cpu(), expected, 5e-6)
