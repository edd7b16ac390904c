"""Smaller measurements for the notebook: `python -m experiments.measurements NAME`.

Each function prints one table of experiments/README.md; `--help` lists them.
"""

import argparse
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from experiments.sample_complexity import (
    draw_grammars, fresh_accuracy, samples_needed, series, train_one_level,
)  # fmt: skip
from model import RandomFeatures
from rhm import RHM
from train_layerwise import Config, accuracy, diagnose, read, train

# Sizes V, m, s, L:
DEFAULT = 16, 4, 2, 4
HELD_OUT = [(12, 3, 2, 5), (32, 4, 2, 3), (8, 2, 3, 4), (24, 5, 2, 3), (10, 4, 4, 3)]
HELD_OUT += [(64, 2, 2, 3), (5, 3, 3, 3), (16, 8, 2, 3), (20, 3, 2, 4), (16, 4, 3, 4)]
OTHERS = (16, 4, 2, 6), (8, 4, 2, 5), (8, 4, 3, 3)
# Options of train_layerwise.py:
LARGER = ["", "--L 3 --s 4", "--L 6", "--L 7 --C 2.5", "--L 8 --C 2.5"]
LARGER += ["--L 8 --m 3 --C 2.5", "--L 10 --m 3 --C 2", "--V 256 --m 2 --L 2"]
LEMMA_10 = 0.307  # sigma / distance, (2 log(2 / eps_O))^(-1/2) for eps_O = 0.01


def evaluate(rhm, config, **choices):
    """Train and measure with the random numbers of `python train_layerwise.py`.

    choices: the features and minimise of train.  N counts the sentences of all levels,
    seconds are of CPU for training, errors those of layer 1.  found: the percentage of
    symbols found by layer, L to 1.  below: is every error of all layers below rho / 2?
    """
    start = time.process_time()
    net, stages = train(rhm, config, **choices)
    seconds, levels = time.process_time() - start, range(rhm.L, 0, -1)
    seen = [diagnose(net, rhm, l, [config.seed, 3, l]) for l in levels]
    return SimpleNamespace(
        N=sum(stage.N for stage in stages),
        seconds=seconds,
        percent=100 * accuracy(net, rhm, 10_000, [config.seed, 4]),
        errors=seen[-1][0],
        found=[100 * share for _, share in seen],
        below=all(2 * e.max() < rhm.signal(l) for l, (e, _) in zip(levels, seen)),
    )


def evaluate_all(rhms, features=RandomFeatures, minimise=None, **changes):
    """evaluate on {seed: grammar}, with a Config of each seed and these changes."""
    runs = []
    for seed, rhm in rhms.items():
        config = Config(seed=seed, **changes)
        runs.append(evaluate(rhm, config, features=features, minimise=minimise))
    return runs


def mean_and_lowest(runs):
    """Accuracies in two columns; empty where there is nothing."""
    percents = [run.percent for run in runs]
    return f"{np.mean(percents):8.2f}% {min(percents):7.2f}%" if runs else ""


def compare(rhms, *settings):
    """What evaluate_all finds on {seed: grammar}; a row for each setting, shown last.

    N of all levels; accuracy, mean and lowest; then means: seconds of CPU, the median
    of the errors of layer 1 and their 99.9% quantile, the share of grammars with every
    error below rho / 2, the percentage of symbols found by layer, L to 1.
    """
    print(f"\n{next(iter(rhms.values()))}, seeds {', '.join(map(str, rhms))}")
    print("        N     mean   lowest  seconds  median    99.9%  below  found")
    for setting in settings:
        runs, p = evaluate_all(rhms, **setting), (0.5, 0.999)
        rows = [(r.seconds, *np.quantile(r.errors, p), r.below, *r.found) for r in runs]
        seconds, median, high, below, *found = np.mean(rows, axis=0)
        row = f"{runs[0].N:9} {mean_and_lowest(runs)}{seconds:9.1f}{median:8.3f}"
        row += f"{high:9.2f}{below:7.0%} " + "".join(f"{share:4.0f}" for share in found)
        texts = [f"{k} = {getattr(v, '__name__', v)}" for k, v in setting.items()]
        print(f"{row}  {', '.join(texts) or 'defaults'}", flush=True)


def seeds():
    """The default size for 25 seeds, C = 2.5 and 10."""
    accuracy_by_size([(DEFAULT, range(10)), (DEFAULT, range(20, 35))])


