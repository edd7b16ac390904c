"""Smaller measurements for the notebook: `python -m experiments.measurements NAME`.

Each function prints one table of experiments/README.md; `--help` lists them.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from experiments.sample_complexity import (
    draw_grammars, fresh_accuracy, samples_needed, series, train_one_level,
)  # fmt: skip
from rhm import RHM
from train_layerwise import Config, accuracy, diagnose, distances_to_q, train

# Sizes V, m, s, L:
DEFAULT = 16, 4, 2, 4
HELD_OUT = [(12, 3, 2, 5), (32, 4, 2, 3), (8, 2, 3, 4), (24, 5, 2, 3), (10, 4, 4, 3)]
HELD_OUT += [(64, 2, 2, 3), (5, 3, 3, 3), (16, 8, 2, 3), (20, 3, 2, 4), (16, 4, 3, 4)]
OTHERS = (16, 4, 2, 6), (8, 4, 2, 5), (8, 4, 3, 3)
# Options of train_layerwise.py:
LARGER = ["", "--L 3 --s 4", "--L 6", "--L 7", "--L 8", "--L 8 --m 3"]
LARGER += ["--L 10 --m 3 --C 2", "--V 256 --m 2 --L 2"]
LEMMA_10 = (2 * math.log(2 / 0.01)) ** -0.5  # sigma / distance for eps_O = 0.01, 0.307
ROOT = Path(__file__).resolve().parents[1]


def evaluate(rhm, config, descend=None):
    """Train and measure with the random numbers of `python train_layerwise.py`.

    percent: the accuracy; errors: those of level 1; nearest: per level, L to 1, in
    percent, the share of outputs whose nearest q is their own.
    """
    net, stages = train(rhm, config, descend=descend)
    found = [diagnose(net, rhm, l, [config.seed, 3, l]) for l in range(rhm.L, 0, -1)]
    test_rng = np.random.default_rng([config.seed, 4])
    return SimpleNamespace(
        percent=100 * accuracy(net, rhm, 10_000, test_rng),
        errors=found[-1][0],
        nearest=[100 * share for _, share in found],
        N=sum(stage.N for stage in stages),
    )


def seeds():
    """The default run for 25 seeds."""
    accuracy_by_size([(DEFAULT, range(10)), (DEFAULT, range(20, 35))])


def held_out():
    """The same for sizes that took no part in the choice of the defaults."""
    accuracy_by_size([(size, range(3)) for size in HELD_OUT])


def accuracy_by_size(rows):
    """A row per size: grammars, mean and lowest accuracy, where K_rho > 0 and = 0."""
    print("                      where K_rho > 0            where K_rho = 0")
    print(f" V  m  s  L  seeds {2 * ' grammars     mean   lowest '}".rstrip())
    for size, some_seeds in rows:
        percents = {True: [], False: []}
        for seed in some_seeds:
            rhm = RHM.random(*size, seed)
            percents[rhm.K_rho > 0].append(evaluate(rhm, Config(seed=seed)).percent)
        row = f"{columns(size)} {some_seeds[0]:3}-{some_seeds[-1]:<3}"
        for found in percents.values():
            row += f"{len(found):9} {mean_and_lowest(found):18}"
        print(row, flush=True)


def columns(size):
    """V, m, s, L as the beginning of a row."""
    return " ".join(f"{number:2}" for number in size)


def mean_and_lowest(percents):
    """Two columns; empty where there is nothing."""
    return f"{np.mean(percents):8.2f}% {min(percents):7.2f}%" if percents else ""


def defaults():
    """How C, M and sigma were chosen; grammars for which Assumption 6 holds.

    Accuracy: mean and lowest over the seeds; errors of level 1: means of their median
    and of their 99.9% quantile.  Seconds of CPU: median of three plain runs; the others
    take the series.
    """
    titles = "    mean   lowest  median   99.9%"
    print("default size, seeds 0 to 9 without 6 and 9")
    print(f"    C    M  sigma {titles}  seconds")
    settings = [dict(C=C, M=M) for C in (1.25, 2.5, 5.0) for M in (128, 256, 512)]
    settings += [dict(sigma=k) for k in (LEMMA_10, 0.35, 0.4, 0.5, 0.6, 0.8)]
    rhms = draw_grammars(*DEFAULT, 8)
    for changes in settings:
        config, row, times = Config(**changes), row_of_a_choice(rhms, changes), []
        for _ in range(3):
            start = time.process_time()
            train(rhms[0], config)
            times.append(time.process_time() - start)
        texts = f"{config.C:5.4g} {config.M:4} {config.sigma:6.3f}"
        print(f"{texts} {row} {np.median(times):8.1f}", flush=True)
    print("\nother sizes, the first three seeds; last, Cagnetta et al.'s sampler")
    print(f" V  m  s  L  sigma {titles}")
    for size, uniform in [*((size, True) for size in OTHERS), (DEFAULT, False)]:
        rhms = draw_grammars(*size, 3, uniform_first_token=uniform)
        for sigma in 0.4, 0.5, 0.6:
            row = row_of_a_choice(rhms, dict(sigma=sigma))
            print(f"{columns(size)} {sigma:6.3f} {row}", flush=True)


def row_of_a_choice(rhms, changes):
    """What a Config with those changes reaches on {seed: grammar}."""
    found = [evaluate(rhms[k], Config(seed=k, **changes), series) for k in rhms]
    median = np.mean([np.median(run.errors) for run in found])
    quantile = np.mean([np.quantile(run.errors, 0.999) for run in found])
    accuracies = mean_and_lowest([run.percent for run in found])
    return f"{accuracies} {median:7.3f} {quantile:7.2f}"


def small_K_rho():
    """Theorem 7's factor K_rho^-2: where the default C and M are too small."""
    print("  L   K_rho     C    M    samples  accuracy")
    for L in 5, 6:
        rhm = RHM.random(8, 4, 2, L, 1)
        for C, M in (2.5, 256), (10.0, 512), (40.0, 512):
            found = evaluate(rhm, Config(C=C, M=M, seed=1))
            row = f"{L:3} {rhm.K_rho:7.2f} {C:5g} {M:4} {found.N:10}"
            print(f"{row} {found.percent:8.2f}%", flush=True)


