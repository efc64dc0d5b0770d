"""SimPool against published numbers and an independent loop, and in all conditions of training."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden.load import assert_close, cases, load, meta, sub
from torch import Tensor, nn

from dino_simpool.models.pooling.basic import ClsPool, GapPool
from dino_simpool.models.pooling.simpool import SimPool

GOLDEN = load("open_simpool")
CASES = [case for case in cases(GOLDEN) if "heads" not in case]
OURS = {
    "norm_patches.weight": "norm.weight",
    "norm_patches.bias": "norm.bias",
    "wq.weight": "q.weight",
    "wk.weight": "k.weight",
    "beta": "beta",
}
TOLERANCE = {"64": {"rtol": 1e-6, "atol": 1e-8}, "": {"rtol": 1e-4, "atol": 1e-5}}
GRADIENT_TOLERANCE = {"64": {"rtol": 1e-6, "atol": 1e-8}, "": {"rtol": 1e-3, "atol": 2e-5}}


def make_pool(case: str, dtype: torch.dtype, min_over: str) -> SimPool:
    settings = meta(GOLDEN, case)
    pool = SimPool(
        settings["dim"],
        gamma=settings["gamma"],
        num_heads=settings["num_heads"],
        min_over=min_over,
        beta=settings["use_beta"] and settings["gamma"] is not None,
    )
    state = {OURS[name]: torch.from_numpy(value) for name, value in sub(GOLDEN, f"{case}/param").items() if name in OURS}
    pool.load_state_dict(state)
    return pool.to(dtype)


def random_pool(dim: int, **options: object) -> SimPool:
    """A SimPool in float64 with all parameters away from their initial values."""
    pool = SimPool(dim, **options).double()
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return pool


def pool_by_loops(pool: SimPool, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 2 of the paper in plain loops: tokens (N, D) -> pooled (D,), attention (N,)."""
    parameters = {name: value.detach().numpy() for name, value in pool.named_parameters()}
    count, dim = tokens.shape
    normed = np.empty_like(tokens)
    for j in range(count):
        variance = sum((tokens[j] - tokens[j].mean()) ** 2) / dim
        normed[j] = (tokens[j] - tokens[j].mean()) / math.sqrt(variance + 1e-6) * parameters["norm.weight"]
        normed[j] += parameters["norm.bias"]
    query = parameters["q.weight"] @ np.array([sum(tokens[:, d]) / count for d in range(dim)])
    width, lowest = dim // pool.num_heads, normed.min()
    pooled, attention = np.empty(dim), np.zeros(count)
    for head in range(pool.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = [query[part] @ (parameters["k.weight"] @ normed[j])[part] / math.sqrt(width) for j in range(count)]
        weights = [math.exp(score - max(scores)) for score in scores]
        weights = [weight / sum(weights) for weight in weights]
        attention += np.array(weights) / pool.num_heads
        for d in range(*part.indices(dim)):
            if pool.gamma is None:
                pooled[d] = sum(weights[j] * normed[j, d] for j in range(count))
            else:
                mean = sum(weights[j] * (normed[j, d] - lowest + 1e-6) ** pool.gamma for j in range(count))
                pooled[d] = mean ** (1 / pool.gamma) + (parameters["beta"][0] if "beta" in parameters else 0)
    return pooled, attention


@pytest.mark.parametrize("precision", ["64", ""])
@pytest.mark.parametrize("case", CASES)
def test_golden_batch(case: str, precision: str) -> None:
    """Output, attention and gradients of the published module, minimum over the batch."""
    dtype = torch.float64 if precision else torch.float32
    pool = make_pool(case, dtype, "batch")
    x = torch.from_numpy(GOLDEN[f"{case}/in/x"]).to(dtype).requires_grad_()
    reference = sub(GOLDEN, f"{case}/out{precision}")
    pooled, attention = pool(x, return_attention=True)
    assert_close(pooled.detach(), reference["y"].reshape(pooled.shape), **TOLERANCE[precision])
    assert_close(attention.detach().flatten(1), reference["attn"][:, 0], **TOLERANCE[precision])
    pooled.backward(torch.from_numpy(GOLDEN[f"{case}/in/g"]).to(dtype).reshape(pooled.shape))
    check_gradients(case, pool, x, precision, "")


@pytest.mark.parametrize("precision", ["64", ""])
@pytest.mark.parametrize("case", [case for case in CASES if f"{case}/out/y_per_image" in GOLDEN])
def test_golden_image(case: str, precision: str) -> None:
    """The minimum over each image: the published module called once for each image."""
    dtype = torch.float64 if precision else torch.float32
    pool = make_pool(case, dtype, "image")
    x = torch.from_numpy(GOLDEN[f"{case}/in/x"]).to(dtype).requires_grad_()
    pooled = pool(x)
    assert_close(pooled.detach(), GOLDEN[f"{case}/out{precision}/y_per_image"], **TOLERANCE[precision])
    pooled.backward(torch.from_numpy(GOLDEN[f"{case}/in/g"]).to(dtype))
    check_gradients(case, pool, x, precision, "_per_image")


@pytest.mark.parametrize("min_over", ["image", "batch"])
@pytest.mark.parametrize("case", [case for case in cases(GOLDEN) if "heads" in case])
def test_golden_heads(case: str, min_over: str) -> None:
    """Four heads. That run had biases in W_q and W_k, which the paper does not have. The latter
    cancels in the softmax; the former is put into W_q, so that it is right for these four images.
    """
    pool, parameters = make_pool(case, torch.float64, min_over), sub(GOLDEN, f"{case}/param")
    x = torch.from_numpy(GOLDEN[f"{case}/in/x"]).double()
    one = torch.linalg.pinv(x.mean(1)) @ torch.ones(len(x), dtype=torch.float64)  # one . mean = 1 for each image
    with torch.no_grad():
        pool.q.weight += torch.outer(torch.from_numpy(parameters["wq.bias"]).double(), one)
    pooled, attention = pool(x, return_attention=True)
    expected = GOLDEN[f"{case}/out64/y" + ("_per_image" if min_over == "image" else "")]
    assert_close(pooled.detach(), expected.reshape(pooled.shape), **TOLERANCE["64"])
    assert_close(attention.detach(), GOLDEN[f"{case}/out64/attn"].mean(1), **TOLERANCE["64"])


def check_gradients(case: str, pool: SimPool, x: Tensor, precision: str, suffix: str) -> None:
    reference = sub(GOLDEN, f"{case}/grad{precision}")
    assert_close(x.grad, reference[f"x{suffix}"], **GRADIENT_TOLERANCE[precision], name="x")
    named = dict(pool.named_parameters())
    checked = [ours for theirs, ours in OURS.items() if f"{theirs}{suffix}" in reference]
    for theirs, ours in OURS.items():
        if f"{theirs}{suffix}" in reference:
            assert_close(named[ours].grad, reference[f"{theirs}{suffix}"], **GRADIENT_TOLERANCE[precision], name=ours)
    assert set(checked) == set(named)


@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 1, 8), (2, 7, 8)])
@pytest.mark.parametrize(("gamma", "beta", "heads"), [(None, False, 1), (1.25, True, 1), (2.0, False, 4), (0.5, True, 2)])
def test_equals_the_algorithm_in_plain_loops(shape: tuple[int, ...], gamma: float | None, beta: bool, heads: int) -> None:
    torch.manual_seed(0)
    pool = random_pool(8, gamma=gamma, beta=beta, num_heads=heads)
    x = torch.randn(shape, dtype=torch.float64) * 3
    pooled, attention = pool(x, return_attention=True)
    for i, image in enumerate(x.numpy()):
        expected = pool_by_loops(pool, image)
        assert_close(pooled[i].detach(), expected[0], 1e-10, 1e-12)
        assert_close(attention[i].detach(), expected[1], 1e-10, 1e-12)


