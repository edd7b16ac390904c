"""What Theorem 7 asks and what the default run uses: `python -m experiments.theorem_7`.

The constants of the proof for the default grammar, beside the settings of the default
run and what that run reaches.  A few seconds; prints a table in Markdown.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch

from rhm import RHM
from train_layerwise import (
    Config, diagnose, one_line_parser, proof_constants, schedule, train,
)  # fmt: skip

ROWS = {
    "N": "samples N",
    "M": "frequencies M (order)",
    "lambda_W": "ridge lambda_W",
    "T": "steps T",
    "sigma": "bandwidth sigma",
    "eps_O": "overlap eps_O of two patches, at most",
    "eps_S": "distance eps_S within a patch, at most",
    "eps": "error of the outputs, at most",
    "inside": "distance of two outputs of one symbol, at most",
    "between": "distance of two outputs of two symbols, at least",
}


@torch.no_grad()
def compare_patches(net, rhm, level, rng, n=500):
    """What a trained level makes of all pairs of n first patches; not in the paper.

    Returns inside and between, the distances of outputs of one symbol and of two
    (Assumption 9); eps_S, the largest distance of embeddings x of one patch; and eps_O,
    the largest overlap |<x, x'>| of two different patches (Lemma 10).
    """
    tree, k = rhm.sample_tree(n, rng, level), rhm.L - level + 1
    symbol, patch = tree[level - 1], tree[level]  # (n, 1), (n, s)
    h = net[:k](torch.as_tensor(tree[-1], device=net[0].weight.device))  # (n, s, V)
    outputs = net[k](h)[:, 0].double().cpu()
    x = net[k].patch_embedding(h.flatten(1)).double().cpu()
    x /= x.norm(dim=1, keepdim=True)  # 1 up to the rounding of float32
    i, j = np.triu_indices(n, 1)  # all pairs
    apart = torch.cdist(outputs, outputs).numpy()[i, j]
    overlap = (x @ x.T).numpy()[i, j]
    same_symbol, same_patch = ((a[i] == a[j]).all(1) for a in (symbol, patch))
    # ||x - x'||^2 = 2 - 2 <x, x'> for vectors of norm 1
    eps_S = math.sqrt(max(0, 2 - 2 * overlap[same_patch].min(initial=1)))
    eps_O = np.abs(overlap[~same_patch]).max(initial=0)
    return apart[same_symbol], apart[~same_symbol], eps_S, eps_O


def asked(rhm):
    """{level: what the proof asks}; Assumption 9 follows from the errors eps."""
    constants = proof_constants(rhm)
    for l, c in constants.items():
        c.inside, c.between = 2 * c.eps, rhm.signal(l) - 2 * c.eps
    return constants


def found(rhm, config):
    """{level: what a run uses and reaches}, under the names of proof_constants."""
    lambda_W, _, T = schedule(rhm.V, rhm.m, config)
    levels = {}

    def report(net, stage):
        l, seed = stage.level, [config.seed, 3, stage.level]
        inside, between, eps_S, eps_O = compare_patches(net, rhm, l, seed)
        levels[l] = SimpleNamespace(
            N=stage.N,
            M=config.M,
            lambda_W=lambda_W,
            T=T,
            sigma=stage.sigma,
            eps_O=eps_O,
            eps_S=round(eps_S, 6),  # equal patches: 1e-8 by rounding
            eps=diagnose(net, rhm, l, seed)[0].max(),
            inside=inside.max(),
            between=between.min(),
        )

    train(rhm, config, report)
    return levels


def show(value):
    """Whole numbers up to a million as they are, others with two digits."""
    return f"{value:,.0f}" if 50 <= value < 1e6 else f"{value:.2g}"


def table(*columns):
    """The lines of the table; columns: {level: constants}, from the bottom level up."""
    levels = sorted(columns[0], reverse=True)
    yield f"level {', '.join(map(str, levels))} | asked by the proof | used or found"
    yield "--- | --- | ---"
    for name, meaning in ROWS.items():
        cells = []
        for column in columns:
            texts = [show(float(getattr(column[l], name))) for l in levels]
            if name in ("inside", "between"):
                texts[-1] = "-"  # Assumption 9 asks nothing of the outputs of level 1
            cells.append(texts[0] if len(set(texts)) == 1 else ", ".join(texts))
        yield " | ".join([meaning, *cells])


def main(argv=None):
    text = "Print what Theorem 7 asks and what the default run uses."
    one_line_parser(text).parse_args(argv)
    rhm = RHM.random(V=16, m=4, s=2, L=4, rng=0)
    print(*table(asked(rhm), found(rhm, Config())), sep="\n")


if __name__ == "__main__":
    main()
