"""What one would do instead: `python -m experiments.backpropagation`, some 15 minutes.

The same architecture with ReLU in place of the fixed features, trained at all levels at
once by Adam, against layerwise training: how many seconds and training sentences until
99% of 2000 fresh sentences are right?  On the first grammar each side chooses two
settings, those with the fewest seconds: Adam its learning rate and its width, layerwise
training C and M.  Then both run in turn on every grammar.  Seconds are CPU time on one
thread, for drawing sentences and training; looking at the accuracy is free.
"""

import math
import time

import numpy as np
import torch
from torch import nn

from experiments.sample_complexity import draw_grammars
from model import deep_cnn, torch_threads
from train_layerwise import Config, accuracy, one_line_parser, train

BATCH, EVERY = 256, 10  # sentences of a step of Adam, steps between two looks
MOST = 120.0  # seconds: longer runs are given up


class ReLULevel(nn.Module):
    """model.Level with 2M trained ReLU features: s embeddings in, one embedding out."""

    def __init__(self, V, s, M):
        super().__init__()
        self.s = s
        features = nn.Linear(s * V, 2 * M), nn.ReLU()
        self.of_patch = nn.Sequential(*features, nn.Linear(2 * M, V))

    def forward(self, h):
        """(n, width, V) -> (n, width / s, V), as model.Level."""
        return self.of_patch(h.unflatten(1, (-1, self.s)).flatten(2))


def backpropagation(rhm, seed, M, learning_rate, most=MOST):
    """Seconds and sentences until Adam reaches 99%; (inf, inf) beyond most seconds."""
    rng, steps, seconds = np.random.default_rng([seed, 1]), 0, 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = deep_cnn(rhm.V, *[ReLULevel(rhm.V, rhm.s, M) for _ in range(rhm.L)])
    optimizer = torch.optim.Adam(net[1:].parameters(), lr=learning_rate)
    while seconds < most:
        start = time.process_time()
        for _ in range(EVERY):
            tokens, labels = map(torch.from_numpy, rhm.sample(BATCH, rng))
            loss = nn.functional.cross_entropy(net(tokens)[:, 0], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.process_time() - start
        steps += EVERY
        if accuracy(net, rhm, 2000, [seed, 4]) >= 0.99:
            return seconds, steps * BATCH
    return math.inf, math.inf


def layerwise(rhm, seed, M, C, most=MOST):
    """The same for `train`.  While it misses 99%, C is doubled; every run counts."""
    sentences, seconds = 0, 0.0
    while seconds < most and C <= 64:
        start = time.process_time()
        net, stages = train(rhm, Config(C=C, M=M, seed=seed))
        seconds += time.process_time() - start
        sentences += sum(stage.N for stage in stages)
        if accuracy(net, rhm, 2000, [seed, 4]) >= 0.99:
            return seconds, sentences
        C *= 2
    return math.inf, math.inf


# What each side may choose, the likely winners first: the others are stopped sooner.
# Adam's network has 2M hidden units in every level; its batch is not tuned.
CHOICES = {
    layerwise: [
        dict(M=M, C=C) for M in (256, 192, 128, 96, 64, 384) for C in (4, 8, 16, 32)
    ],
    backpropagation: [
        dict(M=M, learning_rate=rate)
        for M in (32, 16, 64, 128, 256, 512)
        for rate in (3e-3, 1e-3, 1e-2, 3e-4)
    ],
}


def run(learn, setting, rhm, seed, most=MOST):
    """learn's seconds and sentences, printed at once so that one sees how far it is."""
    seconds, sentences = learn(rhm, seed, **setting, most=most)
    reached = f"{seconds:.2f} s, {sentences} sentences"
    reached = reached if seconds < math.inf else f"stopped at {most:.2f} s"
    text = f"  L = {rhm.L}, grammar {seed}, {name(learn, setting)}: {reached}"
    print(text, flush=True)
    return seconds, sentences


def name(learn, setting):
    """As "layerwise, M = 64, C = 8"."""
    return ", ".join([learn.__name__, *(f"{k} = {v}" for k, v in setting.items())])


def fastest(learn, settings, rhm, seed):
    """The setting with the fewest seconds; slower ones are stopped at the best so far.

    In layerwise training only between two runs.
    """
    best, most = settings[0], MOST
    for setting in settings:
        seconds, _ = run(learn, setting, rhm, seed, most)
        if seconds < most:
            best, most = setting, seconds
    return best


def compare(L, grammars):
    """Choose on the first grammar, run on all: {name of a side: its runs}."""
    rhms = enumerate(draw_grammars(16, 4, L, grammars))
    rhms = [(rhm, seed) for seed, rhm in rhms if rhm.K_rho > 0]
    chosen = {side: fastest(side, CHOICES[side], *rhms[0]) for side in CHOICES}
    runs = {name(*choice): [] for choice in chosen.items()}
    for rhm, seed in rhms:
        for choice in chosen.items():
            runs[name(*choice)].append(run(*choice, rhm, seed))
    return runs


def main(argv=None):
    """Compare and print.  What was typed wrongly ends in one line, exit code 2."""
    text = "Layerwise training against backpropagation: seconds, sentences."
    parser = one_line_parser(text)
    Ls = dict(type=int, nargs="+", choices=range(1, 7), default=[3, 4, 5, 6])
    parser.add_argument("--L", **Ls, help="levels; V = 16, m = 4, s = 2")
    parser.add_argument("--grammars", type=int, default=3, help="with K_rho > 0")
    options = parser.parse_args(argv)
    if options.grammars < 1:
        parser.error(f"grammars must be at least 1, got {options.grammars}")
    with torch_threads(1):
        found = [(L, compare(L, options.grammars)) for L in options.L]
    print("V = 16, m = 4, s = 2.  Means over the grammars on which 99% was reached:")
    print("  L  seconds  sentences  reached")
    for L, runs in found:
        for side, pairs in runs.items():
            reached = [pair for pair in pairs if pair[0] < math.inf]
            seconds, sentences = np.mean(reached or [(math.inf, math.inf)], axis=0)
            count = f"{len(reached)} of {len(pairs)}"
            print(f"{L:3} {seconds:8.2f} {sentences:10.0f} {count:>8}  {side}")


if __name__ == "__main__":
    main()
