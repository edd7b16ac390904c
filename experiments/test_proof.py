"""A second hour beside the proof: Appendix A with its own constants, and Appendix B.

`pytest -k theorem_7` runs the first part, `-k lemma_29` what is about Lemma 29.  P is
|P_l| = V m.  Slips are numbered as in the notebook, experiments/README.md.
Without a test: Lemma 27 says something for far larger m only, and Lemma 28 is Bennett's
bound of moments, which bounded draws satisfy trivially.

All seeds are fixed.  A false alarm is the failure of a correct program for another
seed; a comment says how likely it is where chance enters.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from experiments import theorem_7
from experiments.theorem_7 import dual_descent, literal_run, overlap_and_spread
from model import Level
from rhm import RHM, typical_signal
from train_layerwise import Config, averages, gradient_descent

torch.set_num_threads(1)  # two threads stall beside a busy program

# Two grammars of 512 sentences, P = 8, with K_rho > 0; the first has kappa = 1:
TINY = RHM.random(V=4, m=2, s=2, L=3, rng=22)
KAPPA_4 = RHM.random(V=4, m=2, s=2, L=3, rng=10, uniform_first_token=False)


def minimiser(K, p, joint, lambda_W):
    """A_* of the closed form W_* = A_* X, to which dual_descent converges."""
    return joint @ torch.linalg.inv(K * p + lambda_W * torch.eye(len(p)))


# ---- Appendix A: Theorem 7, with the constants of its own proof.  The bounds are the
# paper's; the literal run has errors of eps_* / 18 or less, overlaps of eps_O / 2.


def test_equation_11_and_equation_3_inner_products_are_enough_for_the_descent():
    """W stays in the span of the samples, W = A X.  So the dual form follows gradient
    descent on Eq. (3) step by step, to W_* = E^[e x^T] (E^[x x^T] + lambda_W I)^-1.
    Frequencies on the wrong side of K would part them at the second step."""
    rng = np.random.default_rng(0)
    h = torch.from_numpy(rng.standard_normal((40, 2, 3)))
    shares = torch.from_numpy(rng.dirichlet(np.full(120, 0.3)).reshape(40, 3))
    level = Level(3, 2, 16, 1.0, rng).double()
    x, lambda_W, eta = level.patch_embedding(h.flatten(1)), 0.05, 2 / 1.1
    covariance, correlation = averages(level, h, shares)
    dual = x @ x.T, shares.sum(1), shares.T, lambda_W
    for T in (2, 30, 2000):
        W, _ = gradient_descent(covariance, correlation, lambda_W, eta, T)
        assert torch.allclose(dual_descent(*dual, eta, T) @ x, W, atol=1e-12)
    W_star = correlation @ torch.linalg.inv(covariance + lambda_W * torch.eye(32))
    for found in W, minimiser(*dual) @ x:  # 1.1^-2000 is left
        assert torch.allclose(found, W_star, atol=1e-12)


def equation_9(stage, K):
    """Lemma 14 at eps_O = 0, row by row: alpha_mu (U,), p^_mu (U,), q^_mu (V, U).

    K of different patches is taken as 0.  Then W_* x = alpha_mu p^_mu q^_mu, where q^
    sums to 1: so alpha_mu p^_mu is what W_* makes of a label that is always 1.
    """
    same = (stage.patch[:, None] == stage.patch).double()
    p_hat = same @ stage.p
    alpha = minimiser(K * same, stage.p, stage.p, stage.c.lambda_W) @ (K * same) / p_hat
    return alpha, p_hat, stage.joint @ same / p_hat


@pytest.fixture(scope="module", params=[TINY, KAPPA_4], ids=["kappa=1", "kappa=4"])
def literal(request):
    """The grammar, and the stages of its literal run."""
    return request.param, literal_run(request.param)


def test_theorem_7_proof_constants_are_the_formulas_of_the_paper(literal):
    """Each constant of each level is that of Lemmas 10, 11, 14 to 17, slips 1 to 3
    mended.  They are written out for P = 8, V = 4, s = 2 and the grammar's own rho.
    There are none where Assumption 6 fails."""
    rhm, stages = literal
    kappa, eps = (4 if rhm is KAPPA_4 else 1), 0.01
    for l, stage in zip((1, 2, 3), reversed(stages)):
        rho, below = 2**0.5, 0  # at the bottom
        if l < 3:
            rho = rhm.signal(l + 1)
            below = rho / math.sqrt(2000 * 8**2 * 2 * math.log(8 * kappa / eps))
        eps_O = eps / (600 * 8**2 * kappa * 2)  # Lemma 17
        assert vars(stage.c) == pytest.approx(dict(
            kappa=kappa, eps=eps, rho=rho,
            eps_below=below, rho_tilde=rho - 2 * below,  # Lemma 11
            lambda_W=1 / 8, eta=2 / (1 + 2 / 8),  # Lemmas 14, 15
            T=math.ceil(8 * math.log(100 * 8 * kappa * 2 / eps)),  # Lemma 17
            N=math.ceil(32 * kappa * 8 / eps**2 * math.log(4 * 8 / 1e-6)),  # Lemma 17
            eps_S=1 / 8 / 4, eps_O=eps_O,  # Lemmas 16, 17
            sigma=(rho - 2 * below) / math.sqrt(2 * math.log(2 / eps_O)),  # Lemma 10
            M=2 * 4 / min(eps_O**2, (1 / 32) ** 4),  # Lemma 10
        ))  # fmt: skip
        eps = below
    never, twins = [[[0, 0]], [[0, 1]]], [[[0, 1], [1, 0]], [[0, 0], [1, 1]]]
    for rules in never, twins:  # symbol 1 is never first; both symbols have the same q
        with pytest.raises(ValueError, match="Theorem 7: Assumption 6.* fails"):
            theorem_7.proof_constants(RHM([rules] * 2))


def test_theorem_7_assumption_9_holds_at_every_level(literal):
    """Embeddings of one symbol lie within eps~_S = eps_S sigma / s^(1/2), Lemma 10's
    hypothesis; those of two symbols rho - 2 eps_* apart, sqrt 2 at the bottom.  Both
    follow from the errors of the level below.  Too few samples there would break it."""
    for stage in literal[1]:
        c, tokens = stage.c, torch.from_numpy(stage.tokens)[:, :, None]
        rows = torch.cat([stage.h, tokens], 2).flatten(0, 1).unique(dim=0)
        apart = torch.cdist(rows[:, :-1], rows[:, :-1])
        same = rows[:, -1:] == rows[:, -1]
        assert apart[same].max() <= c.eps_S * c.sigma / math.sqrt(2)
        assert apart[~same].min() >= c.rho - 2 * c.eps_below - 1e-12  # rounding


def test_theorem_7_lemma_10_patches_apart_and_representations_together(literal):
    """Eq. (7): different patches overlap by eps_O at most, representations of one lie
    within eps_S.  The kernel falls below eps_O / 2 at the distance rho~.  The printed
    sigma is twice as large, and its overlaps are K^(1/4), far above eps_O (slip 3)."""
    for stage in literal[1]:
        overlap, spread = overlap_and_spread(stage.K, stage.patch)
        assert overlap <= stage.c.eps_O and spread <= stage.c.eps_S
        printed, _ = overlap_and_spread(stage.K**0.25, stage.patch)
        assert printed > 100 * stage.c.eps_O
        if stage is literal[1][0]:
            assert printed == pytest.approx((stage.c.eps_O / 2) ** 0.25, rel=0.01)
            assert spread == 0
    _, spread = overlap_and_spread(torch.eye(3), torch.tensor([0, 0, 1]))
    assert spread == pytest.approx(math.sqrt(2))  # of orthogonal representations


def test_theorem_7_lemma_14_and_equation_9_the_minimiser_is_a_multiple_of_q(literal):
    """W_* x = alpha_mu p^_mu q^_mu up to 6 P^2 eps_O, and exactly so for eps_O = 0.
    Different patches hardly see each other, and labels do not depend on how a patch is
    written out.  In samples they do a little: inputs off by rho / 50 and small N show a
    term of order eps_S^2 P (max p / N)^(1/2) (slip 4)."""

    def rest(stage, K, joint):
        alpha, p_hat, q_hat = equation_9(stage, stage.K)
        W_x = minimiser(K, stage.p, joint, stage.c.lambda_W) @ K
        return (W_x - alpha * p_hat * q_hat).norm(dim=0).max()

    for stage in literal[1]:
        assert rest(stage, stage.K, stage.joint) <= 6 * 8**2 * stage.c.eps_O
    for samples in (1e-6, 1e-4):
        stage = literal_run(literal[0], samples, push=0.02)[1]
        alpha, p_hat, q_hat = equation_9(stage, stage.K)
        independent = q_hat * stage.p  # the joint law, if they were so in the sample
        overlap, spread = overlap_and_spread(stage.K, stage.patch)
        assert rest(stage, stage.K, independent) <= 6 * 8**2 * overlap
        same = stage.patch[:, None] == stage.patch
        assert rest(stage, stage.K * same, independent) < 1e-12 < alpha.min()
        term = spread**2 * 8 * math.sqrt(p_hat.max() / (samples * stage.c.N))
        assert 6 * 8**2 * overlap < rest(stage, stage.K, stage.joint) <= 1.5 * term


def test_theorem_7_lemma_15_and_equation_12_gradient_descent_has_converged(literal):
    """||W_T - W_*|| <= exp(-T/P) ||W_*|| and ||W_*|| <= P, so the two are P exp(-T/P)
    apart at most.  Each step shrinks every direction, since no curvature is below
    lambda_W.  An eighth of the steps misses Lemma 17's share of the error."""
    for stage in literal[1]:
        c, K = stage.c, stage.K
        norm = lambda A: ((A @ K) * A).sum().clamp(min=0).sqrt()  # ||A X||_F
        A_star = minimiser(K, stage.p, stage.joint, c.lambda_W)
        rest, W_star = norm(stage.A - A_star), norm(A_star)
        assert W_star <= math.sqrt(8) / 2  # sharper than Lemma 15's P
        assert rest <= math.exp(-c.T / 8) * W_star
        share = c.eps / (100 * c.kappa * 2)  # what Lemma 17 leaves to the descent
        assert rest <= 8 * math.exp(-c.T / 8) <= share
        few = dual_descent(K, stage.p, stage.joint, c.lambda_W, c.eta, c.T // 8)
        assert norm(few - A_star) > share


def test_theorem_7_lemma_16_the_posterior_gets_enough_weight(literal):
    """alpha_mu >= 1 / (4 (p^_mu + lambda_W)), since eps_S <= lambda_W / 4.  The run has
    almost 1 for 1/4, which saves Lemma 17's p^ alpha >= 1 / (5 kappa) (slip 5).  If the
    representations of one patch were orthogonal, it would fail."""
    for stage in literal[1]:
        c, (alpha, p_hat, _) = stage.c, equation_9(stage, stage.K)
        _, spread = overlap_and_spread(stage.K, stage.patch)
        weight = alpha * (p_hat + c.lambda_W)
        assert spread <= c.lambda_W / 4 and weight.min() >= 1 - spread**2 - 1e-12
        assert (p_hat * alpha).min() >= 1 / (5 * c.kappa)
        alpha, *_ = equation_9(stage, torch.eye(512).double())  # orthogonal
        assert (alpha * (p_hat + c.lambda_W)).min() < 1 / 4


def test_theorem_7_lemma_17_every_output_is_within_eps(literal):
    """||output - q_mu|| <= eps_* at every place and level.  W_T x is near a multiple of
    q^_mu, and Eq. (2) takes the multiple away; for that reason T is not needed here.  A
    millionth of N is too few, since q^ has an error of order (P / N)^(1/2)."""
    rhm, stages = literal
    for stage in stages:
        assert stage.errors.max() <= stage.c.eps  # false alarm: delta = 1e-6 each
    few = literal_run(rhm, samples=1e-6)[0]
    assert few.errors.max() > few.c.eps  # the printed N passes: slip 1 is Lemma 18's


def test_theorem_7_lemma_11_small_errors_of_the_inputs_do_no_harm(literal):
    """Inputs may be off by eps_* of the level below.  The outputs are off by less, in
    units of their rho, so errors do not grow from level to level.  Inputs off by half
    of rho are too far for level 2, above all at the place it was not trained on."""
    rhm, stages = literal
    push = min(stage.c.eps_below / stage.c.rho for stage in stages[1:])
    for stage in literal_run(rhm, push=push)[1:]:
        allowed = min(stage.c.eps, push * rhm.signal(stage.level))
        assert stage.errors.max() <= allowed
    far = literal_run(rhm, push=0.5)[1]
    assert far.errors.max() > 100 * far.c.eps


def test_theorem_7_the_tables_compare_what_is_asked_with_what_is_found(literal):
    """Assumption 9 follows from the errors, in both columns of the first table.  The
    default run obeys eps_S only at the bottom level, where a patch has one embedding.
    In the second table each number is below the allowed one beside it."""
    rhm = RHM.random(8, 2, 2, 2, 0)
    asked, found = theorem_7.asked(rhm), theorem_7.found(rhm, Config(C=5, M=64))
    for l in (1, 2):
        assert asked[l].inside + asked[l].between == pytest.approx(rhm.signal(l))
        for c in asked[l], found[l]:
            assert c.inside <= 2 * c.eps + 1e-6  # float32
            assert c.between >= rhm.signal(l) - 2 * c.eps - 1e-6
    assert found[2].eps_S == 0 < asked[1].eps_S < found[1].eps_S
    head, _, samples, width, *_ = theorem_7.table(asked, found)
    assert head.startswith("level 2, 1 |") and samples.endswith(" | 1,280, 640")
    assert width.endswith(" | 64")
    _, _, *rows = theorem_7.literal_table(literal[1])
    for level, row in zip((3, 2, 1), rows, strict=True):
        cells = [float(cell) for cell in row.replace(",", "").split(" | ")]
        assert cells[0] == level and (np.diff(cells[3:])[::2] >= 0).all()


# ---- Appendix B: how large the signal is ---------------------------------------------


def assert_frequencies(counts, p, false_alarm=1e-7):
    """Counts agree with probabilities p: Bernstein's inequality, cell by cell."""
    n, log = counts.sum(), math.log(2 * np.size(p) / false_alarm)
    allowed = log / 3 + np.sqrt(log**2 / 9 + 2 * log * n * p * (1 - p))
    assert (np.abs(counts - n * p) <= allowed).all()


def every_transition(V, m):
    """T of each of the (V m)! ways to deal the patches (mu, tail), (deals, V, V)."""
    patches = itertools.product(range(V), range(m))
    deals = np.array(list(itertools.permutations(patches))).reshape(-1, 1, V, m, 2)
    return np.array([RHM(deal).transition(1) for deal in deals])


def random_transitions(V, m, s, deals):
    """T of Appendix B's sampler, (deals, V, V)."""
    rng = np.random.default_rng(0)
    return np.array([RHM.random(V, m, s, 1, rng).transition(1) for _ in range(deals)])


@pytest.mark.parametrize("uniform", [True, False])
def test_appendix_B_the_samplers_differ_and_every_patch_is_equally_likely(uniform):
    """Each of the V^s patches is a rule of symbol 0 with probability m / V^s.  Appendix
    B draws m tails for each head, independently, Cagnetta et al. any V m patches.
    Patches dealt in order, or the same tails for all heads, would break it."""
    rng, drawn = np.random.default_rng(0), np.zeros((3000, 3, 3))  # V = 3, m = s = 2
    draw = lambda: RHM.random(3, 2, 2, 1, rng, uniform_first_token=uniform).rules[0]
    rules = np.array([draw() for _ in drawn])
    assert_frequencies(np.bincount((rules[:, 0] @ [3, 1]).ravel()), np.full(9, 1 / 9))
    drawn[np.arange(3000)[:, None, None], rules[..., 0], rules[..., 1]] = 1
    assert (drawn.sum(2) == 2).all() == uniform  # m patches of every head
    if uniform:
        a, b = drawn[:, :2].argmin(2).T  # the tails that heads 0 and 1 do not have
        assert_frequencies(np.bincount(3 * a + b), np.full(9, 1 / 9))


@pytest.mark.parametrize(
    "V, m, grammars, least, most",  # the share that fails; false alarm: below 1e-6
    [(4, 4, 60, 9, 50), (16, 4, 300, 1, 36), (16, 16, 60, 0, 0)],  # 49, 4.5, 0%
)
def test_proposition_19_and_lemma_30_need_large_m(V, m, grammars, least, most):
    """rho^(l) >= (20 m)^(-(l-1)/2) for most grammars, if V and m are large, of order
    log d.  The bound breaks where two symbols share q, as at small sizes.  Else rho is
    at least m^-(l-1), which is larger for m <= 20."""
    rng, failures = np.random.default_rng(0), 0
    for _ in range(grammars):
        rhm = RHM.random(V, m, 2, 4, rng)
        fails = any(rhm.signal(l) < (20 * m) ** (-(l - 1) / 2) for l in (1, 2, 3, 4))
        assert fails == (rhm.K_rho == 0)
        T = rhm.transition(1) @ rhm.transition(2) @ rhm.transition(3)
        assert np.allclose(rhm.label_posterior(4), T.T)  # q = T_1 T_2 T_3 e_nu
        failures += fails
    assert least <= failures <= most


def test_lemma_20_transitions_are_balls_dealt_into_bins():
    """m T_l counts m balls of each of V colours in V bins of m slots.  All deals are
    equally likely, so a table n has probability (m!)^(2V) / ((V m)! prod n_ij!).
    Heads dealt in blocks, or with replacement, have another law."""
    V, m = 3, 2
    tables = np.rint(m * random_transitions(V, m, 2, 2000)).astype(int)
    tables, found = np.unique(tables, axis=0, return_counts=True)
    factorials = np.array([math.factorial(k) for k in range(V * m + 1)])
    law = factorials[m] ** (2 * V) / factorials[V * m] / factorials[tables].prod((1, 2))
    assert len(law) == 21 and abs(law.sum() - 1) < 1e-12
    assert_frequencies(found, law)  # false alarm: 1e-7


def test_lemma_21_a_row_of_T_z_is_a_mean_without_replacement():
    """Write z_mu on the m balls of colour mu: a row of T z has the law of the mean of m
    of all V m balls.  With Lemma 26, E ||T z||^2 = ||z||^2 (V-1)/(mV-1) if z sums to 0,
    and typical_signal applies that l - 1 times.  Balls put back would have 1/m."""
    z, T = np.array([1.0, 2.0, -3.0]), every_transition(3, 2)  # V = 3, m = 2
    means = np.mean(list(itertools.permutations(np.repeat(z, 2), 2)), axis=1)
    for row in (T @ z).T:
        assert np.sort(row) == pytest.approx(np.sort(np.repeat(means, 720 // 30)))
    mean_square = np.mean(np.sum((T @ z) ** 2, axis=1))
    assert mean_square == pytest.approx(z @ z * (3 - 1) / (2 * 3 - 1), rel=1e-12)
    T = every_transition(2, 2)  # q = T_1 ... T_(l-1) e_nu
    for level, product in (1, np.eye(2)[None]), (2, T), (3, T[:, None] @ T):
        mean_square = np.mean(np.sum((product @ [1, -1]) ** 2, axis=-1))
        assert typical_signal(2, 2, level) == pytest.approx(math.sqrt(mean_square))


def test_lemma_22_and_corollary_23_dealing_spreads_less_than_replacement():
    """E f(row of T z) <= E f(mean of m draws with replacement) for convex f; f = exp
    gives Chernoff's bound of used balls.  Hinges max(x - c, 0) suffice, since f is a
    line plus positive multiples of them.  Balls of a colour that stick break it."""
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
    """After nu bins, gamma = nu / V, the used balls of a colour are gamma m (1 +- eps)
    but for a probability of 2 exp(-eps^2 gamma m / 3), since they are hypergeometric.
    A union over V^2 bins and colours keeps all within delta_H (our constant).  Balls
    dealt in order or put back would break it."""

    def law(V, m, slots):
        ways = [math.comb(m, k) * math.comb(V * m - m, slots - k) for k in range(m + 1)]
        return np.array([way / math.comb(V * m, slots) for way in ways])

    V, m = 3, 3
    used = np.rint(m * random_transitions(V, m, 2, 2000).cumsum(1)).astype(int)
    for nu, mu in itertools.product(range(1, V), range(V)):
        found = np.bincount(used[:, nu - 1, mu], minlength=m + 1)
        assert_frequencies(found, law(V, m, nu * m))
    V, m, deals, delta = 16, 64, 100, 4e-7  # with the six above, false alarm: 1e-6
    for nu in range(1, V):
        mean, exact = nu * m / V, law(V, m, nu * m)
        away = np.abs(np.arange(m + 1) - mean)
        for far in away[away <= mean]:  # far = eps gamma m, eps <= 1
            assert exact[away >= far].sum() <= 2 * math.exp(-(far**2) / mean / 3)
    used = m * random_transitions(V, m, 3, deals).cumsum(1)  # (deals, nu, mu)
    delta_H = math.sqrt(m / 2 * math.log(2 * V**2 * deals / delta))  # 29; 17 is seen
    assert np.abs(used - np.arange(1, V + 1)[:, None] * m / V).max() <= delta_H


def test_lemma_26_mean_and_variance_of_a_row_given_the_rows_before_it():
    """Given nu rows of T z, the next one has the mean of the R balls left, and their
    variance times (R - m) / (m (R - 1)), since it averages m of them (Lemma 21).  Balls
    put back would lose the factor (R - m) / (R - 1)."""
    V, m, z = 3, 2, np.array([1.0, 2.0, -3.0])
    T = every_transition(V, m)
    for nu, rows in itertools.product(range(V), np.unique(T, axis=0)):
        alike = (T[:, :nu] == rows[:nu]).all((1, 2))  # deals with these first nu rows
        left = np.repeat(z, (m - m * rows[:nu].sum(0)).astype(int))
        R, row = len(left), T[alike, nu] @ z
        assert row.mean() == pytest.approx(left.mean(), abs=1e-12)
        expected = left.var() / m * (R - m) / (R - 1)
        assert row.var() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("V, m, most", [(4, 4, 30), (16, 4, 4), (64, 8, 0)])
def test_lemma_29_a_fixed_direction_keeps_a_twentieth_of_its_mean(V, m, most):
    """For one fixed z, ||T z||^2 is at least ||z||^2 / (20 m) with high probability.
    Its mean is about 20 times as large (Lemma 21).  At small sizes some deals give
    symbols 0 and 1 equal columns, and z = e_0 - e_1 breaks it."""
    T, z = random_transitions(V, m, 2, 300), np.eye(V)[0] - np.eye(V)[1]
    g = np.random.default_rng(1).standard_normal(V)
    broken = lambda z: np.sum(((T @ z) ** 2).sum(1) < z @ z / (20 * m))
    assert broken(z) <= most  # 10 of 300 on average at V = m = 4
    assert V == 4 or broken(g - g.mean()) == 0  # none of 13,000 at either size