def places():
    """The default network at every place, though trained on the first.

    Per level: the share of symbols that are read rightly, by the nearest q, and for
    each place the median ||h - q||.
    """
    rhm = RHM.random(*DEFAULT, 0)
    net, _ = train(rhm, Config())
    tree = rhm.sample_tree(10_000, 1)
    print("level  recovered  median error by place")
    for l in range(rhm.L, 0, -1):
        symbols = tree[l - 1]  # (n, width)
        to_q = distances_to_q(net, rhm, l, tree[-1])  # (n, width, V)
        errors = np.take_along_axis(to_q, symbols[:, :, None], 2)[:, :, 0]
        medians = " ".join(f"{median:.4f}" for median in np.median(errors, axis=0))
        print(f"{l:5} {100 * (to_q.argmin(2) == symbols).mean():9.2f}%  {medians}")


def closed_form(covariance, correlation, lambda_W, eta, T):
    """What endless gradient descent would reach: ridge regression (Section 2.3)."""
    spectrum = covariance.double() + lambda_W * torch.eye(len(covariance))
    W = torch.linalg.solve(spectrum, correlation.double(), left=False)
    return W.to(correlation.dtype), W.new_full((T,), math.nan)


def deviations():
    """What each deviation from the proof does; seeds 0 to 5, K_rho > 0.

    Means over seeds: accuracy, median error of level 1, and per level the share of
    outputs whose nearest q is their own.  Seconds of CPU, with the measurements.
    sigma of Lemma 10: its factor for eps_O = 0.01, corrected, of the typical distance.
    """
    print("                                       level 1  % right at level")
    print("                        accuracy    sd   error    4    3    2    1  seconds")
    for name, changes, descend in (
        ("as it is", {}, None),
        ("ridge = 1, the proof's", dict(ridge=1.0), None),
        ("ridge = 1, M = 1024", dict(ridge=1.0, M=1024), None),
        ("ridge = 0.1", dict(ridge=0.1), None),
        ("sigma of Lemma 10", dict(sigma=LEMMA_10), None),
        ("closed form", {}, closed_form),
    ):
        found, start = [], time.process_time()
        for seed in range(6):
            rhm, config = RHM.random(*DEFAULT, seed), Config(seed=seed, **changes)
            found.append(evaluate(rhm, config, descend))
        seconds = (time.process_time() - start) / 6
        percents = [run.percent for run in found]
        error = np.mean([np.median(run.errors) for run in found])
        nearest = np.mean([run.nearest for run in found], axis=0)
        row = f"{name:22} {np.mean(percents):8.2f}% {np.std(percents):5.2f}"
        shares = " ".join(f"{share:4.0f}" for share in nearest)
        print(f"{row} {error:7.3f} {shares} {seconds:8.1f}", flush=True)


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


class MoreSamples:
    """A grammar of which `train` gets eight times the samples at some levels."""

    def __init__(self, rhm, levels):
        self.V, self.m, self.s, self.L = rhm.V, rhm.m, rhm.s, rhm.L
        self.rhm, self.levels = rhm, levels

    def sample(self, n, rng, level=1):
        return self.rhm.sample(8 * n if level in self.levels else n, rng, level)


