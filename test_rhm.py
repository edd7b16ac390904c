"""The paper again, as tests: each is a claim, named after its place in the paper.

`pytest -k lemma_15` runs what is about Lemma 15.  P is |P_l| = V m.  Numbers are those
of the COLT version; slips are those of experiments/README.md.  The last section is
about this code and no claim of the paper.  The proof with its own constants, and
Appendix B, are in experiments/test_proof.py.

All seeds are fixed.  A false alarm is the failure of a correct program for another
seed.  Where a theorem bounds its probability, a comment says so; other tolerances are
at least six standard deviations of what fifteen or more other seeds gave.
"""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from torch.nn import functional as F

import train_layerwise as tl
from model import Level, deep_cnn, distinct, embed
from rhm import RHM, typical_signal
from train_layerwise import (
    Config, accuracy, averages, diagnose, draw, gradient_descent, network_parse, plot,
    predict, run, schedule, tally, train, typical_distance,
)  # fmt: skip

torch.set_num_threads(1)  # two threads stall beside a busy program


def grammar(V=4, m=2, s=2, L=3, seed=0):
    """The first grammar from `seed` on with K_rho > 0; by default of 512 sentences."""
    rhms = (RHM.random(V, m, s, L, k) for k in itertools.count(seed))
    return next(rhm for rhm in rhms if rhm.K_rho > 0)


TINY = grammar(seed=22)  # of `python rhm.py`; P = 8
USUAL = grammar(16, 4, 2, 4)  # of the default run; P = 64
NEVER = RHM([[[[0, 0]], [[0, 1]]]] * 2)  # m = 1: symbol 1 is never first in its level


def learn(rhm, **settings):
    """A trained network and its accuracy."""
    net, _ = train(rhm, Config(**settings))
    return net, accuracy(net, rhm, 10_000, 1)


@pytest.fixture(scope="module")
def usual():
    """The network and the stages of the default run."""
    return train(USUAL, Config())


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
    net, _ = train(rhm, Config(C=250))
    first = predict(net[:2], [[0, 2], [1, 1], [0, 0], [2, 2]])[:, 0]
    assert np.abs(first - q[[0, 0, 1, 2]]).max() < 0.1
    sentence = np.array([[0, 2, 0, 0]])
    seen = [symbols.tolist() for symbols in network_parse(net, rhm, sentence)]
    assert seen == [[[0]], [[0, 1]], [[0, 2, 0, 0]]]
    assert seen == [symbols.tolist() for symbols in rhm.parse(sentence)]
    assert predict(net, sentence)[0, 0] == pytest.approx([1, 0, 0], abs=0.1)


def test_theorem_7_the_conclusion_on_the_usual_grammar(usual):
    """Trained on sentences and labels alone, the network learns the labels of a
    grammar that satisfies Assumption 6: all 10,000 fresh ones are right, and so is the
    symbol of every first patch, read by the nearest q.  Its settings are those of the
    default run; the proof's are in experiments/test_proof.py."""
    assert USUAL.kappa == 1 and USUAL.K_rho == 1  # K_rho = 1 is of this seed
    net, _ = usual
    assert accuracy(net, USUAL, 10_000, 1) == 1
    for level in range(1, USUAL.L + 1):
        errors, nearest = diagnose(net, USUAL, level, 2)
        assert nearest == 1 and np.median(errors) < USUAL.signal(level) / 2


# ---- Section 1, Principle 2: take one of its three conditions away -------------------
#
# The principle says that they are sufficient.  These are our examples, not its claims.


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
    sums, shuffled = sum_grammar(8, 8, 8), sum_grammar(0, 0, 0)
    assert all((sums.label_posterior(l) == 1 / 8).all() for l in (2, 3))
    assert learn(sums, C=10)[1] < 1 / 8 + 0.03
    assert learn(shuffled, C=10)[1] > 0.98


def test_principle_2_ii_no_clean_signal_then_noise():
    """No grammar breaks (ii), since Eq. (8) holds for all; a learner can.  With a sigma
    far below the spread of its inputs, each representation of a patch is a patch of its
    own, too rare to average out what lies above it.  Level 3 reads exact tokens and is
    right; level 2 learns noise, and the labels are at chance."""
    rhm = grammar(8, 4, 3, 3)
    assert learn(rhm)[1] > 0.999
    net, share = learn(rhm, sigma=0.02)
    nearest = {l: diagnose(net, rhm, l, 2)[1] for l in (3, 2)}
    assert nearest[3] == 1 and nearest[2] < 0.5 and share < 1 / 8 + 0.05


