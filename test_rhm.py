"""The paper again, as tests: most are claims, named after their place in the paper.

`pytest -k lemma_15` runs what is about Lemma 15.  P is |P_l| = V m.  Numbers are those
of the COLT version.  The last section, engineering, is about this code and no claim of
the paper.

All seeds are fixed.  A false alarm is the failure of a correct program for another
seed.  Where a theorem bounds its probability, a comment says so.  Other tolerances are
at least six standard deviations of what fifteen or more other seeds gave.  Either way
it is about 1e-6 per test.
"""

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train_layerwise as tl
from experiments import deep_quadratic as dq
from experiments import backpropagation, measurements, sample_complexity, theorem_7
from experiments import choose_sigma as histogram
from experiments.sample_complexity import series
from model import Level, deep_cnn, distinct_rows, embed
from rhm import RHM, signal_bound, typical_signal
from train_layerwise import (
    Config, accuracy, choose_sigma, diagnose, gradient_descent, merge, network_parse,
    plot, predict, proof_constants, run, schedule, train, train_level,
)  # fmt: skip

torch.set_num_threads(1)  # two threads stall beside a busy program
os.environ.pop("MPLBACKEND", None)  # a notebook's setting may be unusable here
HERE = Path(__file__).parent


def grammar(V=4, m=2, s=2, L=3, seed=0, kappa=None):
    """The first grammar from `seed` on with K_rho > 0, and with this kappa if given."""
    uniform = kappa is None
    rhms = (RHM.random(V, m, s, L, k, uniform) for k in range(seed, seed + 1000))
    good = (rhm for rhm in rhms if rhm.K_rho > 0)
    return next(rhm for rhm in good if rhm.kappa == pytest.approx(kappa or 1))


TINY, KAPPA_4 = grammar(seed=22), grammar(kappa=4)  # 512 sentences, P = 8
USUAL = grammar(16, 4, 2, 4)  # of the default run; P = 64, kappa = 1


class Sealed:
    """All that a learner may see of a grammar; notes what it has drawn."""

    def __init__(self, rhm):
        self.V, self.m, self.s, self.L = rhm.V, rhm.m, rhm.s, rhm.L
        self._rhm, self.drawn = rhm, []

    def sample(self, n, rng, level=1):
        tokens, labels = self._rhm.sample(n, rng, level)
        self.drawn.append((rng, level, tokens, labels))
        return tokens, labels


def learn(rhm, sigmas=None, **settings):
    """Train with the series, which is faster; the network and its accuracy."""
    net, _ = train(rhm, Config(**settings), sigmas=sigmas, descend=series)
    return net, accuracy(net, rhm, 10_000, 1)


def exact_sigmas(rhm):
    """{level: sigma}, the exact smallest distance of the embeddings below."""
    return {l: rhm.signal(l + 1) for l in range(1, rhm.L)}


def derivations(rhm):
    """All derivations of a tiny grammar, equally likely, as sample_tree gives them."""
    tree = [np.arange(rhm.V)[:, None]]
    for rules in rhm.rules:
        width = tree[-1].shape[1]
        choices = np.array(list(itertools.product(range(rhm.m), repeat=width)))
        patches = rules[tree[-1][:, None, :], choices]  # (n, choices, width, s)
        tree = [np.repeat(level, len(choices), axis=0) for level in tree]
        tree.append(patches.reshape(len(tree[0]), -1))
    return tree


def law_of_label(tree, given):
    """P[label | given], (n, V): `given` (n, ...) holds columns of all derivations."""
    _, row = np.unique(given, axis=0, return_inverse=True)
    joint = np.zeros((row.max() + 1, tree[0].max() + 1))
    np.add.at(joint, (row.ravel(), tree[0][:, 0]), 1)
    return (joint / joint.sum(1, keepdims=True))[row.ravel()]


def assert_frequencies(counts, p, false_alarm=1e-7):
    """Counts agree with probabilities p: Bernstein's inequality, cell by cell."""
    n, log = counts.sum(), math.log(2 * np.size(p) / false_alarm)
    allowed = log / 3 + np.sqrt(log**2 / 9 + 2 * log * n * p * (1 - p))
    assert (np.abs(counts - n * p) <= allowed).all()


def pairwise(a):
    """Distances between the rows of an array."""
    return np.linalg.norm(a[:, None] - a, axis=-1)


def test_a_worked_example_one_patch_from_its_law_to_the_label():
    """V = 3, m = 2, s = 2, L = 2; follow the patch 0 2 and its synonym 1 1.

    label  0 -> 0 1 | 1 0     1 -> 1 2 | 2 1     2 -> 2 2 | 0 0
    symbol 0 -> 0 2 | 1 1     1 -> 0 0 | 2 1     2 -> 1 0 | 2 2

    Its law.  24 derivations are equally likely: 3 labels, 2 rules of the label, 2 of
    the left symbol, 2 of the right one.  Four of them begin with 0 2, and p = 1/6:
        0 -> 0 1 -> 0 2 0 0, 0 2 2 1          2 -> 0 0 -> 0 2 0 2, 0 2 1 1
    Its q.  Two of the four have label 0, two have label 2: q = (1/2, 0, 1/2).  So has
    its synonym 1 1.  Symbol 1 has (1/2, 1/2, 0), symbol 2 has (0, 1/2, 1/2).
    The trained level 2 returns q up to 0.1, for 0 2 and for 1 1: symbol 0 is found.
    Level 1.  The sentence 0 2 0 0 is now (q of symbol 0, q of symbol 1), a patch that
    stands under label 0 only, and level 1 returns (1, 0, 0).
    """
    top = [[[0, 1], [1, 0]], [[1, 2], [2, 1]], [[2, 2], [0, 0]]]
    rhm = RHM([top, [[[0, 2], [1, 1]], [[0, 0], [2, 1]], [[1, 0], [2, 2]]]])
    label, _, tokens = derivations(rhm)
    begin = (tokens[:, :2] == [0, 2]).all(1)
    assert len(tokens) == 24 and label[begin, 0].tolist() == [0, 0, 2, 2]
    q = np.array([[0.5, 0, 0.5], [0.5, 0.5, 0], [0, 0.5, 0.5]])
    assert np.array_equal(rhm.label_posterior(2), q)
    assert rhm.signal(2) == pytest.approx(0.5**0.5)  # = rho, and sqrt 2 at level 1
    net, _ = train(rhm, Config(C=1000))
    first = predict(net[:2], [[0, 2], [1, 1], [0, 0], [2, 2]])[:, 0]
    assert np.abs(first - q[[0, 0, 1, 2]]).max() < 0.1
    sentence = np.array([[0, 2, 0, 0]])
    seen = [symbols.tolist() for symbols in network_parse(net, rhm, sentence)]
    assert seen == [[[0]], [[0, 1]], [[0, 2, 0, 0]]]
    assert seen == [symbols.tolist() for symbols in rhm.parse(sentence)]
    assert predict(net, sentence)[0, 0] == pytest.approx([1, 0, 0], abs=0.1)


# ---- Section 1, Principle 2: take one of its three conditions away -------------------


def sum_grammar(*kept, V=8, seed=0):
    """A grammar of all V^2 pairs (m = V, s = 2).  table[a, b] rewrites to (a, b): it is
    a + b mod V in the first kept[l] rows, shuffled in the others."""
    rng, rules = np.random.default_rng(seed), []
    for k in kept:
        table = np.add.outer(range(V), range(V)) % V
        table[k:] = rng.permutation(table[k:].ravel()).reshape(-1, V)
        rules.append([np.argwhere(table == nu) for nu in range(V)])
    return RHM(np.array(rules))


def test_principle_2_i_no_correlation_then_chance():
    """One symbol of a pair tells nothing about the sum a + b mod V.  With this table q
    is flat from level 2 on, and the learner stays at chance.  With a shuffled table
    the same learner learns the grammar."""
    parity, shuffled = sum_grammar(8, 8, 8), sum_grammar(0, 0, 0)
    assert np.allclose([parity.label_posterior(l) for l in (2, 3)], 1 / 8)
    assert learn(parity)[1] < 1 / 8 + 0.03
    assert learn(shuffled, C=40)[1] > 0.98


def test_principle_2_ii_no_clean_signal_then_overfit():
    """No grammar breaks (ii), since Eq. (8) holds for all; a learner can.  Give level 2
    alone a bandwidth far below the spread of its inputs: each representation of a patch
    is then a patch of its own, too rare to average out what lies above it.  Level 3 is
    as clean as before, level 2 learns noise, and the labels are at chance."""
    rhm = grammar(8, 4, 3, 3)
    assert learn(rhm)[1] > 0.999
    net, share = learn(rhm, sigmas={2: 0.05 * rhm.signal(3)})
    nearest = {l: diagnose(net, rhm, l, 2)[1] for l in (3, 2)}
    assert nearest[3] == 1 and nearest[2] < 0.5 and share < 1 / 8 + 0.05


def test_principle_2_iii_not_identifiable_then_exactly_those_two_symbols_merge():
    """Rows 0 and 1 of the top table hold every label once: symbols 0 and 1 of level 1
    share a flat q.  The network merges these two and no others.  It scores what the
    best guesser scores who cannot tell 0 from 1."""
    twins, whole = sum_grammar(2, 0, 0, seed=3), sum_grammar(0, 0, 0, seed=3)
    assert np.allclose(twins.label_posterior(2)[:2], 1 / 8)
    # sigma is that of a whole grammar, and the ridge is large.  Else the level above
    # zooms in on the sampling noise by which the two differ.
    sigmas, V = exact_sigmas(whole), 8
    assert learn(whole, sigmas, ridge=0.1)[1] > 0.98
    net, share = learn(twins, sigmas, ridge=0.1)
    tree = twins.sample_tree(10_000, 2, level=2)
    outputs = predict(net[:3], tree[-1])[:, 0]
    means = np.array([outputs[tree[1][:, 0] == nu].mean(0) for nu in range(V)])
    merged = np.triu(pairwise(means) < sigmas[1] / 2, 1)
    assert np.argwhere(merged).tolist() == [[0, 1]]
    votes = np.zeros((V, V, V))  # for each label, by level-1 patch with 1 read as 0
    a, b = np.moveaxis(np.where(twins.rules[0] == 1, 0, twins.rules[0]), -1, 0)
    np.add.at(votes, (a, b, np.arange(V)[:, None]), 1)
    assert share == pytest.approx(votes.max(2).sum() / votes.sum(), abs=0.05)


