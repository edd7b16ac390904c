"""What one would do instead: `python -m experiments.backpropagation`, half an hour.

The same architecture with ReLU for the fixed features, all levels at once by Adam on
the cross-entropy, against layerwise training: seconds and sentences until 99% of fresh
sentences are right.  Both on one thread, in turn, on the same grammars.
"""

import argparse
import time

import numpy as np
import torch
from torch import nn

from experiments.sample_complexity import draw_grammars
from train_layerwise import Config, accuracy, torch_threads, train

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BATCH, EVERY, MOST_SENTENCES = 256, 10, 2_560_000


class ReLUNetwork(nn.Module):
    """L levels; each maps a patch of s vectors in R^V to 2M features and back."""

    def __init__(self, rhm, M=512):
        super().__init__()
        self.V, self.s = rhm.V, rhm.s
        patch = lambda: nn.Sequential(
            nn.Linear(rhm.s * rhm.V, 2 * M), nn.ReLU(), nn.Linear(2 * M, rhm.V)
        )
        self.levels = nn.ModuleList(patch() for _ in range(rhm.L))

    def forward(self, tokens):
        """Scores of the labels, (n, V), for tokens (n, d)."""
        h = nn.functional.one_hot(tokens.long(), self.V).float()
        for level in self.levels:
            h = level(h.unflatten(1, (-1, self.s)).flatten(2))
        return h[:, 0]


def backpropagate(rhm, learning_rate, seed, most=MOST_SENTENCES):
    """Seconds and sentences to 99%, looked at every 10 steps; None beyond `most`."""
    rng = np.random.default_rng([seed, 1])
    tokens, labels = map(
        torch.from_numpy, rhm.sample(2000, np.random.default_rng([seed, 4]))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ReLUNetwork(rhm)
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    seconds = 0.0
    for step in range(1, most // BATCH + 1):
        start = time.perf_counter()
        batch, zeta = map(torch.from_numpy, rhm.sample(BATCH, rng))
        loss = nn.functional.cross_entropy(net(batch), zeta.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - start
        if step % EVERY == 0:
            with torch.no_grad():
                right = (net(tokens).argmax(1) == labels).float().mean()
            if right >= 0.99:
                return seconds, step * BATCH
    return None


def fastest_rate(rhm, seed):
    """The learning rate that needs the fewest sentences; the others stop at that."""
    best, most = None, MOST_SENTENCES
    for rate in LEARNING_RATES:
        found = backpropagate(rhm, rate, seed, most)
        if found:
            best, most = rate, found[1]
    return best


def layerwise(rhm, seed):
    """The same for `train`, at the smallest C of 1, 2, 4, ... that reaches 99%."""
    for C in 2.0 ** np.arange(7):
        start = time.perf_counter()
        net, stages = train(rhm, Config(C=C, seed=seed))
        seconds = time.perf_counter() - start
        if accuracy(net, rhm, 2000, np.random.default_rng([seed, 4])) >= 0.99:
            return seconds, sum(stage.N for stage in stages)
    return None


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.backpropagation")
    parser.add_argument("--L", type=int, nargs="+", default=[3, 4, 5, 6])
    parser.add_argument("--grammars", type=int, default=3)
    options = parser.parse_args()
    print("V = 16, m = 4, s = 2; means over grammars: seconds and sentences to 99%")
    print("  L  learning rate     layerwise                backpropagation")
    with torch_threads(1):
        for L in options.L:
            rhms = draw_grammars(16, 4, L, options.grammars)
            rhms = [(seed, rhm) for seed, rhm in enumerate(rhms) if rhm.K_rho > 0]
            seed, rhm = rhms[0]
            rate = fastest_rate(rhm, seed)
            pairs = [
                (layerwise(rhm, k), backpropagate(rhm, rate, k)) for k, rhm in rhms
            ]
            ours, theirs = (np.mean(found, axis=0) for found in zip(*pairs))
            print(
                f"{L:3} {rate:14} {ours[0]:8.1f} s {ours[1]:10.0f} "
                f"{theirs[0]:12.1f} s {theirs[1]:10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
