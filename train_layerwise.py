"""Layerwise training of a deep CNN on a random hierarchy model (Section 2.3).

`python train_layerwise.py` draws a grammar, trains the network level by level from
sentences and labels alone, compares every level with the exact theory afterwards, and
draws figures/layerwise.png.  The learner is `train` and what stands above it.
"""

import argparse
import math
import time
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

from model import CHUNK, DeepCNN, Level, distinct_rows
from rhm import RHM, as_integer, is_integer, signal_bound, typical_signal

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

SAMPLES_AT_A_TIME = 2**19


@dataclass(frozen=True)
class Config:
    """All defaults.  The sizes are those of the grammar that `main` draws."""

    V: int = 16  # symbols of every level
    m: int = 4  # rules per symbol
    s: int = 2  # tokens per patch
    L: int = 4  # levels
    C: float = 10.0  # samples: N^(l) = C V m m^l (Section 4.2, corrected Lemma 18)
    M: int = 512  # random frequencies per level, Eq. (6)
    seed: int = 0  # of grammar, training data, features and test data, each on its own
    device: str = "cpu"  # or cuda
    ridge: float = 0.01  # lambda_W = ridge / |P_l|; the proof has ridge = 1
    bandwidth: float = 1.5  # sigma over the estimate of rho~ in choose_sigma
    kappa: float = 1.0  # of Assumption 6(a), as assumed by the learner in Lemma 17
    eps: float = 0.01  # target error eps_* of Lemma 17; sets the number of steps

    def __post_init__(self):
        for name in ("C", "ridge", "bandwidth", "kappa", "eps"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < value < 1e9:
                raise ValueError(f"{name} must lie between 0 and 1e9, got {value!r}")
            object.__setattr__(self, name, float(value))
        for name, least in (("M", 1), ("seed", 0)):
            value = as_integer(name, getattr(self, name), least)
            object.__setattr__(self, name, value)
        if str(self.device).split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device}")
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"cannot use device {self.device}: {reason}") from error


@dataclass(frozen=True)
class Stage:
    """What the learner knows after one stage."""

    level: int
    N: int  # samples drawn
    rows: int  # distinct leaf strings under their first patches
    sigma: float  # bandwidth
    losses: np.ndarray  # Eq. (3) before the first step and after each of the T steps
    minimum: float  # Eq. (3) at its closed-form minimiser
    seconds: float


