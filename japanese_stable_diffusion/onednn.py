"""Matrix products by oneDNN, on a CPU in single precision.

PyTorch hands them to MKL, which leaves instructions unused on processors that Intel didn't make: where there
is AVX-512, it computes at half of oneDNN's speed. The operator used here is the one that `torch.compile` puts
in place of linear layers (torch/_inductor/mkldnn_lowerings.py in PyTorch's repository); it has no gradient.
"""

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SCORES = 2**20
"""Attention scores at a time, so that they stay in the processor's cache."""
MANY_SCORES = 2**16
"""Scores of a head from which there is something to gain; with fewer, calling costs more than computing."""


def computes(tensor: Tensor) -> bool:
    """Whether products with this tensor can go to oneDNN."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def linear(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., inputs) times (outputs, inputs), plain or packed, plus (outputs,) → (..., outputs)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), matrix, bias, "none", [], "")
    return product


def pack(matrix: Tensor) -> Tensor:
    """(outputs, inputs) in the order in which oneDNN reads it; a plain one is put into it each time."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix)
    return packed


def products(rows: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """(count, rows, inputs), each times one of ``count`` of (outputs, inputs) → (count, rows, outputs)."""
    return torch.stack([linear(one, matrix) for one, matrix in zip(rows, matrices, strict=True)])


class Linear(torch.nn.Linear):
    """A linear layer that computes by oneDNN where it can."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) → (..., outputs)."""
        if not computes(input):
            return super().forward(input)
        return linear(input, self.weight, self.bias)


class Pointwise(torch.nn.Conv2d):
    """A convolution over single pixels that computes as a linear layer of each pixel's channels."""

    def forward(self, input: Tensor) -> Tensor:
        """(pictures, in_channels, height, width) → (pictures, out_channels, height, width), channels last."""
        if not computes(input):
            return super().forward(input)
        return linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def is_pointwise(module: torch.nn.Module) -> bool:
    """Whether a layer is one that a `Pointwise` can stand for."""
    return (
        type(module) is torch.nn.Conv2d
        and module.kernel_size == module.stride == module.dilation == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), some queries at a time.

    Args:
        query: (pictures, heads, queries, channels).
        key: (pictures, heads, keys, channels).
        value: as the key.

    Returns:
        As the query.
    """
    pictures, heads, queries, channels = query.shape
    keys = key.shape[2]
    if queries * keys < MANY_SCORES:
        return scaled_dot_product_attention(query, key, value)
    scaled = (query * channels**-0.5).reshape(-1, queries, channels)
    found = torch.empty_like(scaled)
    together = max(1, SCORES // keys)
    for head, (one_key, one_value) in enumerate(zip(key.flatten(0, 1), value.flatten(0, 1), strict=True)):
        one_key, transposed = one_key.contiguous(), one_value.T.contiguous()
        for first in range(0, queries, together):
            scores = linear(scaled[head, first : first + together], one_key)
            found[head, first : first + together] = linear(scores.softmax(-1), transposed)
    return found.view(pictures, heads, queries, channels)


class Attending(AttnProcessor2_0):
    """An attention processor of diffusers for a UNet's transformers, whose attention has no norms."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(pictures, positions, channels) and maybe a text (pictures, tokens, channels) → like the first."""
        if attention_mask is not None or not computes(hidden_states):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            states.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for states in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        output: Tensor = attn.to_out[0](attend(query, key, value).transpose(1, 2).flatten(2))
        return output


def is_plain(attention: Attention) -> bool:
    """Whether an attention is one that `Attending` computes: that of a transformer block."""
    norms = (
        attention.group_norm,
        attention.spatial_norm,
        attention.norm_q,
        attention.norm_k,
        attention.norm_cross,
    )
    return (
        not any(norms)
        and attention.added_kv_proj_dim is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and not attention.fused_projections
    )
