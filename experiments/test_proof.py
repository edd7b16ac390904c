"""A reading beside the proof: Lemmas 10, 11 and 14 to 17 of Appendix A, and Appendix B.

`pytest -k theorem_7_` runs the lemmas of Appendix A, on tiny grammars with the proof's
own constants.  A number ends with an underscore: `-k lemma_15_`, `-k equation_9_`.
Lemma 18 is in test_rhm.py; Lemmas 27 (about far larger m) and 28 (Bennett's bound of
moments) have no test.  Hats, p^ and q^, are frequencies in the sample.  A false alarm
is the failure of a correct program for another seed.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from experiments import theorem_7
from experiments.theorem_7 import dual_descent, literal_run, overlap_and_spread
from model import RandomFeatures
from rhm import RHM
from train_layerwise import Config, gradient_descent, schedule

torch.set_num_threads(1)  # two threads stall beside a busy program

# ---- Appendix A.  The literal run (theorem_7.py) has a row x_u for every sentence: the
# features of its first patch, with a frequency p_u in the sample.  K has the inner
# products of the rows, joint the frequencies of labels and rows together.

P = 8  # |P_l| = V m of both grammars; they have 512 sentences each, and K_rho > 0
TINY = RHM.random(V=4, m=2, s=2, L=3, rng=22)
KAPPA_4 = RHM.random(V=4, m=2, s=2, L=3, rng=10, uniform_first_token=False)


@pytest.fixture(scope="module", params=[TINY, KAPPA_4], ids=["kappa=1", "kappa=4"])
def rhm(request):
    return request.param


@pytest.fixture(scope="module")
def stages(rhm):
    """The literal run, levels 3, 2, 1; stage.c has the constants of the level."""
    return literal_run(rhm)


def minimiser(K, p, joint, lambda_W):
    """A_* of the minimiser W_* = A_* X of Eq. (3); the rows of X are the x_u."""
    return joint @ torch.linalg.inv(K * p + lambda_W * torch.eye(len(p)))


def test_equation_11_equation_3_inner_products_are_enough_for_the_descent():
    """W stays in the span of the rows, W = A X.  So the dual form, which sees K and
    frequencies only, follows gradient descent on Eq. (3) step by step, and to W_*.
    Frequencies on the wrong side of K would break it at the second step."""
    rng, n, lambda_W, eta = np.random.default_rng(0), 200, 0.05, 2 / 1.1
    phi = RandomFeatures(6, 16, 1.0, rng).double()
    X = phi(torch.from_numpy(rng.standard_normal((40, 6))))  # 40 different rows
    rows = torch.eye(40).double()[rng.integers(40, size=n)]  # (n, 40), one-hot
    e = torch.eye(3).double()[rng.integers(3, size=n)]  # (n, 3), the labels
    x = rows @ X  # (n, 32), the samples
    covariance, correlation = x.T @ x / n, e.T @ x / n
    dual = X @ X.T, rows.mean(0), e.T @ rows / n, lambda_W
    for T in (2, 30, 2000):
        W, _ = gradient_descent(covariance, correlation, lambda_W, eta, T)
        assert torch.allclose(dual_descent(*dual, eta, T) @ X, W, atol=1e-12)
    assert torch.allclose(minimiser(*dual) @ X, W, atol=1e-12)  # 1.1^-2000 is left


def test_theorem_7_the_constants_are_the_formulas_of_the_proof():
    """Written out for P = 10, V = 5, s = 3, kappa = 2; none if Assumption 6 fails."""
    rhm = RHM.random(V=5, m=2, s=3, L=2, rng=1, uniform_first_token=False)
    found, rho = theorem_7.proof_constants(rhm, eps=0.02, delta=1e-3), rhm.signal(2)
    below = rho / math.sqrt(2000 * 10**2 * 3 * math.log(10 * 2 / 0.02))  # Lemma 11
    levels = (1, 0.02, rho, below), (2, below, math.sqrt(2), 0)  # one-hot at the bottom
    for l, eps, rho, eps_below in levels:
        rho_tilde = rho - 2 * eps_below  # Assumption 9; Lemma 11 takes rho / 2
        eps_O = eps / (600 * 10**2 * 2 * math.sqrt(5))  # Lemma 17
        assert vars(found[l]) == pytest.approx(dict(
            kappa=2, eps=eps, rho=rho, eps_below=eps_below, rho_tilde=rho_tilde,
            lambda_W=1 / 10, eps_S=1 / 10 / 4, eps_O=eps_O,  # Lemmas 14, 16
            eta=2 / (1 + 2 / 10),  # Lemma 15 prints 2 / (1 + 1 / 10)
            T=math.ceil(10 * math.log(100 * 10 * 2 * math.sqrt(5) / eps)),  # Lemma 17
            # Lemma 17 prints 8 for 32 kappa P, see Lemma 18 in test_rhm.py:
            N=math.ceil(32 * 2 * 10 / eps**2 * math.log(4 * 10 / 1e-3)),
            # Lemma 10, a quarter of the printed sigma^2; M without logarithms:
            sigma=rho_tilde / math.sqrt(2 * math.log(2 / eps_O)),
            M=3 * 5 / min(eps_O**2, (1 / 40) ** 4),
        ))  # fmt: skip
    twins = [[[0, 1], [1, 0]], [[0, 0], [1, 1]]]  # both symbols have the same q
    with pytest.raises(ValueError, match="Theorem 7: Assumption 6.* fails"):
        theorem_7.proof_constants(RHM([twins, twins]))


def test_theorem_7_assumption_9_holds_at_every_level(stages):
    """Embeddings of one symbol lie within eps~_S = eps_S sigma / s^(1/2), those of two
    symbols rho - 2 eps_* apart.  Both follow from the errors of the level below."""
    for stage in stages:
        c, symbols = stage.c, torch.from_numpy(stage.tokens)[..., None]
        pairs = torch.cat([stage.h, symbols], dim=2).flatten(0, 1).unique(dim=0)
        h, symbol = pairs[:, :-1], pairs[:, -1]  # each embedding once, with its symbol
        apart, same = torch.cdist(h, h), symbol[:, None] == symbol
        assert apart[same].max() <= c.eps_S * c.sigma / math.sqrt(2)
        assert apart[~same].min() >= c.rho - 2 * c.eps_below - 1e-12  # rounding


def test_theorem_7_lemma_10_equation_7_patches_apart_rows_of_one_together(stages):
    """Eq. (7): different patches overlap by eps_O at most, representations of one patch
    lie within eps_S.  At rho~, the smallest distance of two patches, the kernel is
    eps_O / 2.  Four times our sigma^2, as printed, would break the first."""
    for stage in stages:
        overlap, spread = overlap_and_spread(stage.K, stage.patch)
        assert overlap == pytest.approx(stage.c.eps_O / 2, rel=0.1)
        assert spread <= stage.c.eps_S and (spread > 0) == (stage.level < 3)
        assert overlap ** (1 / 4) > 100 * stage.c.eps_O  # as printed, K is K^(1/4)
    _, spread = overlap_and_spread(torch.eye(3), torch.tensor([0, 0, 1]))
    assert spread == pytest.approx(math.sqrt(2))  # of two orthogonal rows


def equation_9(stage, K):
    """Lemma 14 at eps_O = 0, for every row: alpha_mu (U,), p^_mu (U,), q^_mu (V, U)."""
    same = (stage.patch[:, None] == stage.patch).double()
    p_hat = same @ stage.p  # a patch has several rows
    K = K * same  # 0 between different patches
    W_x = minimiser(K, stage.p, stage.joint, stage.c.lambda_W) @ K
    # W_* x = alpha_mu p^_mu q^_mu, and q^_mu sums to 1:
    return W_x.sum(0) / p_hat, p_hat, stage.joint @ same / p_hat


def test_theorem_7_lemma_14_equation_9_the_minimiser_is_a_multiple_of_q(rhm, stages):
    """W_* x = alpha_mu p^_mu q^_mu up to 6 P^2 eps_O, and exactly so for eps_O = 0, if
    labels do not depend on how a patch is written out.  In samples they do a little:
    inputs off by rho / 50 show a term of order eps_S^2 P (max p / N)^(1/2)."""

    def rest(stage, K, joint):
        alpha, p_hat, q_hat = equation_9(stage, stage.K)
        W_x = minimiser(K, stage.p, joint, stage.c.lambda_W) @ K
        return (W_x - alpha * p_hat * q_hat).norm(dim=0).max()

    for stage in stages:
        assert rest(stage, stage.K, stage.joint) <= 6 * P**2 * stage.c.eps_O
    for samples in (1e-6, 1e-4):
        stage = literal_run(rhm, samples, push=0.02)[1]
        alpha, p_hat, q_hat = equation_9(stage, stage.K)
        overlap, spread = overlap_and_spread(stage.K, stage.patch)
        independent = q_hat * stage.p  # the joint frequencies, if they did not
        same = stage.patch[:, None] == stage.patch
        assert rest(stage, stage.K * same, independent) < 1e-12 < alpha.min()
        assert rest(stage, stage.K, independent) <= 6 * P**2 * overlap
        term = spread**2 * P * math.sqrt(p_hat.max() / (samples * stage.c.N))
        assert 6 * P**2 * overlap < rest(stage, stage.K, stage.joint) <= 1.5 * term


def test_theorem_7_lemma_15_equation_12_gradient_descent_has_converged(stages):
    """||W_T - W_*|| <= exp(-T/P) ||W_*|| and ||W_*|| <= P, since no curvature is below
    lambda_W.  With Lemma 17's T, no more than its share of the error is left.  An
    eighth of the steps would break it."""

    def norm(A, K):  # ||W||_F of W = A X
        return ((A @ K) * A).sum().clamp(min=0).sqrt()  # rounding: it may be below 0

    for stage in stages:
        c, K, rows = stage.c, stage.K, (stage.K, stage.p, stage.joint, stage.c.lambda_W)
        A_star, share = minimiser(*rows), c.eps / (100 * c.kappa * math.sqrt(4))
        rest, few = norm(stage.A - A_star, K), dual_descent(*rows, c.eta, c.T // 8)
        assert norm(A_star, K) <= math.sqrt(P) / 2  # sharper than P
        assert rest <= math.exp(-c.T / P) * norm(A_star, K)
        assert rest <= share < norm(few - A_star, K)


def test_theorem_7_lemma_16_the_posterior_gets_enough_weight(stages):
    """alpha_mu >= 1 / (4 (p^_mu + lambda_W)) if eps_S <= lambda_W / 4.  We find almost
    1 for 1/4, and Lemma 17's p^ alpha >= 1 / (5 kappa), which 1/4 does not give.
    Orthogonal representations of one patch would break it."""
    for stage in stages:
        c, (alpha, p_hat, _) = stage.c, equation_9(stage, stage.K)
        _, spread = overlap_and_spread(stage.K, stage.patch)
        assert (alpha * (p_hat + c.lambda_W)).min() >= 1 - spread**2 - 1e-12
        assert (alpha * p_hat).min() >= 1 / (5 * c.kappa)
        alpha, *_ = equation_9(stage, torch.eye(512).double())  # orthogonal
        assert (alpha * (p_hat + c.lambda_W)).min() < 1 / 4


def test_theorem_7_lemma_17_every_output_is_within_eps(rhm, stages):
    """||output - q_mu|| <= eps_* at every place of every level.  W_T x is near a
    multiple of q^_mu, and Eq. (2) takes the multiple away.  N / 100,000 samples would
    break it, since q^ has an error of order (P / N)^(1/2)."""
    for stage in stages:
        assert stage.errors.max() <= stage.c.eps  # false alarm: delta = 1e-6 each
    few = literal_run(rhm, samples=1e-5)[0]
    assert few.errors.max() > 3 * few.c.eps  # the constants leave much room


def test_theorem_7_lemma_11_small_errors_of_the_inputs_do_no_harm(rhm, stages):
    """Inputs may be off by eps_* of the level below.  Outputs are off by less, in units
    of their own rho: errors do not grow.  Inputs off by half of rho would break it."""
    push = min(stage.c.eps_below / stage.c.rho for stage in stages[1:])
    for stage in literal_run(rhm, push=push)[1:]:
        assert stage.errors.max() <= min(stage.c.eps, push * rhm.signal(stage.level))
    far = literal_run(rhm, push=0.5)[1]
    assert ((far.h - stages[1].h).norm(dim=2) - far.c.rho / 2).abs().max() < 1e-12
    assert far.errors.max() > 100 * far.c.eps


def test_theorem_7_the_tables_compare_what_is_asked_with_what_is_found(stages):
    """Assumption 9 follows from the errors in both columns of the first table; the run
    obeys eps_S only at the bottom level, where a patch has one embedding.  In the
    second table each number is below the allowed one beside it."""
    rhm = RHM.random(8, 2, 2, 2, 0)
    asked, found = theorem_7.asked(rhm), theorem_7.found(rhm, Config(C=5, M=64))
    for l in (1, 2):
        rho, a, f = rhm.signal(l), asked[l], found[l]
        assert (a.inside, a.between) == (2 * a.eps, rho - 2 * a.eps)
        assert 0 < f.inside <= 2 * f.eps + 1e-6  # float32
        assert rho - 2 * f.eps - 1e-6 <= f.between <= rho
        assert f.T == schedule(8, 2, Config.ridge, Config.eps)[2]
    assert found[2].sigma == pytest.approx(math.sqrt(7 / 16), rel=0.02)  # one-hot
    assert found[2].eps_S == 0 < asked[1].eps_S < found[1].eps_S
    _, _, samples, width, *_ = theorem_7.table(asked, found)  # level 2, level 1
    assert samples.endswith(" | 1,280, 640") and width.endswith(" | 64")
    lines = list(theorem_7.literal_table(stages))[2:]
    for stage, line in zip(stages, lines, strict=True):
        cells = [float(cell) for cell in line.replace(",", "").split(" | ")]
        level, N, T, overlap, eps_O, spread, eps_S, error, eps = cells
        assert (level, T) == (stage.level, stage.c.T) and T < N
        assert eps_O / 3 < overlap <= eps_O and spread <= eps_S and error <= eps


# ---- Appendix B: how large the signal is.  Our T_l is its bold P_l; P is |P_l| above.


def transition(rules):  # rules[l - 1] of one grammar or many, (..., V, m, s)
    """T_l (..., V, V): the share of nu's rules (rows) whose first token is mu."""
    return np.eye(rules.shape[-3])[rules[..., 0]].mean(-2)


