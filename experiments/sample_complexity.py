"""Theorem 7, measured: how many samples does layerwise training need?

`python -m experiments.sample_complexity`, six to eight minutes.  For grammars of several
sizes it measures the test accuracy against the number N of training sentences of all
levels, finds N*, the N of 90% accuracy, and asks with which power of m it grows.
"""

import argparse
import math
import time
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.layerwise import check_figure
from model import DeepCNN
from rhm import RHM
from train_layerwise import Config, accuracy, draw_first_patches, new_level
from train_layerwise import schedule, torch_threads, train, train_level

SIZES = [(16, m, L) for L in (2, 3) for m in (2, 3, 4, 6, 8)]  # V, m, L; s is 2
SIZES += [(16, m, 4) for m in (2, 3, 4, 6)]
SIZES += [(16, 4, 1), (16, 4, 5), (8, 4, 3), (32, 4, 3)]
ONE_LEVEL = [(16, 4, 3), (16, 4, 4)]


@dataclass(frozen=True)
class Curve:
    """Accuracy against the number of samples, for grammars of one size."""

    V: int
    m: int
    L: int
    network: str  # "deep" or "one level"
    N: np.ndarray  # (points,), training sentences of all levels
    shares: np.ndarray  # (points, grammars), accuracies


def sweep(figure, sizes=SIZES, grammars=10, one_level=ONE_LEVEL, device="cpu"):
    """Measure and print the curves that test Theorem 7's rate, redraw after each one.

    figure: a path; sizes and one_level: lists of (V, m, L), m rising, for the deep and
    for the one-level network, the latter on at most 3 grammars.  Returns a list of
    Curves.  ValueError as RHM.random and Config.
    """
    start, curves, needed = time.perf_counter(), [], {}
    jobs = [("deep", size, grammars) for size in sizes]
    jobs += [("one level", size, min(grammars, 3)) for size in one_level]
    print("   V   m   L  network          N  accuracy    sd  where K_rho = 0   seconds")
    for network, (V, m, L), count in jobs:
        Ns, shares = [], []
        for N, good, degenerate in measure(V, m, L, network, count, device):
            Ns.append(N)
            shares.append(good)
            apart = f"{100 * np.mean(degenerate or 0):.2f}% of {len(degenerate)}"
            print(
                f"{V:4} {m:3} {L:3}  {network:9} {N:8} {100 * np.mean(good):8.2f}% "
                f"{100 * np.std(good):5.2f}  {apart if degenerate else '-':>15} "
                f"{time.perf_counter() - start:9.0f}",
                flush=True,
            )
        curves.append(Curve(V, m, L, network, np.array(Ns), np.array(shares)))
        logs = log_samples_needed(Ns, np.array(shares))
        if network == "deep" and len(logs):
            N_star, spread = math.exp(logs.mean()), math.exp(logs.std())
            in_units = f"{N_star / (V * m**L):.2f} V m^L"
            print(f"  N* = {N_star:.0f} (x/: {spread:.2f}), {in_units}")
            needed.setdefault((V, L), []).append((m, logs))
        plot(curves, needed, figure)
    print_exponents(needed)
    return curves


def measure(V, m, L, network, grammars, device="cpu"):
    """Accuracies at growing numbers of samples N = C V m (m + ... + m^L).

    Not in the paper.  Yields N, the accuracies on the first `grammars` seeds with
    K_rho > 0, and those on the seeds passed over for K_rho = 0.  Ends when the mean of
    the first is above 99.5%.
    """
    rhms = draw_grammars(V, m, L, grammars)
    for C in 2.0 ** np.arange(-2, 6) if network == "deep" else (0.5, 2.0, 8.0):
        N = sum(math.ceil(C * V * m * m**l) for l in range(1, L + 1))
        good, degenerate = [], []
        for seed, rhm in enumerate(rhms):
            if network == "deep":
                config = Config(C=C, M=4 * V * m, seed=seed, device=device)
                net, _ = train(rhm, config)
            else:
                net = train_one_level(rhm, N, sigma=L, seed=seed, device=device)
            share = accuracy(net, rhm, 2000, np.random.default_rng([seed, 4]))
            (good if rhm.K_rho > 0 else degenerate).append(share)
        yield N, good, degenerate
        if np.mean(good) > 0.995:
            return


def draw_grammars(V, m, L, count):
    """Grammars of seeds 0, 1, ... until `count` of them have K_rho > 0; s is 2."""
    rhms, good = [], 0
    while good < count:
        rhms.append(RHM.random(V, m, 2, L, np.random.default_rng(len(rhms))))
        good += rhms[-1].K_rho > 0
    return rhms


def train_one_level(rhm, N, sigma, ridge=0.003, seed=0, device="cpu"):
    """A shallow network, as in Remark 8: one level, whose patch is the whole sentence.

    Of the grammar it uses N samples and the sizes.  M = 1024 and 44,860 steps; with
    these, sigma = L and ridge = 0.003 are within 3 percentage points of the best of
    `python -m experiments.measurements one_level`.  Returns the DeepCNN.
    """
    config = Config(M=1024, ridge=ridge, eps=1e-300, seed=seed, device=device)
    data_rng, feature_rng = (np.random.default_rng([seed, k]) for k in (1, 2))
    net = DeepCNN(rhm.V)
    with torch.no_grad(), torch_threads(config.threads):
        leaves, counts = draw_first_patches(rhm, N, 1, data_rng, device)
        h = net.embed(leaves)  # (U, d, V), one-hot
        level = new_level(rhm.V, leaves.shape[1], sigma, config, feature_rng)
        train_level(level, h, counts, *schedule(rhm.V, rhm.m, config))
    net.append(level)
    return net


