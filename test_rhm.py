"""The paper again, as tests: each is a claim, named after its place in the paper.

A first reading of about an hour: the worked example, Theorem 7, Principle 2 (i) and
(iii), Equations 2 and 4, Lemma 15, Section 4.2.  `pytest -k lemma_15_` runs what is
about Lemma 15; the last underscore keeps Equation 11 out of `-k equation_1_`.

Numbers are those of the COLT version, P is |P_l| = V m.  Seeds are fixed.  The last
section is about this code and no claim of the paper.  The proof with its own constants,
and Appendix B, are in experiments/test_proof.py.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train_layerwise as tl
from model import Layer, RandomFeatures, deep_cnn, distinct, embed, predict
from rhm import RHM
from train_layerwise import (
    Config, accuracy, averages, diagnose, gradient_descent, network_parse, plot, read,
    run, schedule, train, typical_distance,
)  # fmt: skip

torch.set_num_threads(1)  # two threads stall beside a busy program


def grammar(V=4, m=2, s=2, L=3, seed=0):
    """The first grammar from `seed` on with K_rho > 0; by default of 512 sentences."""
    rhms = (RHM.random(V, m, s, L, k) for k in itertools.count(seed))
    return next(rhm for rhm in rhms if rhm.K_rho > 0)


TINY = grammar(seed=22)  # of `python rhm.py`; P = 8
USUAL = grammar(16, 4, 2, 4)  # of the default run; P = 64
NEVER = RHM([[[[0, 0]], [[0, 1]]]] * 2)  # m = 1: symbol 1 is never first in its level


@pytest.fixture(scope="module")
def usual():
    """The network and the stages of the default run."""
    return train(USUAL, Config())


class Sampler:
    """All that a learner may see of a grammar, as one would write it oneself.

    Brings at most `most` sentences at a time, in other types, and notes what it drew.
    """

    def __init__(self, rhm, most=math.inf):
        self.V, self.m, self.s, self.L = rhm.V, rhm.m, rhm.s, rhm.L
        self._rhm, self.most, self.drawn = rhm, most, []

    def sample(self, n, rng, level):
        assert isinstance(rng, np.random.Generator)
        tokens, labels = self._rhm.sample(min(n, self.most), rng, level)
        self.drawn.append((level, tokens, labels))
        return tokens.astype(np.int8), torch.tensor(labels)


def learn(rhm, **settings):
    """A trained network and its accuracy."""
    net, _ = train(rhm, Config(**settings))
    return net, accuracy(net, rhm, 10_000, 1)


def derivations(rhm):
    """All derivations of a tiny grammar, equally likely, as sample_tree gives them."""
    tree = [np.arange(rhm.V)[:, None]]
    for rules in rhm.rules:
        width = tree[-1].shape[1]
        choices = np.array(list(itertools.product(range(rhm.m), repeat=width)))
        patches = rules[tree[-1][:, None, :], choices]  # (n, choices, width, s)
        tree = [np.repeat(symbols, len(choices), axis=0) for symbols in tree]
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
    The trained layer 2 returns q up to 0.1, for 0 2 and for 1 1: symbol 0 is found.
    Layer 1.  The sentence 0 2 0 0 is now (q of symbol 0, q of symbol 1), a patch that
    stands under label 0 only, and layer 1 returns (1, 0, 0).
    """
    top = [[[0, 1], [1, 0]], [[1, 2], [2, 1]], [[2, 2], [0, 0]]]
    rhm = RHM([top, [[[0, 2], [1, 1]], [[0, 0], [2, 1]], [[1, 0], [2, 2]]]])
    label, _, tokens = derivations(rhm)
    begin = (tokens[:, :2] == [0, 2]).all(1)
    assert len(tokens) == 24 and label[begin, 0].tolist() == [0, 0, 2, 2]
    q = np.array([[0.5, 0, 0.5], [0.5, 0.5, 0], [0, 0.5, 0.5]])
    assert np.array_equal(rhm.label_posterior(2), q)
    assert rhm.signal(2) == pytest.approx(0.5**0.5)  # = rho, and sqrt 2 at level 1
    net, _ = train(rhm, Config(C=250))  # 0.1 at every entry needs more samples
    first = predict(net[:2], [[0, 2], [1, 1], [0, 0], [2, 2]])[:, 0]
    assert np.abs(first - q[[0, 0, 1, 2]]).max() < 0.1
    sentence = np.array([[0, 2, 0, 0]])
    seen = [symbols.tolist() for symbols in network_parse(net, rhm, sentence)]
    assert seen == [[[0]], [[0, 1]], [[0, 2, 0, 0]]]
    assert seen == [symbols.tolist() for symbols in rhm.parse(sentence)]
    assert predict(net, sentence)[0, 0] == pytest.approx([1, 0, 0], abs=0.1)


