"""Smaller measurements for experiments/README.md: `python -m experiments.measurements NAME`."""

import argparse
import math
import time

import numpy as np
import torch

from experiments.sample_complexity import draw_grammars, train_one_level
from model import distinct_rows
from rhm import RHM
from train_layerwise import (
    Config, accuracy, diagnose, network_parse, new_level, predict,
    schedule, torch_threads, train, train_level,
)  # fmt: skip


def default_grammar(seed):
    """The grammar that `python train_layerwise.py --seed SEED` draws."""
    return RHM.random(16, 4, 2, 4, np.random.default_rng(seed))


def seeds():
    """The default run for other seeds: the numbers that train_layerwise.py prints."""
    print("seed  K_rho  accuracy  level-1 error: largest  median")
    for seed in [*range(10), *range(20, 35)]:
        rhm = default_grammar(seed)
        net, _ = train(rhm, Config(seed=seed))
        share = accuracy(net, rhm, 10_000, np.random.default_rng([seed, 4]))
        errors = diagnose(net, rhm, 1, np.random.default_rng([seed, 3, 1]))["errors"]
        print(
            f"{seed:4} {rhm.K_rho:6.4g} {100 * share:8.2f}% {errors.max():23.4f} "
            f"{np.median(errors):7.4f}",
            flush=True,
        )


def places():
    """Trained on first patches, the default network at every place of 10,000 sentences.

    Per level and place: the median ||h - q||, and the share of latent symbols that
    network_parse recovers.
    """
    rhm = default_grammar(0)
    net, _ = train(rhm, Config())
    tree = rhm.sample_tree(10_000, np.random.default_rng(1))
    read = network_parse(net, rhm, tree[-1])
    print("level  recovered  median error by place")
    for l in range(rhm.L, 0, -1):
        h = predict(net[: rhm.L - l + 1], tree[-1]).reshape(*tree[l - 1].shape, rhm.V)
        errors = np.linalg.norm(h - rhm.label_posterior(l)[tree[l - 1]], axis=2)
        medians = " ".join(f"{median:.4f}" for median in np.median(errors, axis=0))
        print(f"{l:5} {100 * (read[l - 1] == tree[l - 1]).mean():9.2f}%  {medians}")


def deviations():
    """What each deviation from the proof is worth; seeds 0 to 5, all with K_rho > 0.

    sigma of Lemma 10: with the factor of the corrected lemma, for eps_O = 0.01.
    """
    lemma_10 = (2 * math.log(2 / 0.01)) ** -0.5
    print("                          accuracy     sd   level-1 error   seconds per run")
    for name, changes, sigma_over_rho in (
        ("as it is", {}, None),
        ("ridge = 1, the proof's", dict(ridge=1.0), None),
        ("ridge = 0.1", dict(ridge=0.1), None),
        ("sigma = 1.5 rho", {}, 1.5),
        ("sigma = rho", {}, 1.0),
        ("sigma of Lemma 10", {}, lemma_10),
        ("44,860 steps", dict(eps=1e-300), None),
    ):
        shares, errors, start = [], [], time.perf_counter()
        for seed in range(6):
            rhm, sigmas = default_grammar(seed), None
            if sigma_over_rho:
                sigmas = {l: sigma_over_rho * rhm.signal(l + 1) for l in (1, 2, 3)}
            net, _ = train(rhm, Config(seed=seed, **changes), sigmas=sigmas)
            test_rng = np.random.default_rng([seed, 4])
            shares.append(100 * accuracy(net, rhm, 10_000, test_rng))
            found = diagnose(net, rhm, 1, np.random.default_rng(0))
            errors.append(np.median(found["errors"]))
        seconds = (time.perf_counter() - start) / 6
        print(
            f"{name:24} {np.mean(shares):8.2f}% {np.std(shares):6.2f} "
            f"{np.mean(errors):15.3f} {seconds:17.1f}",
            flush=True,
        )


def one_level():
    """The grid from which the one-level network's sigma and ridge come; one grammar."""
    for L, N, sigmas in (3, 43_008, (1, 2, 3, 4, 6)), (4, 87_040, (3, 4, 6, 8, 12)):
        rhm = RHM.random(16, 4, 2, L, np.random.default_rng(0))
        print(f"L = {L}, N = {N}, accuracy for sigma = {sigmas}")
        for ridge in (0.03, 0.003, 0.0003):
            shares = []
            for sigma in sigmas:
                net = train_one_level(rhm, N, float(sigma), ridge)
                shares.append(accuracy(net, rhm, 2000, np.random.default_rng([0, 4])))
            texts = "  ".join(f"{100 * share:.2f}%" for share in shares)
            print(f"  ridge {ridge:<6}  {texts}", flush=True)