def test_principle_2_iii_not_identifiable_then_exactly_those_two_symbols_merge():
    """Rows 0 and 1 of the top table hold every label once: symbols 0 and 1 of level 1
    share a flat q.  The network merges these two and no others, and scores what the
    best guesser scores who cannot tell 0 from 1.  The ridge is three times the usual
    one: else level 1 zooms in on the sampling noise by which the two differ."""
    twins, shuffled = sum_grammar(2, 0, 0, seed=3), sum_grammar(0, 0, 0, seed=3)
    q = twins.label_posterior(2)
    assert (q[:2] == 1 / 8).all()
    assert learn(shuffled, ridge=0.03, C=10)[1] > 0.98
    net, share = learn(twins, ridge=0.03, C=10)
    tree = twins.sample_tree(10_000, 2, level=2)
    outputs = predict(net[:3], tree[-1])[:, 0]
    means = np.array([outputs[tree[1][:, 0] == nu].mean(0) for nu in range(8)])
    closest_others = pairwise(q[1:])[np.triu_indices(7, 1)].min()
    merged = np.triu(pairwise(means) < closest_others / 2, 1)
    assert np.argwhere(merged).tolist() == [[0, 1]]
    votes = np.zeros((8, 8, 8))  # patch of level 1 with symbol 1 read as 0, by label
    for label, patches in enumerate(twins.rules[0]):
        for a, b in np.where(patches == 1, 0, patches):
            votes[a, b, label] += 1
    assert share == pytest.approx(votes.max(2).sum() / votes.sum(), abs=0.05)


# ---- Sections 2 and 3: the grammar, the network, the training ------------------------

SIZES = [  # (V, m, s, L): usual ones, m = 1, s = 1, L = 1, V = 1, V^s near 2^63
    (16, 4, 2, 4), (5, 3, 3, 2), (3, 2, 4, 2), (7, 1, 2, 3), (6, 1, 1, 3), (5, 2, 2, 1),
    (1, 1, 1, 1), (1, 1, 3, 2), (2, 2, 62, 1), (90, 9, 9, 1),
]  # fmt: skip


@pytest.mark.parametrize("V, m, s, L", [*SIZES, (200, 200, 2, 2)])
def test_definition_4_random_grammars_are_uniform_and_have_one_parse(V, m, s, L):
    """Every level has V symbols with m rules each, and no patch twice, for both
    samplers.  So a sentence has one derivation, and parse finds it.  Appendix B's
    sampler begins exactly m patches with each symbol."""
    for uniform, n in (True, 200), (False, 200), (False, 0):
        rhm = RHM.random(V, m, s, L, rng=0, uniform_first_token=uniform)
        assert rhm.rules.shape == (L, V, m, s)  # RHM refuses a patch that stands twice
        for rules in rhm.rules:
            if uniform:
                assert (np.bincount(rules[..., 0].ravel(), minlength=V) == m).all()
        tree = rhm.sample_tree(n, 1)
        for recovered, drawn in zip(rhm.parse(tree[-1]), tree, strict=True):
            assert np.array_equal(recovered, drawn)
            assert recovered.dtype == drawn.dtype == np.int64


@pytest.mark.parametrize("level", [1, 2, 3])
def test_definition_3_derivations_follow_the_exact_law(level):
    """The label is uniform, and each rule has probability 1/m, independently.  So
    sample_tree(level) has the law of the same columns of all 384 derivations, which
    are equally likely.  The grammar has kappa > 1, where uniform symbols differ."""
    rhm, n = RHM.random(3, 2, 2, 3, 0, uniform_first_token=False), 40_000
    assert rhm.kappa > 1
    tree = rhm.sample_tree(n, 2, level)
    columns = [all_[:, : part.shape[1]] for all_, part in zip(derivations(rhm), tree)]
    rows = np.concatenate([np.hstack(columns), np.hstack(tree)])
    _, kind = np.unique(rows, axis=0, return_inverse=True)
    counts = np.bincount(kind.ravel()[384:], minlength=kind.max() + 1)
    p = np.bincount(kind.ravel()[:384]) / 384
    assert len(p) == len(counts)  # no other derivations
    # Bernstein's inequality, cell by cell.  False alarm: below 1e-6.
    log = math.log(2 * len(p) / 3e-7)
    allowed = log / 3 + np.sqrt(log**2 / 9 + 2 * log * n * p * (1 - p))
    assert (np.abs(counts - n * p) <= allowed).all()
    tokens, labels = rhm.sample(n, 2, level)  # the same seed, the same sample
    assert np.array_equal(tokens, tree[-1]) and np.array_equal(labels, tree[0][:, 0])


def random_network(V, s, M=20, levels=2, seed=0):
    """An untrained network in float64, with random W."""
    rng = np.random.default_rng(seed)
    net = deep_cnn(V, *(Level(V, s, M, 1.0, rng) for _ in range(levels))).double()
    for level in net[1:]:
        level.W.data = torch.tensor(rng.standard_normal((V, 2 * M)))
    return net


TOKENS = torch.from_numpy(np.random.default_rng(0).integers(5, size=(200, 18)))


