"""Appendix C, measured: Principle 2 beyond grammars, for deep quadratic functions.

`python -m experiments.deep_quadratic`, about half a minute.  f is a sum of monomials of
signs x in {-1, 1}^d, here {support: coefficient}; a support is a set of variables.
Definition 31: supports have sizes 2, 4, 8, ...; those of one size are disjoint, each
larger one joins two of half its size.  Level l multiplies pairs of what level l - 1
found and fits f minus the levels found so far (p. 42: that sum ends at l - 1, not L-1).
Appendix C is informal: no theorem, no N.  |c| >= 1/2 and THRESHOLD are given.
"""

import argparse
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.sample_complexity import samples_needed

THRESHOLD = 0.25  # half of the smallest coefficient


def random_forest(d, rng, keep=0.9):
    """A random f of Definition 31; a candidate union enters with probability keep."""
    sets, f = [frozenset([i]) for i in range(d)], {}
    while len(sets) > 1:
        order = rng.permutation(len(sets))
        unions = [sets[a] | sets[b] for a, b in zip(order[::2], order[1::2])]
        sets = [S for S in unions if rng.random() < keep]
        f |= {S: float(rng.choice([-1, 1]) * rng.uniform(0.5, 1)) for S in sets}
    return f


def evaluate(f, x):
    """f(x), (..., N), monomial by monomial; x: (..., d, N), signs."""
    return sum(c * x[..., list(S), :].prod(-2) for S, c in f.items())


def forward(f, x):
    """The same as the layers of Eq. (14): products of pairs, added with weights."""
    features, output = {frozenset([i]): x_i for i, x_i in enumerate(x)}, 0
    while features:
        pairs = [(A, S) for S in f for A in features if A < S and S - A in features]
        features = {S: features[A] * features[S - A] for A, S in pairs}
        output = output + sum(f[S] * features[S] for S in features)
    return output


def draw_signs(d, N, rng, mean=0.0):
    """x (levels, d, N) with E x = mean: fresh samples for each level."""
    plus = rng.random((d.bit_length() - 1, d, N)) < (1 + mean) / 2
    return np.where(plus, np.float32(1), np.float32(-1))


def least_squares(rows, y):
    """Coefficients (n,) of rows (n, N) that fit y (N,); the shortest, if many do."""
    tiny = 1e-4 * np.eye(len(rows), dtype=np.float32)  # makes the matrix invertible
    return np.linalg.solve(rows @ rows.T / len(y) + tiny, rows @ y / len(y))


def learn_levels(x, y, one_step=False):
    """Learn f from x (levels, d, N) and y (levels, N), fresh samples for each level."""
    found, sets = {}, [frozenset([i]) for i in range(x.shape[1])]
    for x_l, y_l in zip(x, y):
        rest = y_l - evaluate(found, x_l)
        phi = np.array([x_l[list(S)].prod(0) for S in sets])  # features, (n, N)
        a, b = np.triu_indices(len(sets), 1)
        if one_step:  # from W = 0, Section 2.3: correlations with the products
            estimates = ((phi * rest) @ phi.T)[a, b] / len(rest)
        else:
            estimates = least_squares(phi[a] * phi[b], rest)
        kept = np.flatnonzero(np.abs(estimates) > THRESHOLD)
        if not 0 < len(kept) <= x.shape[1] / 2:  # nothing, or too many to be disjoint
            break
        new = {sets[a[k]] ^ sets[b[k]]: phi[a[k]] * phi[b[k]] for k in kept}
        sets, refit = list(new), least_squares(np.array(list(new.values())), rest)
        found |= dict(zip(sets, refit.tolist()))
    return found


def one_shot(x, y):
    """No levels: correlations with all 2^d monomials at once, a Fourier transform."""
    sums = np.zeros((2,) * x.shape[1])
    np.add.at(sums, tuple(np.moveaxis(x < 0, 1, 0).astype(int)), y)
    means = np.fft.fftn(sums).real / y.size  # index 1 for the variables of a monomial
    large = np.argwhere(np.abs(means) > THRESHOLD)
    return {frozenset(np.flatnonzero(S).tolist()): means[tuple(S)] for S in large}


LEARNERS = {
    "least squares": learn_levels,
    "one gradient step": partial(learn_levels, one_step=True),
    "all 2^d monomials": one_shot,
}


def error(f, prediction, x):
    """The share of the variance of f(x) that a prediction (N,) leaves unexplained."""
    return np.mean((evaluate(f, x) - prediction) ** 2) / np.var(evaluate(f, x))


def trials(functions, d, N, learn, rng, mean=0.0):
    """For each f: exact or not, true and false supports found, variance unexplained."""
    rows = []
    for f in functions:
        x, test = (draw_signs(d, n, rng, mean) for n in (N, 1000))
        g = learn(x, evaluate(f, x))
        true, false = len(f.keys() & g.keys()), len(g.keys() - f.keys())
        left = error(f, evaluate(g, test[0]), test[0])
        rows.append((f.keys() == g.keys(), true, false, left))
    return np.array(rows)