def held_out():
    """The same for sizes that took no part in the choice of the defaults."""
    accuracy_by_size([(size, range(3)) for size in HELD_OUT])


def harder():
    """The same for smaller K_rho; last, for the sampler of Cagnetta et al. (2024)."""
    accuracy_by_size([(size, range(3)) for size in OTHERS[:2]])
    accuracy_by_size([(DEFAULT, range(4))], uniform_first_token=False)


def accuracy_by_size(rows, **sampler):
    """Two rows per size: grammars, their mean and lowest accuracy.

    below: in how many is every one of 10,000 errors below rho / 2, at every level?
    With Appendix B's sampler Assumption 6 fails only where K_rho = 0.
    """
    titles = "  grammars     mean   lowest  below"
    name = "Cagnetta et al. (2024)" if sampler else "Appendix B"
    print(f"{name:26} {'where Assumption 6 holds':34} where it fails")
    print(f" V  m  s  L  seeds    C{2 * titles}")
    for size, some_seeds in rows:
        holds, fails = {}, {}
        for seed in some_seeds:
            rhm = RHM.random(*size, seed, **sampler)
            (fails if rhm.assumption_6_failures() else holds)[seed] = rhm
        for C in 2.5, 10.0:
            row = "".join(f"{number:2} " for number in size)
            row += f"{some_seeds[0]:3}-{some_seeds[-1]:<2} {C:4g}"
            for rhms in holds, fails:
                runs = evaluate_all(rhms, C=C)
                below = sum(run.below for run in runs)
                row += f"{len(runs):10} {mean_and_lowest(runs):18} {below:6}"
            print(row, flush=True)


def defaults():
    """How C, M and sigma were chosen, with the series; Assumption 6 holds."""
    rhms, given = draw_grammars(*DEFAULT, 8), dict(minimise=series)
    grid = [dict(C=C, M=M) for C in (2.5, 5.0, 10.0) for M in (128, 256, 512)]
    ratios = [dict(sigma_ratio=k) for k in (LEMMA_10, 0.35, 0.4, 0.5, 0.6, 0.8)]
    compare(rhms, *(setting | given for setting in grid + ratios))
    settings = [setting | given | dict(C=2.5) for setting in ratios[2:5]]
    for size in OTHERS:
        compare(draw_grammars(*size, 3), *settings)
    print("\nWith the sampler of Cagnetta et al. (2024)", end="")
    compare(draw_grammars(*DEFAULT, 3, uniform_first_token=False), *settings)


def small_K_rho():
    """Theorem 7's factor K_rho^-2: where the default C and M are too small."""
    for L in 5, 6:
        rhm = RHM.random(8, 4, 2, L, 1)
        print(f"\nK_rho = {rhm.K_rho:.2f}", end="")
        compare({1: rhm}, dict(C=2.5), {}, dict(M=512), dict(C=40.0, M=512))


def few_features():
    """Fewer features, 2M, than patches, V m = 1024."""
    settings = [dict(M=M, C=2.5, minimise=series) for M in (256, 512, 1024)]
    compare(draw_grammars(64, 16, 2, 2, 1), *settings)


def closed_form(covariance, correlation, lambda_W, eta, T):
    """What endless gradient descent would reach: ridge regression (Section 2.3)."""
    spectrum = covariance.double() + lambda_W * torch.eye(len(covariance))
    W = torch.linalg.solve(spectrum, correlation.double(), left=False)
    return W, [math.nan]  # no losses


def deviations():
    """What each deviation from the proof does."""
    compare(
        draw_grammars(*DEFAULT, 6),
        {},  # the defaults
        dict(ridge=1.0),  # the proof's
        dict(ridge=0.1),
        dict(sigma_ratio=LEMMA_10),  # of the typical distance
        dict(minimise=closed_form),
    )


def ridge():
    """The proof's ridge = 1 with more and more features."""
    given = dict(ridge=1.0, C=2.5, minimise=closed_form)
    settings = [dict(M=M) | given for M in (256, 1024, 2048, 4096)]
    compare(draw_grammars(*DEFAULT, 3), *settings)


