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
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from experiments.sample_complexity import (
    draw_grammars, fresh_accuracy, log_samples_needed, series, train_one_level,
)  # fmt: skip
from model import Level, deep_cnn, torch_threads
from rhm import RHM
from train_layerwise import (
    Config, accuracy, diagnose, merge, network_parse, one_line_parser,
    outputs_of_level, schedule, train, train_level,
)  # fmt: skip

# Sizes V, m, s, L:
HELD_OUT = [(12, 3, 2, 5), (32, 4, 2, 3), (8, 2, 3, 4), (24, 5, 2, 3), (10, 4, 4, 3)]
HELD_OUT += [(64, 2, 2, 3), (5, 3, 3, 3), (16, 8, 2, 3), (20, 3, 2, 4), (16, 4, 3, 4)]
# Options of train_layerwise.py:
LARGER = ["", "--L 3 --s 3", "--L 3 --s 4", "--L 6", "--L 6 --C 40"]
LARGER += ["--L 8 --m 3 --C 40", "--V 256 --m 2 --L 2"]
ROOT = Path(__file__).resolve().parents[1]


def default_grammar(seed):
    """The grammar that `python train_layerwise.py --seed SEED` draws."""
    return RHM.random(16, 4, 2, 4, seed)


def evaluate(rhm, config, sigmas=None, descend=None):
    """Train and measure with the random numbers of `python train_layerwise.py`.

    percent: the accuracy; errors: those of level 1; nearest: per level, in percent, the
    share of outputs whose nearest q is their own.  Levels as in stages, L to 1.
    """
    net, stages = train(rhm, config, sigmas=sigmas, descend=descend)
    found = [diagnose(net, rhm, l, [config.seed, 3, l]) for l in range(rhm.L, 0, -1)]
    test_rng = np.random.default_rng([config.seed, 4])
    return SimpleNamespace(
        percent=100 * accuracy(net, rhm, 10_000, test_rng),
        errors=found[-1][0],
        nearest=[100 * share for _, share in found],
        stages=stages,
    )


def seeds():
    """The default run for 25 seeds."""
    print("seed  K_rho  accuracy  level-1 error: median  largest")
    for seed in [*range(10), *range(20, 35)]:
        rhm = default_grammar(seed)
        print(f"{seed:4} {row_of_a_run(rhm, Config(seed=seed))}", flush=True)


def held_out():
    """The same for sizes that took no part in the choice of the defaults."""
    print("  V   m   s   L  seed  K_rho  accuracy  level-1 error: median  largest")
    for size in HELD_OUT:
        for seed in range(3):
            texts = " ".join(f"{number:3}" for number in size)
            row = row_of_a_run(RHM.random(*size, seed), Config(seed=seed))
            print(f"{texts} {seed:5} {row}", flush=True)


def row_of_a_run(rhm, config):
    """K_rho, accuracy, median and largest error of level 1."""
    found = evaluate(rhm, config)
    median, largest = np.median(found.errors), found.errors.max()
    return f"{rhm.K_rho:6.4g} {found.percent:8.2f}% {median:22.4f} {largest:8.4f}"


def defaults():
    """How C, M and sigma_quantile were chosen; grammars with K_rho > 0.

    Means over the seeds, accuracy also the lowest; errors of level 1, their median and
    99.9% quantile.  Seconds of CPU: median of three plain runs; the others take the
    series.
    """
    table = "                               accuracy   level-1 error  sigma / rho"
    columns = "sigma_quantile    mean   lowest  median   99.9%  from   to"
    print(f"default size, seeds 0 to 9\n{table}\n   C    M  {columns}  seconds")
    settings = [dict(C=C, M=M) for C in (10.0, 20.0, 40.0) for M in (128, 256, 512)]
    settings += [dict(sigma_quantile=k) for k in (1.0, 1.25, 1.5, 2.0, 3.0)]
    rhms = list(map(default_grammar, range(10)))
    for changes in settings:
        config, row, times = Config(**changes), row_of_a_choice(rhms, changes), []
        for _ in range(3):
            start = time.process_time()
            train(rhms[0], config)
            times.append(time.process_time() - start)
        texts = f"{config.C:4g} {config.M:4} {config.sigma_quantile:15g}"
        print(f"{texts} {row} {np.median(times):8.1f}", flush=True)
    print(f"\nother sizes, seeds 0 to 2\n{table}\n V  m  s  L  {columns}")
    for size in (16, 4, 2, 6), (32, 2, 2, 4), (8, 4, 3, 3), (16, 2, 2, 4):
        rhms = [RHM.random(*size, seed) for seed in range(3)]
        for quantile in 1.0, 1.5, 2.0, 3.0:
            row = row_of_a_choice(rhms, dict(sigma_quantile=quantile))
            texts = " ".join(f"{number:2}" for number in size)
            print(f"{texts} {quantile:15g} {row}", flush=True)