def measure(d, learn, forests, rng):
    """The share of forests found exactly; N of each level rises by sqrt 2 up to 95%."""
    N, shares = [], []
    while not shares or shares[-1] < 0.95:
        N.append(round(6 * d**1.5 * 2 ** (len(N) / 2)))
        shares.append(trials(forests, d, N[-1], learn, rng)[:, 0].mean())
    return N, shares


def sweep(sizes, rng):
    """Print and return the curves {learner: {d: (N, shares)}}, 20 functions each."""
    print(" d  learner           features  N of 90%  N of each level: found exactly")
    curves = {name: {} for name in LEARNERS}
    for d in sizes:
        forests = [random_forest(d, rng) for _ in range(20)]
        for name in list(LEARNERS)[: 3 if d <= 16 else 2]:
            N, shares = curves[name][d] = measure(d, LEARNERS[name], forests, rng)
            features = d * (d - 1) // 2 if name != "all 2^d monomials" else 2**d
            points = "".join(f"{n:7}:{share:5.0%}" for n, share in zip(N, shares))
            needed = f"{features:8} {samples_needed(N, shares):9.0f}"
            print(f"{d:2}  {name:17} {needed}{points}", flush=True)
    return curves


def compare_kernel(rng, d=16, N=640):
    """Print what levels and kernel ridge regression leave, on the same samples."""
    print(f"\nUnexplained, d = {d}, N = {N}: levels; Gaussian kernel, best of 6")
    for f in (random_forest(d, rng) for _ in range(3)):
        x, test = draw_signs(d, N, rng), draw_signs(d, 1000, rng)[0]
        y, inputs, kernel = evaluate(f, x), np.hstack(x), []
        for width, ridge in product((d / 2, d, 2 * d), (1e-3, 1e-2)):
            K, K_test = (np.exp((z.T @ inputs - d) / width) for z in (inputs, test))
            np.fill_diagonal(K, 1 + ridge)
            kernel.append(error(f, K_test @ np.linalg.solve(K, y.ravel()), test))
        levels = error(f, evaluate(learn_levels(x, y), test), test)
        print(f"{levels:10.1%} {min(kernel):8.1%}", flush=True)


def conditions(rng, d=16):
    """Print what remains when one condition of Principle 2 is taken away."""
    trees = [random_forest(d, rng, keep=1) for _ in range(20)]
    tops = [{S: c for S, c in f.items() if len(S) == d} for f in trees]
    gaps = [{S: c for S, c in f.items() if len(S) != 4 or 0 not in S} for f in trees]
    sets = [frozenset(S) for size in (2, 4) for S in combinations(range(4), size)]
    squares = [dict(zip(sets, f.values())) for f in trees]  # six pairs and their union
    print("\nWithout a condition of Principle 2: means of 20 functions, last a median")
    print(" " * 24 + "N  learner            exact    supports  false  unexplained")
    for name, functions, N, mean in (
        ("all conditions hold", trees, 2000, 0),
        ("(i) top monomial alone", tops, 64_000, 0),
        ("(i) a middle node gone", gaps, 2000, 0),
        ("(ii) E x = 0.5", trees, 16_000, 0.5),
        ("(ii) E x = 0.5", trees, 64_000, 0.5),
        ("(ii) E x = 0.7", trees, 64_000, 0.7),
        ("(iii) six pairs of 4", squares, 4000, 0),
    ):
        for learner in ("least squares", "one gradient step"):
            rows = trials(functions, d, N, LEARNERS[learner], rng, mean)
            exact, true, false, _ = rows.mean(0)
            found = f"{exact:6.0%}  {true:4.1f} of {len(functions[0]):2} {false:6.1f}"
            left = np.median(rows[:, 3])
            print(f"{name:22} {N:6}  {learner:17} {found} {left:12.1%}", flush=True)


def plot(curves):
    """Left the shares against N, right the N of 90% against d; returns the Figure."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, curve), line in zip(curves.items(), ("o-", "s--", "^:")):
        for d, (N, shares) in curve.items():
            color = colormaps["viridis"]((np.log2(d) - 2) / 4.5)
            label = f"d = {d}" if line == "o-" else None
            left.plot(N, shares, line, color=color, label=label, markersize=4)
        needed = [samples_needed(*points) for points in curve.values()]
        right.plot(list(curve), needed, line, color="black", label=name)
    ds = np.array(list(curves["least squares"]))
    right.plot(ds, 10 * ds**1.5, color="tab:orange", label="10 d^1.5, for reference")
    left.set(xscale="log", xlabel="N, samples of each level", ylim=(-0.04, 1.25))
    left.set(ylabel="share of 20 functions found exactly", yticks=np.linspace(0, 1, 6))
    legend = dict(columnspacing=0.8, handlelength=1.2, fontsize="small")
    left.legend(loc="upper center", ncols=5, **legend)
    right.set(xscale="log", yscale="log", xlabel="d", ylabel="N of each level for 90%")
    right.set_xticks([], minor=True)
    right.set_xticks(ds, ds)
    right.legend()
    return figure


def main(argv=None):
    """Measure, print, draw."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    rng = np.random.default_rng(0)
    curves = sweep((8, 12, 16, 32, 64), rng)
    compare_kernel(rng)
    conditions(rng)
    plot(curves).savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