# ---- Sections 2 and 3: the grammar, the network, the training ------------------------

SIZES = [  # (V, m, s, L), the corner cases included
    (16, 4, 2, 4), (5, 3, 3, 2), (3, 2, 4, 2), (7, 1, 2, 3), (6, 1, 1, 3), (5, 2, 2, 1),
    (1, 1, 1, 1), (1, 1, 3, 2), (2, 2, 62, 1), (90, 9, 9, 1),
]  # fmt: skip


@pytest.mark.parametrize("V, m, s, L", [*SIZES, (200, 200, 2, 2)])
def test_definition_4_random_grammars_are_uniform_and_have_one_parse(V, m, s, L):
    """Every level has V symbols with m rules each, V m different patches in all, for
    both samplers.  So a sentence has one derivation, and parse finds it."""
    for uniform, n in (True, 200), (False, 200), (False, 0):
        sizes = np.int16([V, m, s, L])  # these can overflow
        rhm = RHM.random(*sizes, rng=0, uniform_first_token=uniform)
        for rules in rhm.rules:
            assert len(np.unique(rules.reshape(V * m, s), axis=0)) == V * m
            if uniform:  # every symbol begins exactly m patches
                assert (np.bincount(rules[..., 0].ravel(), minlength=V) == m).all()
        tree = rhm.sample_tree(n, 1)
        for recovered, drawn in zip(rhm.parse(tree[-1]), tree, strict=True):
            assert np.array_equal(recovered, drawn)
            assert recovered.dtype == drawn.dtype == np.int64


@pytest.mark.parametrize("level", [1, 2, 3])
def test_definition_3_derivations_follow_the_exact_law(level):
    """The label is uniform, and each rule has probability 1/m, independently.  So
    sample_tree(level) has the law of the same columns of all 384 derivations, which
    are equally likely.  The grammar has kappa > 1, where a uniform sampler differs."""
    rhm, n = RHM.random(3, 2, 2, 3, 0, uniform_first_token=False), 40_000
    tree = rhm.sample_tree(n, 2, level)
    columns = [all_[:, : part.shape[1]] for all_, part in zip(derivations(rhm), tree)]
    rows = np.concatenate([np.hstack(columns), np.hstack(tree)])
    _, kind = np.unique(rows, axis=0, return_inverse=True)
    counts = np.bincount(kind.ravel()[384:], minlength=kind.max() + 1)
    law = np.bincount(kind.ravel()[:384]) / 384
    assert len(law) == len(counts)  # no other derivations
    assert_frequencies(counts, law)  # false alarm: below 1e-6
    tokens, labels = rhm.sample(n, 2, level)  # the same seed, the same sample
    assert np.array_equal(tokens, tree[-1]) and np.array_equal(labels, tree[0][:, 0])


def random_network(V, s, M=20, levels=2, seed=0):
    """An untrained network in float64, with random W."""
    rng = np.random.default_rng(seed)
    net = deep_cnn(V, *(Level(V, s, M, 1.0, rng) for _ in range(levels))).double()
    for level in net[1:]:
        assert (level.W == 0).all()  # Section 2.3: W_0 = 0
        level.W.data = torch.tensor(rng.standard_normal((V, 2 * M)))
    return net


TOKENS = torch.from_numpy(np.random.default_rng(0).integers(4, size=(200, 18)))


def test_equations_1_and_2_the_network_is_a_strided_convolution():
    """One W serves all patches of a level.  So the network is torch's conv1d with
    kernel = stride = s, from one-hot sentences up, divided by the sum of the entries.
    embed computes equal patches once: table[ids] is the same, after 0 to 2 levels."""
    V, s, M = 5, 3, 20
    net, tokens = random_network(V, s, M), TOKENS[:40]
    h = F.one_hot(tokens, V).double().transpose(1, 2)  # (n, V, width)
    for k, level in enumerate(net[1:], start=1):
        table, ids = embed(net[:k], tokens.int())
        assert torch.allclose(table[ids], h.transpose(1, 2), atol=1e-12)
        weights = level.omega.view(M, s, V).transpose(1, 2)  # out, in, place
        angles = F.conv1d(h, weights, stride=s)  # (n, M, width / s)
        x = torch.cat([angles.cos(), angles.sin()], 1) / M**0.5
        scores = F.conv1d(x, level.W[:, :, None])  # (n, V, width / s)
        h = scores / scores.sum(1, keepdim=True)  # Eq. (2)
    table, ids = embed(net, tokens)
    assert torch.allclose(table[ids], h.transpose(1, 2))
    assert torch.allclose(net(tokens), h.transpose(1, 2))


def kernel(a, b):
    """exp(-||a_i - b_j||^2 / 2): the kernel of Eq. (6) for rows in units of sigma."""
    exact = "donot_use_mm_for_euclid_dist"  # for near points as well
    return (-(torch.cdist(a, b, compute_mode=exact) ** 2) / 2).exp()


def test_equation_6_and_lemma_12_features_approximate_the_gaussian_kernel():
    """<Phi(h), Phi(h')> is near exp(-||h-h'||^2 / (2 sigma^2)), and ||Phi(h)|| = 1.
    Lemma 12: the largest gap over points of the unit ball has slope -1/2 in M.  Other
    frequencies than Gaussian ones of width 1 / sigma leave a gap that does not fall."""
    rng, sigma, widths = np.random.default_rng(0), 0.5, [16, 64, 256, 1024]
    h = torch.tensor(rng.standard_normal((20, 8)))
    h /= h.norm(dim=1, keepdim=True)

    def error(M):
        x = Level(4, 2, M, sigma, rng).double().patch_embedding(h)
        assert torch.allclose(x.norm(dim=1), torch.ones(20).double())
        return (x @ x.T - kernel(h / sigma, h / sigma)).abs().max().item()

    errors = [np.mean([error(M) for _ in range(12)]) for M in widths]
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.08  # six standard deviations of the fitted slope


def some_patches(rows=40, s=2, V=3, M=16):
    """Distinct patches with label counts, and an untrained level, in float64."""
    rng = np.random.default_rng(0)
    h = torch.tensor(rng.standard_normal((rows, s, V)))
    counts = torch.tensor(rng.integers(5, size=(rows, V)))
    return h, counts, Level(V, s, M, 1.0, rng).double()