def draw_first_patches(rhm, N, level, rng, device="cpu"):
    """N fresh samples of Section 2.3, equal ones merged.

    Eq. (3) sees the data only through how often each leaf string under the first
    level-`level` patch came with each label.  Millions of samples fit in a small table.
    Returns the distinct strings (U, s^(L-level+1)) and their label counts (U, V).
    ValueError for N outside 1..2^31 or a level outside 1..L.
    """
    level = as_integer("level", level, 1, rhm.L)
    if not is_integer(N) or not 1 <= N <= 2**31:
        raise ValueError(f"level {level} must have 1 to 2^31 samples, got {N!r}")
    width = rhm.s ** (rhm.L - level + 1)
    leaves = torch.zeros(0, width, dtype=torch.int32, device=device)
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

    Lemma 10 wants sigma in proportion to rho~, the smallest distance between embeddings
    of two symbols (Assumption 9).  Two random tokens are the same symbol with
    probability about 1/V, so the 1/V quantile of their distance lies where one symbol's
    cluster ends and rho~ begins.  Distances of 0 are left out: with m = 1 the quantile
    would be 0.
    """
    weights = counts.sum(1).cpu().numpy() / counts.sum().item()
    rows = torch.from_numpy(rng.choice(len(h), size=(2, pairs), p=weights))
    places = torch.from_numpy(rng.integers(h.shape[1], size=(2, pairs)))
    tokens = h[rows.to(h.device), places.to(h.device)]  # (2, pairs, V)
    distances = (tokens[0] - tokens[1]).norm(dim=1)
    distances = distances[distances > 0]
    return factor * distances.quantile(1 / h.shape[2]).item() if len(distances) else 1.0


def schedule(V, m, config):
    """lambda_W = ridge / |P_l|, the step eta of Lemma 15, the steps T of Lemma 17.

    The curvatures of Eq. (3) lie in [lambda_W, 1 + lambda_W], and the best constant
    step is 2 / (smallest + largest).  Lemma 15 prints eta = 2 / (1 + lambda_W).
    """
    P = V * m  # |P_l|, the number of patches of every level
    lambda_W = config.ridge / P
    T = P * (math.log(100 * P * config.kappa * math.sqrt(V)) - math.log(config.eps))
    T = max(1, math.ceil(T))  # at W = 0 Eq. (2) is 0 / 0
    return lambda_W, 2 / (1 + 2 * lambda_W), T


def gradient_descent(covariance, correlation, lambda_W, eta, T):
    """T steps of gradient descent on Eq. (3) from W = 0 (Section 2.3).

    covariance: E^[x x^T], (2M, 2M); correlation: E^[e_zeta x^T], (V, 2M).
    Returns W (V, 2M), the T + 1 losses, and the loss of the closed-form minimiser.
    """
    # Gradient descent commutes with an orthogonal change of basis.  In the eigenbasis
    # of E^[x x^T] = Q diag(spectrum) Q^T a step is elementwise, V 2M numbers
    # instead of V (2M)^2; below, W and target stand for W Q and E^[e_zeta x^T] Q.
    spectrum, Q = torch.linalg.eigh(covariance)
    spectrum = spectrum.clamp(min=0)  # below 0 by rounding only
    target = correlation @ Q

    def loss(W):  # Eq. (3) multiplied out, with ||e_zeta|| = 1
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

    h (U, s V): embedded patches, one row a leaf string; counts (U, V): how often each
    came with each label; omega (M, s V).  Returns the Level, and the losses and the
    minimum of gradient_descent.
    """
    V, counts = counts.shape[1], counts.to(h.dtype)
    N = counts.sum()
    level = Level(omega, omega.new_zeros(V, 2 * len(omega)))
    covariance, correlation = 0, 0
    for rows, n in zip(h.split(CHUNK), counts.split(CHUNK)):
        x = level.patch_embedding(rows)  # (u, 2M)
        covariance += x.T @ (n.sum(1, keepdim=True) / N * x)  # E^[x x^T]
        correlation += (n / N).T @ x  # E^[e_zeta x^T], whose mean is Eq. (8)
    W, losses, minimum = gradient_descent(covariance, correlation, lambda_W, eta, T)
    level.W.copy_(W)
    return level, losses, minimum


@torch.no_grad()
def train(rhm, config, report=None, sigmas=None):
    """The training algorithm of Section 2.3; returns (net, stages).

    Of the grammar it uses rhm.sample(n, rng, level) and the sizes V, m, s, L, nothing
    else. report: called as report(net, stage) after each stage.  sigmas: a dict level
    -> bandwidth that takes the place of the learner's own choice.  ValueError for more
    than 2^31 samples a stage, or a sigma that is no positive number.
    """
    data_rng, feature_rng = (np.random.default_rng([config.seed, k]) for k in (1, 2))
    optimiser = schedule(rhm.V, rhm.m, config)  # lambda_W, eta, T
    net, stages = DeepCNN(rhm.V), []
    for l in range(rhm.L, 0, -1):
        start = time.perf_counter()
        N = math.ceil(config.C * rhm.V * rhm.m * rhm.m**l)  # geometric: Section 4.2
        leaves, counts = draw_first_patches(rhm, N, l, data_rng, config.device)
        h = net.embed(leaves)  # (U, s, V): the s tokens of each first patch
        if sigmas and l in sigmas:
            sigma = sigmas[l]
        elif l == rhm.L:
            sigma = 0.5  # one-hot: rho~ = sqrt(2), overlaps exp(-4) (Lemma 10)
        else:
            sigma = choose_sigma(h, counts, config.bandwidth, feature_rng)
        if not isinstance(sigma, Real) or not 1e-30 < sigma < 1e30:
            raise ValueError(f"sigma must be between 1e-30 and 1e30, got {sigma!r}")
        omega = feature_rng.standard_normal((config.M, rhm.s * rhm.V)) / sigma
        omega = torch.tensor(omega, dtype=torch.float32, device=config.device)
        level, losses, minimum = train_level(h.flatten(1), counts, omega, *optimiser)
        net.append(level)
        seconds = time.perf_counter() - start
        stages.append(Stage(l, N, len(leaves), sigma, losses, minimum, seconds))
        if report:
            report(net, stages[-1])
    return net, stages


