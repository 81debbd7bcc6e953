"""Exact attention, at prefill and of chosen tokens, against plain loops."""

import numpy as np
import pytest
import torch

import oracle
from inputs import SIZES, arrays, make_inputs, poisoned
from rocketkv import ops


@pytest.mark.parametrize(("size", "group", "head_dim"), SIZES)
def test_dense_attention_is_causal_attention(seeded: torch.Generator, size: int, group: int, head_dim: int) -> None:
    x = make_inputs(seeded, 1, 2 * group, 2, size, head_dim)
    scale = head_dim**-0.5
    expected = oracle.dense(*(a[0] for a in arrays(*x)))
    np.testing.assert_allclose(ops.prefill_densely(*x, scale=scale)[0], expected, atol=1e-5)
    # the newest tokens only, by the general path
    new = max(1, size // 3)
    lengths = torch.full((1, 2), size)
    output = ops.prefill_densely(x.query[:, :, -new:], x.key, x.value, lengths=lengths, scale=scale)
    np.testing.assert_allclose(output[0], expected[:, -new:], atol=1e-5)


def test_dense_attention_of_ragged_rows_and_heads(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 3, 6, 2, 700, 64)
    lengths = torch.tensor([[700, 650], [40, 33], [600, 600]])
    num_queries = torch.tensor([600, 21, 300])
    output = ops.prefill_densely(
        x.query[:, :, :600],
        poisoned(x.key, lengths),
        poisoned(x.value, lengths),
        lengths=lengths,
        num_queries=num_queries,
        scale=0.125,
    )
    for row in range(3):
        real = int(num_queries[row])
        assert not output[row, :, : 600 - real].any()
        for head in range(2):
            heads, count = slice(3 * head, 3 * head + 3), int(lengths[row, head])
            q, k, v = arrays(
                x.query[row, heads, 600 - real : 600], x.key[row, [head], :count], x.value[row, [head], :count]
            )
            np.testing.assert_allclose(output[row, heads, 600 - real :], oracle.dense(q, k, v), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "group", "head_dim"), SIZES)
def test_sparse_attention(seeded: torch.Generator, dtype: torch.dtype, size: int, group: int, head_dim: int) -> None:
    x = make_inputs(seeded, 1, 2 * group, 2, size, head_dim, dtype)
    counts = torch.tensor([[max(1, size // 4), max(1, size // 2)]])
    slots = torch.stack([torch.randperm(size, generator=seeded) for _ in range(2)])[None, :, : int(counts.max())]
    query = x.query[:, :, -1:]
    output = ops.decode_sparsely(query, x.key, x.value, slots=slots, counts=counts, scale=head_dim**-0.5)
    for head in range(2):
        heads = slice(group * head, group * head + group)
        chosen = slots[0, head, : int(counts[0, head])].tolist()
        expected = oracle.attend(*arrays(query[0, heads, 0], x.key[0, head], x.value[0, head]), chosen)
        plain = torch.nn.functional.scaled_dot_product_attention(
            query[:, heads], *(a[:, [head]][:, :, chosen].expand(-1, group, -1, -1) for a in (x.key, x.value))
        )
        own_error = float((plain[0, :, 0].double() - torch.from_numpy(expected)).norm())
        error = float((output[0, heads, 0].double() - torch.from_numpy(expected)).norm())
        assert error <= 2 * own_error + 1e-6  # no worse than twice torch's own error in this dtype


def test_dense_decode_ignores_what_lies_beyond(seeded: torch.Generator) -> None:
    x = make_inputs(seeded, 2, 4, 2, 80, 64)
    lengths = torch.tensor([[80, 60], [1, 33]])
    output = ops.decode_densely(
        x.query[:, :, -1:], poisoned(x.key, lengths), poisoned(x.value, lengths), lengths=lengths, scale=0.125
    )
    for row, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        heads, count = slice(2 * head, 2 * head + 2), int(lengths[row, head])
        expected = oracle.attend(
            *arrays(x.query[row, heads, -1], x.key[row, head], x.value[row, head]), list(range(count))
        )
        np.testing.assert_allclose(output[row, heads, 0], expected, atol=1e-5)
