"""Layerwise training of a deep CNN on a random hierarchy model (Section 2.3).

`python train_layerwise.py` trains on sentences and labels alone, and compares every
level with the exact theory afterwards.  Below: the algorithm, what it calls in the
order of the calls, the proof's constants, measurements, the picture, the command line.
"""

import argparse
import math
import os
import time
from collections import namedtuple
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from model import CHUNK, Level, deep_cnn, distinct_rows, embed, torch_threads
from rhm import RHM, signal_bound, typical_signal


def setting(default, help):
    """A field of Config, which is an option of the command line as well."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """The learner's settings.  The notebook compares them with what the proof asks."""

    C: float = setting(20.0, "samples: C kappa V m m^l for level l")
    M: int = setting(256, "random frequencies per level")
    ridge: float = setting(0.01, "lambda_W = ridge / (V m); the proof has ridge = 1")
    sigma_quantile: float = setting(1.5, "sigma is the quantile at sigma_quantile / V")
    kappa: float = setting(1.0, "the kappa of Assumption 6 that the learner assumes")
    eps: float = setting(0.01, "target error of Lemma 17: sets the number of steps")
    seed: int = setting(0, "of grammar, data and features")
    device: str = setting("cpu", "cpu or cuda")


Stage = namedtuple("Stage", "level N strings sigma losses")


@torch_threads(1)
def train(rhm, config, report=None, sigmas=None, descend=None):
    """The training algorithm of Section 2.3; returns (net, stages).

    Bottom up, each level learns to predict the *label* from the first patch of fresh
    sentences, embedded by the levels below.  The first patch is enough: the rules are
    the same at every place.  The levels above are ignored, as if a residual link led to
    the output.  Of the grammar it uses rhm.sample and the sizes V, m, s, L only.

    A Stage has its level, N samples, how many different strings of leaves are among
    them, sigma, and T losses.  report(net, stage) is called after every stage; sigmas,
    {level: sigma}, replace the learner's choice; descend replaces gradient_descent.
    ValueError for labels outside 0..V-1 and sigmas of levels outside 1..L.
    """
    V, m, s, L = rhm.V, rhm.m, rhm.s, rhm.L
    data_rng, feature_rng = (np.random.default_rng([config.seed, k]) for k in (1, 2))
    lambda_W, eta, T = schedule(V, m, config)
    # One-hot patches are sqrt 2 apart or more, and 0.5 (not in the paper) makes their
    # kernel exp(-4) or less.
    sigmas = {L: 0.5} | (sigmas or {})
    if not sigmas.keys() <= set(range(1, L + 1)):
        raise ValueError(f"sigmas must be for levels 1..{L}, got {list(sigmas)}")
    net, stages = deep_cnn(V).to(config.device), []
    for l in range(L, 0, -1):
        N = math.ceil(config.C * config.kappa * V * m * m**l)  # Section 4.2: ~ m^l
        tokens, labels = rhm.sample(N, data_rng, l)  # the leaves under the first patch
        h, counts = merge(net, tokens, labels)
        if l not in sigmas:
            sigmas[l] = choose_sigma(h, counts, config.sigma_quantile, feature_rng)
        level = Level(V, s, config.M, sigmas[l], feature_rng).to(config.device)
        losses = train_level(level, h, counts, lambda_W, eta, T, descend)
        net.append(level)
        stages.append(Stage(l, N, len(h), sigmas[l], losses))
        if report:
            report(net, stages[-1])
    return net, stages


# ---- What train calls, in the order of the calls -------------------------------------


def schedule(V, m, config):
    """lambda_W, the step eta of Lemma 15, and the number of steps T of Lemma 17.

    T = |P_l| log(100 |P_l| kappa sqrt(V) / eps) is enough for ridge 1; with a smaller
    ridge gradient descent stops early.  The curvatures of Eq. (3) lie in [lambda_W,
    1 + lambda_W], and the best constant step is 2 / (smallest + largest); Lemma 15
    prints 2 / (1 + lambda_W) (README, slip 2).
    """
    P = V * m  # |P_l|, the number of patches of every level
    lambda_W = config.ridge / P
    T = P * (math.log(100 * P * config.kappa * math.sqrt(V)) - math.log(config.eps))
    T = max(1, math.ceil(T))  # without a step W = 0, and Eq. (2) is 0 / 0
    return lambda_W, 2 / (1 + 2 * lambda_W), T


