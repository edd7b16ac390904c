"""The paper, executable: every test is a claim, in the paper's order; run `pytest`.

    Section 2.1, Appendix B   the grammar            Section 3   what the network can do
    Section 2.2               the network            Section 4   why the training works
    Section 2.3               the training           last        bad input, command line

Tests are deterministic: all seeds are fixed.  Where a docstring states a false-alarm
probability, it is the chance that a correct program fails for a seed drawn anew.
"""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train_layerwise as tl
from model import DeepCNN, Level, distinct_rows, random_fourier_features
from rhm import RHM
from train_layerwise import Config, accuracy, diagnose, draw_first_patches, train

SIZES = [  # (V, m, s, L), the corner cases included
    (16, 4, 2, 4),
    (5, 3, 3, 2),
    (4, 2, 2, 3),
    (3, 2, 4, 2),
    (7, 1, 2, 3),
    (6, 1, 1, 3),
    (5, 2, 2, 1),
    (2, 2, 2, 3),
    (1, 1, 1, 1),
    (1, 1, 3, 2),
    (2, 2, 62, 1),
    (90, 9, 9, 1),
]


def grammar(V=4, m=2, s=2, L=3, seed=0, uniform=True):
    return RHM.random(V, m, s, L, np.random.default_rng(seed), uniform)


def derivations(rhm):
    """All derivations of a tiny grammar, as the arrays of sample_tree: equally likely."""
    tree = [np.arange(rhm.V)[:, None]]
    for rules in rhm.rules:
        choices = np.array(list(product(range(rhm.m), repeat=tree[-1].shape[1])))
        patches = rules[
            tree[-1][:, None, :], choices
        ]  # (derivations, choices, width, s)
        tree = [np.repeat(level, len(choices), axis=0) for level in tree]
        tree.append(patches.reshape(len(tree[0]), -1))
    return tree


def assert_frequencies(counts, p, false_alarm=1e-7):
    """Counts of n draws agree with probabilities p: Bernstein's inequality, cell by cell."""
    n, log = counts.sum(), math.log(2 * np.size(p) / false_alarm)
    allowed = log / 3 + np.sqrt(log**2 / 9 + 2 * log * n * p * (1 - p))
    assert (np.abs(counts - n * p) <= allowed).all()


# ---- Section 2.1 and Appendix B: the grammar -------------------------------------------


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("V, m, s, L", SIZES)
def test_definition_4_random_grammars_are_uniform_and_not_ambiguous(
    V, m, s, L, uniform
):
    """V symbols a level, m rules each, V m different patches: for both samplers."""
    rhm = grammar(V, m, s, L, uniform=uniform)
    assert (rhm.V, rhm.m, rhm.s, rhm.L, rhm.d) == (V, m, s, L, s**L)
    for rules in rhm.rules:
        assert (
            len({tuple(patch) for patch in rules.reshape(V * m, s).tolist()}) == V * m
        )
        if uniform:  # every symbol begins exactly m patches
            assert (np.bincount(rules[..., 0].ravel(), minlength=V) == m).all()
    assert not rhm.rules.flags.writeable


def test_the_samplers_differ_and_every_patch_is_equally_likely():
    """Cagnetta et al. draw any V m of V^s patches; Appendix B any m tails for each head.

    Over 20,000 grammars with V = 3, m = 2, s = 2, each of 9 patches is a rule of symbol 0
    with probability m / V^s.  False alarm: below 1e-6.
    """
    rng = np.random.default_rng(0)
    for uniform in (True, False):
        rules = np.array(
            [RHM.random(3, 2, 2, 1, rng, uniform).rules[0] for _ in range(20_000)]
        )
        assert_frequencies(
            np.bincount((rules[:, 0] @ [3, 1]).ravel()), np.full(9, 1 / 9)
        )
        heads = np.array(
            [np.bincount(r[..., 0].ravel(), minlength=3) for r in rules[:50]]
        )
        assert (heads == 2).all() == uniform