def row_of_a_choice(rhms, changes):
    """What a Config with those changes reaches where K_rho > 0; seeds count rhms."""
    percents, medians, quantiles, ratios = [], [], [], []
    for seed, rhm in enumerate(rhms):
        if rhm.K_rho == 0:
            continue
        found = evaluate(rhm, Config(seed=seed, **changes), descend=series)
        percents.append(found.percent)
        medians.append(np.median(found.errors))
        quantiles.append(np.quantile(found.errors, 0.999))
        above = found.stages[1:]  # without the bottom level, whose sigma is 0.5
        ratios += [stage.sigma / rhm.signal(stage.level + 1) for stage in above]
    return (
        f"{np.mean(percents):7.2f}% {np.min(percents):7.2f}% {np.mean(medians):7.3f} "
        f"{np.mean(quantiles):7.2f} {np.min(ratios):5.1f} {np.max(ratios):4.1f}"
    )


def places():
    """The default network at every place, though trained on the first.

    Per level and place: the median ||h - q||, and the share of latent symbols that
    network_parse recovers.
    """
    rhm = default_grammar(0)
    net, _ = train(rhm, Config())
    tree = rhm.sample_tree(10_000, 1)
    read = network_parse(net, rhm, tree[-1])
    print("level  recovered  median error by place")
    for l in range(rhm.L, 0, -1):
        h = outputs_of_level(net, rhm, l, tree[-1])  # (n, width, V)
        errors = np.linalg.norm(h - rhm.label_posterior(l)[tree[l - 1]], axis=2)
        medians = " ".join(f"{median:.4f}" for median in np.median(errors, axis=0))
        print(f"{l:5} {100 * (read[l - 1] == tree[l - 1]).mean():9.2f}%  {medians}")


def closed_form(covariance, correlation, lambda_W, eta, T):
    """What endless gradient descent would reach: ridge regression (Section 2.3)."""
    spectrum = covariance.double() + lambda_W * torch.eye(len(covariance))
    W = torch.linalg.solve(spectrum, correlation.double(), left=False)
    return W.to(correlation.dtype), W.new_full((T,), math.nan)


def deviations():
    """What each deviation from the proof does; seeds 0 to 5, K_rho > 0.

    Means over seeds: accuracy, median error of level 1, and per level the share of
    outputs whose nearest q is their own.  Seconds of CPU, with the measurements.
    sigma of Lemma 10: with the factor of the corrected lemma, for eps_O = 0.01.
    """
    lemma_10 = (2 * math.log(2 / 0.01)) ** -0.5
    print("                                       level 1  % right at level")
    print("                        accuracy    sd   error    4    3    2    1  seconds")
    for name, changes, ratio, descend in (
        ("as it is", {}, None, None),
        ("ridge = 1, the proof's", dict(ridge=1.0), None, None),
        ("ridge = 1, M = 1024", dict(ridge=1.0, M=1024), None, None),
        ("ridge = 0.1", dict(ridge=0.1), None, None),
        ("sigma = 1.5 rho", {}, 1.5, None),
        ("sigma = rho", {}, 1.0, None),
        ("sigma of Lemma 10", {}, lemma_10, None),
        ("closed form", {}, None, closed_form),
    ):
        found, start = [], time.process_time()
        for seed in range(6):
            rhm, config = default_grammar(seed), Config(seed=seed, **changes)
            sigmas = ratio and {l: ratio * rhm.signal(l + 1) for l in (1, 2, 3)}
            found.append(evaluate(rhm, config, sigmas, descend))
        seconds = (time.process_time() - start) / 6
        percents = [run.percent for run in found]
        error = np.mean([np.median(run.errors) for run in found])
        nearest = np.mean([run.nearest for run in found], axis=0)
        shares = " ".join(f"{share:4.0f}" for share in nearest)
        print(
            f"{name:22} {np.mean(percents):8.2f}% {np.std(percents):5.2f} "
            f"{error:7.3f} {shares} {seconds:8.1f}",
            flush=True,
        )