def merge(net, tokens, labels):
    """Embed the samples, equal patches once: efficiency only.

    Eq. (3) sees the data only through how often each patch came with each label; its
    share of a label is q^ of Lemma 18.
    tokens (N, s^k), labels (N,) -> h (U, s, V), the patches of the U different strings,
    and counts (U, V).
    ValueError unless labels are integers (N,) in 0..V-1.
    """
    device, V = net[0].weight.device, len(net[0].weight)
    tokens, labels = (torch.as_tensor(a, device=device) for a in (tokens, labels))
    if (
        labels.shape != (len(tokens),)
        or labels.is_floating_point()
        or not 0 <= labels.min() <= labels.max() < V
    ):
        raise ValueError(f"labels must be integers in 0..{V - 1}, one per sentence")
    table, ids = embed(net, tokens)
    rows, number = distinct_rows(ids)
    counts = torch.bincount(number * V + labels, minlength=len(rows) * V)
    return table[rows], counts.view(-1, V)


def choose_sigma(h, counts, sigma_quantile, rng, pairs=20_000):
    """The bandwidth sigma of Eq. (6), by a rule that is not in the paper.

    Lemma 10 wants sigma in proportion to the smallest distance between embeddings of
    two symbols (Assumption 9), which the learner does not know.  Sort the distances of
    random pairs of tokens.  About 1/V of the pairs are of one symbol and come first (a
    little less, since equal tokens are dropped).  sigma is the distance at the quantile
    sigma_quantile / V, a little after them: the notebook shows a histogram.
    h: patches (U, s, V); each weighs as much as its counts (U, V).
    """
    weights = counts.sum(1).cpu().numpy() / counts.sum().item()
    rows = torch.from_numpy(rng.choice(len(h), size=(2, pairs), p=weights))
    places = torch.from_numpy(rng.integers(h.shape[1], size=(2, pairs)))
    first, second = h[rows.to(h.device), places.to(h.device)]  # embedded, (pairs, V)
    apart = (first - second).norm(dim=1)
    apart = apart[apart > 0]  # without the pairs of equal tokens
    share = min(1.0, sigma_quantile / h.shape[2])
    # If all tokens are equal, any sigma will do.
    return apart.quantile(share).item() if len(apart) else 1.0


@torch.no_grad()
def train_level(level, h, counts, lambda_W, eta, T, descend=None):
    """Train W in place: gather the two averages of Eq. (3), then descend.

    h (U, s, V): patches; counts (U, V): how often each came with each label.
    Returns the losses, as gradient_descent does.
    """
    frequencies = counts.to(h.dtype) / counts.sum()  # (U, V)
    covariance, correlation = 0, 0
    for patches, p in zip(h.split(CHUNK), frequencies.split(CHUNK)):
        x = level.patch_embedding(patches.flatten(1))  # (u, 2M)
        covariance += x.T @ (p.sum(1, keepdim=True) * x)  # E^[x x^T]
        correlation += p.T @ x  # E^[e_zeta x^T], whose mean is Eq. (8)
    descend = descend or gradient_descent
    W, losses = descend(covariance, correlation, lambda_W, eta, T)
    level.W.copy_(W)
    return losses.cpu().numpy()


def gradient_descent(covariance, correlation, lambda_W, eta, T):
    """T steps of gradient descent on Eq. (3) from W = 0 (Section 2.3, Lemma 15).

    covariance: E^[x x^T], not centred, (2M, 2M); correlation: E^[e_zeta x^T], (V, 2M).
    Returns W (V, 2M), and the loss before every step, (T,).
    """
    W = torch.zeros_like(correlation)
    losses = W.new_empty(T)
    for t in range(T):
        gradient = W @ covariance - correlation + lambda_W * W
        # Eq. (3) multiplied out, with ||e_zeta|| = 1:
        losses[t] = 0.5 + 0.5 * (W * (gradient - correlation)).sum()
        W = W - eta * gradient
    return W, losses


# ---- The constants of the proof, for comparison; the run above uses its own ----------