@pytest.mark.parametrize("min_over", ["image", "batch"])
@pytest.mark.parametrize("gamma", [None, 1.25, 2.0])
def test_gradients_agree_with_finite_differences(gamma: float | None, min_over: str) -> None:
    torch.manual_seed(1)
    pool = random_pool(4, gamma=gamma, num_heads=2, min_over=min_over)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: pool(x, return_attention=True), (x, *pool.parameters()))


@pytest.mark.parametrize("pool", [SimPool(6, gamma=2.0), SimPool(6, num_heads=3), GapPool(6)])
def test_maps_are_tokens_read_row_by_row(pool: nn.Module) -> None:
    x = torch.randn(2, 6, 3, 5)
    pooled, attention = pool(x, return_attention=True)
    same, flat = pool(x.flatten(2).transpose(1, 2), return_attention=True)
    assert attention.shape == (2, 3, 5)
    assert torch.equal(pooled, same)
    assert torch.equal(attention, flat.view(2, 3, 5))
    assert_close(attention.detach().sum((1, 2)), np.ones(2), 0, 1e-6)
    torch.testing.assert_close(pool(x.to(memory_format=torch.channels_last)), pooled)


def test_an_image_does_not_see_its_neighbors() -> None:
    """min_over="image" is a function of the image alone, min_over="batch" is not."""
    torch.manual_seed(2)
    x = torch.randn(4, 9, 8) * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1)
    for min_over, alike in (("image", True), ("batch", False)):
        pool = SimPool(8, gamma=1.25, min_over=min_over)
        nn.init.normal_(pool.norm.weight)
        alone = torch.cat([pool(image[None]) for image in x])
        assert torch.allclose(pool(x), alone, atol=1e-6) == alike


