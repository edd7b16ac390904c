"""How many training sentences does layerwise training need?

`python -m experiments.sample_complexity`, four minutes: test accuracy against N, the
training sentences of all levels; N*, the N of 90% accuracy; its power of m.  The shares
of the levels are fixed, N^(l) = C V m m^l: no test of Theorem 7's poly(m) m^L.
"""

import math
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from model import Level, deep_cnn, torch_threads
from rhm import RHM
from train_layerwise import (
    Config, check, merge, one_line_parser, predict, save, schedule, train, train_level,
)  # fmt: skip

JOBS = [("deep", 16, m, L) for L in (2, 3) for m in (2, 3, 4, 6, 8)]
JOBS += [("deep", 16, m, 4) for m in (2, 3, 4, 6)]
JOBS += [("deep", 16, 4, 1), ("deep", 16, 4, 5), ("deep", 8, 4, 3), ("deep", 32, 4, 3)]
JOBS += [("one level", 16, 4, 3), ("one level", 16, 4, 4)]

# N (points,): training sentences of all levels; shares (points, grammars): accuracies.
Curve = namedtuple("Curve", "network V m L N shares")


def series(covariance, correlation, lambda_W, eta, T):
    """gradient_descent in one go, for the thousands of levels trained here.

    From W = 0, T steps are a geometric series: in the eigenbasis of E^[x x^T] each
    direction shrinks by its own factor (Lemma 15).  Losses: only the last, (1,).
    """
    spectrum, basis = torch.linalg.eigh(covariance)
    curvature = spectrum.clamp(min=0) + lambda_W  # rounding makes it negative
    target = correlation @ basis
    W = target / curvature * (1 - (1 - eta * curvature) ** T)
    loss = 0.5 + 0.5 * (W * (W * curvature - 2 * target)).sum()  # Eq. (3)
    return W @ basis.T, loss.view(1)


@torch_threads(1)
def train_one_level(rhm, N, sigma, ridge=0.003, seed=0, device="cpu"):
    """A random-feature stand-in for Remark 8's shallow models; returns the network.

    Its one level has the whole sentence as its patch.  sigma = L and ridge = 0.003 are
    near the best of `python -m experiments.measurements one_level`.
    """
    lambda_W, eta, _ = schedule(rhm.V, rhm.m, Config(ridge=ridge))
    net = deep_cnn(rhm.V).to(device)
    h, counts = merge(net, *rhm.sample(N, [seed, 1]))
    level = Level(rhm.V, rhm.d, 1024, sigma, [seed, 2]).to(device)
    train_level(level, h, counts, lambda_W, eta, 50_000, series)
    return net.append(level)


def fresh_accuracy(net, rhm, seed):
    """train_layerwise.accuracy, 2000 sentences, for a network of one level as well."""
    tokens, labels = rhm.sample(2000, [seed, 4])
    return (predict(net, tokens)[:, 0].argmax(1) == labels).mean()


def draw_grammars(V, m, L, count):
    """Grammars of seeds 0, 1, ... until `count` of them have K_rho > 0; s is 2."""
    rhms, good = [], 0
    while good < count:
        rhms.append(RHM.random(V, m, 2, L, rng=len(rhms)))
        good += rhms[-1].K_rho > 0
    return rhms


def measure(network, V, m, L, grammars, device="cpu"):
    """Accuracies at growing numbers of samples N = C V m (m + ... + m^L).

    Yields N, the accuracies on the first `grammars` seeds with K_rho > 0, and on those
    passed over for K_rho = 0, until the mean of the first is above 99.5%.
    """
    rhms = draw_grammars(V, m, L, grammars)
    for C in 2.0 ** np.arange(-2, 6) if network == "deep" else (0.5, 2.0, 8.0):
        N = sum(math.ceil(C * V * m * m**l) for l in range(1, L + 1))
        good, degenerate = [], []
        for seed, rhm in enumerate(rhms):
            if network == "deep":
                config = Config(C=C, M=4 * V * m, seed=seed, device=device)
                net, stages = train(rhm, config, descend=series)
                N = sum(stage.N for stage in stages)
            else:
                net = train_one_level(rhm, N, sigma=L, seed=seed, device=device)
            share = fresh_accuracy(net, rhm, seed)
            (good if rhm.K_rho > 0 else degenerate).append(share)
        yield N, good, degenerate
        if np.mean(good) > 0.995:
            return


def sweep(path, jobs=JOBS, grammars=10, device="cpu"):
    """Measure and print all curves, draw them after each one; returns the Curves.

    jobs: ("deep" or "one level", V, m, L), m rising; one level: at most 3 grammars.
    """
    start, curves = time.perf_counter(), []
    print("   V   m   L  network          N  accuracy    sd  where K_rho = 0   seconds")
    for network, V, m, L in jobs:
        count, points = grammars if network == "deep" else min(grammars, 3), []
        for N, good, degenerate in measure(network, V, m, L, count, device):
            points.append((N, good))
            apart = f"{100 * np.mean(degenerate or 0):.2f}% of {len(degenerate)}"
            print(
                f"{V:4} {m:3} {L:3}  {network:9} {N:8} {100 * np.mean(good):8.2f}% "
                f"{100 * np.std(good):5.2f}  {apart if degenerate else '-':>15} "
                f"{time.perf_counter() - start:9.0f}",
                flush=True,
            )
        curves.append(Curve(network, V, m, L, *map(np.array, zip(*points))))
        for found in samples_needed(curves[-1:]).values():  # none if 90% is not reached
            N_star, spread = np.exp(found[m].mean()), np.exp(found[m].std())
            per = N_star / (V * m**L)
            print(f"  N* = {N_star:.0f} (x/: {spread:.2f}), {per:.2f} V m^L")
        save(plot(curves), path)
    print_exponents(curves)
    return curves