# ---- Measurements: they look at the grammar, after the fact --------------------------


def predict(net, tokens):
    """Outputs of the network for NumPy tokens, as a float64 array; not in the paper."""
    device = next(net.parameters()).device
    with torch.no_grad():
        return net(torch.as_tensor(tokens, device=device)).double().cpu().numpy()


def accuracy(net, rhm, n, rng):
    """Share of n fresh sentences whose label is the output's argmax (Section 2.2).

    ValueError for n < 1.
    """
    tokens, labels = rhm.sample(n, rng)
    if not len(labels):
        raise ValueError("an accuracy needs n >= 1 sentences, got 0")
    return float((predict(net, tokens).argmax(1) == labels).mean())


def distances(a, b):
    """Euclidean distances between the rows of two arrays; not in the paper."""
    mode = "donot_use_mm_for_euclid_dist"  # which is exact for equal rows, too
    return torch.cdist(*map(torch.from_numpy, (a, b)), compute_mode=mode).numpy()


def diagnose(net, rhm, level, rng, n=10_000):
    """Compare the outputs of a level with Eq. (4), on n fresh patches.

    net: trained down to `level` or further.  Returns a dict: errors (n,), the
    ||output - q_mu|| that Lemma 17 bounds by eps_*; spread, the median distance of an
    output from its symbol's mean; between, the smallest distance between the means of
    two symbols; nearest, the share of outputs whose nearest q is their own; and matrix,
    the distances between the outputs of one instance of each patch, sorted by symbol.
    ValueError for n < 1 or a level outside 1..L.
    """
    tree = rhm.sample_tree(n, rng, level)
    if not len(tree[0]):
        raise ValueError("a diagnosis needs n >= 1 patches, got 0")
    outputs = predict(net[: rhm.L - level + 1], tree[-1])  # (n, V)
    seen, symbol = np.unique(tree[level - 1], return_inverse=True)
    symbol = symbol.ravel()  # what each patch stands for, as a row of seen
    to_q = distances(outputs, rhm.label_posterior(level)[seen])
    means = np.array([outputs[symbol == i].mean(0) for i in range(len(seen))])
    gaps = distances(means, means)[~np.eye(len(seen), dtype=bool)]
    patches = np.column_stack([symbol, tree[level]])
    one_each = outputs[np.unique(patches, axis=0, return_index=True)[1]]
    return dict(
        errors=to_q[np.arange(n), symbol],
        spread=np.median(np.linalg.norm(outputs - means[symbol], axis=1)),
        between=gaps.min(initial=math.inf),
        nearest=(to_q.argmin(1) == symbol).mean(),
        matrix=distances(one_each, one_each),
    )


