"""The picture of a run, experiments/layerwise.png: `python train_layerwise.py` draws it."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from rhm import signal_bound, typical_signal


@torch.no_grad()
def compare_patches(net, rhm, level, rng, n=500):
    """What a trained level makes of pairs of patches; not in the paper.  A dict:

    matrix: distances between the outputs for one instance of each patch, sorted by
    symbol.  Of all pairs of n instances: inside and between, the distances of outputs
    of one symbol and of two (Assumption 9); eps_S, the largest distance of embeddings x
    of one patch, and eps_O, the largest overlap |<x, x'>| of two patches (Lemma 10).
    """
    tree, k = rhm.sample_tree(10_000, rng, level), rhm.L - level
    symbol = tree[level - 1][:, 0]
    tokens = torch.as_tensor(tree[-1], device=net[k].W.device)
    outputs = net[: k + 1].embed(tokens)[:, 0].double().cpu()
    patch = np.column_stack([symbol, tree[level]])  # unique sorts by symbol first
    _, one_each = np.unique(patch, axis=0, return_index=True)

    x = net[k].patch_embedding(net[:k].embed(tokens[:n]).flatten(1)).double()
    x /= x.norm(dim=1, keepdim=True)  # 1 up to the rounding of float32
    i, j = np.triu_indices(n, 1)  # all pairs
    overlap = (x @ x.T).cpu().numpy()[i, j]
    apart = torch.cdist(outputs[:n], outputs[:n]).numpy()[i, j]
    same_symbol, same_patch = symbol[i] == symbol[j], (patch[i] == patch[j]).all(1)
    return dict(
        matrix=torch.cdist(outputs[one_each], outputs[one_each]).numpy(),
        inside=apart[same_symbol],
        between=apart[~same_symbol],
        # ||x - x'||^2 = 2 - 2 <x, x'> for vectors of norm 1
        eps_S=math.sqrt(max(0, 2 - 2 * overlap[same_patch].min(initial=1))),
        eps_O=np.abs(overlap[~same_patch]).max(initial=0),
    )


def plot_layers(net, rhm, config, stages, diagnoses, path):
    """Synonyms collapse; losses; distances of two tokens; signal and error.

    net, stages and diagnoses as train_layerwise.run returns them; path: the picture.
    """
    levels = [stage.level for stage in stages]
    rngs = [np.random.default_rng([config.seed, 3, l]) for l in levels]
    compared = [compare_patches(net, rhm, l, rng) for l, rng in zip(levels, rngs)]
    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    axes = top.subplots(1, rhm.L, squeeze=False)[0]
    for ax, level, found in zip(axes, levels, compared):
        matrix = found["matrix"] / max(found["matrix"].max(), 1e-12)
        ax.imshow(matrix, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        ax.set(title=f"outputs of level {level}", xticks=[], yticks=[])
    axes[0].set_ylabel(f"{rhm.V} symbols x {rhm.m} synonyms")
    top.colorbar(axes[0].images[0], ax=axes, shrink=0.7, label="distance / largest")

    left, middle, right = bottom.subplots(1, 3)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, rhm.L))
    for stage, color in zip(stages, colors):
        steps = np.arange(1, len(stage.losses) + 1)
        left.plot(steps, stage.losses, color=color, label=f"level {stage.level}")
        left.axhline(stage.minimum, color=color, linestyle=":")
    left.set(title="losses approach their minimum (dotted)", xscale="log")
    left.set(xlabel="gradient step + 1", ylabel="loss, Eq. (3)")

    k = rhm.L // 2  # a stage in the middle: its tokens are outputs of the one before
    found, sigma = compared[max(k - 1, 0)], stages[k].sigma
    largest = max(found[name].max(initial=1e-9) for name in ("inside", "between"))
    for name, label in ("inside", "one symbol"), ("between", "two symbols"):
        middle.hist(found[name], np.linspace(0, largest, 80), label=label)
    dotted = dict(color="black", linestyle=":")
    middle.axvline(sigma / config.bandwidth, **dotted, label="quantile of choose_sigma")
    middle.axvline(sigma, color="black", label=f"sigma of level {levels[k]}")
    middle.set(title="distances of two tokens, and sigma", ylabel="pairs")
    middle.set(xlabel=f"distance of two tokens of level {levels[k]}")
    middle.margins(y=0.5)  # room for the legend
    middle.set_visible(rhm.L > 1)  # the tokens of the bottom level are one-hot

    for label, style, values in (
        ("signal rho", "C0o-", [rhm.signal(l) for l in levels]),
        ("typical distance", "C0:", [typical_signal(rhm.V, rhm.m, l) for l in levels]),
        ("largest error", "C1s-", [found["errors"].max() for found in diagnoses]),
        ("median error", "C1s--", [np.median(found["errors"]) for found in diagnoses]),
        ("Proposition 19", "k-.", [signal_bound(rhm.m, l) for l in levels]),
    ):
        drawn = [v if 0 < v < math.inf else math.nan for v in values]  # on a log scale
        right.plot(levels, drawn, style, label=label)
    right.set(title="signal and error", yscale="log", xticks=levels)
    right.set(xlabel="level (trained from left to right)", ylabel="distance of two q")
    right.invert_xaxis()
    for ax in (left, middle, right):
        ax.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def check_figure(path):
    """Refuse a picture that cannot be written, before training; make its folder."""
    path = Path(path)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"the figure must end in .png, .pdf or .svg, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()  # OSError; leaves an existing picture as it is
    if is_new:
        path.unlink()
