"""Layerwise training of a deep CNN on a random hierarchy model (Section 2.3).

`python train_layerwise.py` trains on sentences and labels alone, and compares every
level with the exact theory afterwards.  Below: the algorithm, what it calls in the
order of the calls, measurements, the program with its picture.
"""

import argparse
import math
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from model import CHUNK, Level, as_symbols, deep_cnn, distinct, embed
from rhm import RHM, typical_signal


@dataclass
class Config:
    """The learner's settings, chosen by trial; the proof's are others.

    Both are in experiments/README.md.  ValueError unless the numbers are above 0 and
    finite, and the seed is 0 or more.
    """

    C: float = 2.5  # samples: N^(l) = C s L V m m^l for level l
    M: int = 256  # random frequencies per level
    ridge: float = 0.01  # lambda_W = ridge / (V m); the proof has 1
    sigma: float = 0.5  # bandwidth of the features, in units of typical_distance
    eps: float = 0.01  # sets the steps T only; errors come from N, M and sigma
    seed: int = 0  # of data and features, and of the command line's grammar
    device: str = "cpu"  # or "cuda"

    def __post_init__(self):
        for name in ("C", "M", "ridge", "sigma", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                got = f"got {getattr(self, name)}"
                raise ValueError(f"{name} must be above 0 and finite, {got}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


Stage = namedtuple("Stage", "level N strings sigma losses")
BLOCK = 2**20  # sentences drawn at a time


def train(rhm, config, report=None, descend=None):
    """The training algorithm of Section 2.3; returns (net, stages).

    Bottom up, each level learns to predict the *label* from the first patch of fresh
    sentences, embedded by the levels below.  The first patch is enough: the rules are
    the same at every place.  The levels above are ignored, as if a residual link led to
    the output.

    rhm is anything with V, m, s, L and sample(n, rng, level) as in RHM.sample, which
    brings fresh sentences at every call.  report(net, stage) is called after a level; a
    Stage has its level, N samples, how many different strings of leaves are among them,
    sigma, and the losses.  descend replaces gradient_descent.  ValueError for what is
    wrong in the samples or in the W of descend.
    torch.set_num_threads(1) is faster, and far faster beside a busy program.
    """
    V, m, s, L = rhm.V, rhm.m, rhm.s, rhm.L
    # Two independent streams of random numbers:
    data_rng, feature_rng = (np.random.default_rng([config.seed, k]) for k in (1, 2))
    lambda_W, eta, T = schedule(V, m, config.ridge, config.eps)
    net, stages = deep_cnn(V).to(config.device), []
    for l in range(L, 0, -1):
        # Section 4.2: N ~ m^l, so that the error of q^, about (V m / N)^(1/2), falls as
        # m^(-l/2), like the bound of Assumption 6.  It prints (V m)^2 for our V m.
        N = math.ceil(config.C * s * L * V * m * m**l)
        strings, counts = draw(rhm, N, data_rng, l)  # of leaves under the first patch
        h = embed(net, strings)  # (U, s, V): one patch per string
        shares = (counts / counts.sum()).to(h)  # (U, V), they sum to 1
        sigma = config.sigma * typical_distance(h, shares)
        level = Level(V, s, config.M, sigma, feature_rng).to(h.device)
        covariance, correlation = averages(level, h, shares)
        minimise = descend or gradient_descent
        W, losses = minimise(covariance, correlation, lambda_W, eta, T)
        if W.shape != level.W.shape or not W.isfinite().all():
            shape = tuple(level.W.shape)
            raise ValueError(f"level {l}: W has diverged, or is not of shape {shape}")
        level.W.data.copy_(W.detach())
        net.append(level)
        losses = losses.detach().cpu().numpy()
        stages.append(Stage(l, int(counts.sum()), len(strings), sigma, losses))
        if report:
            report(net, stages[-1])
    return net, stages


# ---- What train calls, in the order of the calls -------------------------------------


def schedule(V, m, ridge, eps, kappa=1):
    """lambda_W, the step eta, and the number of steps T (Lemmas 14, 15, 17).

    lambda_W is 1 / |P_l| in the proof, where different x_mu are nearly orthogonal.
    Ours overlap, and a large ridge would leave the q of close patches mixed.
    eta: the curvatures of Eq. (3) lie in [lambda_W, 1 + lambda_W], since ||x|| = 1.
    The best constant step is 2 / (smallest + largest).  Lemma 15 prints a larger one,
    2 |P_l| / (|P_l| + 1) = 2 / (1 + lambda_W), at which the largest does not shrink.
    T = |P_l| log(100 |P_l| kappa sqrt(V) / eps) is enough for ridge 1.  With a smaller
    one the flattest directions have not converged by then, which does little harm.
    kappa: a learner does not know it, and assumes 1.
    """
    P = V * m  # |P_l|, the number of patches of every level
    lambda_W = ridge / P
    T = math.ceil(P * math.log(100 * P * kappa * math.sqrt(V) / eps))
    return lambda_W, 2 / (1 + 2 * lambda_W), max(1, T)  # with T = 0 the output is 0 / 0


def draw(rhm, N, rng, level):
    """Draw N fresh sentences: their different strings (U, width), and counts (U, V).

    As `tally` below, but a block at a time (efficiency only): memory grows with the
    different strings, not with N.  rng: a NumPy Generator.  ValueError when the sampler
    ignores `level`.
    """
    width = rhm.s ** (rhm.L - level + 1)
    strings = torch.empty((0, width), dtype=torch.int64)
    counts = torch.empty((0, rhm.V), dtype=torch.int64)
    for start in range(0, N, BLOCK):
        tokens, labels = rhm.sample(min(BLOCK, N - start), rng, level)
        if tokens.shape[1:] != (width,):
            got = f"got {tuple(tokens.shape)}"
            raise ValueError(f"level {level}: tokens must be (n, {width}), {got}")
        more_strings, more_counts = tally(tokens, labels, rhm.V)
        strings, number = distinct(torch.cat([strings, more_strings]))
        both = torch.cat([counts, more_counts])
        counts = both.new_zeros(len(strings), rhm.V).index_add(0, number, both)
    return strings, counts


def tally(tokens, labels, V):
    """The different strings, and how often each came with each label.

    Equal strings have equal x.  So Eq. (3) depends on these counts only.  The shares of
    the labels within a row estimate q (Lemma 18).
    tokens (N, width), labels (N,) -> strings (U, width), counts (U, V).  ValueError
    unless tokens and labels are integers in 0..V-1, one label per string.
    """
    tokens, labels = as_symbols(tokens, V), as_symbols(labels, V).flatten()
    if len(labels) != len(tokens):
        raise ValueError(f"{len(tokens)} strings came with {len(labels)} labels")
    strings, number = distinct(tokens)
    counts = torch.bincount(number * V + labels, minlength=len(strings) * V)
    return strings, counts.view(-1, V)


def typical_distance(h, shares):
    """Root mean square distance of the embeddings of two random tokens, for sigma.

    Lemma 10 wants sigma in proportion to the smallest distance between two symbols,
    which a learner does not know.  It can measure a typical one.  Above the bottom the
    tokens of level l are outputs of level l + 1: near typical_signal(V, m, l + 1).
    h: patches (U, s, V), weighed by shares (U, V).
    """
    weights = shares.sum(1)  # (U,)
    mean = (weights @ h.flatten(1)).view(h.shape[1:]).mean(0)  # E h, (V,)
    variance = weights @ (h - mean).square().sum(2).mean(1)  # E ||h - E h||^2
    # E ||h - h'||^2 is twice that.  If all tokens are equal, any sigma will do.
    return math.sqrt(2 * variance) or 1.0


def averages(level, h, shares):
    """The two averages of Eq. (3): E^[x x^T], (2M, 2M), and E^[e_zeta x^T], (V, 2M).

    h: patches (U, s, V); shares (U, V): how often each came with each label.
    """
    covariance, correlation = 0, 0
    for patches, p in zip(h.split(CHUNK), shares.split(CHUNK)):
        x = level.patch_embedding(patches.flatten(1))  # (u, 2M)
        covariance += x.T @ (p.sum(1, keepdim=True) * x)
        correlation += p.T @ x  # Eq. (8) is its expectation over samples
    return covariance, correlation


def gradient_descent(covariance, correlation, lambda_W, eta, T):
    """T steps of gradient descent on Eq. (3) from W = 0 (Section 2.3, Lemma 15).

    covariance: E^[x x^T], not centred, (2M, 2M); correlation: E^[e_zeta x^T], (V, 2M).
    Returns W (V, 2M), and the loss before every step, (T,).
    """
    W = torch.zeros_like(correlation)
    losses = W.new_empty(T)
    for t in range(T):
        gradient = W @ covariance - correlation + lambda_W * W
        # Eq. (3) multiplied out, with ||e_zeta|| = 1, is
        # 1/2 - <W, correlation> + <W, W covariance + lambda_W W> / 2, and so
        losses[t] = 0.5 + 0.5 * (W * (gradient - correlation)).sum()
        W = W - eta * gradient
    return W, losses


# ---- Measurements, not in the paper: they look at the grammar, after the fact --------


def predict(net, tokens):
    """Outputs of the network, (n, width / s^k, V) after k levels, float64.

    tokens: integers (n, width).  ValueError where an output is not finite.
    """
    outputs = embed(net, tokens)
    if not outputs.isfinite().all():
        raise ValueError("outputs are not finite: in Eq. (2) the sum of W x is 0")
    return outputs.cpu().double().numpy()


def outputs_of_level(net, rhm, level, tokens):
    """predict by the levels L, L - 1, ..., level of a network, without those above.

    tokens: whole sentences, or the leaves under first patches of that level.
    ValueError for other lengths, and for a network of other sizes.
    """
    depth, needed = len(net) - 1, rhm.L - level + 1
    if net[0].num_embeddings != rhm.V or not needed <= depth <= rhm.L:
        have = f"the network has {depth} levels and V = {net[0].num_embeddings}"
        raise ValueError(f"{have}, which cannot be level {level} of {rhm}")
    whole, part = rhm.s**rhm.L, rhm.s**needed
    if len(tokens[0]) not in (whole, part):
        got = f"got {len(tokens[0])}"
        raise ValueError(f"level {level} needs {whole} or {part} tokens, {got}")
    return predict(net[: 1 + needed], tokens)


def distances_to_q(net, rhm, level, tokens):
    """||output - q|| for every output of a level and q of every symbol of level - 1.

    (n, width, V): one distance per symbol, inf for a symbol that is never first.
    """
    outputs, q = outputs_of_level(net, rhm, level, tokens), rhm.label_posterior(level)
    rows = torch.from_numpy(outputs.reshape(-1, rhm.V))
    to_q = torch.cdist(rows, torch.from_numpy(q)).numpy()
    to_q[:, np.isnan(q[:, 0])] = math.inf
    return to_q.reshape(outputs.shape)


def network_parse(net, rhm, tokens):
    """Sentences (n, d) as the network reads them, in the form of RHM.parse.

    A patch counts as the symbol with the q nearest to its output.  It is the right one
    if the error is below rho / 2; two symbols with the same q look alike.
    """
    levels = range(1, rhm.L + 1)
    read = [distances_to_q(net, rhm, l, tokens).argmin(2) for l in levels]
    return [*read, np.asarray(tokens)]


def diagnose(net, rhm, level, rng, n=10_000):
    """Compare a level's outputs for n fresh first patches with q.

    Returns the errors ||output - q_mu||, (n,), those of Lemma 17, and the share of
    outputs whose nearest q is their own.
    """
    tree = rhm.sample_tree(n, rng, level)
    symbol = tree[level - 1][:, 0]
    to_q = distances_to_q(net, rhm, level, tree[-1])[:, 0]  # (n, V)
    return to_q[np.arange(n), symbol], float((to_q.argmin(1) == symbol).mean())


def accuracy(net, rhm, n, rng):
    """Share of n fresh sentences whose label is the argmax (Section 2.2)."""
    tokens, labels = rhm.sample(n, rng)
    guesses = outputs_of_level(net, rhm, 1, tokens)[:, 0].argmax(1)
    return float((guesses == np.ravel(labels)).mean())


# ---- The program ---------------------------------------------------------------------


def run(rhm, config):
    """Train, measure, print; returns net, stages, and what diagnose found as errors."""
    start, all_errors = time.perf_counter(), []
    n = max(1, min(10_000, 2**22 // rhm.d))  # fewer where sentences are very long
    print(f"V={rhm.V} m={rhm.m} s={rhm.s} L={rhm.L}, seed {config.seed}", end="; ")
    print(f"kappa = {rhm.kappa:.4g}, K_rho = {rhm.K_rho:.4g}")
    header = "level   samples  strings    sigma      rho   median  largest  nearest"
    print(*rhm.assumption_6_failures(), header, sep="\n")

    def report(net, stage):
        l = stage.level
        errors, nearest = diagnose(net, rhm, l, [config.seed, 3, l], n)
        all_errors.append(errors)
        print(
            f"{l:5} {stage.N:9} {stage.strings:8} {stage.sigma:8.4f} "
            f"{rhm.signal(l):8.4f} {np.median(errors):8.4f} {errors.max():8.4f} "
            f"{100 * nearest:7.2f}%",
            flush=True,
        )

    net, stages = train(rhm, config, report)
    rng = np.random.default_rng([config.seed, 4])
    share, tokens = accuracy(net, rhm, n, rng), rhm.sample(1, rng)[0]
    read, parsed = network_parse(net, rhm, tokens), rhm.parse(tokens)
    sentence = "The first 16 tokens of a sentence" if rhm.d > 16 else "A fresh sentence"
    print("\nLevel l of the network finds the symbols of level l - 1.")
    print(f"{sentence} as the network reads it, and as the grammar parses it:")
    for l in range(rhm.L + 1):
        columns = 4 * rhm.s ** (rhm.L - l)  # a symbol stands above its first token
        for name, tree in ("network", read), ("grammar", parsed):
            symbols = "".join(f"{nu:<{columns}}" for nu in tree[l][0])
            print(f"level {l}  {name}  {symbols[:64].rstrip()}")
    N, seconds = sum(stage.N for stage in stages), time.perf_counter() - start
    print(f"\n{100 * share:.2f}% of {n} fresh sentences right", end=" ")
    print(f"(chance {100 / rhm.V:.2f}%), {N} training sentences, {seconds:.1f} s")
    return net, stages, all_errors


def plot(net, rhm, stages, all_errors):
    """Synonyms collapse; losses; signal and error.  Returns the matplotlib Figure.

    net, stages and all_errors as run returns them.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    axes, rng = top.subplots(1, rhm.L, squeeze=False)[0], np.random.default_rng(0)
    levels = [stage.level for stage in stages]
    for ax, level in zip(axes, levels):
        # One random string under each of the V m patches, sorted by symbol, as
        # sample_tree draws them:
        tokens = rhm.rules[level - 1].reshape(-1, rhm.s)
        for rules in rhm.rules[level:]:
            choice = rng.integers(rhm.m, size=tokens.shape)
            tokens = rules[tokens, choice].reshape(len(tokens), -1)
        outputs = torch.from_numpy(outputs_of_level(net, rhm, level, tokens)[:, 0])
        distances = torch.cdist(outputs, outputs).numpy()  # (V m, V m)
        ax.imshow(distances / max(distances.max(), 1e-12), cmap="cividis")
        ax.set(title=f"outputs of level {level}", xticks=[], yticks=[])
    axes[0].set_ylabel(f"{rhm.V} symbols x {rhm.m} synonyms")
    top.colorbar(axes[0].images[0], ax=axes, shrink=0.7, label="distance / largest")

    left, right = bottom.subplots(1, 2)
    for stage, color in zip(stages, colormaps["viridis"](np.linspace(0, 0.9, rhm.L))):
        steps = np.arange(1, len(stage.losses) + 1)
        left.plot(steps, stage.losses, color=color, label=f"level {stage.level}")
    left.set(title="loss of every stage, Eq. (3)", xscale="log")
    left.set(xlabel="gradient step", ylabel="loss before the step")
    for label, style, values in (
        ("signal rho", "C0o-", [rhm.signal(l) for l in levels]),
        ("typical signal", "C0:", [typical_signal(rhm.V, rhm.m, l) for l in levels]),
        ("largest error", "C1s-", [errors.max() for errors in all_errors]),
        ("median error", "C1s--", [np.median(errors) for errors in all_errors]),
        ("Proposition 19", "k-.", [(20 * rhm.m) ** (-(l - 1) / 2) for l in levels]),
    ):
        drawn = [v if 0 < v < math.inf else math.nan for v in values]  # on a log scale
        right.plot(levels, drawn, style, label=label)
    right.set(title="signal and error", yscale="log", xticks=levels)
    right.set(xlabel="level (trained from left to right)")
    right.set(ylabel="distance of two q, or of output and q")
    right.invert_xaxis()
    for ax in (left, right):
        ax.legend(fontsize="small")
    return figure


def gigabytes(V, m, s, L, C):
    """About how much memory the samples of a run take; the largest level counts."""
    numbers = []
    for l in range(1, L + 1):
        N, width = C * s * L * V * m * m**l, s ** (L - l + 1)
        choices = sum(s**k for k in range(L - l + 1))  # of rules, from nu to its leaves
        strings = min(N, V * m ** min(choices, 64))
        table = strings * (width + V + 2 * s * V)  # strings, counts, h and its copies
        # And a block of sentences: tokens, chosen rules, numbers of the rules.
        numbers.append(table + 3 * width * min(N, BLOCK))
    return 8e-9 * max(numbers)  # 8 bytes for each number


def main(argv=None):
    """Train, print, draw, on one thread.  A wrong option ends in one line."""
    parser = argparse.ArgumentParser(
        description="Train a deep CNN layer by layer on a random hierarchy model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage=argparse.SUPPRESS,  # an error is one line
        allow_abbrev=False,
    )
    for name, default, text in (
        ("V", 16, "symbols of every level"),
        ("m", 4, "rules per symbol"),
        ("s", 2, "tokens per patch"),
        ("L", 4, "levels, for s^L tokens"),
        ("C", Config.C, "samples: C s L V m m^l for level l"),
        ("M", Config.M, "random frequencies per level"),
        ("ridge", Config.ridge, "lambda_W in units of 1 / (V m)"),
        ("sigma", Config.sigma, "bandwidth, in typical distances of two tokens"),
        ("eps", Config.eps, "target error, sets the number of steps"),
        ("seed", Config.seed, "of grammar, data and features"),
        ("device", Config.device, "cpu or cuda"),
        ("figure", "layerwise.png", "a .png, .pdf or .svg"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    samplers = dict(choices=("appendix_B", "cagnetta"), default="appendix_B")
    parser.add_argument("--sampler", **samplers, help="of the rules")
    options = parser.parse_args(argv)
    sizes = options.V, options.m, options.s, options.L
    path = Path(options.figure).expanduser()
    try:
        if path.suffix not in (".png", ".pdf", ".svg") or not path.parent.is_dir():
            raise ValueError(f"figure must be a .png, .pdf or .svg in a folder: {path}")
        names = "C", "M", "ridge", "sigma", "eps", "seed", "device"
        config = Config(*(getattr(options, name) for name in names))
        torch.zeros(1, device=config.device)  # an error if it cannot be used
        uniform = options.sampler == "appendix_B"
        rhm = RHM.random(*sizes, config.seed, uniform_first_token=uniform)
        needed = gigabytes(*sizes, config.C)
        if needed > 6:
            raise ValueError(f"this would need {needed:.0f} GB, more than 6")
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    torch.set_num_threads(1)
    net, stages, all_errors = run(rhm, config)
    plot(net, rhm, stages, all_errors).savefig(path, dpi=100)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