def test_theorem_7_the_conclusion_on_the_usual_grammar(usual):
    """Trained on sentences and labels alone, the network learns the labels of a grammar
    that satisfies Assumption 6.  Every error at 10,000 first patches is below rho / 2,
    so the nearest q is the right one.  The rules are the same at every place: all
    symbols of whole sentences are found, with the same median error at all places.
    The proof's own settings are in experiments/test_proof.py."""
    assert USUAL.kappa == 1 and USUAL.K_rho == 1  # K_rho = 1 is of this seed
    net, tree = usual[0], USUAL.sample_tree(2000, 1)
    assert accuracy(net, USUAL, 10_000, 1) == 1
    for level in range(1, USUAL.L + 1):
        errors, found = diagnose(net, USUAL, level, 2)
        assert found == 1 and errors.max() < USUAL.signal(level) / 2
        outputs, _, symbols = read(net, USUAL, level, tree[-1])
        assert np.array_equal(symbols, tree[level - 1])
        q = USUAL.label_posterior(level)[tree[level - 1]]
        medians = np.median(np.linalg.norm(outputs - q, axis=2), axis=0)  # by place
        assert medians == pytest.approx(medians.mean(), rel=0.12)


# ---- Equations 1, 2, 3: the same, computed in torch line by line ---------------------


def random_network(V, s, layers, M=20, seed=0):
    """An untrained network in float64, with random W."""
    rng, net = np.random.default_rng(seed), deep_cnn(V)
    for _ in range(layers):
        W = torch.from_numpy(rng.standard_normal((V, 2 * M)))
        net.append(Layer(s, RandomFeatures(s * V, M, 1.0, rng), W))
    return net.double()


def test_equation_1_equation_2_the_network_is_a_strided_convolution():
    """One W serves all patches of a level.  So the network is torch's conv1d with
    kernel = stride = s, from one-hot sentences up, divided by the sum of the entries.
    embed computes equal patches once and gives the same, after 0 to 2 layers."""
    V, s, M, rng = 5, 3, 20, np.random.default_rng(0)
    net = random_network(V, s, layers=2)
    tokens = torch.from_numpy(rng.integers(V, size=(40, 18)))
    h = F.one_hot(tokens, V).double().transpose(1, 2)  # (n, V, width)
    for k, layer in enumerate(net[1:], start=1):
        assert torch.allclose(embed(net[:k], tokens.int()), h.transpose(1, 2))
        weights = layer.phi.omega.view(M, s, V).transpose(1, 2)  # out, in, place
        angles = F.conv1d(h, weights, stride=s)  # (n, M, width / s)
        x = torch.cat([angles.cos(), angles.sin()], 1) / M**0.5
        scores = F.conv1d(x, layer.W[:, :, None])  # (n, V, width / s)
        h = scores / scores.sum(1, keepdim=True)  # Eq. (2)
    assert torch.allclose(embed(net, tokens), h.transpose(1, 2))
    assert torch.allclose(net(tokens), h.transpose(1, 2))