def assumption_6():
    """How often Assumption 6 fails: 200 grammars per size, for both samplers."""
    print(
        "  V   m   L  Appendix B: K_rho = 0   Cagnetta et al.: K_rho = 0  kappa = inf"
    )
    sizes = (8, 4, 3), (16, 2, 2), (16, 2, 4), (16, 3, 4), (16, 4, 4), (16, 6, 4)
    for V, m, L in (*sizes, (32, 4, 3)):
        no_signal, no_kappa = {}, {}
        for uniform in (True, False):
            rngs = map(np.random.default_rng, range(200))
            rhms = [RHM.random(V, m, 2, L, rng, uniform) for rng in rngs]
            no_signal[uniform] = 100 * np.mean([rhm.K_rho == 0 for rhm in rhms])
            no_kappa[uniform] = 100 * np.mean([rhm.kappa == math.inf for rhm in rhms])
        print(
            f"{V:3} {m:3} {L:3} {no_signal[True]:22.1f}% {no_signal[False]:27.1f}% "
            f"{no_kappa[False]:11.1f}%"
        )


class MoreSamples:
    """A grammar of which `train` gets eight times the samples at some levels."""

    def __init__(self, rhm, levels):
        self.V, self.m, self.s, self.L = rhm.V, rhm.m, rhm.s, rhm.L
        self.rhm, self.levels = rhm, levels

    def sample(self, n, rng, level=1):
        return self.rhm.sample(8 * n if level in self.levels else n, rng, level)


def where_samples():
    """Which levels want the samples: C for 90% at L = 4, with more at some levels."""
    print("eight times as many at levels   C* for m = 2, 3, 4   power of m")
    for levels in (), (4,), (1, 2, 3):
        found = [samples_needed(m, levels) for m in (2, 3, 4)]
        power = np.polyfit(np.log([2, 3, 4]), np.log(found), 1)[0]
        texts = "  ".join(f"{C:.2f}" for C in found)
        print(f"{str(levels):30} {texts:>21} {power:12.2f}", flush=True)


def samples_needed(m, levels, grammars=5):
    """The C at which accuracy reaches 90%, geometric mean over grammars; not N."""
    logs = []
    for seed, rhm in enumerate(draw_grammars(16, m, 4, grammars)):
        if rhm.K_rho == 0:
            continue
        Cs, shares = 2.0 ** np.arange(-3, 4), []
        for C in Cs:
            net, _ = train(MoreSamples(rhm, levels), Config(C=C, M=64 * m, seed=seed))
            shares.append(accuracy(net, rhm, 2000, np.random.default_rng([seed, 4])))
            if shares[-1] > 0.9:
                break
        rising = np.maximum.accumulate(shares)
        log_C = np.log(Cs[: len(shares)])
        logs.append(np.interp(0.9, rising, log_C, math.nan, math.nan))
    return math.exp(np.mean(logs))


def merged_rows():
    """Training the bottom level on one row per sample and on merged rows."""
    rhm, config = default_grammar(0), Config()
    tokens, labels = map(
        torch.from_numpy, rhm.sample(163_840, np.random.default_rng(1), 4)
    )
    one_hot = torch.eye(16)
    leaves, number = distinct_rows(tokens, 16)
    counts = torch.zeros(len(leaves), 16).index_add(0, number, one_hot[labels])
    trained = []
    with torch_threads(1):
        for rows, labelled in (tokens, one_hot[labels]), (leaves, counts):
            start = time.perf_counter()
            level = new_level(16, 2, 0.5, config, np.random.default_rng(2))
            h = one_hot[rows.long()].flatten(1)
            train_level(level, h, labelled, *schedule(16, 4, config))
            trained.append(level.W)
            print(f"{len(rows)} rows: {time.perf_counter() - start:.2f} s")
    difference = (trained[0] - trained[1]).norm() / trained[1].norm()
    print(f"relative difference of the weights: {difference.item():.1e}")


def main():
    measurements = {
        function.__name__: function
        for function in (
            seeds,
            places,
            deviations,
            one_level,
            assumption_6,
            where_samples,
            merged_rows,
        )  # fmt: skip
    }
    parser = argparse.ArgumentParser(prog="python -m experiments.measurements")
    parser.add_argument("name", choices=measurements)
    measurements[parser.parse_args().name]()


if __name__ == "__main__":
    main()