def run(rhm, config, figure=None):
    """Train on a grammar, print a row per level as it finishes, draw; not in the paper.

    figure: a path for the picture, or None.  Returns (net, stages, diagnoses).
    """
    start, diagnoses = time.perf_counter(), []
    print(
        f"V={rhm.V} m={rhm.m} s={rhm.s} L={rhm.L}, sentences of {rhm.d} tokens, seed "
        f"{config.seed}; kappa = {rhm.kappa:.4g}, K_rho = {rhm.K_rho:.4g}"
    )
    for line in rhm.assumption_6_failures():
        print(line)
    print(
        "level   samples     rows  steps   sigma    loss  minimum     rho  eps max"
        "  median  spread  between  nearest  seconds"
    )

    def report(net, stage):
        rng = np.random.default_rng([config.seed, 3, stage.level])
        found = diagnose(net, rhm, stage.level, rng)
        diagnoses.append(found)
        print(
            f"{stage.level:5} {stage.N:9} {stage.rows:8} {len(stage.losses) - 1:6} "
            f"{stage.sigma:7.4f} {stage.losses[-1]:7.4f} {stage.minimum:8.4f} "
            f"{rhm.signal(stage.level):7.4f} {found['errors'].max():8.4f} "
            f"{np.median(found['errors']):7.4f} {found['spread']:7.4f} "
            f"{found['between']:8.4f} {100 * found['nearest']:7.2f}% "
            f"{stage.seconds:8.2f}",
            flush=True,
        )

    net, stages = train(rhm, config, report)
    share = accuracy(net, rhm, 10_000, np.random.default_rng([config.seed, 4]))
    if figure:
        plot_layers(rhm, stages, diagnoses, figure)
    print(
        f"{100 * share:.2f}% of 10000 fresh sentences right "
        f"(chance {100 / rhm.V:.2f}%), "
        f"{sum(stage.N for stage in stages)} training sentences, "
        f"{time.perf_counter() - start:.1f} s" + f", {figure}" * bool(figure)
    )
    return net, stages, diagnoses


def plot_layers(rhm, stages, diagnoses, path):
    """The picture of a run: synonyms collapse; losses; signal and error by level."""
    levels = [stage.level for stage in stages]
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    axes = top.subplots(1, rhm.L, squeeze=False)[0]
    for ax, level, found in zip(axes, levels, diagnoses):
        matrix = found["matrix"] / max(found["matrix"].max(), 1e-12)
        ax.imshow(matrix, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        ax.set(title=f"level {level}", xticks=[], yticks=[])
    axes[0].set_ylabel(f"{rhm.V} symbols x {rhm.m} synonyms")
    label = "distance of outputs / largest"
    top.colorbar(axes[0].images[0], ax=axes, shrink=0.7, label=label)

    left, right = bottom.subplots(1, 2)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, rhm.L))
    for stage, color in zip(stages, colors):
        steps = np.arange(1, len(stage.losses) + 1)
        left.plot(steps, stage.losses, color=color, label=f"level {stage.level}")
        left.axhline(stage.minimum, color=color, linestyle=":")
    left.set(xscale="log", xlabel="gradient step + 1", ylabel="loss, Eq. (3)")
    left.set_title("training loss; dotted: closed-form minimum")
    left.legend()
    for label, style, values in (
        ("signal rho", "C0o-", [rhm.signal(l) for l in levels]),
        ("typical distance", "C0:", [typical_signal(rhm.V, rhm.m, l) for l in levels]),
        ("largest error eps_*", "C1s-", [found["errors"].max() for found in diagnoses]),
        ("median error", "C1s--", [np.median(found["errors"]) for found in diagnoses]),
        ("Proposition 19's bound", "k-.", [signal_bound(rhm.m, l) for l in levels]),
    ):
        drawn = [v if 0 < v < math.inf else math.nan for v in values]  # on a log scale
        right.plot(levels, drawn, style, label=label)
    right.set(yscale="log", xlabel="level (trained from left to right)", xticks=levels)
    right.set_title("what there is to see, and how exactly it was seen")
    right.invert_xaxis()
    right.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---- Theorem 7, measured: python train_layerwise.py --sweep --------------------------

