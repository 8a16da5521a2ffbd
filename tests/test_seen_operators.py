"""Attention and patches of the known towers on a CPU: torch's own values, by other operators."""

import pytest
import torch
from torch import nn

from pybackdoor.models import seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bf16_is_as_exact_as_torch_at_least(causal, autocast):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 9, 8, generator=generator).bfloat16() for _ in range(4)]

    def run(attend, dtype):
        qkv = [x.to(dtype, copy=True).requires_grad_() for x in inputs[:3]]
        with torch.autocast("cpu", enabled=autocast and dtype == torch.bfloat16):
            out = attend(*qkv, is_causal=causal)
        assert out.dtype == dtype
        out.backward(inputs[3].to(dtype))
        return [out.detach(), *(x.grad for x in qkv)]

    plain = torch.nn.functional.scaled_dot_product_attention
    got = run(seen.attention, torch.bfloat16)
    own = run(plain, torch.bfloat16)
    for want, one, two in zip(run(plain, torch.float64), own, got, strict=True):
        ulp = torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert (two - want).abs().max() <= 2 * (one - want).abs().max() + ulp
    # fp32 in between gives other bits
    assert not all(torch.equal(one, two) for one, two in zip(own, got, strict=True))


@pytest.mark.parametrize(
    ("options", "product"),
    [
        ({"kernel_size": 4, "stride": 4}, True),
        ({"kernel_size": (2, 6), "stride": (2, 6), "bias": False}, True),
        ({"kernel_size": 4, "stride": 3}, False),
        ({"kernel_size": 4, "stride": 4, "padding": 2}, False),
        ({"kernel_size": 2, "stride": 2, "dilation": 2}, False),
        ({"kernel_size": 4, "stride": 4, "groups": 3}, False),
        ({"kernel_size": 5, "stride": 5}, False),  # which leaves a rest of the image
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_patches_are_those_of_the_convolution(options, product, layout, monkeypatch):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 9, **options).double()
    images = torch.randn(2, 3, 8, 12).double().to(memory_format=layout).requires_grad_()
    own = seen.F.linear
    calls = []
    monkeypatch.setattr(seen.F, "linear", lambda *x: calls.append(x) or own(*x))

    def run(rows):
        conv.zero_grad()
        images.grad = None
        (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
        return [rows.detach(), images.grad, *(p.grad for p in conv.parameters())]

    got = run(seen.patches(conv, images))
    assert bool(calls) == product
    for one, two in zip(got, run(conv(images).flatten(2).transpose(1, 2)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_attention_in_bf16_compiles_whole():
    q, k, v = (torch.randn(2, 3, 9, 8).bfloat16() for _ in range(3))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return seen.attention(q, k, v, is_causal=True)

    assert torch.equal(compiled(q, k, v), seen.attention(q, k, v, is_causal=True))