def test_equations_1_and_2_the_network_is_a_strided_convolution():
    """One W serves all patches of a level.  So the network is torch's conv1d with
    kernel = stride = s, from one-hot sentences up, divided by the sum of the entries.
    embed computes equal patches once and gives the same, after 0 to 2 levels."""
    V, s, M = 5, 3, 20
    net, tokens = random_network(V, s, M), TOKENS[:40]
    h = F.one_hot(tokens, V).double().transpose(1, 2)  # (n, V, width)
    for k, level in enumerate(net[1:], start=1):
        assert torch.allclose(embed(net[:k], tokens.int()), h.transpose(1, 2))
        weights = level.omega.view(M, s, V).transpose(1, 2)  # out, in, place
        angles = F.conv1d(h, weights, stride=s)  # (n, M, width / s)
        x = torch.cat([angles.cos(), angles.sin()], 1) / M**0.5
        scores = F.conv1d(x, level.W[:, :, None])  # (n, V, width / s)
        h = scores / scores.sum(1, keepdim=True)  # Eq. (2)
    assert torch.allclose(embed(net, tokens), h.transpose(1, 2))
    assert torch.allclose(net(tokens), h.transpose(1, 2))


def test_equation_6_and_lemma_12_features_approximate_the_gaussian_kernel():
    """<Phi(h), Phi(h')> is near exp(-||h-h'||^2 / (2 sigma^2)), and ||Phi(h)|| = 1.
    Lemma 12: the largest gap over points of the unit ball falls as M^(-1/2).  Other
    frequencies than Gaussian ones of width 1 / sigma leave a gap that does not fall."""
    rng, sigma, widths = np.random.default_rng(0), 0.5, [16, 64, 256, 1024]
    h = rng.standard_normal((20, 8))
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    kernel = torch.tensor(np.exp(-(pairwise(h) ** 2) / (2 * sigma**2)))

    def error(M):
        x = Level(4, 2, M, sigma, rng).double().patch_embedding(torch.tensor(h))
        assert torch.allclose(x.norm(dim=1), torch.ones(20).double())
        return (x @ x.T - kernel).abs().max().item()

    errors = [np.mean([error(M) for _ in range(12)]) for M in widths]
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.08  # six standard deviations of the fitted slope


def some_patches(rows=40, s=2, V=3, M=16):
    """Distinct patches with label counts, and an untrained level, in float64."""
    rng = np.random.default_rng(0)
    h = torch.tensor(rng.standard_normal((rows, s, V)))
    counts = torch.tensor(rng.integers(5, size=(rows, V)))
    return h, counts, Level(V, s, M, 1.0, rng).double()


