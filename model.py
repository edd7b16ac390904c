"""The deep convolutional network that learns the grammar (Section 2.2 of the paper).

Every level has one matrix W for all its patches: a convolution with kernel = stride =
s.  A patch concatenates s token embeddings from R^V; M random frequencies lift it to
R^(2M).

    tokens (n, s^L) -> one-hot (n, s^L, V) -> (n, s^(L-1), V) -> ... -> labels (n, 1, V)
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


class Level(nn.Module):
    """One level: s token embeddings in, one token embedding of the level above out.

    omega (M, s V): the fixed frequencies of Eq. (6), rows w_k ~ N(0, sigma^-2 I), drawn
    once from rng, a NumPy Generator or a seed.  W (V, 2M): the weights, 0 at first.
    """

    def __init__(self, V, s, M, sigma, rng):
        super().__init__()
        omega = np.random.default_rng(rng).standard_normal((M, s * V)) / sigma
        self.register_buffer("omega", torch.tensor(omega, dtype=torch.float32))
        self.W = nn.Parameter(torch.zeros(V, 2 * M))
        self.s = s

    def patch_embedding(self, patches):
        """Eqs. (1), (6): x = M^(-1/2) (cos <w_k, h>, sin <w_k, h>) for k = 1..M.

        patches: h, the s concatenated embeddings, (..., s V) -> x (..., 2M), of norm 1.
        Inner products approximate the kernel exp(-||h - h'||^2 / (2 sigma^2)).
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

    tokens: integers (n, width).  Returns the different outputs, table (U, V), and which
    of them stands at every place, ids (n, width / s^k) after the k levels of net:
    table[ids] is net(tokens).  ValueError for tokens outside 0..V-1.
    """
    table, ids = net[0].weight, tokens
    if not 0 <= ids.min() <= ids.max() < len(table):
        got = f"got {ids.min()} to {ids.max()}"
        raise ValueError(f"tokens must lie in 0..{len(table) - 1}, {got}")
    for level in net[1:]:
        patches = ids.unflatten(1, (-1, level.s))  # (n, width / s, s)
        rows, number = distinct_rows(patches.flatten(0, 1))
        table = torch.cat([level(table[chunk])[:, 0] for chunk in rows.split(CHUNK)])
        ids = number.view(patches.shape[:2])
    return table, ids


def distinct_rows(ids):
    """The different rows of integers ids >= 0, (n, width), and the number of each.

    Returns rows (U, width) and number (n,), so that rows[number] is ids.
    """
    number = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    for column in ids.T:  # number the pairs of the row so far and its next entry
        pairs = number * (column.max() + 1) + column
        number = torch.unique(pairs, return_inverse=True)[1]
    rows = ids.new_empty(number.max() + 1, ids.shape[1])
    rows[number] = ids  # every copy of a row writes the same entries
    return rows, number


@contextmanager
def torch_threads(threads):
    """Hold torch to so many threads, then restore the caller's; also a decorator.

    Two threads wait for each other at every step: beside a busy program training was up
    to 100 times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
