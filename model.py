"""The deep convolutional network that learns the grammar (Section 2.2 of the paper).

Every level has one matrix W for all its patches: a convolution with kernel = stride =
s.  A patch concatenates s token embeddings from R^V and is lifted to R^(2M).

    tokens (n, s^L) -> one-hot (n, s^L, V) -> (n, s^(L-1), V) -> ... -> labels (n, V)
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

CHUNK = 4096  # patches embedded at a time: bounds the memory, and stays in the cache


def random_fourier_features(h, omega):
    """Eq. (6): M^(-1/2) (cos <w_k, h>, sin <w_k, h>) for k = 1..M.

    h (..., s V), omega (M, s V) with rows w_k ~ N(0, sigma^-2 I) -> (..., 2M), of norm
    1.  Inner products approximate the kernel exp(-||h - h'||^2 / (2 sigma^2)).
    """
    angles = h.to(omega.dtype) @ omega.T  # (..., M)
    return torch.cat([angles.cos(), angles.sin()], dim=-1) / len(omega) ** 0.5


class Level(nn.Module):
    """One level: s token embeddings in, one token embedding of the level above out.

    omega (M, s V): the fixed frequencies; W (V, 2M): the trained weights.
    """

    def __init__(self, omega, W):
        super().__init__()
        self.register_buffer("omega", omega)
        self.W = nn.Parameter(W)
        self.s = omega.shape[1] // len(W)

    def patch_embedding(self, h):
        """Eq. (1) with the map of Eq. (6): s tokens (..., s V) -> x (..., 2M)."""
        return random_fourier_features(h, self.omega)

    def forward(self, h):
        """Eq. (2): W x divided by the sum of its entries, (..., s V) -> (..., V).

        The proof has W x near alpha_mu p_mu q_mu (Lemma 14), so the quotient is near q.
        """
        scores = self.patch_embedding(h) @ self.W.T
        return scores / scores.sum(-1, keepdim=True)


class DeepCNN(nn.Sequential):
    """Section 2.2: one-hot tokens of V symbols, then levels, the bottom one first."""

    def __init__(self, V, *levels):
        super().__init__(*levels)
        self.V = V

    def __getitem__(self, index):
        """net[:k] is the network after k stages; it keeps its V."""
        if isinstance(index, slice):
            return DeepCNN(self.V, *list(self)[index])
        return super().__getitem__(index)

    def forward(self, tokens):
        """Section 2.2: integers (n, width) -> (n, width / s^k, V) after k levels.

        The output (n, V) when one token is left.  ValueError for tokens outside 0..V-1
        and for a width that s^k does not divide.
        """
        self._check(tokens)
        h = F.one_hot(tokens.long(), self.V).float()  # (n, width, V)
        for level in self:
            h = level(h.unflatten(1, (-1, level.s)).flatten(2))  # (n, width / s, V)
        return h[:, 0] if h.shape[1] == 1 else h

    def embed(self, tokens):
        """forward, with equal patches computed once: efficiency only.

        Training and measuring use it.  Always (n, width / s^k, V).
        """
        self._check(tokens)
        ids = tokens.long()  # token j of sentence i has the embedding table[ids[i, j]]
        table = torch.eye(self.V, device=tokens.device)
        for level in self:
            patches = ids.unflatten(1, (-1, level.s))  # (n, width / s, s)
            rows, numbers = distinct_rows(patches.flatten(0, 1), len(table))
            ids = numbers.view(patches.shape[:2])  # which of the rows a patch is
            chunks = [level(table[chunk].flatten(1)) for chunk in rows.split(CHUNK)]
            table = torch.cat(chunks)  # (distinct patches, V)
        return table[ids]

    def _check(self, tokens):
        size = math.prod(level.s for level in self)
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] % size:
            got = f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
            raise ValueError(f"tokens must be integers (n, multiple of {size}), {got}")
        if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < self.V:
            got = f"got {tokens.min()} to {tokens.max()}"
            raise ValueError(f"tokens must lie in 0..{self.V - 1}, {got}")


def distinct_rows(ids, base):
    """The distinct rows of integers (n, width) in range(base), n * base < 2^63.

    Not in the paper.  Returns (U, width), and for each row its number among them, (n,).
    """
    code = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    codes = 1  # code, the row so far as a number in base `base`, is below this
    for column in ids.T:
        if codes * base >= 2**63:  # renumber before int64 overflows
            values, code = torch.unique(code, return_inverse=True)
            codes = len(values)
        code, codes = code * base + column, codes * base
    values, numbers = torch.unique(code, return_inverse=True)
    rows = ids.new_empty(len(values), ids.shape[1])
    rows[numbers] = ids  # every copy of a row writes the same entries
    return rows, numbers