class TensorProduct(nn.Module):
    """Construction 1: all products of two one-hot embeddings.  They are orthonormal."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, h):
        a, b = h.chunk(2, dim=-1)  # (..., V) each
        return (a[..., :, None] * b[..., None, :]).flatten(-2)  # (..., V^2)


def test_equation_2_lemma_14_the_division_undoes_what_the_ridge_does():
    """With orthonormal x, W x is q^ times p^ / (p^ + lambda_W) (Lemma 14): a rare patch
    is shrunk more than its frequent synonym.  Dividing by the sum of the entries takes
    the factor away, and the outputs of synonyms agree."""
    uneven = Sampler(TINY)

    def sample(n, rng, level):  # each second rule is kept one time in nine
        tokens, labels = TINY.sample(n, rng, level)
        second = (tokens[:, None] == TINY.rules[-1, :, 1]).all(2).any(1)
        keep = ~second | (rng.random(n) < 1 / 9)
        return tokens[keep], labels[keep]

    uneven.sample = sample
    phi = TensorProduct()
    covariance, correlation, _ = averages(deep_cnn(4), phi, uneven, 40_000, 0, l=3)
    lambda_W, eta, T = schedule(4, 2, ridge=1, eps=1e-4)
    W, _ = gradient_descent(covariance, correlation, lambda_W, eta, T)
    patches = TINY.rules[-1].reshape(-1, 2)  # (8, 2), the synonyms of a symbol together
    x = phi(torch.eye(4)[patches].flatten(1))
    p = (x @ covariance.diagonal()).numpy()  # x is one-hot: p^ is on the diagonal
    factor = (x @ W.T).sum(1).numpy()
    assert factor == pytest.approx(p / (p + lambda_W), rel=1e-3)
    assert (factor[::2] > 2 * factor[1::2]).all()  # frequent and rare synonyms
    outputs = predict(deep_cnn(4, Layer(2, phi, W)), patches)[:, 0]
    assert np.abs(outputs - TINY.label_posterior(3).repeat(2, axis=0)).max() < 0.1


def test_equation_3_averages_and_descent_follow_every_sample(monkeypatch):
    """The averages are x.T @ x / N and e.T @ x / N over all samples, here drawn in four
    blocks by a sampler that brings fewer than it is asked.  30 steps are 30 steps of
    torch.optim.SGD on the loss as printed."""
    monkeypatch.setattr(tl, "BLOCK", 300)
    monkeypatch.setattr(tl, "CHUNK", 16)
    own, net = Sampler(TINY, most=200), random_network(4, 2, layers=1)
    phi = RandomFeatures(8, 16, 1.0, 0).double()
    covariance, correlation, N = averages(net, phi, own, 1000, 0, l=2)
    assert [len(tokens) for _, tokens, _ in own.drawn] == [200, 200, 200, 100]
    tokens = torch.from_numpy(np.concatenate([tokens for _, tokens, _ in own.drawn]))
    labels = torch.from_numpy(np.concatenate([labels for _, _, labels in own.drawn]))
    x = phi(net(tokens).flatten(1)).detach()  # (700, 32)
    e = F.one_hot(labels, 4).double()
    assert N == len(x) and torch.allclose(covariance, x.T @ x / N)
    assert torch.allclose(correlation, e.T @ x / N)
    W, losses = gradient_descent(covariance, correlation, 0.05, 1.5, 30)
    expected = torch.zeros(4, 32, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([expected], lr=1.5)
    for found in losses:
        loss = 0.5 * (e - x @ expected.T).square().sum(1).mean()
        loss = loss + 0.05 / 2 * expected.square().sum()
        assert loss.item() == pytest.approx(found.item(), rel=1e-10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(losses) == 30 and torch.allclose(W, expected, atol=1e-12)


# ---- Section 1, Principle 2: take one of its three conditions away -------------------
#
# The principle says that they are sufficient.  These are our examples, not its claims.


def sum_grammar(*kept, V=8, seed=0):
    """A grammar of all V^2 pairs (m = V, s = 2).  Symbol nu generates the pairs (a, b)
    with table[a, b] = nu.  This is a + b mod V in the first kept[l] rows a of the table
    of level l; the rest is shuffled."""
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
    assert learn(sums)[1] < 1 / 8 + 0.03
    assert learn(shuffled)[1] > 0.98


def test_principle_2_ii_no_clean_signal_then_noise():
    """No grammar breaks (ii), since Eq. (8) holds for all; a learner can.  With a tiny
    sigma two strings of one patch get nearly orthogonal x.  Then each string is learned
    by itself, from a few samples whose labels also depend on the rest of the sentence.
    Layer 3 reads exact tokens and is right; layer 2 learns that noise, which ten times
    the samples average out."""
    rhm, found = grammar(8, 4, 3, 3), {}
    assert learn(rhm, C=2.5)[1] > 0.999
    for C in 2.5, 25:
        net, _ = learn(rhm, C=C, sigma_ratio=0.02)
        found[C] = [diagnose(net, rhm, l, 2)[1] for l in (3, 2)]
    assert found[2.5][0] == found[25][0] == 1 and found[2.5][1] < 0.5
    assert found[25][1] > 0.8


def test_principle_2_iii_not_identifiable_then_exactly_those_two_symbols_merge():
    """Rows 0 and 1 of the top table hold every label once: symbols 0 and 1 of level 1
    share a flat q.  The network merges these two and no others, and confuses labels
    that the same learner tells apart where all q differ."""
    twins, shuffled = sum_grammar(2, 0, 0, seed=3), sum_grammar(0, 0, 0, seed=3)
    q = twins.label_posterior(2)
    assert (q[:2] == 1 / 8).all()
    assert learn(shuffled)[1] > 0.98
    net, share = learn(twins)
    tree = twins.sample_tree(10_000, 2, level=2)
    outputs = read(net, twins, 2, tree[-1])[0][:, 0]
    means = np.array([outputs[tree[1][:, 0] == nu].mean(0) for nu in range(8)])
    closest_others = pairwise(q[1:])[np.triu_indices(7, 1)].min()  # 1 has the q of 0
    merged = np.triu(pairwise(means) < closest_others / 2, 1)
    assert np.argwhere(merged).tolist() == [[0, 1]]
    assert share < 0.9


# ---- Section 2: the grammar, q, and the training -------------------------------------

SIZES = [  # (V, m, s, L): usual ones, m = 1, s = 1, L = 1, V = 1, V^s near 2^63
    (16, 4, 2, 4), (5, 3, 3, 2), (3, 2, 4, 2), (7, 1, 2, 3), (6, 1, 1, 3), (5, 2, 2, 1),
    (1, 1, 1, 1), (1, 1, 3, 2), (2, 2, 32, 1), (4, 2, 31, 1), (90, 9, 9, 1),
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


@pytest.mark.parametrize("uniform", [True, False])
def test_equation_4_equation_8_label_posterior_equals_enumeration(uniform):
    """q_mu^(l) is a share of all derivations, which are equally likely.  It depends on
    mu through its parent only, and not on the tokens under mu: this is Eq. (8), since
    features are functions of these tokens.  kappa, rho and K_rho follow from it."""
    for seed in range(8):  # P = 6, m = 2
        rhm = RHM.random(3, 2, 2, 3, seed, uniform_first_token=uniform)
        tree, kappa, K_rho = derivations(rhm), 0, math.inf
        for level in (1, 2, 3):
            parent, patch = tree[level - 1][:, 0], tree[level][:, :2]
            tokens = tree[3][:, : 2 ** (4 - level)]  # under the first patch
            q = rhm.label_posterior(level)
            assert q[parent] == pytest.approx(law_of_label(tree, patch))
            assert q[parent] == pytest.approx(law_of_label(tree, tokens))
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


def test_equation_6_lemma_12_features_approximate_the_gaussian_kernel():
    """<Phi(h), Phi(h')> is near exp(-||h-h'||^2 / (2 sigma^2)), and ||Phi(h)|| = 1.
    Lemma 12: the largest gap over points of the unit ball falls as M^(-1/2)."""
    rng, sigma, widths = np.random.default_rng(0), 0.5, [16, 64, 256, 1024]
    h = rng.standard_normal((20, 8))
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    kernel = torch.tensor(np.exp(-(pairwise(h) ** 2) / (2 * sigma**2)))

    def error(M):
        x = RandomFeatures(8, M, sigma, rng).double()(torch.tensor(h))
        assert torch.allclose(x.norm(dim=1), torch.ones(20).double())
        return (x @ x.T - kernel).abs().max().item()

    errors = [np.mean([error(M) for _ in range(12)]) for M in widths]
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.08  # six standard deviations of the fitted slope


def test_section_2_3_the_learner_needs_only_samples_and_sizes():
    """Stages l = L..1 draw N^(l) = C s L P m^l fresh first patches each, rounded up,
    after 1,000 for sigma.  Nothing else of the grammar is used than its sizes.  A layer
    is trained when it is reported."""
    rhm, reported = grammar(8, 2, 2, 3), []
    own, T = Sampler(rhm), schedule(8, 2, ridge=0.02, eps=0.05)[2]

    def report(net, stage):
        assert np.median(diagnose(net, rhm, stage.level, 0, n=500)[0]) < 0.2
        reported.append(stage)

    net, stages = train(own, Config(C=3.01, ridge=0.02, eps=0.05), report)
    drawn = [(level, len(tokens)) for level, tokens, _ in own.drawn]
    sizes = [(3, 2312), (2, 1156), (1, 578)]  # 18.06 * 16 * (8, 4, 2)
    assert drawn[1::2] == sizes == [(stage.level, stage.N) for stage in stages]
    assert drawn[::2] == [(3, 1000), (2, 1000), (1, 1000)] and reported == stages
    labels = [labels[:578].tolist() for *_, labels in own.drawn]
    assert not any(a == b for a, b in itertools.combinations(labels, 2))  # fresh
    assert all(len(stage.losses) == T for stage in stages)
    assert accuracy(net, own, 2000, 9) == 1


def test_section_2_3_any_optimiser_and_other_features():
    """Eq. (3) is ridge regression, and its minimiser has a closed form.  It needs the
    two averages only, it learns the labels, and no loss lies below its own.  Where all
    inputs are one-hot, tensor products serve as well as random features."""
    lowest = []

    def closed_form(covariance, correlation, lambda_W, eta, T):
        assert torch.is_grad_enabled()  # an optimiser may use autograd
        assert (lambda_W, eta, T) == schedule(4, 2, 0.02, 0.05)
        assert covariance.shape == (128, 128) and correlation.shape == (4, 128)
        A = covariance + lambda_W * torch.eye(len(covariance))
        W = torch.linalg.solve(A, correlation, left=False).requires_grad_()
        lowest.append(0.5 - 0.5 * (W * correlation).sum().item())
        return W, [1.0, lowest[-1]]  # a list or an array will do

    config = Config(M=64, ridge=0.02, eps=0.05)
    net, _ = train(TINY, config, minimise=closed_form)
    assert accuracy(net, TINY, 2000, 1) == 1
    _, stages = train(TINY, config)
    # At level 3 samples and features are the same as above:
    assert lowest[0] <= stages[0].losses[-1] < lowest[0] + 1e-3
    one_level = grammar(8, 4, 2, 1)
    net, _ = train(one_level, Config(), features=TensorProduct)
    assert accuracy(net, one_level, 2000, 1) == 1 and net[1].W.shape == (8, 64)


# ---- Section 3: what the network can represent ---------------------------------------


def oracle(rhm, target, M=16_384):
    """W = sum of target(l) x_mu^T over all patches at each level.

    sigma is half of Lemma 10's printed one, for eps_O = 0.01.
    """
    rng, net, tokens = np.random.default_rng(0), deep_cnn(rhm.V), torch.eye(rhm.V)
    for l in range(rhm.L, 0, -1):
        sigma = torch.pdist(tokens).min().item() / math.sqrt(2 * math.log(2 / 0.01))
        phi = RandomFeatures(rhm.s * rhm.V, M, sigma, rng)
        x = phi(tokens[torch.tensor(rhm.rules[l - 1])].flatten(2))
        tokens = torch.tensor(target(l), dtype=torch.float32)
        net.append(Layer(rhm.s, phi, torch.einsum("nz,nkx->zx", tokens, x)))
    return net


def test_construction_1_construction_2_construction_3_oracle_weights():
    """The targets of Constructions 1 and 2, with the features of 3.  W = sum e_parent
    x_mu^T outputs the one-hot parent, W = sum q_mu x_mu^T outputs q_mu, up to less than
    half of the distance between two targets."""
    tree = derivations(TINY)
    for target in (lambda l: np.eye(TINY.V)), TINY.label_posterior:
        net = oracle(TINY, target)
        for l in range(1, TINY.L + 1):
            outputs = read(net, TINY, l, tree[-1])[0]
            errors = np.linalg.norm(outputs - target(l)[tree[l - 1]], axis=2)
            apart = pairwise(target(l))[np.triu_indices(TINY.V, 1)]
            assert errors.max() < apart.min() / 2


# ---- Section 4 and Appendix A: sigma, steps and samples ------------------------------


def test_assumption_6_failures_name_the_level_and_the_symbols():
    """(b) fails by two symbols of equal posterior, (a) by a symbol that is never first.
    One flat posterior alone breaks nothing."""
    merged = RHM([[[[0, 1], [1, 0]], [[0, 0], [1, 1]]]] * 2)
    [line] = merged.assumption_6_failures()
    assert "6(b) fails at level 2: K_rho = 0, symbols [0, 1] of level 1" in line
    assert RHM.random(3, 3, 2, 5, 9).signal(4) == 0  # not 1e-17
    [line] = RHM.random(16, 4, 2, 4, 6).assumption_6_failures()
    assert "symbols [7, 12] of level 1 have the same q" in line
    [line] = NEVER.assumption_6_failures()
    assert "6(a) fails at level 2: kappa = inf, symbols [1] of level 1" in line
    assert NEVER.kappa == NEVER.signal(2) == math.inf
    # Symbol 1 is as often first under each of the three labels:
    top = [[[0, 0], [0, 1], [1, 0]], [[0, 2], [1, 1], [2, 0]], [[1, 2], [2, 1], [2, 2]]]
    flat = RHM([top, sum_grammar(0, V=3).rules[0]])
    assert np.array_equal(flat.label_posterior(2)[1], [1 / 3] * 3)
    assert flat.K_rho > 0 and not flat.assumption_6_failures()


def test_lemma_10_sigma_is_in_proportion_to_the_distances_of_tokens(usual):
    """Lemma 10 takes the smallest distance of two symbols; a learner can measure the
    root mean square over all pairs of tokens that a layer reads.  Where the layer below
    is trained they are near the q of random symbols."""
    own, net = Sampler(TINY), random_network(4, 2, layers=1)
    found = typical_distance(net, own, np.random.default_rng(0), l=2)
    [(_, tokens, _)] = own.drawn
    h = predict(net, tokens).reshape(-1, 4)  # (1000 sentences, 2 tokens each)
    assert len(h) == 2000 and found == pytest.approx((pairwise(h) ** 2).mean() ** 0.5)
    for stage in usual[1]:
        q = np.eye(16) if stage.level == 4 else USUAL.label_posterior(stage.level + 1)
        expected = 0.5 * (pairwise(q) ** 2).mean() ** 0.5
        assert stage.sigma == pytest.approx(expected, rel=0.05)


def ridge_regression(V, m):
    """Averages of orthonormal x, and the minimiser W_* at lambda_W = 1/P, P = V m."""
    P, rng = V * m, np.random.default_rng(0)
    # Orthonormal x of 33 strings with any p (no grammar has these), or of a single one:
    p = torch.tensor([1.0] if P == 1 else [0.7] + 32 * [0.3 / 32]).double()
    x = torch.linalg.qr(torch.tensor(rng.standard_normal((len(p), len(p)))))[0]
    e = torch.eye(V).double()[torch.arange(len(p)) % V]
    covariance, correlation = x.T @ (p[:, None] * x), e.T @ (p[:, None] * x)
    W_star = correlation @ torch.linalg.inv(covariance + torch.eye(len(p)) / P)
    return covariance, correlation, W_star


@pytest.mark.parametrize("V, m", [(1, 1), (2, 2)])
def test_lemma_15_gradient_descent_contracts_at_every_step(V, m):
    """||W_t - W_*|| <= exp(-t/P) ||W_*|| for all t, and ||W_*|| <= P.  The step that
    schedule chooses shrinks every direction of curvature lambda_W to 1 + lambda_W."""
    P = V * m
    covariance, correlation, W_star = ridge_regression(V, m)
    lambda_W, eta, T = schedule(V, m, ridge=1.0, eps=0.01)
    assert lambda_W == 1 / P and W_star.norm() <= P
    for t in range(T + 1):
        W, _ = gradient_descent(covariance, correlation, lambda_W, eta, t)
        assert (W - W_star).norm() <= math.exp(-t / P) * W_star.norm() + 1e-12


def test_lemma_15_half_of_the_step_is_too_slow_and_the_double_is_too_long():
    """The bound is sharp enough to see it: rare patches move slowly along their x, and
    a frequent one swings along its own.  The printed step, 2 / (1 + lambda_W), lies
    between, and passes here."""
    covariance, correlation, W_star = ridge_regression(2, 2)
    lambda_W, eta, T = schedule(2, 2, ridge=1.0, eps=0.01)
    for step in eta / 2, eta, 2 / (1 + lambda_W), 2 * eta:
        W, _ = gradient_descent(covariance, correlation, lambda_W, step, T)
        contracted = (W - W_star).norm() <= math.exp(-T / 4) * W_star.norm()
        assert contracted == (eta <= step < 2 * eta)


def test_lemma_15_the_printed_step_swings_for_ever_with_a_single_patch():
    """The loss is (1 + lambda_W)-smooth, not 1-smooth as printed.  With V = m = 1 the
    step 2 / (1 + lambda_W) is twice the distance to the minimum."""
    covariance, correlation, _ = ridge_regression(1, 1)
    W = [gradient_descent(covariance, correlation, 1, 1, t)[0] for t in range(6)]
    assert torch.cat(W).abs().flatten().tolist() == [0, 1, 0, 1, 0, 1]


def test_lemma_17_the_number_of_steps():
    """T = P log(100 P kappa sqrt(V) / eps), rounded up, whatever the ridge; at least
    one, since with W = 0 the output is 0 / 0."""
    for kappa in 1, 4:
        steps = 8 * math.log(100 * 8 * kappa * 4**0.5 / 0.01)
        assert schedule(4, 2, 1.0, 0.01, kappa)[2] == math.ceil(steps)
        assert schedule(4, 2, 0.01, 0.01, kappa)[2] == math.ceil(steps)
    assert schedule(4, 2, 0.01, 0.01) == schedule(4, 2, 0.01, 0.01, kappa=1)
    assert schedule(16, 4, 0.01, eps=1e8)[2] == 1


def test_lemma_18_a_posterior_averages_the_samples_of_its_patch_only():
    """With orthonormal x the averages are p^ and p^ q^.  Only N / P samples show a
    patch, so the mean square of ||q^ - q|| is P (1 - ||q||^2) / N.  Most patches miss
    the printed bound, (2 u / P)^(1/2), which has lost that P; (8 u)^(1/2) is a bound,
    and p^ lies between p (1 - (2 u)^(1/2)) and p (1 + (3 u)^(1/2)).  Here u is
    P log(4P/delta) / N, for kappa = 1."""
    P, N, rng = 64, 20_000, np.random.default_rng(1)
    u = P * math.log(4 * P / 1e-8) / N  # false alarm: 40 delta = 4e-7
    ratios, missed = [], []
    phi, patches = TensorProduct(), USUAL.rules[-1].reshape(-1, 2)
    x = phi(torch.eye(16)[patches].flatten(1))  # (P, 256), orthonormal
    q = USUAL.label_posterior(4).repeat(4, axis=0)  # (P, 16), of each patch
    for _ in range(40):
        covariance, correlation, _ = averages(deep_cnn(16), phi, USUAL, N, rng, l=4)
        p_hat = (x @ covariance.diagonal()).numpy()
        q_hat = (x @ correlation.T).numpy() / p_hat[:, None]
        error = np.linalg.norm(q_hat - q, axis=1)
        assert error.max() <= math.sqrt(8 * u)
        deviation = (p_hat * P - 1) / math.sqrt(u)
        assert -math.sqrt(2) <= deviation.min() and deviation.max() <= math.sqrt(3)
        missed.append(error > math.sqrt(2 * u / P))
        ratios.append(error**2 / (P * (1 - (q**2).sum(1)) / N))
    assert np.mean(missed) > 0.5 and abs(np.mean(ratios) - 1) < 0.06


def test_section_4_2_geometric_samples_leave_every_level_its_own_sampling_noise():
    """N^(l) proportional to P m^l leave q^ an error of (P / N)^(1/2), in proportion to
    m^(-l/2) as the bound of rho is.  Measured: the median error of the outputs is about
    that at all levels.  Four times the samples halve it."""
    rhm, medians = grammar(16, 3, 2, 4, seed=1), []
    for C in (2.5, 10):
        net, stages = train(rhm, Config(C=C))
        for stage in stages:
            errors, _ = diagnose(net, rhm, stage.level, 2)
            medians.append(np.median(errors))
            assert 0.7 < medians[-1] * (stage.N / 48) ** 0.5 < 1.6
    ratios = np.divide(medians[:4], medians[4:])
    assert 1.6 < np.prod(ratios) ** (1 / 4) < 2.6  # N^(-1/4) gives 1.4, 1/N gives 4


# ---- Engineering: no claim of the paper ----------------------------------------------


def test_a_seed_gives_the_same_weights_also_when_one_looks_on():
    """The same bit for bit: a measurement does not draw from the training streams.
    Another seed gives other samples and other features."""
    rhm, runs = grammar(8, 2, 2, 3), []

    def look(net, stage):
        diagnose(net, rhm, stage.level, 0)

    for seed, report in (0, None), (0, look), (1, None):
        own = Sampler(rhm)
        net, _ = train(own, Config(M=64, seed=seed), report)
        runs.append((own.drawn[0][1], net[1].phi.omega.numpy(), net[3].W.detach()))
    for alone, watched, other in zip(*runs):
        assert np.array_equal(alone, watched) and not np.array_equal(alone, other)


@pytest.mark.parametrize("shape", [(200, 4), (50, 3, 2)])
def test_distinct_finds_the_different_rows(shape):
    """As torch.unique, in another order.  Two rows that share a hash are refused."""
    rows = torch.from_numpy(np.random.default_rng(0).integers(3, size=shape)) * 2**40
    different, number = distinct(rows)
    assert torch.equal(different[number], rows)
    assert len(different) == len(rows.flatten(0, -2).unique(dim=0))
    with pytest.raises(ArithmeticError, match="two different rows have the same hash"):
        distinct(torch.tensor([[0, 0], [-(2**63), -(2**63)]]))


def test_measurements_compare_with_the_exact_posterior():
    """They find the errors of a network that errs by construction: it takes label 3 for
    0.  A measurement with the grammar's own parse would find none."""
    rhm, target = grammar(L=1), np.eye(4)[[0, 1, 2, 0]]
    net = oracle(rhm, lambda l: target)
    errors, found = diagnose(net, rhm, 1, 0, n=8000)
    wrong = errors > 1.2
    assert len(errors) == 8000 and errors[~wrong].max() < 0.2
    assert 0.2 < wrong.mean() < 0.3 and found == pytest.approx(1 - wrong.mean())
    assert 0.7 < accuracy(net, rhm, 4000, 0) < 0.8
    tokens, labels = rhm.sample(100, 0)
    seen = network_parse(net, rhm, tokens)[0][:, 0]
    assert np.array_equal(seen, np.where(labels == 3, 0, labels))
    assert predict(net, tokens[:0]).shape == (0, 1, 4)
    # A symbol that is never first has no q.  It is nobody's nearest:
    errors, found = diagnose(oracle(NEVER, lambda l: np.eye(2)), NEVER, 2, 0)
    assert errors == pytest.approx(0.5**0.5, abs=0.1) and found == 1