def typical_signal(V, m, level):
    """Root mean square of ||q_mu - q_mu'||, patches not synonymous (Lemmas 21, 26)."""
    return math.sqrt(2 * ((V - 1) / (m * V - 1)) ** (level - 1))


def every_deal(V, m):
    """T of all (V m)! ways to deal m balls of V colours into V bins of m slots."""
    balls = np.repeat(np.arange(V), m)  # a ball is a rule, its colour the first token
    deals = list(itertools.permutations(balls))
    return transition(np.reshape(deals, (-1, V, m, 1)))


def draw_rules(n, V, m, s, uniform=True):
    """The rules of n levels, (n, V, m, s), by Appendix B's sampler or Cagnetta's."""
    rng, rules = np.random.default_rng(0), []
    for _ in range(n):
        rules.append(RHM.random(V, m, s, 1, rng, uniform_first_token=uniform).rules[0])
    return np.array(rules)


def assert_frequencies(counts, p):
    """Counts of events of probability p lie within six standard deviations."""
    n = counts.sum()
    assert (np.abs(counts - n * p) <= 6 * np.sqrt(n * p * (1 - p))).all()


@pytest.mark.parametrize("uniform", [True, False])
def test_appendix_B_the_samplers_differ_and_every_patch_is_equally_likely(uniform):
    """Each of the V^s patches is a rule of symbol 0 with the same probability.
    Appendix B draws m tails for each head, independently, Cagnetta et al. any V m
    patches.  The same tails for all heads would break it."""
    rules = draw_rules(2000, V=3, m=2, s=2, uniform=uniform)
    head, tail = rules[..., 0], rules[..., 1]  # (2000, V, m)
    of_symbol_0 = np.bincount((3 * head + tail)[:, 0].ravel())
    assert_frequencies(of_symbol_0, 1 / 9)  # false alarm: 1e-7, below as well
    assert (np.sort(head.reshape(-1, 6)) == [0, 0, 1, 1, 2, 2]).all() == uniform
    if uniform:  # the one tail that a head does not have, of heads 0 and 1
        missing_0, missing_1 = (3 - (tail * (head == nu)).sum((1, 2)) for nu in (0, 1))
        assert_frequencies(np.bincount(3 * missing_0 + missing_1), 1 / 9)


