"""The deep convolutional network that learns the grammar (Section 2.2 of the paper).

Every level has one matrix W for all its patches: a convolution with kernel = stride =
s. Token embeddings live in R^V; a patch embedding concatenates s of them and lifts them
with M random frequencies omega (a cosine and a sine each) to R^(2M).

    tokens (n, s^L) -> one-hot (n, s^L, V) -> (n, s^(L-1), V) -> ... -> labels (n, V)
"""

import torch
from torch import nn

CHUNK = 4096  # patches embedded at a time: bounds the memory, and stays in the cache


def random_fourier_features(h, omega):
    """Eq. (6): M^(-1/2) (cos <w_k, h>, sin <w_k, h>) for k = 1..M.

    h (..., p), omega (M, p) with rows w_k ~ N(0, sigma^-2 I) -> (..., 2M), of norm 1.
    The inner product of two of them approximates exp(-||h - h'||^2 / (2 sigma^2)).
    """
    angles = h @ omega.T  # (..., M)
    return torch.cat([angles.cos(), angles.sin()], dim=-1) / len(omega) ** 0.5


class Level(nn.Module):
    """One level of the network: a patch of s embeddings in, one embedding out.

    omega (M, s V): the fixed frequencies; W (V, 2M): the trained weights.
    """

    def __init__(self, omega, W):
        super().__init__()
        self.register_buffer("omega", omega)
        self.W = nn.Parameter(W)

    def patch_embedding(self, h):
        """Eq. (1) with the map of Eq. (6): (..., s V) -> x (..., 2M)."""
        return random_fourier_features(h, self.omega)

    def forward(self, h):
        """Eq. (2): W x divided by the sum of its entries, (..., s V) -> (..., V).

        That sum is positive near the patches of the training set (Lemma 16); elsewhere
        it can be anything.
        """
        scores = self.patch_embedding(h) @ self.W.T
        return scores / scores.sum(-1, keepdim=True)


class DeepCNN(nn.Sequential):
    """The network of Section 2.2, bottom level first; appending a Level deepens it.

    V: the vocabulary size.  With no level yet it is the one-hot embedding of the
    tokens.
    """

    def __init__(self, V, *levels):
        super().__init__(*levels)
        self.V = V

    def __getitem__(self, index):
        """A level, or with net[:k] the network as it was after k stages."""
        if isinstance(index, slice):
            return DeepCNN(self.V, *list(self)[index])
        return super().__getitem__(index)

    def embed(self, tokens):
        """Embeddings of the tokens of the level that the network reaches (Section 2.2).

        tokens: integers (n, width) -> (n, width / s^k, V) after k levels.
        ValueError for tokens outside the vocabulary or a width that s does not divide.
        """
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex():
            raise ValueError(
                f"tokens must be integers (n, width), got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < self.V:
            raise ValueError(
                f"tokens must lie in 0..{self.V - 1}, got {tokens.min()} "
                f"to {tokens.max()}"
            )
        # Patches repeat, and equal ones have equal embeddings.  So each is computed
        # once: `table` holds the distinct embeddings, `ids` says which one stands
        # where.
        dtype = self[0].W.dtype if len(self) else None
        table = torch.eye(self.V, dtype=dtype, device=tokens.device)
        ids = tokens.long()
        for level in self:
            n, width = ids.shape
            s = level.omega.shape[1] // self.V
            if width % s:
                raise ValueError(
                    f"patches of s = {s} tokens do not divide width {width}"
                )
            patches, ids = distinct_rows(ids.reshape(-1, s), len(table))
            ids = ids.reshape(n, width // s)
            table = torch.cat(  # (distinct patches, V)
                [level(table[rows].flatten(1)) for rows in patches.split(CHUNK)]
            )
        return table[ids]

    def forward(self, tokens):
        """The output (n, V) once one token is left, else as embed (Section 2.2)."""
        h = self.embed(tokens)
        return h[:, 0] if h.shape[1] == 1 else h


def distinct_rows(ids, base):
    """The distinct rows of an integer array (n, width) with entries in range(base).

    Not in the paper; n * base must be below 2^63.  Returns them as (U, width), and for
    each row of ids its number (n,).
    """
    code = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    codes = 1  # code, the row so far as a number in base `base`, is below this
    for column in ids.T:
        if codes * base >= 2**63:  # renumber before int64 overflows
            values, code = torch.unique(code, return_inverse=True)
            codes = len(values)
        code = code * base + column
        codes *= base
    values, number = torch.unique(code, return_inverse=True)
    rows = ids.new_empty(len(values), ids.shape[1])
    rows[number] = ids  # every copy of a row writes the same entries
    return rows, number