@pytest.mark.filterwarnings("ignore:Data has no positive values")  # in the picture
@pytest.mark.parametrize("V, m, s, L", SIZES)
def test_nothing_is_nan_or_infinite_at_any_size(V, m, s, L):
    """Training, table and picture hold where kappa or rho is infinite, and where there
    is a single patch."""
    for uniform in (True, False):
        rhm = RHM.random(V, m, s, L, 0, uniform_first_token=uniform)
        net, stages, errors = run(rhm, Config(M=32, C=1.0))
        for stage in stages:
            assert 0 < stage.sigma < math.inf and np.isfinite(stage.losses).all()
    plot(net, rhm, stages, errors).canvas.draw()


def test_rules_are_a_copy_and_may_come_as_tensors():
    given = TINY.rules.copy()
    rhm = RHM(given)
    given[:] = 0
    assert np.array_equal(rhm.rules, TINY.rules) and repr(rhm) == repr(TINY)
    assert np.array_equal(RHM([torch.tensor(l) for l in rhm.rules]).rules, TINY.rules)


GOOD = np.array([[[[0, 1], [1, 0]], [[0, 0], [1, 1]]]])  # V = m = s = 2, L = 1
NET, SENTENCES = random_network(4, 2, layers=3), TINY.sample(3, 0)[0]
ZERO = deep_cnn(4, Layer(2, RandomFeatures(8, 4, 1.0, 0), torch.zeros(4, 8)))