def where_samples():
    """Which levels want the samples: C for 90%, with more at some levels."""
    print("N^(l) = C V m m^l, eight times as many at some levels; C for 90%")
    print("at levels   C* for m = 2, 3, 4   power of m")
    for levels in (), (4,), (1, 2, 3):
        found = [C_star(m, levels) for m in (2, 3, 4)]
        power = np.polyfit(np.log([2, 3, 4]), np.log(found), 1)[0]
        texts = "  ".join(f"{C:.2f}" for C in found)
        print(f"{str(levels):10} {texts:>20} {power:12.2f}", flush=True)


def C_star(m, levels, grammars=5):
    """The C at which accuracy reaches 90%, geometric mean over grammars; not N."""
    logs, Cs = [], 2.0 ** np.arange(-3, 4)
    for seed, rhm in draw_grammars(16, m, 2, 4, grammars).items():
        shares, source = [], MoreSamples(rhm, levels)
        while not shares or shares[-1] < 0.9:
            C = Cs[len(shares)] / 8  # Config counts in units of s L V m m^l
            config = Config(C=C, M=64 * m, seed=seed)
            net, _ = train(source, config, descend=series)
            shares.append(fresh_accuracy(net, rhm, seed))
        logs.append(np.log(samples_needed(Cs, shares)))
    return math.exp(np.mean(logs))


def larger():
    """Larger sentences: accuracy, seconds by the run's own clock, peak memory."""
    print("command | d | sentences | accuracy | seconds | memory")
    print("--- | --- | --- | --- | --- | ---")
    for options in LARGER:
        text, memory = run_and_watch(options.split())
        L, s = (int(re.search(rf"\b{name}=(\d+)", text)[1]) for name in "Ls")
        end = r"^(\S+%) of \d+ fresh.*, (\d+) training sentences, (\S+) s$"
        percent, N, seconds = re.search(end, text, re.MULTILINE).groups()
        command = f"`python train_layerwise.py {options}".rstrip() + "`"
        row = command, s**L, f"{int(N):,}", percent, seconds, f"{memory:.2f} GB"
        print(*row, sep=" | ", flush=True)


def run_and_watch(options):
    """What `python train_layerwise.py` prints, and its peak memory in GB (not Windows).

    Linux counts the memory of the parent at the start as well; ours only has imports.
    """
    with tempfile.TemporaryDirectory() as folder:
        figure = f"--figure={Path(folder) / 'layerwise.png'}"
        command = [sys.executable, "train_layerwise.py", *options, figure]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        text = child.stdout.read()
        _, _, usage = os.wait4(child.pid, 0)
    unit = 1e9 if sys.platform == "darwin" else 1e6  # macOS: bytes, Linux: kilobytes
    return text, usage.ru_maxrss / unit


def speed():
    """Seconds of train on one thread, beside no, one and two busy processes."""
    # A busy process ends when this one does, however that happens.
    spin = "import os\nme = os.getppid()\nwhile os.getppid() == me: pass"
    print(f"{os.cpu_count()} cores; seconds of five runs")
    print("  L  busy processes  median  longest")
    for L in 4, 6:
        rhm, spinners = RHM.random(16, 4, 2, L, 0), []
        for busy in 0, 1, 2:
            while len(spinners) < busy:
                spinners.append(subprocess.Popen([sys.executable, "-c", spin]))
            times = []
            for _ in range(5):
                start = time.perf_counter()
                train(rhm, Config())
                times.append(time.perf_counter() - start)
            text = f"{np.median(times):7.1f} {max(times):8.1f}"
            print(f"{L:3} {busy:15} {text}", flush=True)
        for spinner in spinners:
            spinner.kill()


MEASUREMENTS = (
    seeds, held_out, defaults, small_K_rho, places, deviations, where_samples,
    one_level, assumption_6, larger, speed,
)  # fmt: skip


def main(argv=None):
    """Print the table that was asked for."""
    named = {function.__name__: function for function in MEASUREMENTS}
    lines = [f"  {name:14}{f.__doc__.splitlines()[0]}" for name, f in named.items()]
    text = "\n".join(["Print one table of the notebook.  NAME is one of\n", *lines])
    as_it_stands = argparse.RawDescriptionHelpFormatter  # with its line breaks
    parser = argparse.ArgumentParser(description=text, formatter_class=as_it_stands)
    parser.add_argument("name", metavar="NAME", choices=named)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    named[options.name]()


if __name__ == "__main__":
    main()