SWEEP = [(16, m, L, False) for L in (2, 3) for m in (2, 3, 4, 6, 8)]  # V, m, L, shallow
SWEEP += [(16, m, 4, False) for m in (2, 3, 4, 6)]
SWEEP += [(16, 4, 1, False), (16, 4, 5, False), (8, 4, 3, False), (32, 4, 3, False)]
SWEEP += [(16, 4, 3, True), (16, 4, 4, True)]


def sample_complexity(V, m, L, shallow=False, grammars=10, device="cpu"):
    """Test accuracy against the number N of training samples of all levels (Theorem 7).

    C = 1/4, 1/2, 1, ..., 32 until the mean accuracy is above 99.5%.  Yields N, the
    accuracies on the first seeds with K_rho > 0, and those on the seeds passed over for
    K_rho = 0, one a grammar.  M = 4 V m.  shallow: the same N samples for a network of
    one level that sees the whole sentence as one patch, on 3 grammars and up to C = 8,
    with 44,860 steps and a sigma and ridge whose accuracy is within 3 percentage points
    of the best tried (README).
    """
    rhms, good = [], 0
    while good < (3 if shallow else grammars):
        rhms.append(RHM.random(V, m, 2, L, np.random.default_rng(len(rhms))))
        good += rhms[-1].K_rho > 0
    for C in [0.5, 2.0, 8.0] if shallow else 2.0 ** np.arange(-2, 6):
        N = sum(math.ceil(C * V * m * m**l) for l in range(1, L + 1))
        shares = {True: [], False: []}  # by K_rho > 0
        for seed, rhm in enumerate(rhms):
            seen, sigmas = rhm, None
            config = Config(C=C, M=4 * V * m, seed=seed, device=device)
            if shallow:
                seen = SimpleNamespace(V=V, m=m, s=rhm.d, L=1, sample=rhm.sample)
                tuned = dict(C=N / (V * m * m), M=1024, ridge=0.003, eps=1e-300)
                config, sigmas = replace(config, **tuned), {1: float(L)}
            net, _ = train(seen, config, sigmas=sigmas)
            test_rng = np.random.default_rng([seed, 4])
            shares[rhm.K_rho > 0].append(accuracy(net, rhm, 2000, test_rng))
        yield N, shares[True], shares[False]
        if np.mean(shares[True]) > 0.995:
            return