def test_a_tiny_grammar_written_out():
    """Two labels, two rules each, two levels; the first label can say a b | b a.

    label 0 -> 0 1 | 1 0      label 1 -> 0 0 | 1 1
    symbol 0 -> 0 1 | 1 1     symbol 1 -> 1 0 | 0 0
    The sentence 0 1 1 0: patches 0 1 and 1 0, so symbols 0 and 1, so label 0.
    """
    rhm = RHM(
        [[[[0, 1], [1, 0]], [[0, 0], [1, 1]]], [[[0, 1], [1, 1]], [[1, 0], [0, 0]]]]
    )
    label, symbols, tokens = rhm.parse([[0, 1, 1, 0]])
    assert (label.tolist(), symbols.tolist()) == ([[0]], [[0, 1]])
    assert (rhm.parse([[1, 1, 0, 1]])[0], rhm.parse([[0, 0, 0, 1]])[0]) == (1, 0)
    # Its first symbol says nothing about the label: half of the sentences of either.
    assert np.array_equal(rhm.label_posterior(2), np.full((2, 2), 0.5))
    assert (rhm.signal(1), rhm.signal(2), rhm.K_rho, rhm.kappa) == (2**0.5, 0, 0, 1)


@pytest.mark.parametrize("V, m, s, L", SIZES)
def test_parsing_a_sample_gives_back_the_label_and_all_latent_symbols(V, m, s, L):
    """Section 2.1: without ambiguity a sentence has one derivation."""
    rhm = grammar(V, m, s, L)
    tree = rhm.sample_tree(200, np.random.default_rng(1))
    assert [level.shape for level in tree] == [(200, s**l) for l in range(L + 1)]
    for recovered, drawn in zip(rhm.parse(tree[-1]), tree, strict=True):
        assert np.array_equal(recovered, drawn)
    tokens, labels = rhm.sample(200, np.random.default_rng(1))
    assert np.array_equal(tokens, tree[-1]) and np.array_equal(labels, tree[0][:, 0])


@pytest.mark.parametrize("uniform", [True, False])
def test_definition_3_sentences_follow_the_exact_law(uniform):
    """Label uniform, each rule with probability 1/m, independently; at every level's view.

    The law of (label, leaves under the first level-l patch) by enumeration of all 384
    derivations, against sample(n, rng, level): the cheap restricted subtree has the law
    of the same columns of whole sentences.  False alarm: below 1e-6.
    """
    rhm = grammar(3, 2, 2, 3, uniform=uniform)
    everything, n = derivations(rhm), 40_000
    for level in (1, 2, 3):
        width = rhm.s ** (rhm.L - level + 1)
        key = 3 ** np.arange(width + 1)
        exact = np.column_stack([everything[0], everything[-1][:, :width]]) @ key
        tokens, labels = rhm.sample(n, np.random.default_rng(2), level)
        drawn = np.column_stack([labels, tokens]) @ key
        law = np.bincount(exact, minlength=3 ** (width + 1)) / len(exact)
        counts = np.bincount(drawn, minlength=len(law))
        assert_frequencies(counts, law)
        assert (counts[law == 0] == 0).all()


def test_a_sampled_subtree_is_a_piece_of_a_derivation():
    """sample_tree(level): above the level first symbols, below it a whole subtree."""
    rhm = grammar(8, 3, 3, 3)
    tree = rhm.sample_tree(500, np.random.default_rng(3), level=2)
    assert [level.shape[1] for level in tree] == [1, 1, 3, 9]
    for l, (parents, children) in enumerate(zip(tree, tree[1:])):
        rules = rhm.rules[l][parents]  # (n, width, m, s)
        if l == 0:  # only the first token of the patch was kept
            assert (rules[..., 0] == children[:, :, None]).any(-1).all()
        else:
            patches = children.reshape(*parents.shape, 1, 3)
            assert (rules == patches).all(-1).any(-1).all()


@pytest.mark.parametrize("uniform", [True, False])
def test_equation_4_label_posterior_equals_enumeration(uniform):
    """q_mu^(l) counted over every derivation; synonyms share it; kappa and rho follow."""
    for seed in range(8):
        rhm = grammar(3, 2, 2, 3, seed, uniform)
        tree, kappa, K_rho = derivations(rhm), 0, math.inf
        for level in (1, 2, 3):
            label, parent = tree[0][:, 0], tree[level - 1][:, 0]
            patch = tree[level][:, 0] * 3 + tree[level][:, 1]
            q, posteriors = rhm.label_posterior(level), {}
            for nu, mu in product(range(3), range(9)):
                here = (parent == nu) & (patch == mu)
                if here.any():
                    posteriors[nu, mu] = (
                        np.bincount(label[here], minlength=3) / here.sum()
                    )
                    assert posteriors[nu, mu] == pytest.approx(q[nu])
                    kappa = max(kappa, 1 / (here.mean() * 6))
            assert set(np.flatnonzero(np.isnan(q[:, 0]))).isdisjoint(parent)
            if len(posteriors) < 6:
                kappa = math.inf
            rho = min(
                [
                    np.linalg.norm(q1 - q2)
                    for (nu1, _), q1 in posteriors.items()
                    for (nu2, _), q2 in posteriors.items()
                    if nu1 != nu2
                ],
                default=math.inf,
            )
            assert rhm.signal(level) == pytest.approx(rho, abs=1e-12)
            K_rho = min(K_rho, rho * 2 ** (level / 2))
        assert rhm.K_rho == pytest.approx(K_rho, abs=1e-12)
        assert rhm.kappa == pytest.approx(kappa)
        assert not uniform or rhm.kappa == pytest.approx(1)


