"""The deep convolutional network that learns the grammar (Sections 2.2 and 3).

Every level has one matrix W for all its patches: a convolution with kernel = stride =
s.  A patch concatenates s token embeddings from R^V; M random frequencies lift it to
R^(2M).

    tokens (n, s^L) -> one-hot (n, s^L, V) -> (n, s^(L-1), V) -> ... -> labels (n, 1, V)
"""

import numpy as np
import torch
from torch import nn


class Level(nn.Module):
    """One level: s token embeddings in, one token embedding of the level above out.

    omega (M, s V): the fixed frequencies of Eq. (6), rows omega_k ~ N(0, sigma^-2 I),
    drawn once from rng, a NumPy Generator or a seed.  W (V, 2M): the weights, 0 until
    they are trained.
    """

    def __init__(self, V, s, M, sigma, rng):
        super().__init__()
        omega = np.random.default_rng(rng).standard_normal((M, s * V)) / sigma
        self.register_buffer("omega", torch.tensor(omega, dtype=torch.float32))
        self.W = nn.Parameter(torch.zeros(V, 2 * M))
        self.s = s

    def patch_embedding(self, patches):
        """Eqs. (1), (6): x = M^(-1/2) (cos <omega_k, h>, sin <omega_k, h>), k = 1..M.

        patches: h, the s concatenated embeddings, (..., s V) -> x (..., 2M), of norm 1.
        Inner products approximate the kernel exp(-||h - h'||^2 / (2 sigma^2)).  So x
        also clusters (Section 3): patches within a small part of sigma get nearly the
        same x, patches several sigma apart nearly orthogonal ones.  In the default run
        patches that differ in one token are about 2 sigma apart: their x overlap.
        """
        angles = patches @ self.omega.T  # (..., M)
        return torch.cat([angles.cos(), angles.sin()], dim=-1) / len(self.omega) ** 0.5

    def forward(self, h):
        """Eq. (2): W x divided by the sum of its entries, for every patch of a level.

        (n, width, V) -> (n, width / s, V).  The proof has W x near a positive multiple
        of q_mu (Lemmas 14, 16), whose entries sum to 1: so the quotient is near q_mu.
        """
        patches = h.unflatten(1, (-1, self.s)).flatten(2)  # (n, width / s, s V)
        scores = self.patch_embedding(patches) @ self.W.T  # (n, width / s, V)
        return scores / scores.sum(-1, keepdim=True)


def deep_cnn(V, *levels):
    """Section 2.2: one-hot embeddings of V symbols, then levels, the bottom one first.

    net(tokens) is (n, 1, V) for integers (n, s^L); net[: k + 1] has the first k levels.
    """
    return nn.Sequential(nn.Embedding.from_pretrained(torch.eye(V)), *levels)


# ---- Efficiency only: nothing below is in the paper ----------------------------------

CHUNK = 4096  # patches embedded at a time: bounds the memory, and stays in the cache


@torch.no_grad()
def embed(net, tokens):
    """net(tokens) with equal patches computed once, without gradients.

    tokens: integers (n, width).  Returns the outputs (n, width / s^k, V) after the k
    levels of net.  ValueError unless tokens are integers in 0..V-1.
    """
    outputs = net[0].weight  # one row per symbol; below, one per different patch
    index = as_symbols(tokens, len(outputs)).to(outputs.device)
    for level in net[1:]:  # outputs[index] are the embeddings at every place
        patches = index.unflatten(1, (-1, level.s))  # (n, width / s, s)
        rows, number = distinct(patches.flatten(0, 1))
        # Each row is a sentence of one patch: level(...) is (u, 1, V).
        outputs = torch.cat([level(outputs[part])[:, 0] for part in rows.split(CHUNK)])
        index = number.view(patches.shape[:2])
    return outputs[index]


def as_symbols(values, V):
    """Integers as an int64 tensor; ValueError unless they lie in 0..V-1."""
    values = torch.as_tensor(values)
    symbols = values.long()
    if values.is_floating_point() or not 0 <= symbols.min() <= symbols.max() < V:
        got = f"got {values.dtype}, {symbols.min()} to {symbols.max()}"
        raise ValueError(f"symbols must be integers in 0..{V - 1}, {got}")
    return symbols


def distinct(rows):
    """The U different rows of integers >= 0, and the number of each row among them.

    [[0, 2], [1, 1], [0, 2]] has the rows [[0, 2], [1, 1]], with numbers [0, 1, 0].
    This is torch.unique(rows, dim=0, return_inverse=True), several times faster.
    (n, width) -> (U, width) and (n,).
    """
    number = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in rows.T:
        # Rows that agree so far share a number; it and the next entry form a pair.
        pairs = number * (column.max() + 1) + column
        if pairs.max() >= len(rows):
            number = torch.unique(pairs, return_inverse=True)[1]  # this sorts
        else:  # counting is faster: pairs [2, 0, 2] get the numbers [1, 0, 1]
            occurs = pairs.new_zeros(len(rows))
            occurs[pairs] = 1  # [1, 0, 1]
            number = occurs.cumsum(0)[pairs] - 1  # from [1, 1, 2]
    different = rows.new_empty(number.max() + 1, rows.shape[1])
    different[number] = rows  # every copy of a row writes the same entries
    return different, number