def test_order_of_tokens_is_irrelevant() -> None:
    pool, x = random_pool(8, gamma=2.0), torch.randn(2, 6, 8, dtype=torch.float64)
    order = torch.randperm(6)
    pooled, attention = pool(x, return_attention=True)
    shuffled, moved = pool(x[:, order], return_attention=True)
    torch.testing.assert_close(shuffled, pooled)
    torch.testing.assert_close(moved, attention[:, order])


@pytest.mark.parametrize("gamma", [1.25, 2.0, 3.0, 40.0])
@pytest.mark.parametrize("x", [torch.zeros(2, 4, 8), torch.full((2, 4, 8), 1e4), 1e3 * torch.eye(8)[None], torch.rand(2, 4, 8)])
def test_gradients_are_finite(x: Tensor, gamma: float) -> None:
    """Constant tokens meet the minimum everywhere; a large exponent makes a power underflow."""
    pool, x = SimPool(8, gamma=gamma), x.clone().requires_grad_()
    pooled = pool(x)
    pooled.square().sum().backward()
    assert pooled.isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in pool.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """In float16 itself 1e-6^2 is 0. Only weights, input and output are rounded."""
    torch.manual_seed(3)
    pool, x = SimPool(16, gamma=2.0).to(dtype), torch.randn(2, 9, 16).to(dtype)
    pooled, attention = pool(x, return_attention=True)
    exact = pool.float()(x.float(), return_attention=True)
    assert pooled.dtype == attention.dtype == dtype
    assert torch.equal(pooled, exact[0].to(dtype))
    assert torch.equal(attention, exact[1].to(dtype))