def on(tokens, labels=np.zeros):
    """Train on samples of one's own that went wrong."""
    own = Sampler(TINY)
    own.sample = lambda n, rng, level: (np.zeros((n, tokens), int), labels(n, int))
    return train(own, Config())


def to(change):
    """Train with a minimise whose W went wrong."""

    def minimise(*given):
        return change(gradient_descent(*given)[0]), [0.0]

    return train(TINY, Config(M=16, C=1), minimise=minimise)


REFUSED = {  # what would give a wrong number, and a piece of the one line that says so
    "shape": (lambda: RHM(GOOD[0]), r"be integers \(L, V, m, s\), got int64"),
    "float rules": (lambda: RHM(GOOD / 2), "must be integers .*, got float64"),
    "axes": (lambda: RHM(TINY.rules.swapaxes(1, 2)), "in 0..1, got int64"),
    "below 0": (lambda: RHM(GOOD - 1), "must lie in 0..1"),
    "twice": (lambda: RHM([GOOD[0], GOOD[0] * 0]), "the same level-2 patch"),
    "V m": (lambda: RHM.random(4, 5, 2, 1, 0), r"V m <= V\^s .* got V = 4, m = 5"),
    "m = 0": (lambda: RHM.random(4, 0, 2, 1, 0), "sizes >= 1, .* got V = 4, m = 0"),
    "s": (lambda: RHM.random(2, 1, 33, 1, 0), "s <= 32, .* s = 33"),
    "V^s": (lambda: RHM.random(5, 1, 32, 1, 0), r"< 2\^63, .* V = 5"),
    "s^L": (lambda: RHM.random(2, 1, 2, 32, 0), r"s\^L <= 2\^31 .* L = 32"),
    "level 0": (lambda: TINY.signal(0), "level must be in 1..3, got 0"),
    "level -1": (lambda: TINY.ways(-1), "level must be in 0..3, got -1"),
    "length": (lambda: TINY.parse(SENTENCES[:, :4]), r"tokens must be \(n, 8\)"),
    "no rule": (lambda: NEVER.parse([[0, 1, 1, 0]]), r"the level-2 patch \(1, 0\)"),
    "token": (lambda: embed(NET, torch.full((2, 8), -1)), r"0..3, .*, \[-1, -1, -1\]"),
    "float": (lambda: predict(NET, SENTENCES / 1), "in 0..3, got torch.float64"),
    "one": (lambda: predict(NET, SENTENCES[0]), r"\(n, width\), got \(8,\)"),
    "0 / 0": (lambda: predict(ZERO, [[0, 1]]), "outputs are not finite: the sum in Eq"),
    "L": (lambda: accuracy(NET[:3], TINY, 9, 0), r"L = 3 .* s = \[2, 2\]"),
    "V": (lambda: diagnose(NET, RHM([GOOD[0]] * 3), 3, 0), "V = 2 .* has V = 4"),
    "s of net": (lambda: accuracy(NET, RHM.random(4, 2, 4, 3, 0), 9, 0), "s = 4 in"),
    "part": (lambda: read(NET, TINY, 2, SENTENCES[:, :2]), r"\(n, 8\) or \(n, 4\)"),
    "level ignored": (lambda: on(8), r"level 3 needs tokens \(n, 2\)"),
    "label": (lambda: on(2, lambda n, _: np.full(n, 4)), r"0..3, .*\[4, 4, 4"),
    "one label": (lambda: on(2, lambda n, _: np.zeros(1, int)), r"labels \(n,\)"),
    "column": (lambda: on(2, lambda n, _: np.zeros((n, 1), int)), r"labels .*, 1\)$"),
    "W": (lambda: to(lambda W: W[:1]), r"layer 3: .*\(4, 32\), got \(1, 32\)"),
    "inf": (lambda: to(lambda W: W * math.inf), "layer 3: W is not finite"),
    "ridge": (lambda: Config(ridge=-0.5), "ridge must be above 0 and finite, got -0.5"),
    "C": (lambda: Config(C=math.nan), "C must be above 0 and finite, got nan"),
    "seed": (lambda: Config(seed=-1), "seed must be 0 or more, got -1"),
}


@pytest.mark.parametrize("act, says", REFUSED.values(), ids=REFUSED)
def test_what_would_give_a_wrong_number_is_refused_in_one_line(act, says):
    with pytest.raises(ValueError, match=says) as refusal:
        act()
    assert "\n" not in str(refusal.value)


def test_a_setting_cannot_be_changed_in_silence():
    """config.M = 16 would be accepted, and config.lambda_W = 1 ignored."""
    with pytest.raises(AttributeError):
        Config().M = 16
    with pytest.raises(TypeError):
        Config(lambda_W=1)
