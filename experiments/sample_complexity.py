"""How many training sentences does layerwise training need?

`python -m experiments.sample_complexity`, five minutes: test accuracy against N, the
training sentences of all levels; N*, the N of 90% accuracy; its power of m.  The shares
of the levels are fixed, N^(l) = C V m m^l: no test of Theorem 7's poly(m) m^L.
"""

import argparse
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from model import Layer, RandomFeatures, deep_cnn, predict
from rhm import RHM
from train_layerwise import Config, averages, schedule, train

# Network, V, m, L; always s = 2.
JOBS = [("deep", 16, m, L) for L in (2, 3) for m in (2, 3, 4, 6, 8)]
JOBS += [("deep", 16, m, 4) for m in (2, 3, 4, 6)]
JOBS += [("deep", 16, 4, 1), ("deep", 16, 4, 5), ("deep", 8, 4, 3), ("deep", 32, 4, 3)]
JOBS += [("one level", 16, 4, 3), ("one level", 16, 4, 4)]

# N (points,): training sentences of all levels; shares (points, grammars): accuracies.
Curve = namedtuple("Curve", "network V m L N shares")


# ---- What the other experiments use as well ------------------------------------------


def draw_grammars(V, m, s, L, count, **sampler):
    """{seed: grammar}, the first `count` seeds for which Assumption 6 holds."""
    rhms, seed = {}, 0
    while len(rhms) < count:
        rhm = RHM.random(V, m, s, L, seed, **sampler)
        if not rhm.assumption_6_failures():
            rhms[seed] = rhm
        seed += 1
    return rhms


def series(covariance, correlation, lambda_W, eta, T):
    """gradient_descent in one go, for the thousands of layers trained here.

    From W = 0, T steps are a geometric series: in the eigenbasis of E^[x x^T] each
    direction shrinks by its own factor (Lemma 15).  Losses: only the last, (1,).
    """
    spectrum, basis = torch.linalg.eigh(covariance)
    curvature = spectrum.clamp(min=0) + lambda_W  # rounding makes it negative
    target = correlation @ basis
    W = target / curvature * (1 - (1 - eta * curvature) ** T)
    loss = 0.5 + 0.5 * (W * (W * curvature - 2 * target)).sum()  # Eq. (3)
    return W @ basis.T, loss.view(1)


def fresh_accuracy(net, rhm, seed):
    """train_layerwise.accuracy, 2000 sentences, for a network of one level as well."""
    tokens, labels = rhm.sample(2000, [seed, 4])
    return (predict(net, tokens)[:, 0].argmax(1) == labels).mean()


def samples_needed(N, shares):
    """N*, the N of 90%, interpolated in log N; nan if the shares do not cross 90%."""
    k = np.argmax(np.array(shares) >= 0.9)  # the first; 0 as well if there is none
    here = slice(k - 1, k + 1)
    return np.exp(np.interp(0.9, shares[here], np.log(N[here]))) if k else np.nan


# ---- The measurement -----------------------------------------------------------------


def train_one_level(rhm, N, sigma, ridge=0.003, M=1024, seed=0):
    """A random-feature stand-in for Remark 8's shallow models; returns the network.

    Its one layer has the whole sentence as its patch.  sigma = L and ridge = 0.003 are
    near the best of `python -m experiments.measurements one_level`.
    """
    net, phi = deep_cnn(rhm.V), RandomFeatures(rhm.d * rhm.V, M, sigma, [seed, 2])
    covariance, correlation, _ = averages(net, phi, rhm, N, [seed, 1], 1)
    lambda_W, eta, _ = schedule(rhm.V, rhm.m, ridge, Config.eps)
    W, _ = series(covariance, correlation, lambda_W, eta, T=50_000)
    return net.append(Layer(rhm.d, phi, W))


def measure(network, V, m, L, grammars):
    """Accuracies at growing numbers of samples N = C V m (m + ... + m^L), a Curve.

    On the first `grammars` seeds for which Assumption 6 holds, until their mean is
    above 99.5%.
    """
    rhms, points = draw_grammars(V, m, 2, L, grammars), []
    for C in 2.0 ** np.arange(-2, 6) if network == "deep" else (0.5, 2.0, 8.0):
        N, shares = sum(math.ceil(C * V * m * m**l) for l in range(1, L + 1)), []
        for seed, rhm in rhms.items():
            if network == "deep":  # Config counts in units of s L V m m^l
                config = Config(C=C / (2 * L), M=4 * V * m, seed=seed)
                net, _ = train(rhm, config, minimise=series)
            else:
                net = train_one_level(rhm, N, sigma=L, seed=seed)
            shares.append(fresh_accuracy(net, rhm, seed))
        points.append((N, shares))
        row = f"{V:4} {m:3} {L:3}  {network:9} {N:8} {100 * np.mean(shares):8.2f}%"
        print(f"{row} {100 * np.std(shares):5.2f}", flush=True)
        if np.mean(shares) > 0.995:
            break
    return Curve(network, V, m, L, *map(np.array, zip(*points)))


