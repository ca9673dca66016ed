"""Layouts of documents in rows of 12 tokens, and the attention that is right for them."""

from itertools import pairwise

import torch

LAYOUTS = {
    "one document": [[0, 12]],
    "documents of one token": [list(range(13))],
    "uneven": [[0, 1, 8, 9, 12]],
    "two rows": [[0, 5, 12], [0, 12]],
    "three rows": [[0, 12], [0, 3, 4, 12], [0, 11, 12]],
}


def draw(layout, num_heads, key_heads, size=8):
    generator = torch.Generator().manual_seed(1)

    def tensor(heads):  # as a layer makes them: heads behind the sequence, then swapped
        shape = (len(layout), 12, heads, size)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2)
        return drawn.float().requires_grad_()

    return tensor(num_heads), tensor(key_heads), tensor(key_heads)


def boundaries_of(layout) -> torch.Tensor:
    starts = [12 * row + place for row, places in enumerate(layout) for place in places[:-1]]
    return torch.tensor([*starts, 12 * len(layout)], dtype=torch.int32)


def reference(layout, query, key, value, window):
    """Softmax over scores, in float64, under a mask that is written down."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    sees = torch.zeros(len(layout), 1, 12, 12, dtype=torch.bool)
    for row, places in enumerate(layout):
        for begin, end in pairwise(places):
            for here in range(begin, end):
                first = begin if window is None else max(begin, here - window + 1)
                sees[row, 0, here, first : here + 1] = True
    scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(
        ~sees, -torch.inf
    )
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)
