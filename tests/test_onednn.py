"""oneDNN's products are the same products."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn.functional import scaled_dot_product_attention

from japanese_stable_diffusion import onednn


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_linear_layer_is_the_plain_one(bias):
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 40, bias=bias)
    layer = copy.deepcopy(plain)
    layer.__class__ = onednn.Linear
    for rows in (torch.randn(3, 5, 24), torch.randn(24), torch.randn(24, 7).T):
        assert torch.allclose(layer(rows), plain(rows), atol=1e-5)
    assert torch.allclose(onednn.linear(rows, onednn.pack(plain.weight), plain.bias), plain(rows), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}])
def test_gradients_and_other_precisions_are_left_to_pytorch(options):
    layer = onednn.Linear(4, 3, **options)
    rows = torch.randn(2, 4, **options)
    layer(rows).sum().backward()
    assert torch.allclose(layer.weight.grad, rows.sum(0).expand(3, 4))
    with torch.inference_mode():
        assert layer(rows).dtype == rows.dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(rows).dtype == torch.bfloat16 or rows.dtype == torch.float64


@torch.inference_mode()
def test_a_convolution_over_single_pixels_is_the_plain_one():
    torch.manual_seed(1)
    plain = torch.nn.Conv2d(6, 9, 1)
    layer = copy.deepcopy(plain)
    layer.__class__ = onednn.Pointwise
    pictures = torch.randn(2, 6, 5, 4)
    for given in (pictures, pictures.contiguous(memory_format=torch.channels_last)):
        output = layer(given)
        assert torch.allclose(output, plain(pictures), atol=1e-5)
        assert output.is_contiguous(memory_format=torch.channels_last)


def test_only_convolutions_over_single_pixels_are_taken():
    assert onednn.is_pointwise(torch.nn.Conv2d(4, 4, 1))
    for other in ({"kernel_size": 3}, {"stride": 2}, {"padding": 1}, {"groups": 2}):
        assert not onednn.is_pointwise(torch.nn.Conv2d(4, 4, **{"kernel_size": 1, **other})), other
    assert not onednn.is_pointwise(torch.nn.Linear(4, 4))


@pytest.mark.parametrize("scores", [1, 60, 2**20])
@pytest.mark.parametrize("keys", [11, 20])
@torch.inference_mode()
def test_attention_is_the_plain_one_however_many_queries_go_together(monkeypatch, scores, keys):
    monkeypatch.setattr(onednn, "SCORES", scores)
    monkeypatch.setattr(onednn, "MANY_SCORES", 1)
    torch.manual_seed(2)
    query, key, value = (torch.randn(2, 3, count, 8) for count in (11, keys, keys))
    expected = scaled_dot_product_attention(query, key, value)
    assert torch.allclose(onednn.attend(query, key, value), expected, atol=1e-5)


@pytest.mark.parametrize(("queries", "multiplied"), [(256, True), (64, False)])
@torch.inference_mode()
def test_attention_goes_to_onednn_where_there_is_much_of_it(queries, multiplied):
    query, key, value = (torch.randn(1, 1, queries, 8) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        onednn.attend(query, key, value)
    assert ("mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}) == multiplied


@torch.inference_mode()
def test_an_attention_of_a_transformer_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(onednn, "MANY_SCORES", 1)
    torch.manual_seed(3)
    attention = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8).eval()
    states, text = torch.randn(2, 10, 16), torch.randn(2, 7, 12)
    mask = torch.zeros(2, 7).index_fill_(1, torch.tensor([3]), -10_000.0)
    expected, masked = attention(states, text), attention(states, text, mask)
    assert onednn.is_plain(attention)
    attention.set_processor(onednn.Attending())
    assert torch.allclose(attention(states, text), expected, atol=1e-5)
    assert torch.allclose(attention(states, text, mask), masked, atol=1e-5)
    assert not torch.allclose(masked, expected, atol=1e-3)
    doubled = attention.double()(states.double(), text.double())
    assert torch.allclose(doubled.float(), expected, atol=1e-5)


def test_attention_with_a_norm_is_left_to_diffusers():
    assert not onednn.is_plain(Attention(query_dim=16, norm_num_groups=4, residual_connection=True))
    assert isinstance(Attention(query_dim=16).processor, AttnProcessor2_0)