def proof_constants(rhm, eps=0.01, delta=1e-6):
    """{level: what the proof of Theorem 7 asks}, the README's slips 1 to 3 mended.

    eps: the error allowed at level 1; delta: the probability of failure at each level.
    Lemma 11 chains the levels, with the grammar's own rho; Lemmas 10, 15, 16 and 17
    give the constants of one level.  ValueError where Assumption 6 fails.
    """
    V, s, L, P, kappa = rhm.V, rhm.s, rhm.L, rhm.V * rhm.m, rhm.kappa
    if kappa == math.inf or rhm.K_rho == 0:
        raise ValueError("Theorem 7 needs a finite kappa and K_rho > 0")
    constants = {}
    for l in range(1, L + 1):
        if l < L:  # Lemma 11: the error that level l allows in its inputs
            rho = rhm.signal(l + 1)  # of the inputs, outputs of level l + 1
            eps_below = rho / math.sqrt(2000 * P**2 * s * math.log(P * kappa / eps))
        else:
            rho, eps_below = math.sqrt(2), 0  # one-hot tokens
        rho_tilde = rho - 2 * eps_below  # Assumption 9
        lambda_W, eta, T = schedule(V, rhm.m, Config(ridge=1.0, kappa=kappa, eps=eps))
        eps_S = lambda_W / 4  # Lemma 16
        eps_O = eps / (600 * P**2 * kappa * math.sqrt(V))  # Lemma 17
        sigma = rho_tilde / math.sqrt(2 * math.log(2 / eps_O))  # Lemma 10
        M = s * V / min(eps_O**2, eps_S**4)  # Lemma 10, without constants and logs
        N = math.ceil(32 * kappa * P / eps**2 * math.log(4 * P / delta))  # Lemma 17
        constants[l] = SimpleNamespace(
            kappa=kappa, rho=rho, eps=eps, eps_below=eps_below, eps_S=eps_S,
            eps_O=eps_O, lambda_W=lambda_W, eta=eta, T=T, sigma=sigma, M=M, N=N,
        )  # fmt: skip
        eps = eps_below  # the target of the next level
    return constants


# ---- Measurements, not in the paper: they look at the grammar, after the fact --------


@torch_threads(1)
def predict(net, tokens):
    """Outputs of the network, (n, width / s^k, V) after k levels.

    tokens: NumPy integers (n, width).  Returns float64.  ValueError where an output is
    not finite.
    """
    tokens = torch.as_tensor(np.array(tokens), device=net[0].weight.device)
    table, ids = embed(net, tokens)
    if not table.isfinite().all():
        raise ValueError("outputs are not finite: with W = 0, Eq. (2) is 0 / 0")
    return table[ids].double().cpu().numpy()


def outputs_of_level(net, rhm, level, tokens):
    """predict with the levels L, L - 1, ..., level; ValueError where net lacks one."""
    if not rhm.L - level < len(net) - 1 <= rhm.L:
        have = f"the network has {len(net) - 1} levels"
        raise ValueError(f"{have}, level {level} of {rhm.L} is not among them")
    return predict(net[: rhm.L - level + 2], tokens)


def accuracy(net, rhm, n, rng):
    """Share of n fresh sentences whose label is the argmax (Section 2.2)."""
    tokens, labels = rhm.sample(n, rng)
    outputs = outputs_of_level(net, rhm, 1, tokens)[:, 0]  # (n, V)
    return float((outputs.argmax(1) == labels).mean())


def distances_to_q(outputs, rhm, level):
    """||output - q|| for q of all symbols of level - 1; inf for one never first.

    outputs (n, width, V) -> distances (n, width, V): one per symbol.
    """
    q = rhm.label_posterior(level)
    rows = torch.from_numpy(outputs.reshape(-1, rhm.V))
    to_q = torch.cdist(rows, torch.from_numpy(q)).numpy()
    to_q[:, np.isnan(q[:, 0])] = math.inf
    return to_q.reshape(outputs.shape)


def network_parse(net, rhm, tokens):
    """Sentences (n, d) as the network reads them, in the form of RHM.parse.

    A token counts as the symbol with the q nearest to its embedding.
    """
    tree = [tokens]
    for level in range(rhm.L, 0, -1):
        outputs = outputs_of_level(net, rhm, level, tokens)
        tree.insert(0, distances_to_q(outputs, rhm, level).argmin(2))
    return tree


def diagnose(net, rhm, level, rng, n=10_000):
    """Compare a level's outputs for n fresh first patches with q.

    Returns the errors ||output - q_mu||, (n,), which Lemma 17 bounds by eps_*, and the
    share of outputs whose nearest q is their own.
    """
    tree = rhm.sample_tree(n, rng, level)
    symbol = tree[level - 1][:, 0]
    outputs = outputs_of_level(net, rhm, level, tree[-1])
    to_q = distances_to_q(outputs, rhm, level)[:, 0]
    return to_q[np.arange(n), symbol], float((to_q.argmin(1) == symbol).mean())


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
    share, sentence = accuracy(net, rhm, n, rng), rhm.sample(1, rng)[0]
    print("\nA fresh sentence as the network reads it, and as the grammar parses it:")
    read, parsed = network_parse(net, rhm, sentence), rhm.parse(sentence)
    for l in range(rhm.L + 1):
        columns = 4 * rhm.s ** (rhm.L - l)  # a symbol stands above its first token
        for name, tree in ("network", read), ("grammar", parsed):
            symbols = "".join(f"{nu:<{columns}}" for nu in tree[l][0])
            print(f"level {l}  {name}  {symbols[:64].rstrip()}")  # 16 tokens
    N, seconds = sum(stage.N for stage in stages), time.perf_counter() - start
    print(f"\n{100 * share:.2f}% of {n} fresh sentences right", end=" ")
    print(f"(chance {100 / rhm.V:.2f}%), {N} training sentences, {seconds:.1f} s")
    return net, stages, all_errors