def log_samples_needed(N, shares):
    """log N* of every grammar whose curve, interpolated in log N, reaches 90%."""
    rising = np.maximum.accumulate(shares)  # (points, grammars)
    logs = [np.interp(0.9, a, np.log(N), math.nan, math.nan) for a in rising.T]
    return np.array([x for x in logs if not math.isnan(x)])


def print_exponents(needed):
    """The power of m in N*, beside the heuristic's L and Theorem 7's L + 3.

    needed: {(V, L): [(m, log N* of the grammars), ...]}.  Heuristic: the error
    sqrt(V m / N) of q^ is below the signal m^(-(L-1)/2).  L + 3: Section 4.2's N with
    the corrected Lemma 18, for a K_rho that does not grow with m.
    """
    print("\nPower of m in N*: by regression, between neighbouring m, and in theory")
    print("   V   L  regression  neighbours  heuristic  Theorem 7")
    for (V, L), points in needed.items():
        if len(points) > 1:
            log_m = np.log([m for m, _ in points])
            x = np.repeat(log_m, [len(logs) for _, logs in points])
            y = np.concatenate([logs for _, logs in points])
            slope = np.polyfit(x, y, 1)[0]
            local = np.diff([logs.mean() for _, logs in points]) / np.diff(log_m)
            between = f"{local.min():.1f} to {local.max():.1f}"
            print(f"{V:4} {L:3} {slope:11.2f} {between:>11} {L:10} {L + 3:10}")


def plot(curves, needed, path):
    """Left accuracy against N, right N* against m; only the V of the first curve.

    Bands: +- 1 standard deviation over grammars.  needed: as in print_exponents.
    """
    V = curves[0].V
    curves = [curve for curve in curves if curve.V == V]
    viridis = matplotlib.colormaps["viridis"]
    color = {L: viridis((L - 1) / 5) for L in sorted({curve.L for curve in curves})}
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_accuracies(left, curves, color)
    plot_samples_needed(right, {L: needed.get((V, L)) for L in color}, color)
    right.set_xticks([], minor=True)
    ms = sorted({curve.m for curve in curves})
    right.set_xticks(ms, ms)
    right.set_xlim(0.78 * ms[0], 1.1 * ms[-1])  # room for the names of the lines
    figure.savefig(path, dpi=90)


def plot_accuracies(ax, curves, color):
    """The left panel; below each curve its m."""
    V = curves[0].V
    for curve in curves:
        mean, sd = 100 * curve.shares.mean(1), 100 * curve.shares.std(1)
        line = "o-" if curve.network == "deep" else "o--"
        ax.plot(curve.N, mean, line, color=color[curve.L], markersize=3)
        band = dict(color=color[curve.L], alpha=0.2, linewidth=0)
        ax.fill_between(curve.N, mean - sd, mean + sd, **band)
        ax.text(curve.N[0], mean[0] - 8, curve.m, color=color[curve.L], ha="center")
    ax.axhline(100 / V, color="black", linestyle=":", label="chance")
    ax.plot([], "--", color="grey", label="one level")
    for L in color:
        ax.plot([], color=color[L], label=f"L = {L}")
    ax.legend(loc="upper center", ncols=4)
    ax.set(title=f"accuracy rises with N (V = {V}; the digits are m)", xscale="log")
    ax.set(xlabel="N, training sentences of all levels", ylabel="test accuracy in %")
    ax.set(ylim=(-4, 130), yticks=range(0, 101, 20))  # room for the legend


def plot_samples_needed(ax, needed, color):
    """The right panel; needed: {L: [(m, log N* of the grammars), ...] or None}."""
    ax.set(title="N* grows as a power of m", xscale="log", yscale="log")
    ax.set(xlabel="m, rules per symbol", ylabel="N*, the N of 90% accuracy")
    for L, points in needed.items():
        if points is None:
            continue
        ms = np.array([m for m, _ in points])
        mean = np.array([logs.mean() for _, logs in points])
        sd = np.array([logs.std() for _, logs in points])
        low, N_star, high = np.exp(mean - sd), np.exp(mean), np.exp(mean + sd)
        ax.plot(ms, N_star, "o-", color=color[L])
        ax.fill_between(ms, low, high, color=color[L], alpha=0.3, linewidth=0)
        name = dict(color=color[L], ha="right", va="center")
        ax.text(0.95 * ms[0], N_star[0], f"L = {L}", **name)
        for power, line in (L, ":"), (L + 3, "--"):
            reference = N_star[0] * (ms / ms[0]) ** power
            ax.plot(ms, reference, line, color="grey", linewidth=1)
    ax.plot([], ":", color="grey", label="slope L, the heuristic")
    ax.plot([], "--", color="grey", label="slope L + 3, bound of Theorem 7")
    ax.legend(loc="upper left")


def main(argv=None):
    """The command line; bad input ends it with one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sample_complexity",
        description="Measure how many samples layerwise training needs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    path = "experiments/sample_complexity.png"
    parser.add_argument("--figure", default=path, help="picture to write")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    options = parser.parse_args(argv)
    try:
        Config(device=options.device)  # refuses a device that cannot be used
        check_figure(options.figure)
        sweep(options.figure, device=options.device)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        parser.error((str(error) or "out of memory").splitlines()[0])


if __name__ == "__main__":
    main()