def places():
    """The default network at every place, though trained on the first.

    Per layer: the share of symbols found, and for each place the median ||h - q||.
    """
    rhm = RHM.random(*DEFAULT, 0)
    net, _ = train(rhm, Config())
    tree = rhm.sample_tree(10_000, 1)
    print("layer    found  median error by place")
    for l in range(rhm.L, 0, -1):
        symbols = tree[l - 1]  # (n, places)
        _, distances, nearest = read(net, rhm, l, tree[-1])  # (n, places, V)
        errors = np.take_along_axis(distances, symbols[:, :, None], 2)[:, :, 0]
        medians = " ".join(f"{median:.4f}" for median in np.median(errors, axis=0))
        print(f"{l:5} {100 * (nearest == symbols).mean():7.2f}%  {medians}")


class TensorProduct(nn.Module):
    """x: all products of an entry of the first input with one of the second (s = 2)."""

    def __init__(self, dim, M, sigma, rng):  # as RandomFeatures, which needs them
        super().__init__()

    def forward(self, h):
        """(..., 2 V) -> (..., V^2)."""
        a, b = h.chunk(2, dim=-1)
        return (a[..., :, None] * b[..., None, :]).flatten(-2)


class ScaledProduct(TensorProduct):
    """x / ||x||."""

    def forward(self, h):
        return nn.functional.normalize(super().forward(h), dim=-1)


class ClusterProduct(TensorProduct):
    """For each input the one-hot vector of the nearest of V centres.

    Centres are inputs of the first batch, each as far as can be from those before it.
    """

    centres = None

    def forward(self, h):
        inputs = h.unflatten(-1, (2, -1))  # (..., 2, V)
        rows, V = inputs.flatten(0, -2), inputs.shape[-1]
        if self.centres is None:
            self.centres = rows[:1]
            while len(self.centres) < V:
                farthest = torch.cdist(rows, self.centres).amin(1).argmax()
                self.centres = torch.cat([self.centres, rows[farthest, None]])
        nearest = torch.cdist(inputs, self.centres).argmin(-1)
        return super().forward(nn.functional.one_hot(nearest, V).to(h).flatten(-2))


def features():
    """What random features are for: products of the inputs in their place."""
    exact = dict(features=TensorProduct, minimise=closed_form)
    compare(
        draw_grammars(*DEFAULT, 1),
        dict(features=RandomFeatures),
        dict(features=TensorProduct),
        dict(features=ScaledProduct),
        exact,
        exact | dict(ridge=64e-6),  # lambda_W = 1e-6
        exact | dict(ridge=64e-8),  # lambda_W = 1e-8
        dict(features=ClusterProduct),
    )


def one_level():
    """The grid for sigma and ridge of the one-level network; one grammar."""
    for L, N, sigmas in (3, 43_008, (1, 2, 3, 4, 6)), (4, 87_040, (3, 4, 6, 8, 12)):
        rhm = RHM.random(16, 4, 2, L, 0)
        print(f"L = {L}, N = {N}, accuracy for sigma = {sigmas}")
        for ridge in 0.03, 0.003, 0.0003:
            nets = [train_one_level(rhm, N, sigma, ridge) for sigma in sigmas]
            texts = (f"{100 * fresh_accuracy(net, rhm, 0):7.2f}%" for net in nets)
            print(f"  ridge {ridge:<6}", *texts, flush=True)


def assumption_6():
    """How often Assumption 6 fails, in 200 grammars of each size."""
    print("             Appendix B   Cagnetta et al. (2024)")
    print("  V   m   L   K_rho = 0   K_rho = 0  kappa = inf")
    sizes = (8, 4, 3), (16, 2, 2), (16, 2, 4), (16, 3, 4), (16, 4, 4), (16, 6, 4)
    for V, m, L in (*sizes, (32, 4, 3)):
        row = f"{V:3} {m:3} {L:3}"
        for sampler in {}, dict(uniform_first_token=False):
            rhms = [RHM.random(V, m, 2, L, seed, **sampler) for seed in range(200)]
            row += f"{100 * np.mean([rhm.K_rho == 0 for rhm in rhms]):11.1f}%"
        no_kappa = 100 * np.mean([rhm.kappa == math.inf for rhm in rhms])
        print(f"{row} {no_kappa:11.1f}%", flush=True)


class MoreSamples(RHM):
    """A grammar of which `train` gets eight times the samples at some levels."""

    def __init__(self, rhm, levels):
        super().__init__(rhm.rules)
        self.levels = levels

    def sample(self, n, rng, level=1):
        return super().sample(8 * n if level in self.levels else n, rng, level)