def one_level():
    """The grid for sigma and ridge of the one-level network; one grammar."""
    for L, N, sigmas in (3, 43_008, (1, 2, 3, 4, 6)), (4, 87_040, (3, 4, 6, 8, 12)):
        rhm = RHM.random(16, 4, 2, L, 0)
        print(f"L = {L}, N = {N}, accuracy for sigma = {sigmas}")
        for ridge in 0.03, 0.003, 0.0003:
            shares = []
            for sigma in sigmas:
                net = train_one_level(rhm, N, float(sigma), ridge)
                shares.append(fresh_accuracy(net, rhm, 0))
            texts = "  ".join(f"{100 * share:.2f}%" for share in shares)
            print(f"  ridge {ridge:<6}  {texts}", flush=True)


def assumption_6():
    """How often Assumption 6 fails, in 200 grammars of each size."""
    print("                 Appendix B    Cagnetta et al. (2024)")
    print("  V   m   L       K_rho = 0    K_rho = 0   kappa = inf")
    sizes = (8, 4, 3), (16, 2, 2), (16, 2, 4), (16, 3, 4), (16, 4, 4), (16, 6, 4)
    for V, m, L in (*sizes, (32, 4, 3)):
        no_signal, no_kappa = {}, {}
        for uniform in True, False:
            rhms = [RHM.random(V, m, 2, L, seed, uniform) for seed in range(200)]
            no_signal[uniform] = 100 * np.mean([rhm.K_rho == 0 for rhm in rhms])
            no_kappa[uniform] = 100 * np.mean([rhm.kappa == math.inf for rhm in rhms])
        print(
            f"{V:3} {m:3} {L:3} {no_signal[True]:14.1f}% {no_signal[False]:11.1f}% "
            f"{no_kappa[False]:12.1f}%",
            flush=True,
        )


class MoreSamples:
    """A grammar of which `train` gets eight times the samples at some levels."""

    def __init__(self, rhm, levels):
        self.V, self.m, self.s, self.L = rhm.V, rhm.m, rhm.s, rhm.L
        self.rhm, self.levels = rhm, levels

    def sample(self, n, rng, level=1):
        return self.rhm.sample(8 * n if level in self.levels else n, rng, level)


def where_samples():
    """Which levels want the samples: C for 90%, with more at some levels."""
    print("eight times as many at levels   C* for m = 2, 3, 4   power of m")
    for levels in (), (4,), (1, 2, 3):
        found = [C_star(m, levels) for m in (2, 3, 4)]
        power = np.polyfit(np.log([2, 3, 4]), np.log(found), 1)[0]
        texts = "  ".join(f"{C:.2f}" for C in found)
        print(f"{str(levels):30} {texts:>21} {power:12.2f}", flush=True)


def C_star(m, levels, grammars=5):
    """The C at which accuracy reaches 90%, geometric mean over grammars; not N."""
    logs, Cs = [], 2.0 ** np.arange(-3, 4)
    for seed, rhm in enumerate(draw_grammars(16, m, 4, grammars)):
        if rhm.K_rho == 0:
            continue
        shares = []
        for C in Cs:
            config, source = Config(C=C, M=64 * m, seed=seed), MoreSamples(rhm, levels)
            net, _ = train(source, config, descend=series)
            shares.append(fresh_accuracy(net, rhm, seed))
            if shares[-1] > 0.9:
                break
        [log_C] = log_samples_needed(Cs[: len(shares)], np.array([shares]).T)
        logs.append(log_C)
    return math.exp(np.mean(logs))