def test_assumption_6_failures_name_the_level_and_the_symbols():
    """(b) by two level-1 symbols of equal posterior, (a) by a symbol that is never first."""
    merged = RHM(
        [[[[0, 1], [1, 0]], [[0, 0], [1, 1]]]] * 2
    )  # each head once: T_1 is flat
    assert merged.assumption_6_failures() == [
        "Assumption 6(b) fails at level 2: K_rho = 0, since symbols 0 and 1 of level 1 "
        "have the same label posterior"
    ]
    never = RHM([[[[0, 0]], [[0, 1]]]] * 2)  # every patch begins with 0
    assert never.kappa == math.inf and np.isnan(never.label_posterior(2)[1]).all()
    assert never.signal(2) == math.inf  # only one symbol can come first
    assert never.assumption_6_failures() == [
        "Assumption 6(a) fails at level 2: kappa is infinite, since symbols 1 of level 1 "
        "are never first"
    ]
    assert grammar(16, 4, 2, 4).assumption_6_failures() == []


# ---- Section 2.2: the network ----------------------------------------------------------


def network(V, s, M=20, levels=2):
    """An untrained network in float64."""
    g = torch.Generator().manual_seed(0)
    net = DeepCNN(V).double()
    for _ in range(levels):
        omega = torch.randn(M, s * V, generator=g, dtype=torch.float64)
        net.append(
            Level(omega, torch.randn(V, 2 * M, generator=g, dtype=torch.float64))
        )
    return net


def random_tokens(V, n, width):
    return torch.from_numpy(np.random.default_rng(0).integers(V, size=(n, width)))


def test_equation_6_features_have_norm_1_and_approximate_the_gaussian_kernel():
    """||Phi|| = 1 exactly, and <Phi(h), Phi(h')> is near exp(-||h-h'||^2 / (2 sigma^2))."""
    rng, sigma = np.random.default_rng(0), 0.7
    h = torch.tensor(rng.standard_normal((5, 6)))
    omega = torch.tensor(rng.standard_normal((200_000, 6)) / sigma)
    x = random_fourier_features(h, omega)
    kernel = torch.exp(-(torch.cdist(h, h) ** 2) / (2 * sigma**2))
    assert torch.allclose(x.norm(dim=1), torch.ones(5, dtype=x.dtype))
    assert (x @ x.T - kernel).abs().max() < 6 / 200_000**0.5
    angles = h @ omega.T
    assert torch.allclose(x[:, :200_000], angles.cos() / 200_000**0.5)
    assert torch.allclose(x[:, 200_000:], angles.sin() / 200_000**0.5)


def test_equations_1_and_2_the_network_is_a_strided_convolution():
    """One W for all patches: conv1d with kernel = stride = s, from one-hot sentences up."""
    V, s, M = 5, 3, 20
    net, tokens = network(V, s, M), random_tokens(V, 7, 18)
    h = F.one_hot(tokens, V).double().transpose(1, 2)  # (n, V, width)
    for level in net:
        kernel = level.omega.view(M, s, V).transpose(
            1, 2
        )  # out, in, place in the patch
        angles = F.conv1d(h, kernel, stride=s)  # (n, M, width / s)
        x = torch.cat([angles.cos(), angles.sin()], 1) / M**0.5
        scores = F.conv1d(x, level.W[:, :, None])  # (n, V, width / s)
        h = scores / scores.sum(1, keepdim=True)  # Eq. (2)
    assert torch.allclose(net(tokens), h.transpose(1, 2))
    assert torch.allclose(net(tokens).sum(-1), torch.ones(7, 2, dtype=torch.float64))


