"""Layerwise training of a deep CNN on a random hierarchy model (Section 2.3).

`python train_layerwise.py` trains on sentences and labels alone, and compares the
outputs of every layer with the exact q afterwards.  Below: the algorithm, what it calls
in the order of the calls, measurements, the program with its picture.
"""

import argparse
import math
import time
from collections import namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from model import CHUNK, Layer, RandomFeatures, as_symbols, deep_cnn
from model import distinct, embed, predict
from rhm import RHM


@dataclass(frozen=True)
class Config:
    """The learner's settings, chosen by trial (experiments/README.md), not the proof's.

    C            N^(l) = C s L V m m^l samples for level l, see sample_size
    M            random frequencies per layer
    ridge        lambda_W = ridge / (V m), see schedule
    sigma_ratio  sigma in units of typical_distance
    eps          only sets the number of steps T, see schedule
    seed         of data and features, and of the command line's grammar
    device       cpu or cuda

    ValueError unless the numbers are above 0 and finite, and the seed is 0 or more.
    """

    C: float = 10.0
    M: int = 256
    ridge: float = 0.01
    sigma_ratio: float = 0.5
    eps: float = 0.01
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        for name in ("C", "M", "ridge", "sigma_ratio", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                got = f"got {getattr(self, name)}"
                raise ValueError(f"{name} must be above 0 and finite, {got}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


Stage = namedtuple("Stage", "level N sigma losses")


def train(rhm, config, report=None, *, features=RandomFeatures, minimise=None):
    """The training algorithm of Section 2.3; returns (net, stages).

    Layers L, L-1, ..., 1 learn in turn to predict the *label* from the first patch of
    fresh sentences, as the frozen layers below see it.  The best prediction of a
    one-hot label under squared loss is q_mu.  Synonyms share q, and other patches have
    another (Assumption 6), so the output tells the symbol that generated the patch.
    First patches are enough, since the rules are the same at every place.

    rhm: anything with V, m, s, L and sample(n, rng, level), which brings fresh
        sentences at every call, as RHM.sample does; rng is a Generator.
    report(net, stage): called after each layer.
    features(dim, M, sigma, rng): a torch module (..., dim) -> (..., K), dim = s V, with
        ||x|| <= 1 (for eta).  The x of inputs much closer than sigma should be nearly
        equal, those of inputs several sigma apart nearly orthogonal.
    minimise(covariance, correlation, lambda_W, eta, T): in place of gradient_descent.
    ValueError for wrong samples and for a wrong W.
    torch.set_num_threads(1) is two to three times faster beside a busy program.
    """
    V, m, s, L = rhm.V, rhm.m, rhm.s, rhm.L
    data_rng = np.random.default_rng([config.seed, 1])  # independent streams
    feature_rng = np.random.default_rng([config.seed, 2])
    lambda_W, eta, T = schedule(V, m, config.ridge, config.eps)
    minimise = minimise or gradient_descent  # below
    net, stages = deep_cnn(V).to(config.device), []
    for l in range(L, 0, -1):
        sigma = config.sigma_ratio * typical_distance(net, rhm, data_rng, l)
        phi = features(s * V, config.M, sigma, feature_rng).to(config.device)
        N = sample_size(rhm, config.C, l)  # a sampler may bring fewer
        covariance, correlation, N = averages(net, phi, rhm, N, data_rng, l)
        W, losses = minimise(covariance, correlation, lambda_W, eta, T)
        W, losses = checked(W, losses, correlation, l)
        net.append(Layer(s, phi, W))
        stages.append(Stage(l, N, sigma, losses))
        if report:
            report(net, stages[-1])
    return net, stages


# ---- What train calls, in the order of the calls -------------------------------------


def schedule(V, m, ridge, eps, kappa=1):
    """lambda_W, the step eta, and the number of steps T (Lemmas 14, 15, 17)."""
    P = V * m  # |P_l|, the number of patches of every level
    # The proof has ridge = 1, and nearly orthogonal x of different patches.  Ours
    # overlap, and a large ridge would leave the q of close patches mixed.
    lambda_W = ridge / P
    # The curvatures of Eq. (3) lie in [lambda_W, 1 + lambda_W], since ||x|| <= 1.  If
    # no more is known, the best constant step is 2 / (smallest + largest).  Lemma 15
    # prints 2 / (1 + lambda_W): along a curvature of 1 + lambda_W the error would only
    # change its sign.
    eta = 2 / (1 + 2 * lambda_W)
    # Lemma 17's, for ridge = 1 and errors of eps; a learner does not know kappa.  With
    # a smaller ridge the flattest directions of Eq. (3) stay unfinished.
    T = math.ceil(P * math.log(100 * P * kappa * math.sqrt(V) / eps))
    return lambda_W, eta, max(1, T)


def typical_distance(net, rhm, rng, l):
    """Root mean square distance of two random embeddings that layer l reads.

    Lemma 10 wants sigma in proportion to the smallest distance between two symbols.  A
    learner does not know that, but can measure a typical one, on 1,000 sentences
    without their labels.
    """
    n = max(1, min(1000, NUMBERS // rhm.s ** (rhm.L - l + 1)))
    tokens, _ = draw(rhm, n, rng, l)
    h = embed(net, tokens).flatten(0, 1)  # (n s, V)
    # For independent h and h', E ||h - h'||^2 is twice the variance E ||h - E h||^2.
    variance = (h - h.mean(0)).square().sum(1).mean()
    return math.sqrt(2 * variance) or 1.0  # if all tokens are equal, any sigma will do


def draw(rhm, n, rng, l):
    """rhm.sample, checked: tokens (n, s^(L-l+1)), labels (n,), as int64 tensors."""
    tokens, labels = (as_symbols(a, rhm.V) for a in rhm.sample(n, rng, l))
    width = rhm.s ** (rhm.L - l + 1)
    if labels.ndim != 1 or tokens.shape != (len(labels), width):
        got = f"got {tuple(tokens.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"level {l} needs tokens (n, {width}) and labels (n,), {got}")
    return tokens, labels


def sample_size(rhm, C, l):
    """N^(l) = C s L V m m^l, the number of samples of level l (Section 4.2).

    Of N samples N / (V m) show a given patch, so the error of its q is about
    (V m / N)^(1/2).  With N in proportion to m^l it falls as m^(-l/2), as the distance
    of two q does in Assumption 6.  s L is the paper's; its N has (V m)^2 for our V m.
    """
    return math.ceil(C * rhm.s * rhm.L * rhm.V * rhm.m * rhm.m**l)


BLOCK = 2**20  # sentences drawn at a time, so that memory does not grow with N
NUMBERS = 2**24  # tokens and their hashes, or counts of labels, in such a block


@torch.no_grad()
def averages(net, phi, rhm, N, rng, l):
    """The two averages of Eq. (3), E^[x x^T] and E^[e_zeta x^T], and how many came.

    N fresh sentences have first level-l patches with features x (N, K), and one-hot
    labels e (N, V).  The averages, (K, K) and (V, K), are

        x.T @ x / N    and    e.T @ x / N

    Sentences are drawn a block at a time.  Equal strings of tokens have equal x: this
    is computed once and counted with each of its labels.
    """
    rng = np.random.default_rng(rng)  # a seed would draw the same block every time
    V, width = rhm.V, rhm.s ** (rhm.L - l + 1)
    block = max(1, min(BLOCK, NUMBERS // max(2 * width, V)))
    covariance, correlation, total = 0, 0, 0
    for start in range(0, N, block):
        tokens, labels = draw(rhm, min(block, N - start), rng, l)
        strings, number = distinct(tokens)  # (U, width), (n,)
        # With V = 3, string 2 with label 1 is counted at 2 * 3 + 1:
        counts = torch.bincount(number * V + labels, minlength=len(strings) * V)
        h = embed(net, strings).flatten(1)  # (U, s V): one patch per string
        counts = counts.view(-1, V).to(h)  # (U, V)
        for patches, c in zip(h.split(CHUNK), counts.split(CHUNK)):
            x = phi(patches)  # (u, K)
            covariance += x.T @ (c.sum(1, keepdim=True) * x)
            correlation += c.T @ x
        total += len(tokens)
    return covariance / total, correlation / total, total


def gradient_descent(covariance, correlation, lambda_W, eta, T):
    """T steps of gradient descent on Eq. (3) from W = 0 (Section 2.3, Lemma 15).

    covariance: E^[x x^T], not centred, (K, K); correlation: E^[e_zeta x^T], (V, K).
    Returns W (V, K), and the loss before every step, (T,).
    """
    W = torch.zeros_like(correlation)
    losses = W.new_empty(T)
    for t in range(T):
        # Eq. (3) is E^||e - W x||^2 / 2 + lambda_W ||W||^2 / 2.  Multiplied out, with
        # ||e|| = 1, it is 1/2 - <W, E^[e x^T]> + <W, W E^[x x^T] + lambda_W W> / 2.
        WA = W @ covariance + lambda_W * W
        losses[t] = 0.5 + (W * (WA / 2 - correlation)).sum()
        W = W - eta * (WA - correlation)
    return W, losses


def checked(W, losses, correlation, l):
    """W and losses as train needs them: a minimise of one's own may return arrays,
    lists, tensors with gradients.  ValueError for a W of wrong shape or not finite."""
    W, losses = (torch.as_tensor(a).detach().to(correlation) for a in (W, losses))
    if W.shape != correlation.shape:
        shapes = f"{tuple(correlation.shape)}, got {tuple(W.shape)}"
        raise ValueError(f"layer {l}: W must be of shape {shapes}")
    if not W.isfinite().all():
        raise ValueError(f"layer {l}: W is not finite: it has diverged")
    return W, losses.cpu().numpy()


# ---- Measurements, not in the paper: they look at the grammar, after the fact --------


def read(net, rhm, level, tokens):
    """What layer `level` makes of every patch of its level in tokens (n, width).

    Returns its outputs (n, patches, V); the distances ||output - q|| to the q of all V
    symbols of level - 1, (n, patches, V), inf for a symbol that is never first; and the
    symbols with the nearest q, (n, patches).
    """
    check_that_they_fit(net, rhm, level, tokens)
    up_to_this_layer = net[: rhm.L - level + 2]  # net[1] is layer L
    outputs, q = predict(up_to_this_layer, tokens), rhm.label_posterior(level)
    rows = torch.from_numpy(outputs).flatten(0, 1)
    distances = torch.cdist(rows, torch.from_numpy(q)).numpy().reshape(outputs.shape)
    distances[..., np.isnan(q[:, 0])] = math.inf
    return outputs, distances, distances.argmin(2)


def check_that_they_fit(net, rhm, level, tokens):
    """ValueError for a network of another V, s or L, and for sentences of a length that
    is neither s^L nor that of one level-`level` patch, s^(L-level+1)."""
    V, s, L = rhm.V, rhm.s, rhm.L
    net_V, net_s = net[0].num_embeddings, [layer.s for layer in net[1:]]
    if net_V != V or any(k != s for k in net_s) or not L - level < len(net_s) <= L:
        needed = f"layer {level} of L = {L} needs V = {V} and s = {s} in all layers"
        raise ValueError(f"{needed}, the network has V = {net_V} and s = {net_s}")
    whole, part = s**L, s ** (L - level + 1)
    if np.shape(tokens)[1:] not in ((whole,), (part,)):
        needed = f"layer {level} needs tokens (n, {whole}) or (n, {part})"
        raise ValueError(f"{needed}, got {np.shape(tokens)}")


def network_parse(net, rhm, tokens):
    """Sentences (n, d) as the network reads them, in the form of RHM.parse.

    A patch counts as the symbol with the q nearest to its output.  Below an error of
    rho / 2 this is surely the right one.  Two symbols with the same q look alike.
    """
    layers = range(1, rhm.L + 1)
    return [*(read(net, rhm, l, tokens)[2] for l in layers), np.asarray(tokens)]


def diagnose(net, rhm, level, rng, n=10_000):
    """Compare the outputs of layer `level` for n fresh first patches with q.

    Returns the errors ||output - q_mu||, (n,), those of Lemma 17, and the share of
    patches whose symbol is found: its q is the nearest.
    """
    tree = rhm.sample_tree(n, rng, level)
    symbol = tree[level - 1][:, 0]
    _, distances, nearest = read(net, rhm, level, tree[-1])
    errors = distances[np.arange(n), 0, symbol]
    return errors, float((nearest[:, 0] == symbol).mean())


def accuracy(net, rhm, n, rng):
    """Share of n fresh sentences whose label is the argmax (Section 2.2)."""
    tokens, labels = draw(rhm, n, np.random.default_rng(rng), 1)
    check_that_they_fit(net, rhm, 1, tokens)
    guesses = predict(net, tokens)[:, 0].argmax(1)
    return float((guesses == labels.numpy()).mean())


# ---- The program ---------------------------------------------------------------------


def run(rhm, config, **choices):
    """Train, measure, print; returns net, stages, and the errors of every layer.

    choices: the features and minimise of train.
    """
    start, all_errors = time.perf_counter(), []
    V, m, s, L, M = rhm.V, rhm.m, rhm.s, rhm.L, config.M
    N = sum(sample_size(rhm, config.C, l) for l in range(1, L + 1))
    print(f"V={V} m={m} s={s} L={L}, seed {config.seed}", end="; ")
    print(f"kappa = {rhm.kappa:.4g}, K_rho = {rhm.K_rho:.4g}; {N} training sentences")
    warnings = rhm.assumption_6_failures()
    if 2 * M < V * m and "features" not in choices:
        warnings += [f"fewer features (2M = {2 * M}) than patches (V m = {V * m})"]
    header = "layer   samples    rho/2  median error  largest error    found"
    print(*warnings, header, sep="\n", flush=True)
    n = max(1, min(10_000, 2**22 // rhm.d))  # fewer where sentences are very long

    def report(net, stage):
        l = stage.level
        errors, found = diagnose(net, rhm, l, [config.seed, 3, l], n)
        all_errors.append(errors)
        row = f"{l:5} {stage.N:9} {rhm.signal(l) / 2:8.4f} {np.median(errors):13.4f}"
        print(f"{row} {errors.max():14.4f} {100 * found:7.2f}%", flush=True)

    net, stages = train(rhm, config, report, **choices)
    rng = np.random.default_rng([config.seed, 4])
    share, tokens = accuracy(net, rhm, n, rng), rhm.sample(1, rng)[0]
    seen, parsed = network_parse(net, rhm, tokens), rhm.parse(tokens)
    sentence = "The first 16 tokens of a sentence" if rhm.d > 16 else "A fresh sentence"
    print(f"\n{sentence} as the network reads it, and as the grammar parses it:")
    trees = ("network", seen), ("grammar", parsed)
    rows = [(l, name, tree[l]) for l in range(L) for name, tree in trees]
    for l, name, symbols in [*rows, (L, "tokens ", tokens)]:
        columns = 4 * s ** (L - l)  # a symbol stands above its first token
        text = "".join(f"{nu:<{columns}}" for nu in symbols[0])
        print(f"level {l}  {name}  {text[:64].rstrip()}")
    seconds = time.perf_counter() - start
    print(f"\n{100 * share:.2f}% of {n} fresh sentences right", end=" ")
    print(f"(chance {100 / V:.2f}%), {seconds:.1f} s")
    return net, stages, all_errors


def plot(net, rhm, stages, all_errors):
    """Synonyms collapse; losses; errors and rho / 2.  Returns the matplotlib Figure.

    net, stages and all_errors as run returns them.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    axes, rng = top.subplots(1, rhm.L, squeeze=False)[0], np.random.default_rng(0)
    levels = [stage.level for stage in stages]
    for ax, level in zip(axes, levels):
        tokens = rhm.rules[level - 1].reshape(-1, rhm.s)  # all V m patches, by symbol
        for l in range(level, rhm.L):
            tokens = rhm.rewrite(tokens, l, rng)  # and a random string under each
        outputs = torch.from_numpy(read(net, rhm, level, tokens)[0][:, 0])
        distances = torch.cdist(outputs, outputs).numpy()  # (V m, V m)
        ax.imshow(distances / max(distances.max(), 1e-12), cmap="cividis")
        ax.set(title=f"outputs of layer {level}", xticks=[], yticks=[])
    axes[0].set_ylabel(f"{rhm.V} symbols x {rhm.m} synonyms")
    top.colorbar(axes[0].images[0], ax=axes, shrink=0.7, label="distance / largest")

    left, right = bottom.subplots(1, 2)
    for stage, color in zip(stages, colormaps["viridis"](np.linspace(0, 0.9, rhm.L))):
        steps = np.arange(1, len(stage.losses) + 1)
        left.plot(steps, stage.losses, color=color, label=f"layer {stage.level}")
    left.set(title="training loss of every layer, Eq. (3)", xscale="log")
    left.set(xlabel="gradient step", ylabel="loss before the step")
    for label, style, values in (
        ("rho / 2", "C0o-", [rhm.signal(l) / 2 for l in levels]),
        ("largest error", "C1s-", [errors.max() for errors in all_errors]),
        ("median error", "C1s--", [np.median(errors) for errors in all_errors]),
    ):
        right.plot(levels, values, style, label=label)
    right.set_yscale("log", nonpositive="mask")
    right.set(title="errors ||output - q||", xticks=levels, ylabel="distance")
    right.set(xlabel="layer (trained from left to right)")
    right.invert_xaxis()
    for ax in (left, right):
        ax.legend(fontsize="small")
    return figure


def main(argv=None):
    """Train, print, draw, on one thread.  A wrong option ends before training."""
    parser = argparse.ArgumentParser(
        description="Train a deep CNN layer by layer on a random hierarchy model:\n"
        "V symbols per level, m rules per symbol, s symbols per patch, L levels.",
        epilog=Config.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sizes, settings = dict(V=16, m=4, s=2, L=4), asdict(Config())
    for name, default in {**sizes, **settings, "figure": "layerwise.png"}.items():
        about = dict(type=type(default), help=f"default: {default}")
        parser.add_argument(f"--{name}", default=default, **about)
    samplers = "appendix_B", "cagnetta"
    parser.add_argument("--sampler", choices=samplers, default="appendix_B")
    options = parser.parse_args(argv)
    path = Path(options.figure).expanduser()
    try:
        known = path.suffix in (".png", ".pdf", ".svg")
        if not known or not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"figure must be a .png, .pdf or .svg in a folder: {path}")
        config = Config(**{name: getattr(options, name) for name in settings})
        torch.zeros(1, device=config.device)  # an error if it cannot be used
        sizes = {name: getattr(options, name) for name in sizes}
        uniform = options.sampler == "appendix_B"
        rhm = RHM.random(**sizes, rng=config.seed, uniform_first_token=uniform)
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    torch.set_num_threads(1)
    net, stages, all_errors = run(rhm, config)
    plot(net, rhm, stages, all_errors).savefig(path, dpi=100)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