def sweep(path, jobs=JOBS, grammars=10):
    """Measure and print all curves, draw them after each one; returns the Curves.

    jobs: ("deep" or "one level", V, m, L), m rising; one level: at most 3 grammars.
    """
    curves = []
    print("   V   m   L  network          N  accuracy    sd")
    for network, V, m, L in jobs:
        count = grammars if network == "deep" else min(grammars, 3)
        curves.append(measure(network, V, m, L, count))
        logs = log_samples_needed(curves[-1])
        if len(logs):
            N_star, spread = np.exp(logs.mean()), np.exp(logs.std())
            per = N_star / (V * m**L)
            print(f"  N* = {N_star:.0f} (x/: {spread:.2f}), {per:.2f} V m^L")
        plot(curves).savefig(path, dpi=100)
    print_exponents(curves)
    return curves


def log_samples_needed(curve):
    """log N* of the grammars that reach 90%."""
    logs = np.log([samples_needed(curve.N, shares) for shares in curve.shares.T])
    return logs[~np.isnan(logs)]


def logs_by_size(curves):
    """{(V, L): {m: log N* of the grammars}} of the deep networks that reach 90%."""
    found = {}
    for curve in curves:
        logs = log_samples_needed(curve)
        if curve.network == "deep" and len(logs):
            found.setdefault((curve.V, curve.L), {})[curve.m] = logs
    return found


def exponent(ms, logs):
    """The power of m in N*: by regression, and between neighbouring m, an array.

    ms: at least two; logs: for each m an array, log N* of its grammars.
    """
    x = np.repeat(np.log(ms), [len(y) for y in logs])
    slope = np.polyfit(x, np.concatenate(logs), 1)[0]
    return slope, np.diff([y.mean() for y in logs]) / np.diff(np.log(ms))


def print_exponents(curves):
    """The power of m in N*, and in theory: see the notebook for heuristic and L + 3.

    Rule: N = C V m (m + ... + m^L) for a C that does not depend on m.
    """
    print("\nPower of m in N*: by regression, between neighbouring m, and in theory")
    print("   V   L  regression  neighbours  rule  heuristic  Section 4.2")
    for (V, L), found in logs_by_size(curves).items():
        if len(found) > 1:
            slope, local = exponent([*found], [*found.values()])
            between = f"{local.min():.1f} to {local.max():.1f}"
            sums = [m * sum(m**l for l in range(1, L + 1)) for m in found]
            rule = np.polyfit(np.log([*found]), np.log(sums), 1)[0]
            row = f"{V:4} {L:3} {slope:11.2f} {between:>11} {rule:5.2f}"
            print(f"{row} {L:10} {L + 3:12}")


def plot(curves):
    """Accuracy against N, N* against m, for the V of the first curve; a Figure.

    Bars: +- 1 standard deviation over grammars; N* is their geometric mean.
    """
    V, styles = curves[0].V, {}
    curves = [curve for curve in curves if curve.V == V]
    figure = Figure(figsize=(9, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for L in sorted({curve.L for curve in curves}):
        color, marker = colormaps["viridis"]((L - 1) / 5), "Ds^ovPX*"[L - 1]
        styles[L] = dict(color=color, marker=marker, markersize=4)
        left.plot([], label=f"L = {L}", **styles[L])
    for network, _, m, L, N, shares in curves:
        mean, sd, line = 100 * shares.mean(1), 100 * shares.std(1), styles[L]
        line = dict(line, linestyle="-" if network == "deep" else "--")
        left.errorbar(N, mean, sd, **line)
        left.text(N[0], mean[0] - 3, m, color=line["color"], ha="center", va="top")
    left.plot([], "--", color="grey", label="one level")
    left.axhline(100 / V, color="black", linestyle=":", label=f"chance, V = {V}")
    left.set(title="accuracy rises with N (digits: m)", ylabel="test accuracy in %")
    left.set(xlabel="N, training sentences of all levels", xscale="log", ylim=(-5, 103))

    for (_, L), found in logs_by_size(curves).items():
        ms, N_star = np.array([*found]), np.exp([y.mean() for y in found.values()])
        right.plot(ms, N_star, **styles[L])
        for power, line in (L, ":"), (L + 3, "-."):
            right.plot(ms, N_star[0] * (ms / ms[0]) ** power, line, color="grey")
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
    """Measure and print, draw."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    torch.set_num_threads(1)
    sweep(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