def test_equation_3_gradient_descent_follows_autograd(monkeypatch):
    """30 steps are 30 steps of torch.optim.SGD on the loss as printed, a term for each
    sample.  So Eq. (3) sees the samples only through the counts of equal patches.  A
    wrong gradient or a wrong loss would differ from the second step on."""
    h, counts, level = some_patches()
    monkeypatch.setattr(tl, "CHUNK", 16)  # the averages are gathered in three parts
    both = averages(level, h, counts / counts.sum().double())
    W, losses = gradient_descent(*both, 0.05, 1.5, 30)
    # A row and a label for each sample:
    rows, labels = counts.nonzero().repeat_interleave(counts[counts > 0], dim=0).T
    x, e = level.patch_embedding(h.flatten(1))[rows], F.one_hot(labels, 3)
    expected = torch.zeros(3, 32, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([expected], lr=1.5)
    for found in losses:
        loss = 0.5 * (e - x @ expected.T).square().sum(1).mean()
        loss = loss + 0.05 / 2 * expected.square().sum()
        assert loss.item() == pytest.approx(found.item(), rel=1e-10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(losses) == 30 and torch.allclose(W, expected, atol=1e-12)


class Sealed:
    """All that a learner may see of a grammar; notes what it has drawn."""

    def __init__(self, rhm):
        self.V, self.m, self.s, self.L = rhm.V, rhm.m, rhm.s, rhm.L
        self._rhm, self.drawn = rhm, []

    def sample(self, n, rng, level=1):
        tokens, labels = self._rhm.sample(n, rng, level)
        self.drawn.append((level, tokens, labels))
        return tokens, labels


def test_section_2_3_the_learner_needs_only_samples_and_sizes():
    """Stages l = L..1 draw N^(l) = C s L P m^l fresh first patches each, rounded up.
    Nothing else of the grammar is used than its sizes.  descend gets the averages and
    the schedule, and a level is trained when it is reported."""
    rhm, stages, given = grammar(8, 2, 2, 3), [], []
    sealed = Sealed(rhm)

    def report(net, stage):
        assert np.median(diagnose(net, rhm, stage.level, 0, n=500)[0]) < 0.2
        stages.append(stage)

    def descend(*averages_and_schedule):
        given.append(averages_and_schedule)
        return gradient_descent(*averages_and_schedule)

    config = Config(C=3.01, ridge=0.02, eps=0.05)
    net, returned = train(sealed, config, report, descend)
    drawn = [(level, len(tokens)) for level, tokens, _ in sealed.drawn]
    assert drawn == [(3, 2312), (2, 1156), (1, 578)]  # 18.06 * 16 * (8, 4, 2)
    assert drawn == [(stage.level, stage.N) for stage in stages] and returned == stages
    labels = [labels[:578].tolist() for *_, labels in sealed.drawn]
    assert not any(a == b for a, b in itertools.combinations(labels, 2))  # fresh
    strings = [len(np.unique(tokens, axis=0)) for _, tokens, _ in sealed.drawn]
    assert strings == [stage.strings for stage in stages]
    lambda_W, eta, T = schedule(8, 2, ridge=0.02, eps=0.05)
    for stage, (covariance, correlation, *settings) in zip(stages, given, strict=True):
        assert settings == [lambda_W, eta, T] and len(stage.losses) == T
    assert accuracy(net, rhm, 2000, 9) == 1


def test_section_2_3_any_optimiser_would_do():
    """Eq. (3) is ridge regression, which has one minimum.  So Adam by autograd, from
    the two averages alone, ends as low as the closed form, and the labels are right.
    An optimiser that may not use gradients, or a wrong average, would break it."""
    lowest = []

    def adam(covariance, correlation, lambda_W, eta, T):
        curvature = covariance + lambda_W * torch.eye(len(covariance))
        loss = lambda W: 0.5 + (W * (W @ curvature / 2 - correlation)).sum()
        lowest.append(loss(torch.linalg.solve(curvature, correlation, left=False)))
        W = torch.zeros_like(correlation, requires_grad=True)
        optimizer, losses = torch.optim.Adam([W], lr=0.1), []
        for _ in range(300):
            losses.append(loss(W))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        return W, torch.stack(losses)

    net, stages = train(TINY, Config(M=64), descend=adam)
    assert accuracy(net, TINY, 2000, 1) == 1
    for stage, minimum in zip(stages, lowest, strict=True):
        assert len(stage.losses) == 300
        assert minimum.item() - 1e-4 < stage.losses[-1] < minimum.item() + 0.01


def test_section_2_3_a_level_trained_on_first_patches_works_at_every_place(usual):
    """The rules are the same at every place, so one W serves all patches.  The default
    network recovers the latent symbols at every place, with the same median error.  A
    level that used its place would do so at the first only."""
    tree = USUAL.sample_tree(2000, 1)
    net, _ = usual
    read = network_parse(net, USUAL, tree[-1])
    for l in range(USUAL.L):
        assert (read[l] == tree[l]).mean(0).min() >= 0.97  # for other seeds; here 1
        h = predict(net[: USUAL.L - l + 1], tree[-1])
        errors = np.linalg.norm(h - USUAL.label_posterior(l + 1)[tree[l]], axis=2)
        medians = np.median(errors, axis=0)  # by place
        assert medians == pytest.approx(medians.mean(), rel=0.07)


def oracle(rhm, target, M=16_384):
    """W = sum of target(l) x_mu^T over all patches at each level.

    sigma is Lemma 10's, corrected (slip 3), for overlaps of 0.01.
    """
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
    """1: W = sum e_parent x_mu^T outputs the one-hot parent.  2, without latents: W =
    sum q_mu x_mu^T outputs q_mu.  3: random features for x_mu do both, up to less than
    half of the distance between two targets; with a wide sigma they would not."""
    tree = derivations(TINY)
    for target in (lambda l: np.eye(TINY.V)), TINY.label_posterior:
        net = oracle(TINY, target)
        for l in range(1, TINY.L + 1):
            outputs = predict(net[: TINY.L - l + 2], tree[-1])
            errors = np.linalg.norm(outputs - target(l)[tree[l - 1]], axis=2)
            apart = pairwise(target(l))[np.triu_indices(TINY.V, 1)]
            assert errors.max() < apart.min() / 2


# ---- Section 4 and Appendix A: the posterior q, sigma, steps and samples -------------


@pytest.mark.parametrize("uniform", [True, False])
def test_equation_4_label_posterior_equals_enumeration(uniform):
    """q_mu^(l) is a share of all derivations, which are equally likely.  It depends on
    mu through its parent only; kappa, rho and K_rho follow.  Posteriors, transitions or
    powers of m of a neighbouring level would break it."""
    for seed in range(8):  # P = 6, m = 2
        rhm = RHM.random(3, 2, 2, 3, seed, uniform_first_token=uniform)
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
    copying = [[[0, 0], [0, 1]], [[1, 0], [1, 1]]]  # first tokens repeat the label
    assert RHM([copying] * 2).K_rho == pytest.approx(2)  # of level 1: sqrt 2 m^(1/2)


def test_assumption_6_failures_name_the_level_and_the_symbols():
    """(b) fails by two symbols of equal posterior, (a) by a symbol that is never first.
    One flat posterior alone breaks nothing.  Posteriors are quotients of whole numbers:
    products of the shares T_l would have rounding errors, and rho > 0 for equal q."""
    merged = RHM([[[[0, 1], [1, 0]], [[0, 0], [1, 1]]]] * 2)
    [line] = merged.assumption_6_failures()
    assert "6(b) fails at level 2: K_rho = 0, symbols [0, 1] of level 1" in line
    assert sum_grammar(*[7] * 8, V=7).signal(8) == 0  # all q are flat
    [line] = NEVER.assumption_6_failures()
    assert "6(a) fails at level 2: kappa = inf, symbols [1] of level 1" in line
    assert NEVER.kappa == NEVER.signal(2) == math.inf
    # Symbol 1 is as often first under each of the three labels:
    top = [[[0, 0], [0, 1], [1, 0]], [[0, 2], [1, 1], [2, 0]], [[1, 2], [2, 1], [2, 2]]]
    flat = RHM([top, sum_grammar(0, V=3).rules[0]])
    assert np.array_equal(flat.label_posterior(2)[1], [1 / 3] * 3)
    assert flat.K_rho > 0 and not flat.assumption_6_failures()


def test_equation_8_features_and_label_are_independent_given_the_patch():
    """P[label | leaves under the first patch mu] = q_mu over all derivations.  This is
    Eq. (8), whatever the features, which are functions of these leaves.  The leaves of
    the patch beside it would change the law."""
    tree = derivations(TINY)
    for level in (1, 2, 3):
        q = TINY.label_posterior(level)[tree[level - 1][:, 0]]
        width = TINY.s ** (4 - level)  # of the leaves, which determine mu
        assert np.allclose(law_of_label(tree, tree[3][:, :width]), q)
        beside = law_of_label(tree, tree[3][:, : 2 * width])
        assert level == 1 or not np.allclose(beside, q)


def test_lemma_10_sigma_is_in_proportion_to_the_distances_of_tokens(usual):
    """Lemma 10 takes the smallest distance of two symbols; a learner can measure the
    root mean square over all pairs of tokens, each weighed by its counts.  Lemmas 21
    and 26 predict it, up to the 1/V pairs of one symbol.  Counts that are left out, or
    the first place only, would break it."""
    h, counts, _ = some_patches(s=3)
    h = h * torch.tensor([[1.0], [2.0], [3.0]])  # by place
    counts = counts * torch.arange(40)[:, None]
    shares = counts / counts.sum().double()
    weights = shares.sum(1).repeat_interleave(3).numpy() / 3
    mean_square = weights @ pairwise(h.flatten(0, 1).numpy()) ** 2 @ weights
    assert typical_distance(h, shares) == pytest.approx(math.sqrt(mean_square))
    for stage in usual[1]:
        typical = typical_signal(16, 4, stage.level + 1) if stage.level < 4 else 2**0.5
        assert stage.sigma == pytest.approx(typical / 2 * (15 / 16) ** 0.5, rel=0.15)


@pytest.mark.parametrize("V, m", [(1, 1), (2, 2)])
def test_lemma_15_and_17_gradient_descent_contracts_at_every_step(V, m):
    """||W_t - W_*|| <= exp(-t/P) ||W_*|| for all t: a step of 2 / (1 + 2 lambda_W)
    shrinks every direction of curvature lambda_W to 1 + lambda_W.  Twice the step
    diverges along a frequent patch, half of it is too slow along rare ones.  For a
    single patch the printed step, 2 / (1 + lambda_W), swings for ever (slip 2)."""
    P, rng = V * m, np.random.default_rng(0)
    # Orthonormal x of 33 strings, a frequent one and 32 rare ones, or a single one:
    p = torch.tensor([1.0] if P == 1 else [0.7] + 32 * [0.3 / 32]).double()
    x = torch.linalg.qr(torch.tensor(rng.standard_normal((len(p), len(p)))))[0]
    e = torch.eye(V).double()[torch.arange(len(p)) % V]
    both = x.T @ (p[:, None] * x), e.T @ (p[:, None] * x)
    W_star = both[1] @ torch.linalg.inv(both[0] + torch.eye(len(p)) / P)
    lambda_W, eta, T = schedule(V, m, ridge=1.0, eps=0.01)
    assert (lambda_W / 100, T) == schedule(V, m, ridge=0.01, eps=0.01)[::2]
    steps = P * math.log(100 * P * V**0.5 / 0.01)  # Lemma 17
    assert lambda_W == 1 / P and T == math.ceil(steps)
    printed = 2 / (1 + lambda_W)
    for step in (eta, printed) if P > 1 else (eta,):
        for t in range(T + 1):
            W, _ = gradient_descent(*both, lambda_W, step, t)
            assert (W - W_star).norm() <= math.exp(-t / P) * W_star.norm() + 1e-12
    assert W_star.norm() <= P
    if P == 1:
        W = [gradient_descent(*both, lambda_W, printed, t)[0] for t in range(6)]
        assert torch.cat(W).abs().flatten().tolist() == [0, 1, 0, 1, 0, 1]
    else:
        for step in 2 * eta, eta / 2:
            W, _ = gradient_descent(*both, lambda_W, step, T)
            assert (W - W_star).norm() > math.exp(-T / P) * W_star.norm()


def test_lemma_18_a_posterior_averages_the_samples_of_its_patch_only():
    """With u = kappa P log(4P/delta) / N, here kappa = 1: p^ = p (1 +- (c u)^(1/2)),
    c = 2 below, and 3 above is enough, and ||q^ - q|| <= (8 u)^(1/2).  Only N / P
    samples show a patch, so the mean square of ||q^ - q|| is P (1 - ||q||^2) / N.
    Most patches miss the printed bound, which has no P (slip 1)."""
    P, N, L, rng = 64, 20_000, USUAL.L, np.random.default_rng(1)
    u = P * math.log(4 * P / 1e-8) / N  # false alarm: 40 delta = 4e-7
    ratios, missed = [], []
    for _ in range(40):
        strings, counts = tally(*USUAL.sample(N, rng, L), 16)
        parent = RHM(USUAL.rules[L - 1 :]).parse(strings)[0][:, 0]  # level L alone
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
    """N^(l) proportional to P m^l leave q^ an error of (P / N)^(1/2), in proportion to
    m^(-l/2) as the bound of rho is.  Measured: the median error of the outputs is about
    that at all levels.  Four times the samples halve it."""
    rhm, medians = grammar(16, 3, 2, 4, seed=1), []
    for C in (1.25, 5):
        net, stages = train(rhm, Config(C=C))
        for stage in stages:
            errors, _ = diagnose(net, rhm, stage.level, 2)
            medians.append(np.median(errors))
            assert 0.4 < medians[-1] * (stage.N / 48) ** 0.5 < 1.75
    ratios = np.divide(medians[:4], medians[4:])
    assert 1.6 < np.prod(ratios) ** (1 / 4) < 2.6  # N^(-1/4) gives 1.4, 1/N gives 4


# ---- Engineering: measurements, input, command line ----------------------------------


def test_a_seed_gives_the_same_weights_also_when_one_looks_on():
    """The same bit for bit.  A measurement that drew from the training stream, or a
    stream that ignores the seed, would break it."""
    rhm = grammar(8, 2, 2, 3)
    look = lambda net, stage: diagnose(net, rhm, stage.level, 0)
    alone, watched, other = (
        train(rhm, Config(M=64, seed=seed), report)[0][-1].W
        for seed, report in ((0, None), (0, look), (1, None))
    )
    assert torch.equal(alone, watched) and not torch.equal(alone, other)


def test_draw_tallies_block_by_block(monkeypatch):
    """The counts of three blocks are those of all samples together.  A block that is
    lost, counted twice, or drawn from the seed of another, would break it."""
    sealed = Sealed(TINY)
    monkeypatch.setattr(tl, "BLOCK", 4000)
    strings, counts = draw(sealed, 9000, np.random.default_rng(0), level=3)
    _, tokens, labels = zip(*sealed.drawn)
    assert not np.array_equal(tokens[0], tokens[1])
    tokens, labels = np.concatenate(tokens), np.concatenate(labels)
    assert len(tokens) == 9000
    assert all(map(torch.equal, (strings, counts), tally(tokens, labels, 4)))
    for string, row in zip(strings.numpy(), counts):
        same = (tokens == string).all(1)
        assert row.tolist() == np.bincount(labels[same], minlength=4).tolist()


@pytest.mark.parametrize("largest, width", [(3, 4), (2**40, 5), (1, 3)])
def test_distinct_is_torch_unique(largest, width):
    """Where it counts (first case), where it sorts since a row does not fit into 64
    bits, and where all rows are equal."""
    rows = TOKENS[:, :width] % min(largest, 3) * max(largest // 3, 1)
    expected = torch.unique(rows, dim=0, return_inverse=True)
    assert all(map(torch.equal, distinct(rows), expected))


def test_measurements_compare_with_the_exact_posterior():
    """They find the errors of a network that errs by construction: it takes label 3 for
    0.  A measurement with the grammar's own parse would find none."""
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
    # A symbol that is never first has no q.  It is nobody's nearest:
    errors, nearest = diagnose(oracle(NEVER, lambda l: np.eye(2)), NEVER, 2, 0)
    assert errors == pytest.approx(0.5**0.5, abs=0.1) and nearest == 1


def test_the_picture_shows_the_run(usual):
    """The Figure that plot returns has the data under its titles and labels.  Panels of
    another level, or error and signal exchanged, would break it."""
    (net, stages), levels = usual, [4, 3, 2, 1]
    stages = [stage._replace(losses=np.arange(1, 4) * stage.level) for stage in stages]
    errors = [np.array([0.1, 0.2, 0.9]) / l for l in levels]
    figure = plot(net, USUAL, stages, errors)
    *matrices, _, losses, signal = (ax for sub in figure.subfigs for ax in sub.axes)
    for level, ax in zip(levels, matrices, strict=True):
        assert ax.get_title() == f"outputs of level {level}"
        matrix, q = ax.images[0].get_array(), USUAL.label_posterior(level)
        expected = np.kron(pairwise(q), np.ones((4, 4)))  # 4 synonyms of each symbol
        assert matrix.max() == 1 and matrix[expected == 0].max() < 0.5
        # With the q of another level at most 0.75:
        assert np.corrcoef(matrix.ravel(), expected.ravel())[0, 1] > 0.88
    lines = {line.get_label(): line.get_xydata().T.tolist() for line in losses.lines}
    assert lines == {f"level {l}": [[1, 2, 3], [l, 2 * l, 3 * l]] for l in levels}
    lines = {line.get_label(): line.get_xydata().T.tolist() for line in signal.lines}
    assert signal.xaxis_inverted()  # levels in the order of training
    assert losses.get_xscale() == signal.get_yscale() == "log"
    assert losses.get_xlabel() == "gradient step"
    assert matrices[0].get_ylabel() == "16 symbols x 4 synonyms"
    colors = [to_hex(line.get_color()) for line in signal.lines]
    assert colors == [to_hex(color) for color in ("C0", "C0", "C1", "C1", "k")]
    assert lines == {
        "signal rho": [levels, [USUAL.signal(l) for l in levels]],
        "typical signal": [levels, [typical_signal(16, 4, l) for l in levels]],
        "largest error": [levels, [0.9 / l for l in levels]],
        "median error": [levels, [0.2 / l for l in levels]],
        "Proposition 19": [levels, [80 ** (-(l - 1) / 2) for l in levels]],
    }


@pytest.mark.parametrize("V, m, s, L", SIZES)
def test_nothing_is_nan_or_infinite_at_any_size(V, m, s, L):
    """Training, table and picture hold where kappa or rho is infinite, and where there
    is a single patch."""
    for uniform in (True, False):
        rhm = RHM.random(V, m, s, L, 0, uniform_first_token=uniform)
        net, stages, errors = run(rhm, Config(M=32, C=1.0))
        for stage in stages:
            assert 0 < stage.sigma < math.inf and np.isfinite(stage.losses).all()
    *_, signal = plot(net, rhm, stages, errors).subfigs[1].axes
    drawn = np.concatenate([line.get_ydata() for line in signal.lines])
    assert (np.isnan(drawn) | (0 < drawn) & (drawn < math.inf)).all()  # on a log scale
    assert schedule(16, 4, 0.01, eps=1e8)[2] == 1  # with W = 0 Eq. (2) is 0 / 0


def test_rules_are_a_copy_and_an_edited_grammar_is_parsed_by_its_own_rules():
    """Rules may come as a list of tensors, as other implementations have them.  An
    edited deep copy is not parsed by the rules of the original."""
    rules = [torch.tensor(level) for level in TINY.rules]
    rhm = RHM(rules)
    rules[0][:] = 0
    assert np.array_equal(rhm.rules, TINY.rules) and repr(rhm) == repr(TINY)
    edited = copy.deepcopy(rhm)
    edited.rules[0] = edited.rules[0, ::-1]
    tokens, labels = edited.sample(50, 0)
    assert np.array_equal(edited.parse(tokens)[0][:, 0], labels)
    edited.rules[0, 0] = edited.rules[0, 1]
    with pytest.raises(ValueError, match="generated by symbols 0 and 1"):
        edited.parse(tokens)


def test_samples_of_ones_own_count_as_they_come():
    """A sampler may bring fewer rows, other integer types, and tensors."""
    own = Sealed(TINY)

    def sample(n, rng, level=1):
        tokens, labels = TINY.sample(min(n, 100), rng, level)
        return tokens.astype(np.int8), torch.tensor(labels)[:, None]

    own.sample = sample
    net, stages = train(own, Config(M=64))
    assert [stage.N for stage in stages] == [100, 100, 100]
    tokens, labels = TINY.sample(100, [0, 5])
    right = predict(net, tokens.astype(np.uint8))[:, 0].argmax(1) == labels
    assert accuracy(net, own, 100, [0, 5]) == right.mean() > 0.5


GOOD = np.array([[[[0, 1], [1, 0]], [[0, 0], [1, 1]]]])  # V = m = s = 2, L = 1
UNTRAINED, NET = deep_cnn(4, Level(4, 2, 8, 1.0, 0)), random_network(4, 2, levels=3)
SENTENCES = TINY.sample(3, 0)[0]
HALF_NAN = copy.deepcopy(NET)
HALF_NAN[0].weight.data[0] = math.nan


def train_with(labels=lambda n: np.zeros(n, int), width=2):
    """Train on a sample of one's own that went wrong."""
    own = Sealed(TINY)
    own.sample = lambda n, rng, level: (np.zeros((n, width), int), labels(n))
    return train(own, Config())


def descend_to(change):
    """Train with a descent whose W went wrong."""
    descend = lambda *given: (change(gradient_descent(*given)[0]), torch.zeros(1))
    return train(TINY, Config(M=16), descend=descend)


REFUSED = [
    (lambda: RHM(GOOD[0]), r"integers \(L, V, m, s\), got int64 of shape \(2, 2, 2\)"),
    (lambda: RHM(GOOD / 2), r"integers \(L, V, m, s\), got float64"),
    (lambda: RHM(TINY.rules.swapaxes(1, 2)), r"0..1, got int64 of shape \(3, 2, 4, 2"),
    (lambda: RHM(GOOD - 1), r"rules \(L, V, m, s\) must lie in 0..1, got int64"),
    (lambda: RHM([GOOD[0], [[[0, 0], [1, 0]]] * 2]), r"level-2 .* by symbols 0 and 1"),
    (lambda: RHM.random(4, 0, 2, 1, 0), "sizes >= 1, .* got V = 4, m = 0, s = 2"),
    (lambda: RHM.random(4, 5, 2, 1, 0), r"V m <= V\^s < 2\^63 .* got V = 4, m = 5"),
    (lambda: RHM.random(2, 1, 63, 1, 0), r"V m <= V\^s < 2\^63 .* s = 63"),
    (lambda: RHM.random(2, 1, 2, 32, 0), r"s\^L <= 2\^31 are needed, .* L = 32"),
    (lambda: TINY.signal(0), "level must be in 1..3, got 0"),
    (lambda: TINY.transition(4), "level must be in 1..3, got 4"),
    (lambda: TINY.sample_tree(1, 0, 0), "level must be in 1..3, got 0"),
    (lambda: TINY.parse(SENTENCES[:, :4]), r"tokens must be \(n, 8\)"),
    (lambda: NEVER.parse([[0, 1, 0, 0], [0, 1, 1, 0]]), r"1: .* level-2 patch \(1, 0"),
    (lambda: embed(NET, torch.full((2, 8), -1)), "in 0..3, got torch.int64, -1 to -1"),
    (lambda: predict(NET, SENTENCES / 1), "in 0..3, got torch.float64"),
    (lambda: predict(UNTRAINED, [[0, 1]]), "outputs are not finite: in Eq"),
    (lambda: predict(HALF_NAN, [[1] * 8, [0] * 8]), "outputs are not finite"),
    (lambda: accuracy(NET[:3], TINY, 9, 0), "2 levels and V = 4, which cannot be leve"),
    (lambda: diagnose(NET, RHM([GOOD[0]] * 3), 3, 0), "V = 4, .* level 3 of RHM.V=2"),
    (lambda: network_parse(NET, TINY, np.tile(SENTENCES, 2)), "needs 8 or 8 tokens"),
    (lambda: train_with(lambda n: np.full(n, 4)), "integers in 0..3, got .* 4 to 4"),
    (lambda: train_with(lambda n: np.zeros(n)), "integers in 0..3, got torch.float64"),
    (lambda: train_with(lambda n: np.zeros((n, 4), int)), "strings came with .* label"),
    (lambda: train_with(width=8), r"level 3: tokens must be \(n, 2\), got"),
    (lambda: descend_to(lambda W: W[:1]), r"level 3: W .* is not of shape \(4, 32\)"),
    (lambda: descend_to(lambda W: W * math.inf), "level 3: W has diverged"),
    (lambda: Config(ridge=-0.5), "ridge must be above 0 and finite, got -0.5"),
    (lambda: Config(sigma=0), "sigma must be above 0 and finite, got 0"),
    (lambda: Config(C=math.nan), "C must be above 0 and finite, got nan"),
    (lambda: Config(seed=-1), "seed must be 0 or more, got -1"),
]


@pytest.mark.parametrize("act, says", REFUSED)
def test_what_would_give_a_wrong_number_is_refused_in_one_line(act, says):
    with pytest.raises(ValueError, match=says) as refusal:
        act()
    assert "\n" not in str(refusal.value)


def test_the_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line, before training; no file is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tl, "run", None)  # nothing is trained
    for options, says in (
        ("--figure=new.txt", "figure must be a .png, .pdf or .svg"),
        ("--figure=new/a.png", "figure must be a .png, .pdf or .svg in a folder"),
        ("--f=kernel.json", "unrecognized arguments"),
        ("--m=5 --V=2", "V m <= V^s < 2^63"),
        ("--seed=-1", "seed must be 0 or more"),
        ("--L=10", "GB"),
        ("--V=2 --m=1 --L=22", "GB"),
        ("--device=nowhere", ""),
        ("--device=cuda:99", ""),
    ):
        with pytest.raises(SystemExit) as stop:
            tl.main(options.split())
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and error.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_main_prints_both_parses_and_which_symbols_cannot_be_told_apart(
    tmp_path, monkeypatch, capsys
):
    """Sizes, sampler and seed arrive.  The random streams of data, features, three
    diagnoses and test are [seed, 1] to [seed, 4]; a shared one would break it."""
    drawn = lambda k: RHM.random(4, 3, 2, 3, k, uniform_first_token=False)
    seed = next(k for k in itertools.count(1) if drawn(k).assumption_6_failures())
    rhm, streams, default_rng = drawn(seed), set(), np.random.default_rng

    def record(seed):
        if isinstance(seed, list):
            streams.add(tuple(seed))
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", record)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    # A handful of samples: nothing is learned, and the two parses differ.
    options = "--V=4 --m=3 --L=3 --C=0.002 --M=16 --sampler=cagnetta --figure=~/a.png"
    tl.main([*options.split(), f"--seed={seed}"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    expected = (1,), (2,), (3, 3), (3, 2), (3, 1), (4,)
    assert streams == {(seed, *stream) for stream in expected}
    out = capsys.readouterr().out
    assert f"kappa = {rhm.kappa:.4g}, K_rho = {rhm.K_rho:.4g}\n" in out
    assert "\n".join(rhm.assumption_6_failures()) in out
    read, parsed = (  # from lines such as "level 1  network  2       0"
        [[int(nu) for nu in row.split()] for row in re.findall(f"  {name}  (.*)", out)]
        for name in ("network", "grammar")
    )
    assert parsed == [row[0].tolist() for row in rhm.parse(np.array([parsed[3]]))]
    assert read != parsed and read[3] == parsed[3]