def log_samples_needed(N, shares):
    """log N* per grammar: where its curve, interpolated in log N, reaches 90%.

    N (points,), shares (points, grammars).  Curves that never reach it are left out.
    """
    rising = np.maximum.accumulate(shares).T
    logs = np.array([np.interp(0.9, a, np.log(N), np.nan, np.nan) for a in rising])
    return logs[~np.isnan(logs)]


def samples_needed(curves):
    """{(V, L): {m: log N* of the grammars}} of the deep networks' curves."""
    needed = {}
    for network, V, m, L, N, shares in curves:
        logs = log_samples_needed(N, shares)
        if network == "deep" and len(logs):
            needed.setdefault((V, L), {})[m] = logs
    return needed


def exponent(ms, logs):
    """The power of m in N*: by regression, and between neighbouring m, an array.

    ms: at least two; logs: for each m an array, log N* of its grammars.
    """
    x = np.repeat(np.log(ms), [len(y) for y in logs])
    slope = np.polyfit(x, np.concatenate(logs), 1)[0]
    return slope, np.diff([y.mean() for y in logs]) / np.diff(np.log(ms))


def print_exponents(curves):
    """The power of m in N*, beside that of our rule, the heuristic and Section 4.2.

    Rule: N = C V m (m + ... + m^L) for a C that does not depend on m.  Heuristic: the
    error sqrt(V m / N) of q^ is below the signal m^(-(L-1)/2).  L + 3: Section 4.2 with
    the corrected Lemma 18, for a K_rho that does not grow with m.
    """
    print("\nPower of m in N*: by regression, between neighbouring m, and in theory")
    print("   V   L  regression  neighbours  rule  heuristic  Section 4.2")
    for (V, L), found in samples_needed(curves).items():
        if len(found) > 1:
            slope, local = exponent([*found], [*found.values()])
            between = f"{local.min():.1f} to {local.max():.1f}"
            rule = [np.log([sum(m * m**l for l in range(1, L + 1))]) for m in found]
            rule, _ = exponent([*found], rule)
            print(
                f"{V:4} {L:3} {slope:11.2f} {between:>11} {rule:5.2f} {L:10} {L + 3:12}"
            )


def plot(curves):
    """Accuracy against N, N* against m; returns the matplotlib Figure.

    Bands: +- 1 standard deviation over grammars.  Drawn is the V of the first curve.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    V = curves[0].V
    curves = [curve for curve in curves if curve.V == V]
    figure = Figure(figsize=(9, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles, bands = {}, {}
    for L in sorted({curve.L for curve in curves}):
        color = colormaps["viridis"]((L - 1) / 5)
        styles[L] = dict(color=color, marker="Ds^ovPX*"[L - 1], markersize=4)
        bands[L] = dict(color=color, alpha=0.2, linewidth=0)
        left.plot([], label=f"L = {L}", **styles[L])
    for network, _, m, L, N, shares in curves:
        mean, sd = 100 * shares.mean(1), 100 * shares.std(1)
        left.plot(N, mean, "-" if network == "deep" else "--", **styles[L])
        left.fill_between(N, mean - sd, mean + sd, **bands[L])
        left.text(N[0], mean[0] - 3, m, color=styles[L]["color"], ha="center", va="top")
    left.plot([], "--", color="grey", label="one level")
    left.axhline(100 / V, color="black", linestyle=":", label=f"chance, V = {V}")
    left.set(title="accuracy rises with N (digits: m)", ylabel="test accuracy in %")
    left.set(xlabel="N, training sentences of all levels", xscale="log", ylim=(-5, 103))

    for (_, L), found in samples_needed(curves).items():
        ms = np.array([*found])
        mean, sd = np.array([(logs.mean(), logs.std()) for logs in found.values()]).T
        right.plot(ms, np.exp(mean), **styles[L])
        right.fill_between(ms, np.exp(mean - sd), np.exp(mean + sd), **bands[L])
        for power, line in (L, ":"), (L + 3, "-."):
            from_first = np.exp(mean[0]) * (ms / ms[0]) ** power
            right.plot(ms, from_first, line, color="grey", linewidth=1)
    right.plot([], ":", color="grey", label="slope L, the heuristic")
    right.plot([], "-.", color="grey", label="slope L + 3, Section 4.2 corrected")
    right.set(title="N* grows as a power of m", xscale="log", yscale="log")
    right.set(xlabel="m, rules per symbol", ylabel="N*, the N of 90% accuracy")
    ms = sorted({curve.m for curve in curves})
    right.set_xticks(ms, ms)
    right.set_xticks([], minor=True)
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def main(argv=None):
    """Measure, print, draw.  What was typed wrongly ends in one line, exit code 2."""
    text = "Measure how many training sentences layerwise training needs."
    parser = one_line_parser(text)
    parser.set_defaults(**vars(Config()), V=16, m=4, s=2, L=4, sampler="appendix_B")
    picture = dict(default="experiments/sample_complexity.png", help="picture")
    parser.add_argument("--grammars", type=int, default=10, help="of each size")
    parser.add_argument("--figure", type=Path, **picture)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(argv)
    try:
        path = check(options)[2]  # figure and device as train_layerwise checks them
        if options.grammars < 1:
            raise ValueError(f"grammars must be at least 1, got {options.grammars}")
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])
    sweep(path, JOBS, options.grammars, options.device)


if __name__ == "__main__":
    main()