def test_autocast_is_switched_off_inside() -> None:
    torch.manual_seed(4)
    pool, x = SimPool(16, gamma=1.25), torch.randn(2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, keys = pool(x), pool.keys(x)
        assert GapPool(16)(x.bfloat16()).dtype == torch.float32
    assert torch.equal(inside, pool(x))
    assert torch.equal(keys, pool.keys(x))


def test_float64_stays_float64() -> None:
    pool, x = random_pool(8, gamma=2.0), torch.randn(2, 5, 8, dtype=torch.float64)
    assert pool(x).dtype == pool.keys(x).dtype == GapPool(8)(x).dtype == torch.float64
    assert not torch.equal(pool(x), pool.float()(x.float()).double())


def test_keys_give_the_attention() -> None:
    """Eq. 14 unfolded: softmax of query times keys is the attention of the folded form."""
    pool, x = random_pool(8), torch.randn(2, 5, 8, dtype=torch.float64)
    keys = pool.keys(x)
    scores = torch.einsum("bd,bnd->bn", pool.q(x.mean(1)), keys) / math.sqrt(8)
    assert keys.shape == (2, 5, 8)
    torch.testing.assert_close(scores.softmax(1), pool(x, return_attention=True)[1])
    torch.testing.assert_close(pool.keys(x.transpose(1, 2).reshape(2, 8, 1, 5)), keys)


def test_attention_of_each_head() -> None:
    """Softmax of the slices of query and keys of each head; otherwise the mean over heads."""
    pool, x = random_pool(8, gamma=2.0, num_heads=2), torch.randn(3, 8, 2, 5, dtype=torch.float64)
    pooled, heads = pool(x, return_attention="heads")
    assert heads.shape == (3, 2, 2, 5)
    query, keys = pool.q(x.mean((2, 3))).view(3, 2, 4), pool.keys(x).view(3, 10, 2, 4)
    expected = (torch.einsum("bhc,bnhc->bhn", query, keys) / 2).softmax(-1)
    torch.testing.assert_close(heads.flatten(2), expected)
    same, mean = pool(x, return_attention=True)
    torch.testing.assert_close((pooled, heads.mean(1)), (same, mean))
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool(tokens, return_attention="heads")[1], expected)


def test_simpool_needs_torch_only() -> None:
    program = (
        "import sys\n"
        "from dino_simpool import SimPool, attach_simpool\n"
        "from dino_simpool.models.pooling import build_pool\n"
        "found = {'timm', 'torchvision', 'jsonargparse', 'PIL', 'cv2', 'faiss'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_parameters_are_the_announced_ones() -> None:
    assert list(SimPool(4).state_dict()) == ["norm.weight", "norm.bias", "q.weight", "k.weight"]
    assert set(SimPool(4, gamma=2.0, beta=True).state_dict()) == {"beta", "norm.weight", "norm.bias", "q.weight", "k.weight"}
    assert sum(p.numel() for p in SimPool(384).parameters()) == 2 * 384**2 + 2 * 384


@pytest.mark.parametrize(
    ("options", "words"),
    [({"num_heads": 3}, "multiple"), ({"gamma": 0.0}, "above 0"), ({"beta": True}, "gamma"), ({"min_over": "all"}, "image")],
)
def test_wrong_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SimPool(8, **options)


@pytest.mark.parametrize("pool", [SimPool(8), GapPool(8), ClsPool(8)])
def test_wrong_shapes_are_refused(pool: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\(2, 8\)"):
        pool(torch.randn(2, 8))


def test_baselines() -> None:
    x = torch.randn(2, 5, 8)
    pooled, attention = GapPool(8)(x, return_attention=True)
    torch.testing.assert_close(pooled, x.mean(1))
    assert torch.equal(attention, torch.full((2, 5), 0.2))
    assert torch.equal(ClsPool(8)(x), x[:, 0])
    pooled, attention = ClsPool(8)(x, return_attention=True)
    assert torch.equal(pooled, x[:, 0]) and attention is None
    assert GapPool(8).out_dim == ClsPool(8).out_dim == SimPool(8).out_dim == 8


@pytest.mark.parametrize("dim", [8, 384, 2048])
def test_a_gamma_whose_power_overflows_is_refused(dim: int) -> None:
    """The largest one that is named does not, for the values farthest apart that a LayerNorm can give."""
    with pytest.raises(ValueError, match="overflows float32 for width") as error:
        SimPool(dim, gamma=100.0)
    largest = float(str(error.value).rsplit(" ", 1)[1])
    assert 15 < largest < 50
    pool = SimPool(dim, gamma=largest)
    tokens = torch.zeros(1, 2, dim)
    tokens[0, 0, 0], tokens[0, 1, 0] = 1e6, -1e6  # one value at sqrt(dim), one at -sqrt(dim)
    assert pool(tokens).isfinite().all()
    with pytest.raises(ValueError, match="overflows"):
        SimPool(dim, gamma=largest + 0.11)