def test_equation_3_gradient_descent_follows_autograd():
    """30 steps are 30 steps of torch.optim.SGD on the loss as printed, a term for each
    sample.  So Eq. (3) sees the samples only through the counts of equal patches.  A
    wrong gradient or a wrong loss would differ from the first step on."""
    h, counts, level = some_patches()
    losses = train_level(level, h, counts, 0.05, 1.5, 30)
    rows, labels = counts.nonzero().repeat_interleave(counts[counts > 0], dim=0).T
    x, e = level.patch_embedding(h.flatten(1))[rows], F.one_hot(labels, 3)
    W = torch.zeros(3, 32, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([W], lr=1.5)
    for expected in losses:
        loss = 0.5 * (e - x @ W.T).square().sum(1).mean() + 0.025 * W.square().sum()
        assert loss.item() == pytest.approx(expected, rel=1e-10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(losses) == 30 and torch.allclose(W, level.W, atol=1e-12)
    # Section 2.3: any optimiser would do.  The series is these steps in closed form.
    [loss] = train_level(level, h, counts, 0.05, 1.5, 29, series)
    assert loss == pytest.approx(losses[29], rel=1e-10)
    train_level(level, h, counts, 0.05, 1.5, 30, series)
    assert torch.allclose(W, level.W, atol=1e-12)


def test_section_2_3_the_learner_needs_only_samples_and_sizes():
    """Stages l = L..1 draw N^(l) = C kappa P m^l fresh first patches each, rounded up.
    Nothing but `sample` and the sizes of the grammar is used."""
    rhm = grammar(8, 2, 2, 3)
    sealed, sigmas, stages, steps = Sealed(rhm), {3: 0.4, 1: 0.5}, [], []

    def report(net, stage):  # after the level is trained
        assert np.isfinite(diagnose(net, rhm, stage.level, 0, n=10)[0]).all()
        stages.append(stage)

    def descend(*averages):  # any optimiser would do
        steps.append(averages[-1])
        return series(*averages)

    config = Config(C=10.01, kappa=2)
    net, returned = train(sealed, config, report, sigmas, descend)
    drawn = [(level, len(tokens)) for _, level, tokens, _ in sealed.drawn]
    assert drawn == [(3, 2563), (2, 1282), (1, 641)]  # 20.02 * 16 * (8, 4, 2)
    assert drawn == [(stage.level, stage.N) for stage in stages] and returned == stages
    labels = [labels[:640].tolist() for *_, labels in sealed.drawn]
    assert not any(a == b for a, b in itertools.combinations(labels, 2))  # fresh
    assert stages[0].strings == 16 and steps == 3 * [schedule(8, 2, config)[2]]
    assert (stages[0].sigma, stages[2].sigma) == (0.4, 0.5) and len(sigmas) == 2
    assert accuracy(net, rhm, 2000, 9) == 1


def test_section_2_3_a_level_trained_on_first_patches_works_at_every_place():
    """The rules are the same at every place, so one W serves all patches.  The default
    network recovers the latent symbols at every place, and its median error is the
    same there."""
    tree = USUAL.sample_tree(2000, 1)
    net, _ = learn(USUAL)
    read = network_parse(net, USUAL, tree[-1])
    for l in range(USUAL.L):
        assert (read[l] == tree[l]).mean(0).min() >= 0.97
        h = predict(net[: USUAL.L - l + 1], tree[-1])
        errors = np.linalg.norm(h - USUAL.label_posterior(l + 1)[tree[l]], axis=2)
        medians = np.median(errors, axis=0)  # by place
        assert medians == pytest.approx(medians.mean(), rel=0.07)


def oracle(rhm, target, M=16_384):
    """W = sum of target(l) x_mu^T over all patches at each level; Lemma 10's sigma."""
    rng, net, tokens = np.random.default_rng(0), deep_cnn(rhm.V), torch.eye(rhm.V)
    for l in range(rhm.L, 0, -1):
        sigma = torch.pdist(tokens).min().item() / math.sqrt(2 * math.log(2 / 0.01))
        level = Level(rhm.V, rhm.s, M, sigma, rng)
        x = level.patch_embedding(tokens[torch.tensor(rhm.rules[l - 1])].flatten(2))
        tokens = torch.tensor(target(l), dtype=torch.float32)
        level.W.data = torch.einsum("nz,nkx->zx", tokens, x)
        net.append(level)
    return net


def test_constructions_1_2_and_3_oracle_weights_return_their_targets():
    """1: W = sum e_parent x_mu^T outputs e_parent.  2, without latents: W = sum q_mu
    x_mu^T outputs q_mu; exactly, if x_mu is the tensor product of one-hots.  3: with
    random features up to less than half of the distance between two targets."""
    tree = derivations(TINY)
    for target in (lambda l: np.eye(TINY.V)), TINY.label_posterior:
        net = oracle(TINY, target)
        for l in range(1, TINY.L + 1):
            x = np.eye(16)[TINY.rules[l - 1] @ [4, 1]]  # (V, m, V^s)
            W = np.einsum("nz,nkx->zx", target(l), x)
            exact = np.repeat(target(l)[:, None], TINY.m, axis=1)  # synonyms share it
            assert np.array_equal(x @ W.T, exact)
            outputs = predict(net[: TINY.L - l + 2], tree[-1])
            errors = np.linalg.norm(outputs - target(l)[tree[l - 1]], axis=2)
            apart = pairwise(target(l)) + 9 * np.eye(TINY.V)
            assert errors.max() < apart.min() / 2


# ---- Section 4 and Appendix A: the posterior q, steps and samples --------------------


@pytest.mark.parametrize("uniform", [True, False])
def test_equation_4_label_posterior_equals_enumeration(uniform):
    """q_mu^(l) counted over all derivations; synonyms share it; kappa, rho follow."""
    for seed in range(8):
        rhm = RHM.random(3, 2, 2, 3, seed, uniform)
        tree, kappa, K_rho = derivations(rhm), 0, math.inf
        for level in (1, 2, 3):
            parent, patch = tree[level - 1][:, 0], tree[level][:, :2]
            q = rhm.label_posterior(level)
            assert q[parent] == pytest.approx(law_of_label(tree, patch))
            _, counts = np.unique(patch, axis=0, return_counts=True)
            rarest = counts.min() / len(patch) if len(counts) == 6 else 0
            kappa = max(kappa, 1 / (6 * rarest) if rarest else math.inf)
            apart = pairwise(q[np.unique(parent)])
            rho = apart[~np.eye(len(apart), dtype=bool)].min(initial=math.inf)
            assert rhm.signal(level) == pytest.approx(rho, abs=1e-12)
            K_rho = min(K_rho, rho * 2 ** (level / 2))
        assert rhm.K_rho == pytest.approx(K_rho, abs=1e-12)
        assert rhm.kappa == pytest.approx(kappa)
    assert RHM.random(3, 2, 2, 1, 0, uniform).K_rho == pytest.approx(2)  # level 1 alone


def test_assumption_6_failures_name_the_level_and_the_symbols():
    """(b) fails by two symbols of equal posterior, (a) by a symbol that is never first.
    One flat posterior alone breaks nothing.  A distance by rounding is 0."""
    merged = RHM([[[[0, 1], [1, 0]], [[0, 0], [1, 1]]]] * 2)
    [line] = merged.assumption_6_failures()
    assert "6(b) fails at level 2: K_rho = 0, symbols 0 and 1 of level 1" in line
    rounded = np.nextafter(merged.label_posterior(2), [[0], [1]])
    merged.label_posterior = lambda level: rounded
    assert pairwise(rounded).max() > 0 == merged.signal(2)
    never = RHM([[[[0, 0]], [[0, 1]]]] * 2)  # every patch begins with 0
    [line] = never.assumption_6_failures()
    assert "6(a) fails at level 2: kappa = inf, symbols [1] of level 1 are ne" in line
    assert never.kappa == never.signal(2) == math.inf
    # Symbol 1 is as often first under each of the three labels:
    top = [[[0, 0], [0, 1], [1, 0]], [[0, 2], [1, 1], [2, 0]], [[1, 2], [2, 1], [2, 2]]]
    flat = RHM([top, sum_grammar(0, V=3).rules[0]])
    assert np.allclose(flat.label_posterior(2)[1], 1 / 3)
    assert flat.K_rho > 0 and not flat.assumption_6_failures()


def test_equation_8_features_and_label_are_independent_given_the_patch():
    """P[label | leaves under the first patch mu] = q_mu over all derivations.  This is
    Eq. (8) for every x.  The patch beside it would change the law."""
    tree = derivations(TINY)
    for level in (1, 2, 3):
        q = TINY.label_posterior(level)[tree[level - 1][:, 0]]
        width = TINY.s ** (4 - level)  # of the leaves, which determine mu
        assert np.allclose(law_of_label(tree, tree[3][:, :width]), q)
        beside = law_of_label(tree, tree[3][:, : 2 * width])
        assert level == 1 or not np.allclose(beside, q)


def test_assumption_9_choose_sigma_is_a_quantile_over_samples_and_all_places():
    """Our rule, not the paper's.  Of all pairs of different tokens, each weighed by its
    counts, a share of 1.5 / V is nearer than sigma."""
    V, s, rng = 4, 3, np.random.default_rng(0)
    spread = np.linspace(0.2, 2, 60)[:, None, None] * [[[1.0], [2.0], [3.0]]]
    h = torch.tensor(rng.standard_normal((60, s, V)) * spread)
    counts = torch.tensor([[1] * V] * 30 + [[30] * V] * 30)
    sigma = choose_sigma(h, counts, 1.5, rng)
    apart = pairwise(h.flatten(0, 1).numpy())
    weights = counts.sum(1).repeat_interleave(s).numpy()
    weights = np.outer(weights, weights) * (apart > 0)
    share = weights[apart <= sigma].sum() / weights.sum()
    assert share == pytest.approx(1.5 / V, abs=0.025)  # 20,000 pairs: sd 0.0035
    assert sigma < choose_sigma(h, counts, 9, rng) <= apart.max()  # 9 / V is above 1


@pytest.mark.parametrize("V, m", [(1, 1), (2, 2)])
def test_lemma_15_gradient_descent_contracts_at_every_step(V, m):
    """||W_t - W_*|| <= exp(-t/P) ||W_*|| for all t, and ||W_*|| <= P.  The curvatures
    lie in [lambda_W, 1 + lambda_W], so a step of 2 / (1 + 2 lambda_W) shrinks every
    direction: twice the step diverges along a frequent patch, half of it is too slow
    along the rare ones.  For a single patch the printed step, 2 / (1 + lambda_W), makes
    W alternate between 0 and 2 W_* for ever (README, slip 2)."""
    P, rng = V * m, np.random.default_rng(0)
    p = torch.tensor([1.0] if P == 1 else [0.7] + 32 * [0.3 / 32]).double()
    x = torch.linalg.qr(torch.tensor(rng.standard_normal((len(p), len(p)))))[0]
    e = torch.eye(V).double()[torch.arange(len(p)) % V]
    averages = x.T @ (p[:, None] * x), e.T @ (p[:, None] * x)
    W_star = averages[1] @ torch.linalg.inv(averages[0] + torch.eye(len(p)) / P)
    lambda_W, eta, T = schedule(V, m, Config(ridge=1.0))
    printed = 2 / (1 + lambda_W)
    for step in (eta, printed) if P > 1 else (eta,):
        for t in range(T + 1):
            W, _ = gradient_descent(*averages, lambda_W, step, t)
            assert (W - W_star).norm() <= math.exp(-t / P) * W_star.norm() + 1e-12
    assert W_star.norm() <= math.sqrt(P) / 2 + 1e-12  # sharper than the lemma's P
    if P == 1:
        W = [gradient_descent(*averages, lambda_W, printed, t)[0] for t in range(6)]
        assert torch.cat(W).abs().flatten().tolist() == [0, 1, 0, 1, 0, 1]


def test_lemma_18_a_posterior_averages_the_samples_of_its_patch_only():
    """With u = kappa P log(4P/delta) / N, here kappa = 1: p^ = p (1 +- (c u)^(1/2)),
    c = 2 below and 3 above, and ||q^ - q|| <= (8 u)^(1/2).  The reason is that only N /
    P samples show a patch: the mean square of ||q^ - q|| is P (1 - ||q||^2) / N.  So
    most patches miss the printed bound, which has no P (README, slip 1)."""
    P, N, L, rng = 64, 20_000, USUAL.L, np.random.default_rng(1)
    u = P * math.log(4 * P / 1e-8) / N  # false alarm: 40 delta = 4e-7
    ratios, missed = [], []
    for _ in range(40):
        h, counts = merge(deep_cnn(16), *USUAL.sample(N, rng, L))
        parent = RHM(USUAL.rules[L - 1 :]).parse(h.argmax(2).numpy())[0][:, 0]
        q, n = USUAL.label_posterior(L)[parent], counts.sum(1).numpy()
        error = np.linalg.norm(counts.numpy() / n[:, None] - q, axis=1)
        assert len(n) == P and n.sum() == N and counts.dtype == torch.int64
        assert error.max() <= math.sqrt(8 * u)
        deviation = (n / N * P - 1) / math.sqrt(u)
        assert -math.sqrt(2) <= deviation.min() and deviation.max() <= math.sqrt(3)
        missed.append(error > math.sqrt(2 * u / P))
        ratios.append(error**2 / (P * (1 - (q**2).sum(1)) / N))
    assert np.mean(missed) > 0.5 and abs(np.mean(ratios) - 1) < 0.06


def test_section_4_2_geometric_samples_leave_every_level_its_own_sampling_noise():
    """N^(l) = C P m^l samples leave q^ an error of (P / N)^(1/2) = (C m^l)^(-1/2).
    Measured with exact sigma: the median error of the outputs is about that at all
    levels; four times the samples halve it, and the largest is then below rho."""
    rhm, medians = grammar(16, 3, 2, 4, seed=1), []
    for C in (10, 40):
        net, _ = learn(rhm, C=C, M=512, sigmas=exact_sigmas(rhm))
        for l in range(1, rhm.L + 1):
            errors, _ = diagnose(net, rhm, l, 2)
            medians.append(np.median(errors))
            assert 0.4 < medians[-1] * (C * rhm.m**l) ** 0.5 < 1.75
            assert C < 40 or errors.max() < rhm.signal(l)
    ratios = np.divide(medians[:4], medians[4:])
    assert 1.6 < np.prod(ratios) ** (1 / 4) < 2.6  # N^(-1/4) gives 1.4, 1/N gives 4


# ---- Theorem 7, with the constants of its own proof ----------------------------------
#
# Only the width M cannot be had, so take its limit: inner products of features are the
# kernel.  Eq. (3) sees samples through counts, so 1e11 of them are one multinomial draw
# over all 512 sentences.  The bounds are the paper's.  The run lies far inside them:
# errors are at least 18 times smaller than eps_*, overlaps half of eps_O.


def dual_descent(K, p, joint, lambda_W, eta, T):
    """Gradient descent of Section 2.3 by inner products only (the dual form, Eq. (11)).

    From W = 0 it stays in the span of the rows x_u: W = A X, A (V, U).  K (U, U): the
    inner products <x_u, x_v>; p (U,): frequencies of rows; joint (V, U): with labels.
    """
    A = torch.zeros_like(joint)
    for _ in range(T):
        A = A - eta * ((A @ K) * p - joint + lambda_W * A)
    return A


def minimiser(K, p, joint, lambda_W):
    """A_* of the closed form W_* = A_* X, to which dual_descent converges."""
    return joint @ torch.linalg.inv(K * p + lambda_W * torch.eye(len(p)))


def test_equation_3_and_equation_11_gradient_descent_reaches_the_closed_form():
    """W_* = E^[e x^T] (E^[x x^T] + lambda_W I)^-1 = A_* X, up to 1.1^-2000 after 2000
    steps.  Inner products are enough for each step, here 30."""
    h, counts, level = some_patches()
    x, n = level.patch_embedding(h.flatten(1)), counts.double() / counts.sum()
    dual = x @ x.T, n.sum(1), n.T, 0.05
    train_level(level, h, counts, 0.05, 2 / 1.1, 30)
    assert torch.allclose(dual_descent(*dual, 2 / 1.1, 30) @ x, level.W, atol=1e-12)
    train_level(level, h, counts, 0.05, 2 / 1.1, 2000)
    covariance = (x.T * n.sum(1)) @ x + 0.05 * torch.eye(32).double()
    assert torch.allclose(level.W, n.T @ x @ torch.linalg.inv(covariance), atol=1e-12)
    assert torch.allclose(level.W, minimiser(*dual) @ x, atol=1e-12)
    train_level(level, h, counts, 0.05, 0, 1, measurements.closed_form)
    assert torch.allclose(level.W, minimiser(*dual) @ x, atol=1e-12)


def equation_9(K, p, joint, patch, lambda_W):
    """Lemma 14 at eps_O = 0, row by row: alpha_mu, p^_mu (U,) and q^_mu (V, U).

    Different patches do not see each other: K is masked.  W_* x = alpha_mu p^_mu q^_mu,
    and q^ sums to 1, so alpha_mu p^_mu is what W_* makes of a label that is always 1.
    """
    same = (patch[:, None] == patch).double()
    p_hat = same @ p
    alpha = minimiser(K * same, p, p, lambda_W) @ (K * same) / p_hat
    return alpha, p_hat, joint @ same / p_hat


def literal_run(rhm, samples=1, push=0):
    """All stages of Section 2.3 with proof_constants(rhm), in float64, M = infinity.

    samples: a factor of N; push: an error of the inputs above the bottom, in units of
    rho.  Returns the stages, from L to 1, with what the lemmas speak of.
    """
    rng, tree, stages = np.random.default_rng(0), derivations(rhm), []
    n, V, s, L = len(tree[0]), rhm.V, rhm.s, rhm.L
    h = torch.eye(V).double()[torch.tensor(tree[L])]  # (n, d, V)
    for l, c in sorted(proof_constants(rhm).items(), reverse=True):
        if l < L:
            noise = torch.tensor(rng.standard_normal(h.shape))
            h = h + push * c.rho * noise / noise.norm(dim=2, keepdim=True)
        counts = rng.multinomial(round(samples * c.N), np.full(n, 1 / n))
        p = torch.tensor(counts / counts.sum())
        joint = torch.eye(V).double()[:, tree[0][:, 0]] * p
        patches = h.unflatten(1, (-1, s)).flatten(2) / c.sigma
        rows = patches[:, 0]  # the first patches, from which it learns
        K = kernel(rows, rows)
        A = dual_descent(K, p, joint, c.lambda_W, c.eta, c.T)
        scores = kernel(patches.flatten(0, 1), rows) @ A.T  # at all places
        outputs = (scores / scores.sum(1, keepdim=True)).view(n, -1, V)
        q = torch.tensor(rhm.label_posterior(l)[tree[l - 1]])
        patch = torch.tensor(tree[l][:, :s] @ [V, 1])  # the number of the first one
        stage = SimpleNamespace(c=c, h=h, tokens=tree[l], K=K, p=p, joint=joint, A=A)
        stage.patch, stage.errors = patch, (outputs - q).norm(dim=2)
        alpha_p_q = equation_9(K, p, joint, patch, c.lambda_W)
        stage.alpha, stage.p_hat, stage.q_hat = alpha_p_q
        stages.append(stage)
        h = outputs
    return stages


@pytest.fixture(scope="module", params=[TINY, KAPPA_4], ids=["kappa=1", "kappa=4"])
def literal(request):
    """The grammar and the stages of a literal run."""
    return request.param, literal_run(request.param)


def overlap_and_spread(K, patch):
    """The eps_O and eps_S of Lemma 10 of rows with inner products K."""
    same = patch[:, None] == patch
    return K[~same].max(), (2 - 2 * K[same]).clamp(min=0).sqrt().max()


def test_theorem_7_proof_constants_are_the_formulas_of_the_paper(literal):
    """Each constant of each level, written out: Lemmas 10, 11, 15, 16 and 17, with the
    README's slips 1 to 3 mended.  P = 8, V = 4, s = 2; the grammar's own rho."""
    rhm, stages = literal
    kappa, eps = (4 if rhm is KAPPA_4 else 1), 0.01
    for l, stage in zip((1, 2, 3), reversed(stages)):
        below = rho = 2**0.5  # at the bottom
        if l < 3:
            rho = rhm.signal(l + 1)
            below = rho / math.sqrt(2000 * 8**2 * 2 * math.log(8 * kappa / eps))
        eps_O = eps / (600 * 8**2 * kappa * 2)  # Lemma 17
        rho_tilde = rho - 2 * below if l < 3 else rho
        assert vars(stage.c) == pytest.approx(dict(
            kappa=kappa, rho=rho, eps=eps, eps_below=below if l < 3 else 0,  # Lemma 11
            lambda_W=1 / 8, eta=stage.c.eta,  # Lemma 14; Lemma 15 has its own tests
            T=math.ceil(8 * math.log(100 * 8 * kappa * 2 / eps)),  # Lemma 17
            N=math.ceil(32 * kappa * 8 / eps**2 * math.log(4 * 8 / 1e-6)),
            eps_S=1 / 8 / 4, eps_O=eps_O,  # Lemmas 16, 17
            sigma=rho_tilde / math.sqrt(2 * math.log(2 / eps_O)),  # Lemma 10
            M=2 * 4 / min(eps_O**2, (1 / 32) ** 4),  # Lemma 10
        ))  # fmt: skip
        eps = below


def test_theorem_7_assumption_9_holds_at_every_level(literal):
    """Embeddings of one symbol lie within eps~_S = eps_S sigma / s^(1/2) (Lemma 10's
    hypothesis), of two symbols rho - 2 eps_* apart; sqrt 2 apart at the bottom."""
    for stage in literal[1]:
        c, symbols = stage.c, torch.tensor(stage.tokens).flatten()
        apart = torch.cdist(stage.h.flatten(0, 1), stage.h.flatten(0, 1))
        same = symbols[:, None] == symbols
        assert apart[same].max() <= c.eps_S * c.sigma / math.sqrt(2)
        assert apart[~same].min() >= c.rho - 2 * c.eps_below - 1e-12


def test_theorem_7_lemma_10_patches_apart_and_representations_together(literal):
    """Different patches overlap by eps_O at most, those of one lie within eps_S.  With
    the printed sigma, twice the right one, overlaps are K^(1/4), far above eps_O: at
    the bottom exactly (eps_O / 2)^(1/4) (README, slip 3)."""
    for stage in literal[1]:
        overlap, spread = overlap_and_spread(stage.K, stage.patch)
        assert overlap <= stage.c.eps_O and spread <= stage.c.eps_S
        printed, _ = overlap_and_spread(stage.K**0.25, stage.patch)
        assert printed > 100 * stage.c.eps_O
        if stage is literal[1][0]:
            assert printed == pytest.approx((stage.c.eps_O / 2) ** 0.25, rel=0.01)
            assert spread == 0


def test_theorem_7_lemma_14_the_minimiser_is_equation_9(literal):
    """W_* x = alpha_mu p^_mu q^_mu up to 6 P^2 eps_O: exactly so where labels and
    representations are independent in the sample.  Drawn, a term of order eps_S^2 (P
    max p / N)^(1/2) stays (README, slip 4).  Few samples and inputs off by rho / 50
    show it."""

    def rest(stage, joint):
        A_star = minimiser(stage.K, stage.p, joint, stage.c.lambda_W)
        rest = A_star @ stage.K - stage.alpha * stage.p_hat * stage.q_hat
        return rest.norm(dim=0).max()

    for stage in literal[1]:
        assert rest(stage, stage.joint) <= 6 * 8**2 * stage.c.eps_O
    stage = literal_run(literal[0], samples=1e-6, push=0.02)[1]
    overlap, spread = overlap_and_spread(stage.K, stage.patch)
    term = spread**2 * math.sqrt(8 * stage.p_hat.max() * 8 / (1e-6 * stage.c.N))
    assert rest(stage, stage.q_hat * stage.p) <= 6 * 8**2 * overlap
    assert 6 * 8**2 * overlap < rest(stage, stage.joint) <= 2.5 * term


def test_theorem_7_lemma_15_and_equation_12_gradient_descent_has_converged(literal):
    """||W_T - W_*|| <= exp(-T/P) ||W_*||, and ||W_*|| <= P.  Norms are taken by inner
    products, ||A X||^2 = tr A K A^T.  An eighth of the steps would miss Lemma 17's
    share of the error, eps_* / (100 kappa sqrt V)."""
    for stage in literal[1]:
        c, K = stage.c, stage.K
        square = lambda A: ((A @ K) * A).sum()
        A_star = minimiser(K, stage.p, stage.joint, c.lambda_W)
        rest, W_star = square(stage.A - A_star), square(A_star)
        assert rest <= math.exp(-2 * c.T / 8) * W_star and W_star <= 8**2
        few = dual_descent(K, stage.p, stage.joint, c.lambda_W, c.eta, c.T // 8)
        share = c.eps / (100 * c.kappa * 2)
        assert rest.sqrt() <= share < square(few - A_star).sqrt()


def test_theorem_7_lemma_16_the_posterior_gets_enough_weight(literal):
    """alpha_mu >= 1 / (4 (p^_mu + lambda_W)), since eps_S <= lambda_W / 4.  The run has
    almost 1 for 1/4, which saves Lemma 17's p^ alpha >= 1 / (5 kappa) (README, slip 5).
    If the representations of one patch are orthogonal, it fails."""
    for stage in literal[1]:
        c, weight = stage.c, stage.alpha * (stage.p_hat + stage.c.lambda_W)
        _, spread = overlap_and_spread(stage.K, stage.patch)
        assert spread <= c.lambda_W / 4 and weight.min() >= 1 - spread**2 - 1e-12
        assert (stage.p_hat * stage.alpha).min() >= 1 / (5 * c.kappa)
        apart = torch.eye(512).double()  # 16 to 128 representations of every patch
        alpha, *_ = equation_9(apart, stage.p, stage.joint, stage.patch, c.lambda_W)
        assert (alpha * (stage.p_hat + c.lambda_W)).min() < 1 / 4


def test_theorem_7_lemma_17_every_output_is_within_eps(literal):
    """||output - q_mu|| <= eps_* at every place and level.  A millionth of N is too
    few: the error is that of q^, and falls as N^(-1/2).  T is not needed here, since
    Eq. (2) cancels alpha at every step; the printed N passes as well (see Lemma 18)."""
    rhm, stages = literal
    for stage in stages:
        assert stage.errors.max() <= stage.c.eps  # false alarm: delta = 1e-6 each
    few = literal_run(rhm, samples=1e-6)[0]
    assert few.errors.max() > few.c.eps


def test_theorem_7_lemma_11_small_errors_of_the_inputs_do_no_harm(literal):
    """Inputs off by Lemma 11's eps_* of the level below are good enough.  The outputs
    are off by less, relative to their rho: errors do not grow from level to level.
    Inputs off by rho / 2 are too far (at level 2; level 1 sees everything)."""
    rhm, stages = literal
    push = min(stage.c.eps_below / stage.c.rho for stage in stages[1:])
    for l, stage in zip((2, 1), literal_run(rhm, push=push)[1:]):
        assert stage.errors.max() <= min(stage.c.eps, push * rhm.signal(l))
    far = literal_run(rhm, push=0.5)[1]
    assert far.errors.max() > 100 * far.c.eps


# ---- Appendix B: how large the signal is ---------------------------------------------


@pytest.mark.parametrize("uniform", [True, False])
def test_appendix_B_the_samplers_differ_and_every_patch_is_equally_likely(uniform):
    """Over 20,000 grammars with V = 3, m = s = 2, each of 9 patches is a rule of symbol
    0 with probability m / V^s.  Appendix B draws m random tails for each head, Cagnetta
    et al. any V m patches."""
    rng, drawn = np.random.default_rng(0), np.zeros((20_000, 3, 3))
    rules = np.array([RHM.random(3, 2, 2, 1, rng, uniform).rules[0] for _ in drawn])
    assert_frequencies(np.bincount((rules[:, 0] @ [3, 1]).ravel()), np.full(9, 1 / 9))
    drawn[np.arange(20_000)[:, None, None], rules[..., 0], rules[..., 1]] = 1
    assert (drawn.sum(2) == 2).all() == uniform  # m patches of every head
    if uniform:  # the tails of head 1 do not depend on those of head 0
        a, b = drawn[:, :2].argmin(2).T  # the tail that is not drawn
        assert_frequencies(np.bincount(3 * a + b), np.full(9, 1 / 9))


def test_proposition_19_and_lemma_30_fail_only_where_there_is_no_signal():
    """rho^(l) >= (20 m)^(-(l-1)/2) with high probability.  At V = 16, m = 4 it fails
    for about 5% of grammars, all with K_rho = 0: other rho are at least m^-(l-1), which
    is above the bound for m <= 20."""
    rng, failures = np.random.default_rng(0), 0
    for _ in range(600):
        rhm = RHM.random(16, 4, 2, 4, rng)
        fails = any(rhm.signal(l) < signal_bound(4, l) for l in (1, 2, 3, 4))
        assert fails == (rhm.K_rho == 0)
        failures += fails
    assert 5 <= failures <= 60  # 5% of 600, by six standard deviations
    assert signal_bound(4, 4) == pytest.approx(80**-1.5)


def every_transition(V, m):
    """T of each of the (V m)! ways to deal the patches (mu, tail), (deals, V, V)."""
    patches = itertools.product(range(V), range(m))
    deals = np.array(list(itertools.permutations(patches))).reshape(-1, 1, V, m, 2)
    return np.array([RHM(deal).transition(1) for deal in deals])


def random_transitions(V, m, s, deals):
    """T of Appendix B's sampler, (deals, V, V)."""
    rng = np.random.default_rng(0)
    return np.array([RHM.random(V, m, s, 1, rng).transition(1) for _ in range(deals)])


def test_lemma_20_transitions_are_balls_dealt_into_bins():
    """m T_l counts m balls of each of V colours in V bins of m slots; a table n has
    probability (m!)^(2V) / ((V m)! prod n_ij!)."""
    V, m = 3, 2
    tables = np.rint(m * random_transitions(V, m, 2, 3000)).astype(int)
    tables, found = np.unique(tables, axis=0, return_counts=True)
    factorials = np.array([math.factorial(k) for k in range(V * m + 1)])
    law = factorials[m] ** (2 * V) / factorials[V * m] / factorials[tables].prod((1, 2))
    assert len(law) == 21 and abs(law.sum() - 1) < 1e-12
    assert_frequencies(found, law)  # false alarm: 1e-7


def test_lemma_21_and_lemma_26_exact_mean_over_all_deals():
    """Lemma 21 with Lemma 26: E ||T z||^2 = ||z||^2 (V-1)/(mV-1), if z sums to 0.  So
    each transition costs that factor in typical_signal, the root mean square of
    ||q_mu - q_mu'||: here over all pairs of deals with V = m = 2."""
    z = np.array([1.0, 2.0, -3.0])
    squares = np.sum((every_transition(3, 2) @ z) ** 2, axis=1)
    assert np.mean(squares) == pytest.approx(z @ z * (3 - 1) / (2 * 3 - 1), rel=1e-12)
    T = every_transition(2, 2)  # q = T_1 ... T_(l-1) e_nu, as label_posterior finds
    for level, product in (1, np.eye(2)[None]), (2, T), (3, T[:, None] @ T):
        apart = product @ [1, -1]
        mean_square = np.mean(np.sum(apart**2, axis=-1))
        assert typical_signal(2, 2, level) == pytest.approx(math.sqrt(mean_square))


def test_lemma_22_and_corollary_23_dealing_spreads_less_than_replacement():
    """E f(row of T z) <= E f(mean of m draws with replacement) for convex f.  Hinges
    max(x - c, 0) suffice: f is a line plus positive multiples of them.  With f = exp,
    used balls obey Chernoff's bound.  It breaks if balls of a colour stick."""
    V, m, z = 3, 2, np.array([1.0, 2.0, -3.0])
    T = every_transition(V, m)[:, 0]  # the first row: one bin of m slots
    dealt, replaced = T @ z, np.mean(list(itertools.product(z, repeat=m)), axis=1)
    for c in np.unique(np.append(dealt, replaced)):  # hinges elsewhere lie in between
        gap = np.maximum(replaced - c, 0).mean() - np.maximum(dealt - c, 0).mean()
        assert gap > 0.02 if -3 < c < 2 else abs(gap) < 1e-12  # inside, 1/45 or 4/45
    used, p = m * T[:, 0], 1 / V
    for k in range(m + 1):
        tail = np.mean(used >= k if k > m * p else used <= k)
        most_likely = (k / m) ** k * (1 - k / m) ** (m - k)
        assert tail <= p**k * (1 - p) ** (m - k) / most_likely


def test_lemma_24_equation_13_and_remark_25_used_balls():
    """After nu bins, the number of used balls of a colour is hypergeometric.  By
    Hoeffding's bound (our constants) and a union over V^2 bins and colours, all stay
    within delta_H of nu m / V.  It breaks if balls are dealt in order or put back."""
    V, m = 3, 3
    used = np.rint(m * random_transitions(V, m, 2, 3000).cumsum(1)).astype(int)
    for nu, mu in itertools.product(range(1, V), range(V)):
        slots = nu * m
        ways = [math.comb(m, k) * math.comb(V * m - m, slots - k) for k in range(m + 1)]
        found = np.bincount(used[:, nu - 1, mu], minlength=m + 1)
        assert_frequencies(found, np.array(ways) / math.comb(V * m, slots))
    V, m, deals, delta = 16, 64, 200, 4e-7  # with the six above, false alarm: 1e-6
    used = m * random_transitions(V, m, 3, deals).cumsum(1)  # (deals, nu, mu)
    delta_H = math.sqrt(m / 2 * math.log(2 * V**2 * deals / delta))  # 29; 18 is seen
    assert np.abs(used - np.arange(1, V + 1)[:, None] * m / V).max() <= delta_H


def test_lemma_26_a_row_given_the_rows_before_it():
    """Given nu rows of T z, the next one averages m of the R balls left, which are not
    put back.  So its mean is theirs, its variance theirs times (R - m) / (m (R - 1)),
    over all deals with V = 3, m = 2.  Balls put back would lose (R - m) / (R - 1)."""
    V, m, z = 3, 2, np.array([1.0, 2.0, -3.0])
    T = every_transition(V, m)
    for nu, rows in itertools.product(range(V), np.unique(T, axis=0)):
        alike = (T[:, :nu] == rows[:nu]).all((1, 2))  # deals with these first nu rows
        left = np.repeat(z, (m - m * rows[:nu].sum(0)).astype(int))
        R, row = len(left), T[alike, nu] @ z
        assert row.mean() == pytest.approx(left.mean(), abs=1e-12)
        expected = left.var() / m * (R - m) / (R - 1)
        assert row.var() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("V, m, most", [(4, 4, 80), (16, 4, 6), (64, 8, 0)])
def test_lemma_29_a_fixed_direction_keeps_a_twentieth_of_its_mean(V, m, most):
    """||T z||^2 >= ||z||^2 / (20 m) with high probability.  For z = e_0 - e_1 less
    means T z = 0, which some deals give at V = m = 4.  For a Gaussian z none does at
    the larger sizes.  It would fail if the rows of T were equal."""
    T, z = random_transitions(V, m, 2, 1000), np.eye(V)[0] - np.eye(V)[1]
    g = np.random.default_rng(1).standard_normal(V)
    broken = lambda z: np.sum(((T @ z) ** 2).sum(1) < z @ z / (20 * m))
    assert broken(z) <= most  # 34 of 1000 on average at V = m = 4
    assert V == 4 or broken(g - g.mean()) == 0  # none of 13,000 at either size


# ---- Appendix C: deep quadratic functions -------------------------------------------


def test_appendix_C_definition_31_features_are_orthonormal():
    """Each support is the union of two below, in one way (Remark 32).  Supports of one
    size are disjoint, so products of pairs are orthonormal, and layers of them add up
    to f (Eq. 14).  An overlap, a wrong half or a lost weight would break it."""
    for d, seed, keep in ((8, 3, 1), *((32, seed, 0.9) for seed in range(5))):
        f = dq.random_forest(d, np.random.default_rng(seed), keep)
        below = [*map(frozenset, zip(range(d))), *f]
        assert all(sum(A < S and S - A in below for A in below) == 2 for S in f)
        assert all(0.5 <= abs(c) <= 1 for c in f.values())
        assert min(f.values()) < 0 < max(f.values()) and (len(f) < d - 1) == (d > 8)
    cube = np.array(list(itertools.product((1, -1), repeat=8))).T  # all inputs
    f = dq.random_forest(8, np.random.default_rng(3), keep=1)
    phi = np.array([cube[list(S)].prod(0) for S in f if len(S) == 2])
    a, b = np.triu_indices(4, 1)
    for rows in (phi, phi[a] * phi[b]):
        assert np.array_equal(rows @ rows.T / 256, np.eye(len(rows)))
    direct = sum(c * np.prod([cube[i] for i in S], axis=0) for S, c in f.items())
    assert np.allclose([dq.forward(f, cube), dq.evaluate(f, cube)], direct)


@pytest.mark.parametrize("learn", dq.LEARNERS.values(), ids=dq.LEARNERS)
def test_appendix_C_finds_f_exactly_and_without_a_node_not_its_ancestors(learn):
    """The learners find f, up to six times the spread of a coefficient.  Without one
    node the levels miss its ancestors, which lack a half, and nothing else.  A wrong
    threshold, rest or pairing, or samples of another level, would break it."""
    rng, levels = np.random.default_rng(0), learn is not dq.one_shot
    for f in [dq.random_forest(16, rng, keep=1) for _ in range(5)]:
        node, top = next(S for S in f if len(S) == 4), max(f, key=len)
        gap, alone = {S: c for S, c in f.items() if S != node}, {top: f[top]}
        for g in (f, gap, alone):
            x = dq.draw_signs(16, 8000, rng)
            found = learn(x, dq.evaluate(g, x))
            missed = {S for S in g if S > node or g is alone} if g is not f else set()
            assert found.keys() == (g.keys() - missed if levels else g.keys())
            assert all(abs(c - f[S]) < 0.1 for S, c in found.items())
        if levels:  # without a level above there is no noise, and the refit is exact
            y, pairs = dq.evaluate(f, x), {S: c for S, c in f.items() if len(S) == 2}
            y[0] = dq.evaluate(pairs, x[0])
            found = learn(x, y)
            assert found.keys() == f.keys()
            assert all(abs(found[S] - f[S]) < 1e-3 for S in pairs)


def test_appendix_C_biased_inputs_leave_an_error_that_samples_do_not_remove():
    """For E x = 0.5 level 1 absorbs a part of the levels above.  All supports are found
    but 2 to 6% of the variance stay, at both N; uniform signs leave less than 0.1%.
    Unbiased signs would break it, and a level fitted without the rest."""
    rng, learn = np.random.default_rng(0), dq.learn_levels
    f = dq.random_forest(16, rng, keep=1)
    assert dq.trials([f], 16, 64_000, learn, rng)[0, 3] < 1e-3
    for N in (32_000, 128_000):
        exact, true, false, left = dq.trials([f], 16, N, learn, rng, mean=0.5)[0]
        assert (exact, true, false) == (1, 15, 0) and 0.01 < left < 0.1
    nothing = dq.trials([{frozenset([0, 1]): 1}], 16, 9, lambda x, y: {}, rng, mean=0.7)
    assert nothing[0] == pytest.approx([0, 0, 0, 1 / (1 - 0.7**4)], abs=0.2)


# ---- Engineering: measurements, input, files, command line, experiments --------------


def test_a_seed_gives_the_same_weights_and_the_caller_keeps_its_threads():
    """Bit for bit, also when one looks on.  Threads come back after an error, too."""
    rhm, threads = grammar(8, 2, 2, 3), []

    def look(net, stage):
        diagnose(net, rhm, stage.level, 0)
        threads.append(torch.get_num_threads())

    with tl.torch_threads(2):
        alone, watched, other = (
            train(rhm, Config(M=64, seed=seed), report)[0][-1].W
            for seed, report in ((0, None), (0, look), (1, None))
        )
        with pytest.raises(ZeroDivisionError):
            train(rhm, Config(M=64), lambda net, stage: 1 / 0)
        assert threads == [1, 1, 1] and torch.get_num_threads() == 2
    assert torch.equal(alone, watched) and not torch.equal(alone, other)


def test_measurements_compare_with_the_exact_posterior():
    """Of a network that errs by construction, for it takes label 3 for 0."""
    rhm, target = grammar(L=1), np.eye(4)[[0, 1, 2, 0]]
    net = oracle(rhm, lambda l: target)
    errors, nearest = diagnose(net, rhm, 1, 0, n=8000)
    wrong = errors > 1.2
    assert len(errors) == 8000 and errors[~wrong].max() < 0.2
    assert 0.2 < wrong.mean() < 0.3 and nearest == pytest.approx(1 - wrong.mean())
    assert 0.7 < accuracy(net, rhm, 4000, 0) < 0.8
    tokens, labels = rhm.sample(100, 0)
    read = network_parse(net, rhm, tokens)[0][:, 0]
    assert np.array_equal(read, np.where(labels == 3, 0, labels))
    inside, between, eps_S, eps_O = theorem_7.compare_patches(net, rhm, 1, 0)
    assert len(inside) + len(between) == 500 * 499 / 2 and eps_S < 1e-3 < eps_O < 0.2
    assert inside.max() < 0.2 and 0.1 < np.mean(between < 0.2) < 0.3
    # A symbol that is never first has no q.  It is nobody's nearest:
    never = RHM([[[[0, 0]], [[0, 1]]]] * 2)
    errors, nearest = diagnose(oracle(never, lambda l: np.eye(2)), never, 2, 0)
    assert errors == pytest.approx(0.5**0.5, abs=0.1) and nearest == 1


def test_the_picture_shows_the_run():
    """The data and the titles, read from the Figure that plot returns."""
    rhm, levels = grammar(8, 2, 2, 3), [3, 2, 1]
    net, stages = train(rhm, Config(), descend=series)
    stages = [stage._replace(losses=np.arange(1, 4) * stage.level) for stage in stages]
    errors = [np.array([0.1, 0.2, 0.9]) / l for l in levels]
    figure = plot(net, rhm, stages, errors)
    *matrices, _, losses, signal = (ax for sub in figure.subfigs for ax in sub.axes)
    block = np.kron(np.eye(8), np.ones((2, 2))) == 1  # 8 symbols, 2 synonyms each
    for level, ax in zip(levels, matrices, strict=True):
        assert ax.get_title() == f"outputs of level {level}"
        matrix = ax.images[0].get_array()
        assert matrix.max() == 1 and matrix[block].max() < matrix[~block].min()
    lines = {line.get_label(): line.get_xydata().T.tolist() for line in losses.lines}
    assert lines == {f"level {l}": [[1, 2, 3], [l, 2 * l, 3 * l]] for l in levels}
    lines = {line.get_label(): line.get_xydata().T.tolist() for line in signal.lines}
    assert signal.xaxis_inverted()  # levels in the order of training
    assert lines == {
        "signal rho": [levels, [rhm.signal(l) for l in levels]],
        "typical distance": [levels, [typical_signal(8, 2, l) for l in levels]],
        "largest error": [levels, [0.9 / l for l in levels]],
        "median error": [levels, [0.2 / l for l in levels]],
        "Proposition 19": [levels, [signal_bound(2, l) for l in levels]],
    }


@pytest.mark.parametrize("V, m, s, L", SIZES)
def test_nothing_is_nan_or_infinite_at_any_size(V, m, s, L):
    """Also where kappa or rho is infinite, and where there is a single patch."""
    for uniform in (True, False):
        rhm = RHM.random(V, m, s, L, 0, uniform)
        net, stages, errors = run(rhm, Config(M=32, C=1.0))
        for stage in stages:
            assert 0 < stage.sigma < math.inf and np.isfinite(stage.losses).all()
    *_, signal = plot(net, rhm, stages, errors).subfigs[1].axes
    drawn = np.concatenate([line.get_ydata() for line in signal.lines])
    assert (np.isnan(drawn) | (0 < drawn) & (drawn < math.inf)).all()  # on a log scale
    assert schedule(16, 4, Config(eps=1e8))[2] == 1  # with W = 0 Eq. (2) is 0 / 0


@pytest.mark.parametrize("largest, width", [(3, 4), (2**40, 5), (1, 3)])
def test_distinct_rows_numbers_equal_rows_alike(largest, width):
    """Also where a row does not fit into 64 bits; network and learner rely on it."""
    ids = TOKENS[:, :width] % min(largest, 3) * max(largest // 3, 1)
    rows, number = distinct_rows(ids)
    assert torch.equal(rows[number], ids)
    assert len(rows) == len({tuple(row) for row in ids.tolist()})


def test_rules_are_a_copy_that_cannot_be_edited():
    """They may come as a list of tensors, as other implementations have them."""
    rules = [torch.tensor(level) for level in TINY.rules]
    rhm = RHM(rules)
    rules[0][:] = 0
    assert np.array_equal(rhm.rules, TINY.rules) and repr(rhm) == repr(TINY)
    with pytest.raises(ValueError, match="read-only"):
        rhm.rules[0, 0, 0, 0] = 1


GOOD = np.array([[[[0, 1], [1, 0]], [[0, 0], [1, 1]]]])  # V = m = s = 2, L = 1
ODD = RHM([[[[0, 1]], [[0, 0]]]] * 2)  # symbol 0 -> 0 1, symbol 1 -> 0 0, twice
UNTRAINED, NET = deep_cnn(4, Level(4, 2, 8, 1.0, 0)), random_network(4, 2, levels=2)


def train_with(labels):
    """Train on a sample of one's own, whose labels went wrong."""
    own = Sealed(TINY)
    own.sample = lambda n, rng, level: (np.zeros((n, 2), int), labels(n))
    return train(own, Config())


REFUSED = [
    (lambda: RHM(GOOD[0]), r"rules must be \(L, V, m, s\), got shape \(2, 2, 2\)"),
    (lambda: RHM(GOOD[:, :, :0]), r"\(L, V, m, s\), got shape \(1, 2, 0, 2\)"),
    (lambda: RHM([[[[0, 1], [1]], [[0, 0], [1, 1]]]]), "rules must be .* not ragged"),
    (lambda: RHM(GOOD + 1), "tokens must lie in 0..1, got 1 to 2"),
    (lambda: RHM(GOOD - 1), "tokens must lie in 0..1, got -1 to 0"),
    (lambda: RHM(GOOD / 2), "tokens must be integers, got float64"),
    (lambda: RHM([GOOD[0], [[[0, 0], [1, 0]]] * 2]), r"level-2 .* by symbols 0 and 1"),
    (lambda: RHM.random(4, 0, 2, 1, 0), "sizes >= 1, .* got V = 4, m = 0, s = 2"),
    (lambda: RHM.random(4, 5, 2, 1, 0), r"V m <= V\^s < 2\^63 .* got V = 4, m = 5"),
    (lambda: RHM.random(2, 1, 63, 1, 0), r"V m <= V\^s < 2\^63 .* s = 63"),
    (lambda: RHM.random(2, 1, 2, 32, 0), r"s\^L <= 2\^31 are needed, .* L = 32"),
    (lambda: TINY.signal(0), "level must be in 1..3, got 0"),
    (lambda: TINY.transition(4), "level must be in 1..3, got 4"),
    (lambda: TINY.sample_tree(1, 0, 0), "level must be in 1..3, got 0"),
    (lambda: TINY.parse(np.zeros((2, 4), int)), r"tokens must be \(n, 8\)"),
    (lambda: TINY.parse(np.zeros(8, int)), r"tokens must be \(n, 8\)"),
    (lambda: ODD.parse([[0, 1, 0, 0], [0, 1, 1, 0]]), r"e 1: .* level-2 patch \(1, 0"),
    (lambda: embed(NET, torch.full((2, 8), -1)), "must lie in 0..3, got -1 to -1"),
    (lambda: embed(NET, torch.full((2, 8), 4)), "must lie in 0..3, got 4 to 4"),
    (lambda: predict(UNTRAINED, [[0, 1]]), "outputs are not finite: with W = 0"),
    (lambda: accuracy(NET, TINY, 9, 0), "has 2 levels, level 1 of 3 is not among "),
    (lambda: accuracy(NET, grammar(L=1), 9, 0), "2 levels, level 1 of 1 is not among "),
    (lambda: train(TINY, Config(), sigmas={4: 1}), r"levels 1..3, got \[3, 4\]"),
    (lambda: train_with(lambda n: np.full(n, -1)), "labels must be integers in 0..3"),
    (lambda: train_with(lambda n: np.full(n, 4)), "labels must be integers in 0..3"),
    (lambda: train_with(lambda n: np.zeros(n)), "labels must be integers in 0..3"),
    (lambda: train_with(lambda n: np.zeros((n, 1), int)), "labels .* one per sentence"),
    (lambda: proof_constants(ODD), "needs a finite kappa and K_rho > 0"),
    (lambda: proof_constants(sum_grammar(8, 8)), "a finite kappa and K_rho > 0"),
]


@pytest.mark.parametrize("act, says", REFUSED)
def test_bad_input_is_refused_in_one_sentence(act, says):
    with pytest.raises(ValueError, match=says) as refusal:
        act()
    assert "\n" not in str(refusal.value)


def test_the_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    """Exit code 2, before training; no file is left or touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tl, "run", None)  # nothing is trained
    monkeypatch.setattr(sample_complexity, "sweep", None)
    (tmp_path / "folder.png").mkdir()
    for options, says in (
        ("--figure=new.txt", "must be a .png, .pdf or .svg file"),
        ("--figure=folder.png", "must be a .png, .pdf or .svg file"),
        ("--figure=new/a.png", "there is no folder new"),
        ("--f=kernel.json", "unrecognized arguments"),
        ("--m=5 --V=2", "V m <= V^s < 2^63"),
        ("--C=nan", "C must be above 0"),
        ("--M=0", "M must be above 0"),
        ("--ridge=0", "ridge must be above 0"),
        ("--sigma_quantile=inf", "sigma_quantile must be above 0"),
        ("--kappa=-1", "kappa must be above 0"),
        ("--eps=0", "eps must be above 0"),
        ("--C=1e8", "more than 2^31 samples"),
        ("--device=mps", "device must be cpu or cuda"),
        ("--device=cuda:99", ""),
        ("--sampler=other", "invalid choice"),
        ("--grammars=0 --figure=a.png", "grammars must be at least 1"),
        ("--grammars=1 --figure=new/a.png", "there is no folder new"),
    ):
        with pytest.raises(SystemExit) as stop:
            (sample_complexity if "grammars" in options else tl).main(options.split())
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_main_prints_both_parses_and_which_symbols_cannot_be_told_apart(
    tmp_path, monkeypatch, capsys
):
    """Sizes, sampler and seed arrive; the random streams of grammar, data, features,
    three diagnoses and test differ."""
    failures = lambda k: RHM.random(4, 3, 2, 3, k, False).assumption_6_failures()
    seed = next(k for k in itertools.count(1) if failures(k))
    seeds, default_rng = [], np.random.default_rng
    record = lambda seed: seeds.append(str(seed)) or default_rng(seed)
    monkeypatch.setattr(np.random, "default_rng", record)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    # A handful of samples: nothing is learned, and the two parses differ.
    options = "--V=4 --m=3 --L=3 --C=0.01 --M=16 --sampler=cagnetta --figure=~/a.png"
    tl.main([*options.split(), f"--seed={seed}"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    drawn = {stream for stream in seeds if stream[0] == "["}
    assert drawn == {f"[{seed}, {k}]" for k in ("1", "2", "3, 3", "3, 2", "3, 1", "4")}
    out = capsys.readouterr().out
    assert "\n".join(failures(seed)) in out
    read, parsed = (
        [[int(nu) for nu in row.split()] for row in re.findall(f"  {name}  (.*)", out)]
        for name in ("network", "grammar")
    )
    rhm = RHM.random(4, 3, 2, 3, seed, False)
    assert parsed == [row[0].tolist() for row in rhm.parse(np.array([parsed[3]]))]
    assert read != parsed and read[3] == parsed[3]


def test_only_errors_of_the_picture_cost_no_result(tmp_path, monkeypatch, capsys):
    """Results first, then one line with the reason, exit code 1, the old picture.  An
    error inside the run shows its traceback."""
    figure = tmp_path / "a.png"
    options = ["--V=8", "--m=2", "--L=3", "--C=1", "--M=16", f"--figure={figure}"]
    figure.write_text("old")

    def full_disk(path, dpi):
        Path(path).write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(tl, "plot", lambda *found: SimpleNamespace(savefig=full_disk))
    for says in "No space left on device", "matplotlib":
        with pytest.raises(SystemExit) as stop:
            tl.main(options)
        out, error = capsys.readouterr()
        assert stop.value.code == 1 and "fresh sentences right" in out
        assert error.startswith("No picture: ") and says in error
        assert figure.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if not installed
    monkeypatch.setattr(tl, "choose_sigma", lambda h, *others: h @ h)
    with pytest.raises(RuntimeError):
        tl.main(options)


README = (HERE / "README.md").read_text(encoding="utf-8")


def python(folder, *words, **environment):
    """What Python prints, run in a folder; an error fails the test."""
    options = dict(capture_output=True, text=True, check=True, cwd=folder)
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *words], **options, env=environment).stdout


def test_the_readme_shows_what_the_three_modules_print_alone(tmp_path):
    """In an empty folder, with a plotting backend that is not there: table, parse and
    picture.  Numbers agree up to the rounding of other builds.  rhm.py needs NumPy
    only, and prints rules and posterior of its grammar."""
    for name in ("rhm.py", "model.py", "train_layerwise.py"):
        shutil.copy(HERE / name, tmp_path)
    out = python(tmp_path, "train_layerwise.py", MPLBACKEND="module://not_there")
    assert (tmp_path / "layerwise.png").read_bytes().startswith(b"\x89PNG")
    [shown] = re.findall(r"```\n(V=16.*?)```", README, re.DOTALL)
    start, end = (part.splitlines() for part in shown.split("...\n"))
    printed = out.splitlines()
    printed = printed[: len(start)] + printed[-len(end) :]
    number = re.compile(r"\d+\.?\d*")
    for pair in zip(start + end, printed):
        pair = [re.sub(r"[\d.]+ s$", "", line) for line in pair]  # without the seconds
        texts = [number.sub("#", line).split() for line in pair]
        numbers = [[float(x) for x in number.findall(line)] for line in pair]
        assert texts[0] == texts[1]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.02)
    (tmp_path / "torch.py").write_text("raise ImportError")
    lines = python(tmp_path, "-W", "error", "rhm.py").splitlines()
    rhm = RHM.random(4, 2, 2, 3, np.random.default_rng(22))
    for l, rules in enumerate(rhm.rules):
        [line] = [line for line in lines if line.startswith(f"  level {l} -> {l + 1}:")]
        assert all(f"{nu} -> {a} | {b}" in line for nu, (a, b) in enumerate(rules))
    for (a, b), q in zip(rhm.rules[1], rhm.label_posterior(2)):
        assert f"  {a} or {b}:  q = {q}" in lines


def test_the_readme_code_runs_as_it_stands(tmp_path):
    """Its block of use, in another folder, with the modules on the path."""
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    out = python(tmp_path, "-W", "error", "-c", block, PYTHONPATH=str(HERE))
    assert out.startswith("1.0\n")


def test_the_readme_names_functions_and_tests_that_exist():
    """In its map and its exercises.  A lemma of the map has a test of its name."""
    tests = " ".join(name for name in globals() if name.startswith("test_"))
    table = README.split("## From the paper to the code")[1].split("\n## ")[0]
    rows = re.findall(r"^(.*) \| (.*)$", table, re.MULTILINE)[2:]
    assert len(rows) > 20
    for statement, code in rows:
        for lemma in re.findall(r"Lemma \d+", statement):
            assert lemma.lower().replace(" ", "_") in tests, lemma
        for home, attribute in re.findall(r"`(\w+)\.?(\w*)`", code):
            found = globals().get(home) or getattr(tl, home)
            assert not attribute or hasattr(found, attribute), code
    for word in re.findall(r"pytest -k (\w+)", README):
        assert word in tests, word


def test_section_4_2_estimates_of_the_sweep_on_curves_made_by_hand(capsys):
    """N* is interpolated in log N, curves that never reach 90% are left out, and the
    exponent is the slope of log N* against log m."""
    N, Curve = np.array([10, 100, 1000, 9999]), sample_complexity.Curve
    shares = np.array([[0, 0.2], [0.8, 0.3], [1.0, 0.4], [0.7, 0.5]])
    [log] = sample_complexity.log_samples_needed(N, shares)
    assert np.exp(log) == pytest.approx(100 * 10**0.5)
    assert dq.samples_needed(N, shares[:, 0]) == pytest.approx(100 * 10**0.5)
    assert np.isnan(dq.samples_needed(N, shares[:, 1]))
    curves = [Curve("deep", 16, m, 3, m**3 * N, shares[:, :1]) for m in (2, 4, 6)]
    curves.append(Curve("one level", 16, 4, 2, N, shares))
    sample_complexity.print_exponents(curves)
    rule = np.polyfit(np.log([2, 4, 6]), np.log([28, 336, 1548]), 1)[0]  # m sum of m^l
    last = ["16", "3", "3.00", "3.0", "to", "3.0", f"{rule:.2f}", "3", "6"]
    assert capsys.readouterr().out.splitlines()[-1].split() == last
    [(key, found)] = sample_complexity.samples_needed(curves).items()
    assert key == (16, 3) and found[4] == pytest.approx(log + 3 * math.log(4))
    found[6] = np.append(found[6], found[6] - 0.6)
    slope, local = sample_complexity.exponent([*found], [*found.values()])
    assert local == pytest.approx([3, 3 - 0.3 / math.log(1.5)])
    assert local[1] < slope < 3


def test_section_4_2_the_sweep_counts_all_samples_and_sets_K_rho_0_apart(
    monkeypatch, tmp_path, capsys
):
    """With accuracies made up: 10% where K_rho = 0, else 60 to 80% until C = 1."""
    seen, rng, job = [], np.random.default_rng(0), ("deep", 2, 2, 2)

    def fake_train(rhm, config, descend):
        seen.append((rhm, config))
        return None, [SimpleNamespace(N=round(config.C * N)) for N in (8, 16)]

    def fake_accuracy(net, rhm, seed):
        untrained = rng.uniform(0.6, 0.8) if rhm.K_rho > 0 else 0.1
        return 1 if seen[-1][1].C == 1 and rhm.K_rho > 0 else untrained

    monkeypatch.setattr(sample_complexity, "train", fake_train)
    monkeypatch.setattr(sample_complexity, "fresh_accuracy", fake_accuracy)
    [curve] = sample_complexity.sweep(tmp_path / "a.png", [job], grammars=12)
    assert curve.N.tolist() == [6, 12, 24] and curve.shares.shape == (3, 12)
    out, drawn = capsys.readouterr().out, len(seen) // 3
    for shares in curve.shares:
        assert f"{100 * shares.mean():.2f}% {100 * shares.std():5.2f}" in out
    logs = sample_complexity.log_samples_needed(curve.N, curve.shares)
    N, spread = np.exp([logs.mean(), logs.std()])
    assert f"N* = {N:.0f} (x/: {spread:.2f}), {N / 8:.2f} V m^L" in out
    assert out.count(f" 10.00% of {drawn - 12} ") == 3  # 2 of 3 grammars are so
    for k, (rhm, config) in enumerate(seen[:drawn]):
        assert config.seed == k and config.M == 16
        assert np.array_equal(rhm.rules, RHM.random(2, 2, 2, 2, k).rules)


def test_remark_8_a_network_of_one_level_sees_whole_sentences():
    """It learns a grammar of one level, with the sigma and the ridge it is given."""
    rhm, learn_one_level = grammar(8, 2, 2, 1), sample_complexity.train_one_level
    nets = [learn_one_level(rhm, 2000, *given) for given in ((1,), (2,), (1, 1))]
    assert sample_complexity.fresh_accuracy(nets[0], rhm, 0) == 1
    assert len({net[1].W.norm().item() for net in nets}) == 3
    sealed = Sealed(grammar(8, 2, 2, 2))
    sealed.d = 4
    sample_complexity.fresh_accuracy(learn_one_level(sealed, 100, 1, seed=7), sealed, 7)
    drawn = [(rng, level, tokens.shape) for rng, level, tokens, _ in sealed.drawn]
    assert drawn == [([7, 1], 1, (100, 4)), ([7, 4], 1, (2000, 4))]  # train, test


def test_backpropagation_counts_sentences_until_fresh_ones_are_right(monkeypatch):
    """It learns; then the accuracy is replaced, and the third look finds 99%."""
    rhm, adam = grammar(8, 2, 2, 2), dict(M=32, learning_rate=0.01)
    assert backpropagation.backpropagation(rhm, 5, **adam, most=10)[0] < 10
    for learn, setting, sentences in (
        (backpropagation.backpropagation, adam, 3 * 10 * 256),
        (backpropagation.layerwise, dict(M=8, C=1), (1 + 2 + 4) * 16 * (2 + 4)),
    ):
        looks, shares = [], iter([0.5, 0.98, 0.99])
        look = lambda net, rhm, n, rng: looks.append((n, rng)) or next(shares)
        monkeypatch.setattr(backpropagation, "accuracy", look)
        assert learn(rhm, 5, **setting)[1] == sentences
        assert looks == 3 * [(2000, [5, 4])]


def test_the_notebook_measures_what_the_run_prints(capsys):
    """Also what Theorem 7 asks, the bottom level first, and eight times the samples."""
    rhm, config = grammar(8, 2, 2, 2), Config(C=0.5, seed=3)
    _, stages, all_errors = run(rhm, config)
    printed, measured = capsys.readouterr().out, measurements.evaluate(rhm, config)
    errors, nearest = measured.errors, measured.nearest[1]
    assert f"{np.median(errors):8.4f} {errors.max():8.4f} {nearest:7.2f}%\n" in printed
    assert f"{measured.percent:.2f}% of 10000 fresh sentences right" in printed
    assert [stage.level for stage in stages] == [2, 1]
    assert np.array_equal(all_errors[1], errors)
    asked, found = theorem_7.asked(rhm), theorem_7.found(rhm, config)
    for l, c in proof_constants(rhm).items():  # Assumption 9 follows from the errors
        assert asked[l].inside == 2 * c.eps
        assert asked[l].between == rhm.signal(l) - 2 * c.eps
    assert found[2].eps_S == 0 < 0.1 < found[1].eps_S  # level 2 reads tokens
    rows = list(theorem_7.table(asked, found))
    assert rows[0].startswith("level 2, 1 |") and rows[2].endswith(" | 32, 16")
    more = measurements.MoreSamples(rhm, (2,))
    assert [len(more.sample(10, 0, l)[1]) for l in (1, 2)] == [10, 80]


def test_the_histogram_shows_the_distances_of_one_symbol_and_of_two():
    """Also sigma and rho of the level that it shows."""
    net, stages = train(TINY, Config(), descend=series)
    inside, between = histogram.token_distances(net, TINY, 2, 0, pairs=1000)
    assert np.median(inside) < np.median(between)
    [ax] = histogram.plot({2: (inside, between)}, TINY, stages).axes
    lines = {line.get_label(): line.get_xdata()[0] for line in ax.lines}
    assert lines["sigma"] == stages[1].sigma and lines["rho"] == TINY.signal(3)
    bars = {bars[0].get_label(): bars.datavalues.sum() for bars in ax.containers}
    assert bars == {"of one symbol": len(inside), "of two symbols": len(between)}