def sweep(figure, sizes=SWEEP, grammars=10, device="cpu"):
    """Run the experiment, print its tables, redraw the picture after every curve.

    N* is where a grammar's curve, interpolated in log N, reaches 90%.  Returns the
    curves: (V, m, L, shallow, N (points,), accuracies (points, grammars)).
    """
    start, curves, needed = time.perf_counter(), [], {}
    print("   V   m   L  network        N  accuracy    sd  where K_rho = 0   seconds")
    for size in sizes:
        V, m, L, shallow = size
        Ns, shares = [], []
        for N, good, degenerate in sample_complexity(*size, grammars, device):
            Ns.append(N)
            shares.append(good)
            apart = f"{100 * np.mean(degenerate or 0):.2f}% of {len(degenerate)}"
            seconds = time.perf_counter() - start
            print(
                f"{V:4} {m:3} {L:3}  {'shallow' if shallow else 'deep':7} {N:8} "
                f"{100 * np.mean(good):8.2f}% {100 * np.std(good):5.2f}  "
                f"{apart if degenerate else '-':>15} {seconds:9.0f}",
                flush=True,
            )
        curves.append((*size, np.array(Ns), np.array(shares)))
        plot_sample_complexity(curves, figure)
        if not shallow:
            rising = np.maximum.accumulate(shares)
            logs = [np.interp(0.9, a, np.log(Ns), np.nan, np.nan) for a in rising.T]
            logs = [x for x in logs if not math.isnan(x)]  # curves that cross 90%
            needed.setdefault((V, L), []).extend((math.log(m), x) for x in logs)
            N_star, spread = math.exp(np.mean(logs)), math.exp(np.std(logs))
            print(
                f"  N* = {N_star:.0f} (x/: {spread:.2f}), {N_star / V / m**L:.2f} V m^L"
            )
    print("\n   V   L   N* grows as m to the power   heuristic   Section 4.2's bound")
    for (V, L), points in needed.items():
        x, y = np.array(points).reshape(-1, 2).T
        if len(set(x)) > 1:
            (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
            error = covariance[0, 0] ** 0.5
            print(f"{V:4} {L:3} {slope:17.2f} +- {error:.2f} {L:11} {L + 3:21}")
    return curves


def plot_sample_complexity(curves, path):
    """Accuracy against N, raw and divided by V m^L; bands: +- 1 sd over grammars."""
    figure = plt.figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    Ls, ms = (sorted({curve[i] for curve in curves}) for i in (2, 1))
    color = {L: plt.get_cmap("viridis")((L - 1) / 4.6) for L in Ls}
    marker = dict(zip(ms, "os^Dvp*hX<>"))
    for V, m, L, is_shallow, Ns, shares in curves:
        style = "--" if is_shallow else "-" if V == 16 else "-."
        mean, sd = 100 * shares.mean(1), 100 * shares.std(1)
        for ax, x in zip(axes, (Ns, Ns / (V * m**L))):
            if not is_shallow or ax is axes[0]:
                ax.plot(x, mean, style, marker=marker[m], color=color[L], ms=4, lw=1)
                band = dict(color=color[L], alpha=0.15, lw=0)
                ax.fill_between(x, mean - sd, mean + sd, **band)
    for ax, label in zip(axes, ("N = training samples of all levels", "N / (V m^L)")):
        ax.axhline(100 / 16, color="grey", linestyle=":")
        ax.set(xscale="log", xlabel=label)
    axes[0].set_ylabel("test accuracy in %")
    keys = [Line2D([], [], color=color[L], label=f"L = {L}") for L in Ls]
    key = lambda **style: keys.append(Line2D([], [], color="grey", **style))
    for m in ms:
        key(ls="", marker=marker[m], label=f"m = {m}")
    for ls, label in (("-", "V = 16"), ("-.", "other V"), ("--", "one level")):
        key(ls=ls, label=label)
    key(ls=":", label="chance, V = 16")
    figure.legend(handles=keys, loc="outside right center")
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---- The command line ----------------------------------------------------------------


def check_figure(path):
    """Refuse a picture that cannot be written, before training rather than after."""
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
    """The command line; bad input ends it with one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="train_layerwise.py",
        description="Train a deep CNN layer by layer on a random hierarchy model.",
    )
    for name, text in dict(
        V="symbols of every level",
        m="rules per symbol",
        s="tokens per patch",
        L="levels; sentences have s^L tokens",
        C="samples: C V m m^l for level l",
        M="random frequencies per level",
        seed="of grammar, data and features",
        device="cpu or cuda",
    ).items():
        default = getattr(Config, name)
        text += f" (default {default})"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    text = "measure the sample complexity instead, on sizes and grammars of its own"
    parser.add_argument("--sweep", action="store_true", help=text)
    text = "picture to write (default figures/layerwise.png or sample_complexity.png)"
    parser.add_argument("--figure", help=text)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    options = vars(parser.parse_args(argv))
    sweeping, figure = options.pop("sweep"), options.pop("figure")
    figure = figure or f"figures/{'sample_complexity' if sweeping else 'layerwise'}.png"
    try:
        config = Config(**options)
        rng = np.random.default_rng(config.seed)
        rhm = RHM.random(config.V, config.m, config.s, config.L, rng)
        check_figure(figure)
        if not sweeping:
            run(rhm, config, figure)
        elif config == Config(device=config.device):
            sweep(figure, device=config.device)
        else:
            raise ValueError("--sweep has sizes, samples and seeds of its own")
    except (ValueError, MemoryError, RuntimeError) as error:  # torch's memory errors
        parser.error((str(error) or "out of memory").splitlines()[0])


if __name__ == "__main__":
    main()