def test_the_network_grows_from_one_hot_tokens_to_label_scores():
    """Shapes of Section 2.2; embed keeps the token axis where forward is the classifier."""
    tokens, net = random_tokens(4, 6, 8), network(4, 2, levels=3)
    assert torch.equal(DeepCNN(4)(tokens), F.one_hot(tokens, 4).float())
    assert net[:0].embed(tokens).shape == (6, 8, 4)
    for k in (1, 2):
        assert net[:k](tokens).shape == (6, 8 // 2**k, 4)
    assert net(tokens).shape == (6, 4) and net.embed(tokens).shape == (6, 1, 4)
    assert torch.equal(net.embed(tokens)[:, 0], net(tokens))


def test_the_network_saves_loads_copies_and_moves_like_any_module(tmp_path):
    net, tokens = network(4, 2), random_tokens(4, 6, 8)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = DeepCNN(
        4, *(Level(torch.empty(20, 8), torch.empty(4, 40)) for _ in range(2))
    )
    other.double().load_state_dict(torch.load(tmp_path / "net.pt"))
    assert torch.equal(other(tokens), net(tokens))
    assert net.float()(tokens).dtype == torch.float32
    net(tokens).square().sum().backward()  # end-to-end training is possible, too
    assert all(level.W.grad.abs().sum() > 0 for level in net)


@pytest.mark.parametrize("base, width", [(3, 4), (2**40, 5), (1, 3), (7, 0)])
def test_distinct_rows_numbers_equal_rows_alike(base, width):
    """Also where a row does not fit into 64 bits; the network and Eq. (3) rely on it."""
    ids = torch.from_numpy(
        np.random.default_rng(0).integers(min(base, 3), size=(200, width))
    )
    ids = ids * (base // 3) if base > 7 else ids
    rows, number = distinct_rows(ids, base)
    assert torch.equal(rows[number], ids)
    assert len(rows) == len({tuple(row) for row in ids.tolist()})


# ---- Section 2.3: the training algorithm -----------------------------------------------


def some_patches(rows=40, p=6, V=3, M=16):
    """Distinct patches with label counts and frequencies, in float64."""
    rng = np.random.default_rng(0)
    h, omega = (
        torch.tensor(rng.standard_normal(shape)) for shape in ((rows, p), (M, p))
    )
    return h, torch.tensor(rng.integers(5, size=(rows, V))), omega


def loss_of_equation_3(W, x, counts, lambda_W):
    """Eq. (3) as printed, sample by sample."""
    samples = [
        (i, zeta)
        for i, n in enumerate(counts.tolist())
        for zeta in range(len(n))
        for _ in range(n[zeta])
    ]
    e = torch.eye(counts.shape[1], dtype=x.dtype)
    errors = torch.stack([(e[zeta] - W @ x[i]).square().sum() for i, zeta in samples])
    return 0.5 * errors.mean() + 0.5 * lambda_W * W.square().sum()


def test_gradient_descent_follows_autograd_on_equation_3():
    """30 hand-written steps = 30 steps of torch.optim.SGD on the loss as printed."""
    h, counts, omega = some_patches()
    level, losses, _ = tl.train_level(h, counts, omega, 0.05, 1.5, 30)
    W = torch.zeros(3, 32, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([W], lr=1.5)
    for t in range(31):
        loss = loss_of_equation_3(W, level.patch_embedding(h), counts, 0.05)
        assert loss.item() == pytest.approx(losses[t], rel=1e-10)
        if t < 30:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.allclose(W, level.W, atol=1e-12)


def test_gradient_descent_reaches_the_closed_form():
    """W_* = E^[e x^T] (E^[x x^T] + lambda_W I)^-1; ridge 0.05, 2000 steps, float64, 1e-12."""
    h, counts, omega = some_patches()
    level, losses, minimum = tl.train_level(h, counts, omega, 0.05, 2 / 1.1, 2000)
    x, n = random_fourier_features(h, omega), counts.double()
    covariance = (x.T * n.sum(1)) @ x / n.sum()
    W_star = (
        n.T @ x / n.sum() @ torch.linalg.inv(covariance + 0.05 * torch.eye(32).double())
    )
    assert torch.allclose(level.W, W_star, rtol=0, atol=1e-12)
    assert losses[-1] == pytest.approx(minimum, abs=1e-14)
    assert minimum == pytest.approx(loss_of_equation_3(W_star, x, counts, 0.05).item())


def test_merged_rows_train_the_same_weights_as_plain_rows():
    """Eq. (3) depends on the samples only through counts: 1 row each, or 1 row a patch."""
    h, counts, omega = some_patches()
    rows, labels = zip(
        *[
            (i, zeta)
            for i, n in enumerate(counts.tolist())
            for zeta in range(3)
            for _ in range(n[zeta])
        ]
    )
    merged, *_ = tl.train_level(h, counts, omega, 0.01, 1.9, 100)
    plain, *_ = tl.train_level(
        h[list(rows)], F.one_hot(torch.tensor(labels), 3), omega, 0.01, 1.9, 100
    )
    assert torch.allclose(merged.W, plain.W, atol=1e-12)


def test_samples_are_merged_without_loss_whatever_the_chunk(monkeypatch):
    """The counts per (leaves, label) are those of the same 5,000 samples drawn at once."""
    rhm = grammar(5, 3, 2, 3)
    tables = []
    for chunk in (10**6, 700):
        monkeypatch.setattr(tl, "SAMPLES_AT_A_TIME", chunk)
        leaves, counts = draw_first_patches(rhm, 5000, 2, np.random.default_rng(0))
        assert counts.sum() == 5000 and (counts.sum(1) > 0).all()
        assert len({tuple(row) for row in leaves.tolist()}) == len(leaves)
        tables.append((leaves, counts))
    tokens, labels = rhm.sample(5000, np.random.default_rng(0), 2)
    expected = {}
    for row, zeta in zip(tokens.tolist(), labels.tolist()):
        expected.setdefault(tuple(row), [0] * 5)[zeta] += 1
    leaves, counts = tables[0]
    assert dict(zip(map(tuple, leaves.tolist()), counts.tolist())) == expected
    # Other chunks, other random numbers, but the same law: both see nearly every kind.
    assert len(tables[1][0]) == pytest.approx(len(leaves), rel=0.05)


class Sealed:
    """All that a learner may see of a grammar; notes what it asked for."""

    def __init__(self, rhm, shuffle=None):
        self.V, self.m, self.s, self.L = rhm.V, rhm.m, rhm.s, rhm.L
        self._rhm, self._shuffle, self.asked, self.drawn = rhm, shuffle, [], []

    def sample(self, n, rng, level=1):
        tokens, labels = self._rhm.sample(n, rng, level)
        self.asked.append((level, n))
        self.drawn.append(tokens)
        return tokens, self._shuffle.permutation(labels) if self._shuffle else labels


SMALL = Config(V=8, m=2, L=3, M=64, C=20.0)


def test_the_learner_needs_only_samples_and_sizes():
    """Section 2.3: stages l = L..1, N^(l) = C V m m^l fresh samples of the first patch."""
    rhm = grammar(8, 2, 2, 3)
    sealed = Sealed(rhm)
    net, stages = train(sealed, SMALL)
    assert sealed.asked == [(3, 20 * 16 * 8), (2, 20 * 16 * 4), (1, 20 * 16 * 2)]
    assert [(stage.level, stage.N) for stage in stages] == sealed.asked
    first = [tokens[:, :2][: 20 * 16 * 2] for tokens in sealed.drawn]
    assert not np.array_equal(first[0], first[1])  # fresh, not the same again
    assert accuracy(net, rhm, 1000, np.random.default_rng(9)) == 1
    assert [stage.rows for stage in stages][0] == 16  # all there is: V m patches


def test_the_same_seed_gives_the_same_numbers_bit_for_bit():
    """And another data seed moves the network but neither grammar nor schedule."""
    nets = []
    for seed in (0, 0, 1):
        rhm = grammar(8, 2, 2, 3)
        net, stages = train(rhm, replace(SMALL, seed=seed))
        nets.append((net.state_dict(), [stage.sigma for stage in stages], rhm.rules))
    (a, sigma_a, rules_a), (b, sigma_b, rules_b), (c, sigma_c, rules_c) = nets
    assert all(torch.equal(a[key], b[key]) for key in a) and sigma_a == sigma_b
    assert (
        all(not torch.equal(a[key], c[key]) for key in a) and sigma_a[1] != sigma_c[1]
    )
    assert np.array_equal(rules_a, rules_c)


def test_features_and_data_have_random_streams_of_their_own():
    """More features leave the samples as they were; more samples leave omega as it was."""
    rhm = grammar(8, 2, 2, 3)
    few, many = Sealed(rhm), Sealed(rhm)
    train(few, replace(SMALL, M=32))
    train(many, replace(SMALL, M=64))
    assert all(np.array_equal(a, b) for a, b in zip(few.drawn, many.drawn, strict=True))
    nets = [train(rhm, replace(SMALL, C=C))[0] for C in (10.0, 20.0)]
    assert torch.equal(nets[0][0].omega, nets[1][0].omega)


def test_shuffled_labels_fall_to_chance():
    """Without the correlation of Eq. (4) there is nothing to learn: 12.5% of 8 labels.

    False alarm: below 1e-6 for 5 standard deviations of 2,000 fair guesses.
    """
    rhm = grammar(8, 2, 2, 3)
    net, _ = train(Sealed(rhm, shuffle=np.random.default_rng(5)), SMALL)
    share = accuracy(net, rhm, 2000, np.random.default_rng(9))
    assert abs(share - 1 / 8) < 5 * math.sqrt(1 / 8 * 7 / 8 / 2000)


def test_sigma_estimates_the_distance_between_clusters():
    """choose_sigma: clusters of radius 0.01 at mutual distance sqrt 2, found unlabelled."""
    V, rng = 8, np.random.default_rng(0)
    h = torch.eye(V)[rng.integers(V, size=(500, 2))]
    h = h + 0.01 * torch.from_numpy(rng.standard_normal(h.shape)).float() / V**0.5
    sigma = tl.choose_sigma(h, torch.ones(500, V, dtype=torch.int64), 1.0, rng)
    assert 0.01 < sigma < 1.45
    exact = torch.eye(V)[
        rng.integers(V, size=(500, 2))
    ]  # all distances are 0 or sqrt 2
    sigma = tl.choose_sigma(exact, torch.ones(500, V, dtype=torch.int64), 3.0, rng)
    assert sigma == pytest.approx(3 * 2**0.5)
    one = torch.ones(1, 2, 1)  # V = m = 1: no distance at all
    assert tl.choose_sigma(one, torch.ones(1, 1, dtype=torch.int64), 3.0, rng) == 1


@pytest.mark.parametrize("V, m, s, L", SIZES)
def test_nothing_is_nan_or_infinite_at_any_size(V, m, s, L):
    """float32 throughout; m = 1, s = 1, L = 1 and V = 1 are grammars, too."""
    for uniform in (True, False):
        rhm = grammar(V, m, s, L, uniform=uniform)
        net, stages = train(rhm, Config(M=32, C=1.0))
        tokens, _ = rhm.sample(500, np.random.default_rng(0))
        assert np.isfinite(tl.predict(net, tokens)).all()
        for stage in stages:
            assert 0 < stage.sigma < math.inf and np.isfinite(stage.losses).all()
            assert stage.minimum <= stage.losses[-1] + 1e-6


def test_diagnose_measures_distances_to_the_exact_posterior():
    """For a network that errs by construction: Eq. (4) is what outputs are compared with."""
    rhm = grammar(4, 2, 2, 1)

    class Oracle(torch.nn.Module):  # outputs the label exactly but mistakes 3 for 0
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens):
            labels = torch.from_numpy(rhm.parse(tokens.numpy())[0][:, 0]).long()
            return torch.eye(4)[torch.where(labels == 3, 0, labels)]

    found = diagnose(Oracle(), rhm, 1, np.random.default_rng(0), n=4000)
    assert set(np.unique(found["errors"].round(6))) == {0, 1.414214}
    assert 0.7 < found["nearest"] < 0.8 and (found["spread"], found["between"]) == (
        0,
        0,
    )
    blocks = found["matrix"].reshape(4, 2, 4, 2)  # symbol, synonym, symbol, synonym
    assert (blocks[[0, 1, 2], :, [0, 1, 2]] == 0).all() and (blocks[0, :, 3] == 0).all()
    assert blocks[1, :, 2] == pytest.approx(2**0.5)
    share = accuracy(Oracle(), rhm, 4000, np.random.default_rng(0))
    assert 0.7 < share < 0.8


# ---- Bad input and the command line ----------------------------------------------------

GOOD = np.array([[[[0, 1], [1, 0]], [[0, 0], [1, 1]]]])  # V = m = s = 2, L = 1


def changed(index, value):
    rules = GOOD.copy()
    rules[index] = value
    return rules


@pytest.mark.parametrize(
    "act, says",
    [
        (lambda: RHM(GOOD[0]), "four axes"),
        (lambda: RHM(GOOD * 1.0), "rules must be integers"),
        (lambda: RHM(GOOD == 1), "rules must be integers"),
        (lambda: RHM(GOOD[:0]), "L must be an integer >= 1"),
        (
            lambda: RHM(changed((0, 1, 0, 1), 2)),
            r"rules\[0, 1, 0\] = \[0, 2\] has a token",
        ),
        (lambda: RHM(changed((0, 1, 0, 1), -1)), "outside the vocabulary 0..1"),
        (
            lambda: RHM(changed((0, 0, 0), [1, 0])),
            r"symbol 0 has the level-1 patch \[1, 0\] tw",
        ),
        (
            lambda: RHM(changed((0, 0, 0), [0, 0])),
            "symbols 0 and 1 both generate the level-1",
        ),
        (lambda: grammar(4, 5, 2, 1), r"V m = 4 \* 5 = 20 and V\^s = 4\^2 = 16"),
        (
            lambda: grammar(4, 5, 2, 1, uniform=False),
            r"V m = 4 \* 5 = 20 and V\^s = 4\^2 = 16",
        ),
        (lambda: grammar(2, 1, 63, 1), r"V\^s < 2\^63 is needed, got V = 2, s = 63"),
        (lambda: grammar(10, 1, 10**9, 1), r"V\^s < 2\^63"),
        (lambda: grammar(0), "V must be an integer >= 1, got 0"),
        (lambda: grammar(m=-1), "m must be an integer >= 1, got -1"),
        (lambda: grammar(s=2.0), "s must be an integer >= 1, got 2.0"),
        (lambda: grammar(L=True), "L must be an integer >= 1, got True"),
        (
            lambda: grammar().sample(-1, np.random.default_rng(0)),
            "n must be an integer >= 0",
        ),
        (
            lambda: grammar().sample(1.5, np.random.default_rng(0)),
            "n must be an integer >= 0",
        ),
        (
            lambda: grammar().sample(1, np.random.default_rng(0), 0),
            "level must be .* in 1..3",
        ),
        (
            lambda: grammar().sample(1, np.random.default_rng(0), 4),
            "level must be .* in 1..3",
        ),
        (lambda: grammar().sample(2**29, np.random.default_rng(0)), "more than 2\\^31"),
        (
            lambda: grammar().label_posterior(0),
            "level must be an integer in 1..3, got 0",
        ),
        (lambda: grammar().signal(4), "level must be an integer in 1..3, got 4"),
        (lambda: grammar().transition(0), "level must be an integer in 1..3, got 0"),
        (lambda: grammar().parse(np.zeros((2, 4), int)), r"tokens must be \(n, 8\)"),
        (lambda: grammar().parse(np.zeros(8, int)), r"tokens must be \(n, 8\)"),
        (
            lambda: grammar().parse(np.zeros((2, 8))),
            "tokens must be integers, got float64",
        ),
        (lambda: grammar().parse(np.full((2, 8), 4)), "row 0 has a token outside 0..3"),
        (lambda: network(4, 2)(torch.zeros(2, 8)), "tokens must be integers"),
        (
            lambda: network(4, 2)(torch.zeros(8, dtype=int)),
            r"tokens must be integers \(n, wid",
        ),
        (
            lambda: network(4, 2)(torch.full((2, 8), 4)),
            "tokens must lie in 0..3, got 4 to 4",
        ),
        (
            lambda: network(4, 2)(torch.full((2, 8), -1)),
            "tokens must lie in 0..3, got -1 to",
        ),
        (lambda: network(4, 2)(torch.zeros(2, 6, dtype=int)), "do not divide width 3"),
        (lambda: Config(C=0.0), "C must be positive, got 0.0"),
        (lambda: Config(C=math.nan), "C must be positive, got nan"),
        (lambda: Config(ridge=-1.0), "ridge must be positive"),
        (lambda: Config(M=0), "M must be an integer >= 1, got 0"),
        (lambda: Config(M=0.5), "M must be an integer >= 1, got 0.5"),
        (lambda: Config(seed=-1), "seed must be an integer >= 0, got -1"),
        (lambda: Config(device="abacus"), "device must be cpu or cuda, got abacus"),
        (lambda: Config(device="meta"), "device must be cpu or cuda, got meta"),
        (lambda: Config(device="cuda:99"), "cannot use device cuda:99"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(act, says):
    with pytest.raises(ValueError, match=says) as refusal:
        act()
    assert "\n" not in str(refusal.value)


def test_parse_names_the_row_and_the_level_of_an_impossible_patch():
    rhm = RHM(np.concatenate([GOOD[:, :, :1], GOOD[:, :, :1]]))  # 0 -> 0 1, 1 -> 0 0
    assert rhm.parse([[0, 1, 0, 0]])[0] == 0
    with pytest.raises(ValueError, match=r"row 1: .* level-2 patch \[1, 0\]"):
        rhm.parse([[0, 1, 0, 0], [0, 1, 1, 0]])
    with pytest.raises(ValueError, match=r"row 0: .* level-1 patch \[1, 1\]"):
        rhm.parse([[0, 0, 0, 0]])


def test_main_reaches_100_percent_and_writes_the_picture(tmp_path, capsys):
    figure = tmp_path / "run.png"
    tl.main(["--V=8", "--m=2", "--L=3", "--M=128", f"--figure={figure}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:-1]] == ["3", "2", "1"]
    assert lines[-1].startswith(
        "100.00% of 10000 fresh sentences right (chance 12.50%)"
    )
    assert (
        figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size < 200_000
    )


def test_main_says_which_symbols_cannot_be_told_apart(tmp_path, capsys):
    """Seed 6 draws a grammar with K_rho = 0: a line says why, and training goes on."""
    options = f"--L=3 --seed=6 --C=1 --M=32 --figure={tmp_path / 'run.png'}".split()
    tl.main(options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(
        "Assumption 6(b) fails at level 2: K_rho = 0, since symbols"
    )
    assert "fresh sentences right" in lines[-1]


@pytest.mark.parametrize(
    "options, says",
    [
        ("--V=0", "V must be an integer >= 1, got 0"),
        ("--V=two", "invalid int value: 'two'"),
        ("--m=17", "V m <= V^s, that is m <= V^(s-1)"),
        ("--m=2 --s=1", "got V m = 16 * 2 = 32 and V^s = 16^1 = 16"),
        ("--s=16", "V^s < 2^63 is needed"),
        ("--L=-1", "L must be an integer >= 1, got -1"),
        ("--C=0", "C must be positive, got 0.0"),
        ("--M=0", "M must be an integer >= 1, got 0"),
        ("--seed=-1", "seed must be an integer >= 0, got -1"),
        ("--device=abacus", "device must be cpu or cuda, got abacus"),
        ("--device=cuda:99", "cannot use device cuda:99"),
        (
            "--figure=nowhere/run.png",
            "cannot write the figure nowhere/run.png: No such file",
        ),
        ("--figure=figures/run.txt", "must end in .png, .pdf or .svg"),
        ("--figure=folder.png", "cannot write the figure folder.png: Is a directory"),
        ("--sweep --L=3", "--sweep has sizes, samples and seeds of its own"),
        ("--unknown=1", "unrecognized arguments: --unknown=1"),
    ],
)
def test_the_command_line_refuses_in_one_line_before_training(
    options, says, tmp_path, monkeypatch, capsys
):
    """Exit code 2, one line, no traceback, nothing trained, no file touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tl, "train", lambda *_: pytest.fail("trained before refusing"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "kept.png").write_text("a picture")
    with pytest.raises(SystemExit) as stop:
        tl.main(
            [*options.split(), *([] if "figure" in options else ["--figure=kept.png"])]
        )
    out, error = capsys.readouterr()
    assert (
        stop.value.code == 2 and out == "" and says in error and error.count("\n") == 1
    )
    assert (tmp_path / "kept.png").read_text() == "a picture"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder.png",
        "kept.png",
    ]


def test_rhm_py_runs_alone_with_numpy(tmp_path):
    """Copied into an empty folder, without torch: 25 lines, a grammar and its signal."""
    code = (
        "import sys; sys.modules['torch'] = None; import runpy; "
        "runpy.run_path('rhm.py', run_name='__main__')"
    )
    (tmp_path / "rhm.py").write_text(open(sys.modules["rhm"].__file__).read())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) <= 25 and "kappa = 1, K_rho" in done.stdout
