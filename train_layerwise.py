"""Layerwise training of a deep CNN on a random hierarchy model (Section 2.3 of the paper).

`python train_layerwise.py` draws a grammar, trains the network level by level from
sentences and labels alone, compares every level with the exact theory afterwards, and
draws figures/layerwise.png.  The learner is `train` and what stands above it.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

from model import CHUNK, DeepCNN, Level, distinct_rows
from rhm import RHM, signal_bound, typical_signal

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SAMPLES_AT_A_TIME = 2**19


@dataclass(frozen=True)
class Config:
    """All defaults.  The sizes are those of the grammar that `main` draws."""

    V: int = 16  # symbols of every level
    m: int = 4  # rules per symbol
    s: int = 2  # tokens per patch
    L: int = 4  # levels
    C: float = 10.0  # samples: N^(l) = C V m m^l (Section 4.2, with the corrected Lemma 18)
    M: int = 512  # random frequencies per level, Eq. (6)
    seed: int = 0  # of grammar, training data, features and test data, each on its own
    device: str = "cpu"  # or cuda
    ridge: float = 0.01  # lambda_W = ridge / |P_l|; the proof has ridge = 1
    bandwidth: float = 1.5  # sigma in units of the learner's estimate of rho~, see below
    kappa: float = 1.0  # of Assumption 6(a), as assumed by the learner in Lemma 17
    eps: float = 0.01  # target error eps_* of Lemma 17; sets the number of steps

    def __post_init__(self):
        for name in ("C", "ridge", "bandwidth", "kappa", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name, least in (("M", 1), ("seed", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be an integer >= {least}, got {getattr(self, name)}"
                )
        if str(self.device).split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device}")
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"cannot use device {self.device}: {error}".splitlines()[0])


@dataclass(frozen=True)
class Stage:
    """What the learner knows after one stage."""

    level: int
    N: int  # samples drawn
    rows: int  # distinct first patches among them
    sigma: float  # bandwidth
    losses: np.ndarray  # Eq. (3) before the first step and after each of the T steps
    minimum: float  # Eq. (3) at its closed-form minimiser
    seconds: float


def draw_first_patches(rhm, N, level, rng, device="cpu"):
    """N fresh samples of Section 2.3, equal ones merged.

    Eq. (3) sees the data only through how often each leaf string under the first
    level-`level` patch came with each label.  Millions of samples fit in a small table.
    Returns the distinct strings (U, s^(L-level+1)) and their label counts (U, V).
    """
    leaves = torch.zeros(0, rhm.s ** (rhm.L - level + 1), dtype=torch.int32, device=device)
    counts = torch.zeros(0, rhm.V, dtype=torch.int64, device=device)
    for start in range(0, N, SAMPLES_AT_A_TIME):
        tokens, labels = rhm.sample(min(SAMPLES_AT_A_TIME, N - start), rng, level)
        tokens, labels = (torch.as_tensor(a, device=device) for a in (tokens, labels))
        rows, number = distinct_rows(torch.cat([leaves, tokens]), rhm.V)
        old, new = number[: len(leaves)], number[len(leaves) :]
        merged = torch.bincount(new * rhm.V + labels, minlength=len(rows) * rhm.V)
        merged = merged.view(len(rows), rhm.V).index_add(0, old, counts)
        leaves, counts = rows, merged
    return leaves, counts


def choose_sigma(h, counts, factor, rng, pairs=20_000):
    """The bandwidth of Eq. (6), from the learner's own embeddings h (U, s, V).

    Lemma 10 wants sigma in proportion to rho~, the smallest distance between embeddings of
    two symbols (Assumption 9).  Two random tokens are the same symbol with probability about
    1/V, so the 1/V quantile of their distance lies where one symbol's cluster ends and
    rho~ begins.  Distances of 0 are left out: with m = 1 the quantile would be 0.
    """
    weights = counts.sum(1).cpu().numpy() / counts.sum().item()
    rows = torch.from_numpy(rng.choice(len(h), size=(2, pairs), p=weights))
    places = torch.from_numpy(rng.integers(h.shape[1], size=(2, pairs)))
    tokens = h[rows.to(h.device), places.to(h.device)]  # (2, pairs, V)
    distances = (tokens[0] - tokens[1]).norm(dim=1)
    distances = distances[distances > 0]
    return factor * distances.quantile(1 / h.shape[2]).item() if len(distances) else 1.0


def schedule(V, m, config):
    """lambda_W and the step eta of Lemma 15, and the number of steps T of Lemma 17.

    Lemma 15 prints eta = 2 / (1 + lambda_W); the loss is (1 + lambda_W)-smooth, which asks
    for the 2 in front of lambda_W.
    """
    P = V * m  # |P_l|, the number of patches of every level
    lambda_W = config.ridge / P
    T = P * math.log(100 * P * config.kappa * math.sqrt(V) / config.eps)
    return lambda_W, 2 / (1 + 2 * lambda_W), math.ceil(T)


def gradient_descent(covariance, correlation, lambda_W, eta, T):
    """T steps of gradient descent on Eq. (3) from W = 0 (Section 2.3).

    covariance: E^[x x^T], (2M, 2M); correlation: E^[e_zeta x^T], (V, 2M).
    Returns W (V, 2M), the T + 1 losses, and the loss of the closed-form minimiser.
    """
    # Gradient descent does not care for an orthogonal change of basis.  In the eigenbasis
    # of E^[x x^T] = Q diag(spectrum) Q^T a step is elementwise, V 2M numbers instead of
    # V (2M)^2; below, W and target stand for W Q and E^[e_zeta x^T] Q.
    spectrum, Q = torch.linalg.eigh(covariance)
    target = correlation @ Q

    def loss(W):  # 1/2 E^||e_zeta - W x||^2 + lambda_W / 2 ||W||^2, since ||e_zeta|| = 1
        return 0.5 + (W * (0.5 * (spectrum + lambda_W) * W - target)).sum()

    W = torch.zeros_like(target)
    losses = [loss(W)]
    for _ in range(T):
        gradient = W * spectrum - target + lambda_W * W
        W = W - eta * gradient
        losses.append(loss(W))
    W_star = target / (spectrum + lambda_W)  # E^[e x^T] (E^[x x^T] + lambda_W I)^-1
    return W @ Q.T, torch.stack(losses).cpu().numpy(), loss(W_star).item()


@torch.no_grad()
def train_level(h, counts, omega, lambda_W, eta, T):
    """Train one level (Section 2.3): gather the two averages of Eq. (3), then descend.

    h (U, s V): distinct patches; counts (U, V): how often each came with each label;
    omega (M, s V).  Returns the Level, the losses and the minimum of gradient_descent.
    """
    V, counts = counts.shape[1], counts.to(h.dtype)
    N = counts.sum()
    level = Level(omega, omega.new_zeros(V, 2 * len(omega)))
    covariance, correlation = 0, 0
    for rows, n in zip(h.split(CHUNK), counts.split(CHUNK)):
        x = level.patch_embedding(rows)  # (u, 2M)
        covariance += x.T @ (n.sum(1, keepdim=True) / N * x)  # E^[x x^T]
        correlation += (n / N).T @ x  # E^[e_zeta x^T]
    W, losses, minimum = gradient_descent(covariance, correlation, lambda_W, eta, T)
    level.W.copy_(W)
    return level, losses, minimum


@torch.no_grad()
def train(rhm, config, report=None, sigmas=None):
    """The training algorithm of Section 2.3; returns (net, stages).

    Of the grammar it uses rhm.sample(n, rng, level) and the sizes V, m, s, L, nothing else.
    report: called as report(net, stage) after each stage.  sigmas: a dict level -> bandwidth
    that takes the place of the learner's own choice.
    """
    data_rng, feature_rng = (np.random.default_rng([config.seed, k]) for k in (1, 2))
    lambda_W, eta, T = schedule(rhm.V, rhm.m, config)
    net, stages = DeepCNN(rhm.V), []
    for l in range(rhm.L, 0, -1):
        start = time.perf_counter()
        N = math.ceil(config.C * rhm.V * rhm.m * rhm.m**l)  # the bottom level dominates
        leaves, counts = draw_first_patches(rhm, N, l, data_rng, config.device)
        h = net.embed(leaves)  # (U, s, V): the s tokens of each first patch
        if sigmas and l in sigmas:
            sigma = sigmas[l]
        elif l == rhm.L:
            sigma = 0.5  # one-hot tokens: rho~ = sqrt(2) is known
        else:
            sigma = choose_sigma(h, counts, config.bandwidth, feature_rng)
        omega = feature_rng.standard_normal((config.M, rhm.s * rhm.V)) / sigma  # Eq. (6)
        omega = torch.tensor(omega, dtype=torch.float32, device=config.device)
        level, losses, minimum = train_level(
            h.flatten(1), counts, omega, lambda_W, eta, T
        )
        net.append(level)
        seconds = time.perf_counter() - start
        stages.append(Stage(l, N, len(leaves), sigma, losses, minimum, seconds))
        if report:
            report(net, stages[-1])
    return net, stages


# ---- From here on: measurements, which look at the grammar, after the fact.


def predict(net, tokens):
    """Outputs of the network for NumPy tokens, as a float64 array; not in the paper."""
    device = next(net.parameters()).device
    with torch.no_grad():
        return net(torch.as_tensor(tokens, device=device)).double().cpu().numpy()


def accuracy(net, rhm, n, rng):
    """Share of n fresh sentences whose label is the argmax of the output (Section 2.2)."""
    tokens, labels = rhm.sample(n, rng)
    return float((predict(net, tokens).argmax(1) == labels).mean())


def diagnose(net, rhm, level, rng, n=10_000):
    """Compare a network that reaches down from `level` with Eq. (4), on n fresh patches.

    Returns a dict: errors (n,), the eps_* of Lemma 17, ||output - q_mu||; spread, the median
    distance of an output from its symbol's mean; between, the smallest distance between the
    means of two symbols; nearest, the share of outputs whose nearest q is their own; and
    distances, between the outputs of one instance of each patch, sorted by symbol.
    """
    tree = rhm.sample_tree(n, rng, level)
    outputs = predict(net, tree[-1])  # (n, V)
    symbols = tree[level - 1][:, 0]
    q = rhm.label_posterior(level)
    seen = np.unique(symbols)
    to_q = cdist(outputs, q[seen])
    means = np.array([outputs[symbols == nu].mean(0) for nu in seen])
    to_means = cdist(outputs, means)
    own = np.arange(n), np.searchsorted(seen, symbols)
    gaps = cdist(means, means)[~np.eye(len(seen), dtype=bool)]
    first_patch = tree[level].reshape(n, -1)[:, : rhm.s]
    _, instance = np.unique(
        np.column_stack([symbols, first_patch]), axis=0, return_index=True
    )
    return dict(
        errors=to_q[own],
        spread=np.median(to_means[own]),
        between=gaps.min() if len(gaps) else math.inf,
        nearest=(to_q.argmin(1) == own[1]).mean(),
        distances=cdist(outputs[instance], outputs[instance]),
    )


def cdist(a, b):
    """Euclidean distances between the rows of two arrays."""
    mode = "donot_use_mm_for_euclid_dist"  # exact also where the distance is 0
    return torch.cdist(*map(torch.from_numpy, (a, b)), compute_mode=mode).numpy()


def run(rhm, config, figure=None):
    """Train on a grammar, print a row per level as it finishes, draw; not in the paper.

    Returns (net, stages, diagnoses).  figure: a path for the picture, or None.
    """
    start = time.perf_counter()
    print(
        f"V={rhm.V} m={rhm.m} s={rhm.s} L={rhm.L}, sentences of {rhm.d} tokens, "
        f"seed {config.seed}; kappa = {rhm.kappa:.4g}, K_rho = {rhm.K_rho:.4g}"
    )
    for line in rhm.assumption_6_failures():
        print(line)
    print(
        "level   samples     rows  steps   sigma      loss   minimum     rho  eps max  median"
        "  spread  between  nearest  seconds"
    )
    diagnoses = []

    def report(net, stage):
        rng = np.random.default_rng([config.seed, 3, stage.level])
        found = diagnose(net, rhm, stage.level, rng)
        diagnoses.append(found)
        print(
            f"{stage.level:5} {stage.N:9} {stage.rows:8} {len(stage.losses) - 1:6} "
            f"{stage.sigma:7.4f} {stage.losses[-1]:9.6f} {stage.minimum:9.6f} "
            f"{rhm.signal(stage.level):7.4f} {found['errors'].max():8.4f} "
            f"{np.median(found['errors']):7.4f} {found['spread']:7.4f} "
            f"{found['between']:8.4f} {100 * found['nearest']:7.2f}% {stage.seconds:8.2f}",
            flush=True,
        )

    net, stages = train(rhm, config, report)
    test_rng = np.random.default_rng([config.seed, 4])
    share, n = accuracy(net, rhm, 10_000, test_rng), 10_000
    if figure:
        plot_layers(rhm, stages, diagnoses, figure)
    print(
        f"{100 * share:.2f}% of {n} fresh sentences right (chance {100 / rhm.V:.2f}%), "
        f"{sum(stage.N for stage in stages)} training sentences, "
        f"{time.perf_counter() - start:.1f} s" + (f", {figure}" if figure else "")
    )
    return net, stages, diagnoses


def plot_layers(rhm, stages, diagnoses, path):
    """The picture of a run: synonyms collapse, losses, signal against error by level."""
    levels = [stage.level for stage in stages]
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    axes = top.subplots(1, rhm.L, squeeze=False)[0]
    for ax, level, found in zip(axes, levels, diagnoses):
        distances = found["distances"] / max(found["distances"].max(), 1e-12)
        image = ax.imshow(distances, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        ax.set(title=f"level {level}", xticks=[], yticks=[])
    axes[0].set_ylabel(f"{rhm.V} symbols x {rhm.m} synonyms")
    bar = top.colorbar(image, ax=axes, shrink=0.7)
    bar.set_label("distance of outputs / largest")

    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, rhm.L))
    left, right = bottom.subplots(1, 2)
    for stage, color in zip(stages, colors):
        left.plot(
            np.arange(len(stage.losses)) + 1, stage.losses, color=color,
            label=f"level {stage.level}",
        )
        left.axhline(stage.minimum, color=color, linestyle=":")
    left.set(xscale="log", xlabel="gradient step + 1", ylabel="loss, Eq. (3)")
    left.set_title("training loss; dotted: closed-form minimum")
    left.legend()

    errors = np.array([found["errors"] for found in diagnoses])
    for label, style, values in (
        ("signal rho", "C0o-", [rhm.signal(l) for l in levels]),
        ("typical distance", "C0:", [typical_signal(rhm.V, rhm.m, l) for l in levels]),
        ("largest error eps_*", "C1s-", errors.max(1)),
        ("median error", "C1s--", np.median(errors, 1)),
        ("Proposition 19's bound", "k-.", [signal_bound(rhm.m, l) for l in levels]),
    ):
        drawn = [v if 0 < v < math.inf else math.nan for v in values]  # on a log scale
        right.plot(levels, drawn, style, label=label)
    right.set(yscale="log", xlabel="level (training goes from left to right)", xticks=levels)
    right.set_title("what there is to see, and how exactly it was seen")
    right.invert_xaxis()
    right.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def check_figure(path):
    """Refuse a picture that could not be written, before training rather than after it."""
    path = Path(path)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"the figure must end in .png, .pdf or .svg, got {path}")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"cannot write the figure {path}: {error.strerror}")
    if not existed:
        path.unlink()


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train_layerwise.py",
        description="Train a deep CNN layer by layer on a random hierarchy model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Config()
    for name, text in dict(
        V="symbols of every level", m="rules per symbol", s="tokens per patch",
        L="levels; sentences have s^L tokens", C="samples per stage: C V m m^level",
        M="random frequencies per level", seed="of grammar, data and features",
        device="cpu or cuda",
    ).items():
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    parser.add_argument("--figure", default="figures/layerwise.png", help="picture to write")
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    options = vars(parser.parse_args(argv))
    figure = options.pop("figure")
    try:
        config = Config(**options)
        rng = np.random.default_rng(config.seed)
        rhm = RHM.random(config.V, config.m, config.s, config.L, rng)
        check_figure(figure)
        run(rhm, config, figure)
    except (ValueError, MemoryError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