def test_lemma_20_transitions_are_balls_dealt_into_bins():
    """m T_l counts m balls of each colour dealt into bins, all deals equally likely: so
    Lemmas 21 to 23, 26 are about every deal.  Rules dealt in order would break it."""
    tables, times = np.unique(every_deal(3, 2), axis=0, return_counts=True)
    drawn = transition(draw_rules(2000, V=3, m=2, s=2))
    counts = (drawn[:, None] == tables).all((2, 3)).sum(0)
    assert counts.sum() == 2000  # no other tables than these 21
    assert_frequencies(counts, times / 720)  # false alarm: 1e-6


def test_lemma_21_lemma_26_rows_of_T_z_are_means_without_replacement():
    """Write z_mu on the balls of colour mu.  Given nu rows of T z, the next one has the
    law of the mean of m of the R balls left: so it has their mean, and their variance
    times (R - m) / (m (R - 1)).  Balls put back would lose (R - m) / (R - 1)."""
    V, m, z = 3, 2, np.array([1.0, 2.0, -3.0])
    T = every_deal(V, m)
    for nu, table in itertools.product(range(V), np.unique(T, axis=0)):
        alike = (T[:, :nu] == table[:nu]).all((1, 2))  # the deals with these nu rows
        row = T[alike, nu] @ z
        left = np.repeat(z, (m - m * table[:nu].sum(0)).astype(int))
        means, R = np.mean([*itertools.permutations(left, m)], axis=1), len(left)
        same_law = np.repeat(np.sort(means), len(row) // len(means))
        assert np.sort(row) == pytest.approx(same_law)
        assert row.mean() == pytest.approx(left.mean())
        assert row.var() == pytest.approx(left.var() / m * (R - m) / (R - 1))
    # So all V rows have E ||T z||^2 = ||z||^2 (V-1)/(mV-1) together, as sum z = 0:
    for level, product in (1, np.eye(V)), (2, T), (3, T[:, None] @ T):
        mean_square = np.mean(np.sum((product @ z) ** 2, axis=-1)) * 2 / (z @ z)
        assert typical_signal(V, m, level) == pytest.approx(math.sqrt(mean_square))


def test_lemma_22_corollary_23_dealing_spreads_less_than_replacement():
    """E f(row of T z) <= E f(mean of m draws with replacement) for convex f.  Hinges
    max(x - c, 0) are enough, since other f are made of them.  With f = exp this gives
    Chernoff's bound of the balls of one colour in a bin."""
    V, m, z = 3, 2, np.array([1.0, 2.0, -3.0])
    first_bin = every_deal(V, m)[:, 0]  # (720, V)
    dealt, replaced = first_bin @ z, np.mean([*itertools.product(z, repeat=m)], axis=1)
    for c in np.linspace(-2.5, 1.5, 17):
        gap = np.maximum(replaced - c, 0).mean() - np.maximum(dealt - c, 0).mean()
        assert gap > 0.01
    used, p = m * first_bin[:, 0], 1 / V
    for k in range(m + 1):
        tail = np.mean(used >= k if k > m * p else used <= k)
        most_likely = (k / m) ** k * (1 - k / m) ** (m - k)
        assert tail <= p**k * (1 - p) ** (m - k) / most_likely


def test_lemma_24_equation_13_remark_25_used_balls():
    """After nu bins, gamma = nu / V, gamma m (1 +- eps) balls of a colour are used, but
    for a probability of 2 exp(-eps^2 gamma m / 3).  A union over V^2 bins and colours
    keeps all within delta_H (our constant).  Rules dealt in order would break it."""
    V, m, n, delta = 16, 64, 100, 1e-6
    mean = np.arange(1, V + 1)[:, None] * m / V  # gamma m, (nu, 1)
    used = m * transition(draw_rules(n, V, m, s=3)).cumsum(1)  # (n, nu, mu)
    away = np.abs(used - mean)
    for eps in (0.25, 0.5, 1):
        found = (away >= eps * mean).mean((0, 2), keepdims=True)  # (1, nu, 1)
        assert (found <= 2 * np.exp(-(eps**2) * mean / 3)).all()
    delta_H = math.sqrt(m / 2 * math.log(2 * V**2 * n / delta))  # 28; 17 is seen
    assert away.max() <= delta_H


def test_lemma_29_lemma_30_proposition_19_need_large_V_and_m():
    """For one fixed z, ||T z||^2 >= ||z||^2 / (20 m) with high probability.  So for all
    pairs of symbols rho^(l) >= (20 m)^(-(l-1)/2), if V and m are large, of order log d.
    At V = 16, m = 4 it is no bound: in 4.7% of grammars two symbols have the same q."""
    failures, rng = {4: 0, 32: 0}, np.random.default_rng(0)
    for V, m in 300 * [(16, 4)] + 10 * [(32, 32)]:
        rhm, z = RHM.random(V, m, 2, 4, rng), rng.standard_normal(V)
        T, z = transition(rhm.rules), z - z.mean()
        assert np.sum((T[0] @ z) ** 2) >= z @ z / (20 * m)
        assert np.allclose(rhm.label_posterior(4).T, T[0] @ T[1] @ T[2])
        # For m = 4 a rho above 0 is above its bound: q has multiples of m^-(l-1).
        below = [rhm.signal(l) < (20 * m) ** (-(l - 1) / 2) for l in (1, 2, 3, 4)]
        failures[m] += any(below)
    assert 1 <= failures[4] <= 36 and failures[32] == 0  # false alarm: 1e-6
