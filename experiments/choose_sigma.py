"""The picture behind `choose_sigma`: `python -m experiments.choose_sigma` draws it.

For levels 3, 2, 1 of the default run: the distances of two random tokens, of one symbol
and of two.  The learner sees their sum only; it cannot tell the two colours apart.  A
few seconds; writes experiments/choose_sigma.png.
"""

from pathlib import Path

import numpy as np
import torch

from rhm import RHM
from train_layerwise import Config, one_line_parser, save, train


@torch.no_grad()
def token_distances(net, rhm, level, rng, pairs=20_000):
    """Distances of two random tokens of first level-`level` patches; not in the paper.

    As choose_sigma draws them: two random patches, a random token of each, without
    pairs of equal embeddings.  Returns those of one symbol, and those of two.
    """
    rng = np.random.default_rng(rng)
    tree, k = rhm.sample_tree(2 * pairs, rng, level), rhm.L - level
    h = net[: k + 1](torch.as_tensor(tree[-1]))  # (2 pairs, s, V)
    rows, places = np.arange(2 * pairs), rng.integers(rhm.s, size=2 * pairs)
    tokens, symbols = h[rows, places], tree[level][rows, places]
    apart = (tokens[:pairs] - tokens[pairs:]).norm(dim=1).numpy()
    same_symbol = symbols[:pairs] == symbols[pairs:]
    return apart[same_symbol & (apart > 0)], apart[~same_symbol & (apart > 0)]


def plot(distances, rhm, stages):
    """A panel per level; distances: {level: (of one symbol, of two)}.  The Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    share = dict(sharex=True, sharey=True, squeeze=False)
    axes = figure.subplots(1, len(distances), **share)[0]
    sigmas = {stage.level: stage.sigma for stage in stages}
    for ax, (level, (inside, between)) in zip(axes, distances.items()):
        together = np.concatenate([inside, between])
        bins = np.geomspace(together.min(), together.max(), 60)
        names = "of one symbol", "of two symbols"
        ax.hist([inside, between], bins, stacked=True, color=["C1", "C0"], label=names)
        for label, line, value in (
            ("quantile 1 / V", ":", np.quantile(together, 1 / rhm.V)),
            ("sigma", "-", sigmas[level]),
            ("rho", "--", rhm.signal(level + 1)),
        ):
            ax.axvline(value, color="black", linestyle=line, label=label)
        ax.set(title=f"level {level}", xscale="log", xlabel="distance of two tokens")
        ax.set_xticks([], minor=True)
        ax.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], [0.02, 0.05, 0.1, 0.2, 0.5, 1])
    axes[0].set_ylabel("pairs of tokens")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def main(argv=None):
    text = "Draw the distances of two random tokens, and sigma."
    one_line_parser(text).parse_args(argv)
    rhm = RHM.random(V=16, m=4, s=2, L=4, rng=0)
    net, stages = train(rhm, Config())
    distances = {l: token_distances(net, rhm, l, [0, 5, l]) for l in (3, 2, 1)}
    path = Path(__file__).with_suffix(".png")
    save(plot(distances, rhm, stages), path)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
