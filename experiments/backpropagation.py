"""What one would do instead: `python -m experiments.backpropagation`, half an hour.

The same architecture with ReLU in place of the fixed features, all layers trained at
once by Adam, against layerwise training: how many seconds and training sentences until
99% of 2000 fresh sentences are right?  V = 16, m = 4, s = 2; three grammars for each L.
Each side has nine settings and takes the one whose slowest grammar is fastest: Adam its
width and learning rate, layerwise training M and C.  Seconds are CPU time on one
thread, for drawing sentences and training; looking at the accuracy is free.
"""

import argparse
import math
import time

import numpy as np
import torch
from torch import nn

from experiments.sample_complexity import draw_grammars
from model import deep_cnn
from train_layerwise import Config, accuracy, train

BATCH, EVERY = 256, 10  # sentences of a step of Adam, steps between two looks
MOST = 120.0  # seconds: longer runs are given up


def relu_layer(V, s, M):
    """model.Layer with 2M trained ReLU features: (n, width, V) -> (n, width / s, V)."""
    layer = nn.Sequential(nn.Unflatten(1, (-1, s)), nn.Flatten(2))  # patches
    layer.extend([nn.Linear(s * V, 2 * M), nn.ReLU(), nn.Linear(2 * M, V)])
    layer.s = s  # as model.embed wants it
    return layer


def backpropagation(rhm, seed, M, learning_rate):
    """Adam on fresh sentences; yields the network and the sentences seen, for ever."""
    rng, sentences = np.random.default_rng([seed, 1]), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = deep_cnn(rhm.V, *[relu_layer(rhm.V, rhm.s, M) for _ in range(rhm.L)])
    optimizer = torch.optim.Adam(net[1:].parameters(), lr=learning_rate)
    while True:
        for _ in range(EVERY):
            tokens, labels = map(torch.from_numpy, rhm.sample(BATCH, rng))
            loss = nn.functional.cross_entropy(net(tokens)[:, 0], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sentences += EVERY * BATCH
        yield net, sentences


def layerwise(rhm, seed, M, C):
    """`train` with N^(l) = C V m m^l, then anew with twice the C: every run counts."""
    sentences = 0
    while True:
        net, stages = train(rhm, Config(C=C / (rhm.s * rhm.L), M=M, seed=seed))
        sentences += sum(stage.N for stage in stages)
        yield net, sentences
        C *= 2


# The likely winners first: the others are stopped sooner.  Adam's network has 2M hidden
# units in every layer; its batch is not tuned.
WIDTHS, RATES = (64, 32, 128), (0.003, 0.01, 0.001)
SETTINGS = {
    layerwise: [dict(M=M, C=C) for M in (256, 128, 64) for C in (16, 32, 8)],
    backpropagation: [dict(M=M, learning_rate=r) for r in RATES for M in WIDTHS],
}


def until_right(looks, rhm, seed, most=MOST):
    """Seconds and sentences until 99% are right; (inf, inf) beyond `most` seconds.

    looks: yields the network and the sentences so far.  Layerwise training cannot be
    stopped inside a run.
    """
    seconds = 0.0
    while seconds < most:
        start = time.process_time()
        net, sentences = next(looks)
        seconds += time.process_time() - start
        if seconds < most and accuracy(net, rhm, 2000, [seed, 4]) >= 0.99:
            return seconds, sentences
    return math.inf, math.inf


def choose(learn, settings, rhms):
    """The setting whose slowest grammar is fastest, and its (seconds, sentences).

    rhms: {seed: grammar}.  A setting is given up where it is slower than the slowest
    grammar of the best one so far.  (None, []) when every setting misses 99%.
    """
    best, best_runs, most = None, [], MOST
    for setting in settings:
        runs = []
        for seed, rhm in rhms.items():
            looks = learn(rhm, seed, **setting)
            seconds, sentences = until_right(looks, rhm, seed, most)
            runs.append((seconds, sentences))
            print(f"  L = {rhm.L}, grammar {seed}, {learn.__name__}", end=", ")
            print(f"{setting}: {seconds:.2f} s, {sentences} sentences", flush=True)
            if seconds == math.inf:  # not within `most`
                break
        else:
            best, best_runs, most = setting, runs, max(runs)[0]
    return best, best_runs


def main(argv=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--L", type=int, nargs="+", default=[3, 4, 5, 6], help="levels")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = ["  L  seconds, sentences of three grammars, and the setting"]
    for L in options.L:
        rhms = draw_grammars(16, 4, 2, L, 3)
        for learn, settings in SETTINGS.items():
            setting, runs = choose(learn, settings, rhms)
            texts = "".join(f"{s:8.2f} {sentences:9}" for s, sentences in runs)
            texts = texts or "  no setting reaches 99% on all three"
            rows.append(f"{L:3} {texts}  {learn.__name__} {setting or ''}")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