def plot(net, rhm, stages, all_errors):
    """Synonyms collapse; losses; signal and error.  Returns the matplotlib Figure.

    net, stages and all_errors as run returns them.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    axes, rng = top.subplots(1, rhm.L, squeeze=False)[0], np.random.default_rng(0)
    levels = [stage.level for stage in stages]
    for ax, level in zip(axes, levels):
        # One random string under each of the V m patches, sorted by symbol:
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
        ("typical distance", "C0:", [typical_signal(rhm.V, rhm.m, l) for l in levels]),
        ("largest error", "C1s-", [errors.max() for errors in all_errors]),
        ("median error", "C1s--", [np.median(errors) for errors in all_errors]),
        ("Proposition 19", "k-.", [signal_bound(rhm.m, l) for l in levels]),
    ):
        drawn = [v if 0 < v < math.inf else math.nan for v in values]  # on a log scale
        right.plot(levels, drawn, style, label=label)
    right.set(title="signal and error", yscale="log", xticks=levels)
    right.set(xlabel="level (trained from left to right)", ylabel="distance of two q")
    right.invert_xaxis()
    for ax in (left, right):
        ax.legend(fontsize="small")
    return figure


# ---- The command line ----------------------------------------------------------------


def main(argv=None):
    """Train, print, draw.  What was typed wrongly ends in one line, exit code 2."""
    text = "Train a deep CNN layer by layer on a random hierarchy model."
    parser = one_line_parser(text)
    parser.add_argument("--V", type=int, default=16, help="symbols of every level")
    parser.add_argument("--m", type=int, default=4, help="rules per symbol")
    parser.add_argument("--s", type=int, default=2, help="tokens per patch")
    parser.add_argument("--L", type=int, default=4, help="levels, for s^L tokens")
    parser.add_argument(
        "--sampler",
        choices=("appendix_B", "cagnetta"),
        default="appendix_B",
        help="of rules: Appendix B's, or any V m patches as in Cagnetta et al. (2024)",
    )
    for option in fields(Config):
        settings = dict(default=option.default, help=option.metadata["help"])
        parser.add_argument(f"--{option.name}", type=type(option.default), **settings)
    parser.add_argument("--figure", type=Path, default="layerwise.png", help="picture")
    options = parser.parse_args(argv)
    try:
        rhm, config, path = check(options)
    except (ValueError, RuntimeError, AssertionError, OSError, MemoryError) as error:
        parser.error(str(error).splitlines()[0])
    net, stages, all_errors = run(rhm, config)
    try:
        import matplotlib.figure  # here first: the results do not need it
    except Exception as error:  # missing, or an MPLBACKEND that it does not know
        parser.exit(1, f"No picture: {error}\n")
    figure = plot(net, rhm, stages, all_errors)
    try:
        save(figure, path)
    except OSError as error:  # a full disk, say
        parser.exit(1, f"No picture: {error}\n")
    print(f"Picture: {path}")


def one_line_parser(description, **settings):
    """A parser whose errors are one line, and which completes no option's name."""
    defaults = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    settings = defaults | settings | dict(usage=argparse.SUPPRESS, allow_abbrev=False)
    return argparse.ArgumentParser(description=description, **settings)


def check(options):
    """Grammar, Config and path from what was typed; an error for what cannot be."""
    config = Config(*(getattr(options, option.name) for option in fields(Config)))
    for name in ("C", "M", "ridge", "sigma_quantile", "kappa", "eps"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")
    if config.device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {config.device}")
    torch.zeros(1, device=config.device)  # an error if it cannot be used
    V, m, s, L = options.V, options.m, options.s, options.L
    uniform_first_token = options.sampler == "appendix_B"
    rhm = RHM.random(V, m, s, L, config.seed, uniform_first_token)
    if config.C * config.kappa * V * m ** (L + 1) > 2**31:
        raise ValueError(f"level {L} would need more than 2^31 samples")
    path = options.figure.expanduser()
    if path.suffix not in (".png", ".pdf", ".svg") or path.is_dir():
        raise ValueError(f"figure must be a .png, .pdf or .svg file, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"figure: there is no folder {path.parent}")
    return rhm, config, path


def save(figure, path):
    """Write a picture beside its place, then move it there: a full disk harms none."""
    part = path.with_name(f".part-{path.name}")
    try:
        figure.savefig(part, dpi=100)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