def merged_rows():
    """The bottom level trained on one row per sample, and on merged rows."""
    rhm, config, net = default_grammar(0), Config(), deep_cnn(16)
    N = math.ceil(config.C * rhm.V * rhm.m * rhm.m**rhm.L)
    tokens, labels = map(torch.from_numpy, rhm.sample(N, 1, rhm.L))
    one_row_each = net(tokens), torch.nn.functional.one_hot(labels, rhm.V)
    trained = []
    with torch_threads(1):
        for h, counts in one_row_each, merge(net, tokens, labels):
            start, level = time.process_time(), Level(rhm.V, rhm.s, config.M, 0.5, 2)
            train_level(level, h, counts, *schedule(rhm.V, rhm.m, config))
            trained.append(level.W.detach())
            print(f"{len(h)} rows: {time.process_time() - start:.2f} s", flush=True)
    difference = (trained[0] - trained[1]).norm() / trained[1].norm()
    print(f"relative difference of the weights: {difference.item():.1e}")


def larger():
    """Larger sentences: accuracy, seconds by the run's own clock, peak memory."""
    print("command | d | accuracy | seconds | memory")
    print("--- | --- | --- | --- | ---")
    for options in LARGER:
        text, memory = run_and_watch(options.split())
        L, s = (int(re.search(rf"\b{name}=(\d+)", text)[1]) for name in "Ls")
        percent = re.search(r"^(\S+%) of \d+ fresh", text, re.MULTILINE)[1]
        seconds = re.search(r"sentences, (\S+) s$", text, re.MULTILINE)[1]
        command = f"python train_layerwise.py {options}".rstrip()
        row = f"`{command}`", str(s**L), percent, seconds, f"{memory:.2f} GB"
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
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    unit = 1e9 if sys.platform == "darwin" else 1e6  # macOS: bytes, Linux: kilobytes
    return text, usage.ru_maxrss / unit


def speed():
    """Seconds of train on one thread, beside no, one and two busy processes."""
    # A busy process ends when this one does, however that happens.
    spin = "import os\nme = os.getppid()\nwhile os.getppid() == me: pass"
    print(f"{os.cpu_count()} cores; seconds of five runs")
    print("  L  busy processes  median  longest")
    for L in 4, 6:
        for busy in 0, 1, 2:
            times = []
            with ExitStack() as stack:
                for _ in range(busy):
                    spinner = stack.enter_context(
                        subprocess.Popen([sys.executable, "-c", spin])
                    )
                    stack.callback(spinner.kill)
                for _ in range(5):
                    rhm, start = RHM.random(16, 4, 2, L, 0), time.perf_counter()
                    train(rhm, Config())
                    times.append(time.perf_counter() - start)
            text = f"{np.median(times):7.1f} {max(times):8.1f}"
            print(f"{L:3} {busy:15} {text}", flush=True)


MEASUREMENTS = {
    function.__name__: function
    for function in (
        seeds, held_out, defaults, places, deviations, merged_rows, where_samples,
        one_level, assumption_6, larger, speed,
    )
}  # fmt: skip


def main(argv=None):
    lines = [f"  {k:14}{v.__doc__.splitlines()[0]}" for k, v in MEASUREMENTS.items()]
    text = "\n".join(["Print one table of the notebook.  NAME is one of\n", *lines])
    as_it_stands = argparse.RawDescriptionHelpFormatter  # with its line breaks
    parser = one_line_parser(text, formatter_class=as_it_stands)
    parser.add_argument("name", metavar="NAME", choices=MEASUREMENTS)
    MEASUREMENTS[parser.parse_args(argv).name]()


if __name__ == "__main__":
    main()
