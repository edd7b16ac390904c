"""The deep convolutional network that learns the grammar (Sections 2.2 and 3).

    tokens (n, s^L) -> one-hot (n, s^L, V) -> (n, s^(L-1), V) -> ... -> labels (n, 1, V)
            net[0], the embedding      net[1], layer L          net[L], layer 1

A level belongs to the grammar, a layer to the network.  Layer l reads level-l patches,
each as s embeddings, vectors of R^V.  From each it makes one embedding, near q_mu^(l)
once it is trained.  This stands for the symbol of level l - 1 that generated the patch.
All patches of a level share one layer: a convolution with kernel = stride = s.
"""

import numpy as np
import torch
from torch import nn


class RandomFeatures(nn.Module):
    """Eq. (6): x = Phi(h) = M^(-1/2) (cos <omega_k, h>, sin <omega_k, h>), k = 1..M.

    omega (M, dim): the frequencies, rows omega_k ~ N(0, sigma^-2 I), drawn once from
    rng, a NumPy Generator or a seed, and never trained.

    ||x|| = 1, and <x, x'> approximates the kernel exp(-||h - h'||^2 / (2 sigma^2)).  So
    the x of patches much closer than sigma are nearly equal.  Those of patches several
    sigma apart are nearly orthogonal, and one W can give each its own output.
    """

    def __init__(self, dim, M, sigma, rng):
        super().__init__()
        omega = np.random.default_rng(rng).standard_normal((M, dim)) / sigma
        self.register_buffer("omega", torch.tensor(omega, dtype=torch.float32))

    def forward(self, h):
        """(..., dim) -> (..., 2M)."""
        angles = h @ self.omega.T  # (..., M)
        return torch.cat([angles.cos(), angles.sin()], dim=-1) / len(self.omega) ** 0.5


class Layer(nn.Module):
    """Eqs. (1), (2): the output W x, divided by the sum of its entries, of every patch.

    phi: the fixed features, (..., s V) -> (..., K); for RandomFeatures K = 2M.
    W (V, K): the trained weights.
    """

    def __init__(self, s, phi, W):
        super().__init__()
        self.s, self.phi, self.W = s, phi, nn.Parameter(W)

    def forward(self, h):
        """Embeddings (n, width, V) -> (n, width / s, V).

        Training leaves W x near q_mu times a positive factor (Lemmas 14, 16), which
        differs from patch to patch: p_mu / (p_mu + lambda_W) for orthonormal x, with
        p_mu = P[first patch is mu].  Entries of q_mu sum to 1: the division removes it.
        """
        patches = h.unflatten(1, (-1, self.s)).flatten(2)  # (n, width / s, s V)
        x = self.phi(patches)  # (n, width / s, K)
        scores = x @ self.W.T  # (n, width / s, V)
        return scores / scores.sum(-1, keepdim=True)


def deep_cnn(V, *layers):
    """Section 2.2: one-hot embeddings of V symbols, then layers L, L-1, ....

    net(tokens) is (n, 1, V) for integers (n, s^L); net[: k + 1] has the first k layers.
    """
    return nn.Sequential(nn.Embedding.from_pretrained(torch.eye(V)), *layers)


def predict(net, tokens):
    """Outputs of a network of k layers, (n, width / s^k, V), NumPy float64.

    tokens: integers (n, width).  ValueError for other tokens, and where an output is
    not finite.
    """
    tokens = torch.as_tensor(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (n, width), got {tuple(tokens.shape)}")
    outputs = embed(net, tokens)
    if not outputs.isfinite().all():
        raise ValueError("outputs are not finite: the sum in Eq. (2) may be 0")
    return outputs.cpu().double().numpy()


# ---- Efficiency only: embed(net, tokens) is net(tokens), faster ----------------------

CHUNK = 4096  # patches computed at a time: bounds the memory, and stays in the cache


@torch.no_grad()
def embed(net, tokens):
    """net(tokens) without gradients; equal patches are computed once.

    tokens: integers (n, width), else ValueError, in 0..V-1.
    """
    table = net[0].weight  # the different outputs, one per row: here one-hot vectors
    index = as_symbols(tokens, len(table)).to(table.device)  # which row stands where
    for layer in net[1:]:
        patches = index.unflatten(1, (-1, layer.s))  # (n, width / s, s)
        patches, index = distinct(patches)  # (U, s), (n, width / s)
        outputs = [layer(table[part]) for part in patches.split(CHUNK)]  # (u, 1, V)
        table = torch.cat(outputs)[:, 0]
    return table[index]


def distinct(rows):
    """The U different rows of integers, and the number of each row among them.

    [[0, 2], [1, 1], [0, 2]] has the rows [[0, 2], [1, 1]], in an order that means
    nothing, and the numbers [0, 1, 0].  (..., s) -> (U, s) and (...).
    """
    # Rows are compared by a hash, a random linear function modulo 2^64: much faster
    # than torch.unique(rows, dim=0, return_inverse=True).
    odd = 2 * np.random.default_rng(0).integers(2**62, size=rows.shape[-1]) + 1
    hashes = (rows * torch.from_numpy(odd).to(rows.device)).sum(-1)
    hashes, number = hashes.unique(return_inverse=True)
    different = rows.new_empty(len(hashes), rows.shape[-1])
    different[number] = rows  # equal rows write the same entries
    if not torch.equal(different[number], rows):
        raise ArithmeticError("two different rows have the same hash")
    return different, number


def as_symbols(values, V):
    """Integers as an int64 tensor; ValueError unless they lie in 0..V-1."""
    values = torch.as_tensor(values)
    symbols = values.long()
    outside = symbols[(symbols < 0) | (symbols >= V)]
    if values.is_floating_point() or len(outside) > 0:
        got = f"{values.dtype}, {outside[:3].tolist()} outside"
        raise ValueError(f"symbols must be integers in 0..{V - 1}, got {got}")
    return symbols