def where_samples():
    """Which levels want the samples: C for 90%, with more at some levels."""
    print("N^(l) = C V m m^l, eight times as many at some levels; C for 90%")
    print("at levels  C* for m = 2, 3, 4  power of m")
    for levels in (), (4,), (1, 2, 3):
        found = [C_star(m, levels) for m in (2, 3, 4)]
        power = np.polyfit(np.log([2, 3, 4]), np.log(found), 1)[0]
        print(f"{str(levels):11}", *(f"{C:5.2f}" for C in found), f"{power:12.2f}")


def C_star(m, levels, grammars=5):
    """The C at which accuracy reaches 90%, geometric mean over grammars; not N."""
    logs, Cs = [], 2.0 ** np.arange(-3, 4)
    for seed, rhm in draw_grammars(16, m, 2, 4, grammars).items():
        shares, source = [], MoreSamples(rhm, levels)
        while not shares or shares[-1] < 0.9:
            C = Cs[len(shares)] / 8  # Config counts in units of s L V m m^l
            net, _ = train(source, Config(C=C, M=64 * m, seed=seed), minimise=series)
            shares.append(fresh_accuracy(net, rhm, seed))
        logs.append(np.log(samples_needed(Cs, shares)))
    return math.exp(np.mean(logs))


def larger():
    """Larger sentences: accuracy, seconds by the run's clock, peak of memory (Unix)."""
    program = Path(__file__).resolve().parents[1] / "train_layerwise.py"
    unit = 1e9 if sys.platform == "darwin" else 1e6  # macOS: bytes, Linux: kilobytes
    words = r"s=(\d+) L=(\d+),.* (\d+) training.*\s(\S+%) of \d+ fresh.*, (\S+) s\n"
    print("command | d | sentences | accuracy | seconds | memory")
    print("--- | --- | --- | --- | --- | ---")
    for options in LARGER:
        command = [sys.executable, program, *options.split()]
        with tempfile.TemporaryDirectory() as folder:  # for the picture
            child = Popen(command, cwd=folder, stdout=PIPE, text=True)
            text = child.stdout.read()
            memory = os.wait4(child.pid, 0)[2].ru_maxrss / unit
        s, L, N, percent, seconds = re.search(words, text, re.DOTALL).groups()
        command = f"`python train_layerwise.py {options}".rstrip() + "`"
        row = command, int(s) ** int(L), f"{int(N):,}", percent, seconds
        print(*row, f"{memory:.2f} GB", sep=" | ", flush=True)


def speed():
    """Seconds of the default training, beside processes that only spin."""
    # A spinning process ends when this one does, however that happens.
    spin = "import os\nme = os.getppid()\nwhile os.getppid() == me: pass"
    print(f"{os.cpu_count()} cores; seconds of five runs, median and longest")
    print("busy processes   one thread     two threads")
    for busy in 0, 1, 2:
        spinners, row = [Popen([sys.executable, "-c", spin]) for _ in range(busy)], ""
        for threads in 1, 2:
            torch.set_num_threads(threads)
            times = []
            for _ in range(5):
                start = time.perf_counter()
                train(RHM.random(*DEFAULT, 0), Config())
                times.append(time.perf_counter() - start)
            row += f"{np.median(times):10.1f} {max(times):5.1f}"
        print(f"{busy:14}{row}", flush=True)
        for spinner in spinners:
            spinner.kill()


MEASUREMENTS = (
    seeds, held_out, harder, defaults, small_K_rho, few_features, deviations, ridge,
    places, features, where_samples, one_level, assumption_6, larger, speed,
)  # fmt: skip


def main(argv=None):
    """Print the table that was asked for."""
    named = {function.__name__: function for function in MEASUREMENTS}
    lines = [f"  {name:14}{f.__doc__.splitlines()[0]}" for name, f in named.items()]
    as_it_stands = argparse.RawDescriptionHelpFormatter  # with its line breaks
    parser = argparse.ArgumentParser(formatter_class=as_it_stands)
    parser.description = "\n".join(["One table of the notebook:\n", *lines])
    parser.add_argument("name", metavar="NAME", choices=named)
    torch.set_num_threads(1)
    named[parser.parse_args(argv).name]()


if __name__ == "__main__":
    main()
