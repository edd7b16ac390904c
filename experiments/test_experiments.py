"""What the programs print and draw, the experiments, Appendix C, and the README.

All seeds are fixed.
"""

import importlib
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
from matplotlib.colors import to_hex

import train_layerwise as tl
from experiments import backpropagation, measurements, sample_complexity, theorem_7
from experiments import deep_quadratic as dq
from experiments.sample_complexity import Curve, fresh_accuracy, train_one_level
from rhm import RHM
from train_layerwise import Config, gradient_descent, plot, run, sample_size, train

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = "rhm", "model", "train_layerwise"

# ---- What the programs print and draw ------------------------------------------------


def test_the_picture_shows_the_run():
    """The Figure that plot returns has the data under its titles and labels.  Panels of
    another layer, or error and rho / 2 exchanged, would break it."""
    rhm, levels = RHM.random(16, 4, 2, 4, 0), [4, 3, 2, 1]
    net, stages = train(rhm, Config(C=2.5))
    stages = [stage._replace(losses=np.arange(1, 4) * stage.level) for stage in stages]
    errors = [np.array([0.1, 0.2, 0.9]) / l for l in levels]
    figure = plot(net, rhm, stages, errors)
    *matrices, _, losses, right = (ax for sub in figure.subfigs for ax in sub.axes)
    for level, ax in zip(levels, matrices, strict=True):
        assert ax.get_title() == f"outputs of layer {level}"
        matrix, q = ax.images[0].get_array(), rhm.label_posterior(level)
        apart = np.linalg.norm(q[:, None] - q, axis=2)
        expected = np.kron(apart, np.ones((4, 4)))  # 4 synonyms of each symbol
        assert matrix.max() == 1 and matrix[expected == 0].max() < 0.5
        # With the q of another level at most 0.75:
        assert np.corrcoef(matrix.ravel(), expected.ravel())[0, 1] > 0.85
    lines = {line.get_label(): line.get_xydata().T.tolist() for line in losses.lines}
    assert lines == {f"layer {l}": [[1, 2, 3], [l, 2 * l, 3 * l]] for l in levels}
    lines = {line.get_label(): line.get_xydata().T.tolist() for line in right.lines}
    assert lines == {
        "rho / 2": [levels, [rhm.signal(l) / 2 for l in levels]],
        "largest error": [levels, [0.9 / l for l in levels]],
        "median error": [levels, [0.2 / l for l in levels]],
    }
    assert right.xaxis_inverted()  # layers in the order of training
    assert losses.get_xscale() == right.get_yscale() == "log"
    assert losses.get_xlabel() == "gradient step"
    assert matrices[0].get_ylabel() == "16 symbols x 4 synonyms"
    colors = [to_hex(line.get_color()) for line in right.lines]
    assert colors == [to_hex(color) for color in ("C0", "C1", "C1")]


def test_the_command_line_refuses_before_training(tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line below the usage; no file is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tl, "run", None)  # nothing is trained
    (tmp_path / "folder.png").mkdir()
    for options, says in (
        ("--figure=new.txt", "error: figure must be a .png"),
        ("--figure=new/a.png", "error: figure must be a .png"),
        ("--figure=folder.png", "error: figure must be a .png"),
        ("--fig=a.png", "error: unrecognized arguments"),
        ("--m=5 --V=2", "error: sizes >= 1, V m <= V^s < 2^63"),
        ("--M=0", "error: M must be above 0"),
        ("--seed=-1", "error: seed must be 0 or more"),
        ("--device=nowhere", "error: "),
        ("--device=cuda:99", "error: "),
    ):
        with pytest.raises(SystemExit) as stop:
            tl.main(options.split())
        *_, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and says in line
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_the_run_prints_sizes_warnings_table_and_both_parses(
    tmp_path, monkeypatch, capsys
):
    """Sizes, settings, sampler and seed arrive.  The random streams of data, features,
    three diagnoses and test are [seed, 1] to [seed, 4]; a shared one would break it."""

    def drawn(seed):
        return RHM.random(4, 3, 2, 3, seed, uniform_first_token=False)

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
    options = "--V=4 --m=3 --L=3 --C=0.01 --M=5 --sampler=cagnetta --figure=~/a.png"
    tl.main([*options.split(), f"--seed={seed}"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    expected = (1,), (2,), (3, 3), (3, 2), (3, 1), (4,)
    assert streams == {(seed, *stream) for stream in expected}
    first, *lines = capsys.readouterr().out.splitlines()
    N = [sample_size(rhm, 0.01, l) for l in (3, 2, 1)]
    assert first.startswith(f"V=4 m=3 s=2 L=3, seed {seed}; kappa = {rhm.kappa:.4g}, ")
    assert first.endswith(f"K_rho = {rhm.K_rho:.4g}; {sum(N)} training sentences")
    warnings = rhm.assumption_6_failures()
    warnings.append("fewer features (2M = 10) than patches (V m = 12)")
    assert lines[: len(warnings)] == warnings
    rows = [line.split() for line in lines[len(warnings) + 1 :][:3]]
    for row, l, n in zip(rows, (3, 2, 1), N, strict=True):
        assert row[:3] == [str(l), str(n), f"{rhm.signal(l) / 2:.4f}"]
    trees = {"network": [], "grammar": [], "tokens": []}
    for line in lines:
        if line.startswith("level "):
            _, l, name, *symbols = line.split()
            trees[name].append([int(nu) for nu in symbols])
            assert int(l) == (3 if name == "tokens" else len(trees[name]) - 1)
    parsed = [symbols[0].tolist() for symbols in rhm.parse(np.array(trees["tokens"]))]
    assert trees["grammar"] == parsed[:3] != trees["network"]


def test_rhm_alone_shows_its_grammar_without_torch(tmp_path):
    """rhm.py needs NumPy only.  `python rhm.py` prints the rules of every level, one
    derivation, and q of every pair of synonyms."""
    shutil.copy(ROOT / "rhm.py", tmp_path)
    (tmp_path / "torch.py").write_text("raise ImportError")
    lines = python(tmp_path, "-W", "error", "rhm.py").splitlines()
    rhm, tree = RHM.random(4, 2, 2, 3, np.random.default_rng(22)), []
    for l in range(4):
        [line] = [line for line in lines if line.startswith(f"  level {l}  ")]
        tree.append([int(nu) for nu in line.split()[2:]])
    assert [symbols[0].tolist() for symbols in rhm.parse(np.array(tree[3:]))] == tree
    for l, rules in enumerate(rhm.rules):
        [line] = [line for line in lines if line.startswith(f"  level {l} -> {l + 1}:")]
        assert all(f"{nu} -> {a} | {b}" in line for nu, (a, b) in enumerate(rules))
    for (a, b), q in zip(rhm.rules[1], rhm.label_posterior(2)):
        assert f"  {a} or {b}:  q = {q}" in lines


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
    for f in [dq.random_forest(16, rng, keep=1) for _ in range(3)]:
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
    """With E x = 0.5 all supports are found, but a few percent of the variance stay, at
    both N.  Level 1 absorbs a part of the levels above, and nothing corrects it later.
    Unbiased signs would break it, and a level that is fitted without the rest."""
    rng, learn = np.random.default_rng(0), dq.learn_levels
    f = dq.random_forest(16, rng, keep=1)
    assert dq.trials([f], 16, 32_000, learn, rng)[0, 3] < 1e-3
    for N in (32_000, 64_000):
        exact, true, false, left = dq.trials([f], 16, N, learn, rng, mean=0.5)[0]
        assert (exact, true, false) == (1, 15, 0) and 0.008 < left < 0.1
    nothing = dq.trials([{frozenset([0, 1]): 1}], 16, 9, lambda x, y: {}, rng, mean=0.7)
    assert nothing[0] == pytest.approx([0, 0, 0, 1 / (1 - 0.7**4)], abs=0.2)


# ---- Experiments ---------------------------------------------------------------------


def test_equation_3_the_series_is_gradient_descent_and_ends_in_the_closed_form():
    """T steps from W = 0 are a geometric series in the eigenbasis of E^[x x^T].  Its
    limit is ridge regression.  A wrong number of steps or a lost lambda_W breaks it."""
    x = torch.tensor(np.random.default_rng(0).standard_normal((9, 6)))
    covariance, correlation = x.T @ x / 99, x[:4]
    for lambda_W, T in (0.05, 1), (0.05, 7), (0.05, 2000), (1.0, 7):
        given = covariance, correlation, lambda_W, 1.5
        W, loss = sample_complexity.series(*given, T)
        steps, losses = gradient_descent(*given, T + 1)  # losses are before each step
        assert torch.allclose(W, gradient_descent(*given, T)[0])
        assert loss.item() == pytest.approx(losses[-1].item())
    limit = gradient_descent(covariance, correlation, 0.05, 1.5, 2000)[0]
    assert torch.allclose(measurements.closed_form(*given[:2], 0.05, 0, 1)[0], limit)


def test_section_4_2_N_star_and_its_power_of_m_on_curves_made_by_hand(capsys):
    """N* is interpolated in log N, and the power is the slope of log N* against log m.
    On curves made by hand both are known.  Curves that never reach 90% must be left
    out, and so must the one-level networks."""
    N = np.array([10, 100, 1000, 9999])
    shares = np.array([[0, 0.2], [0.8, 0.3], [1.0, 0.4], [0.7, 0.5]])
    [log] = sample_complexity.log_samples_needed(Curve("deep", 16, 4, 3, N, shares))
    assert np.exp(log) == pytest.approx(100 * 10**0.5)
    assert np.isnan(sample_complexity.samples_needed(N, shares[:, 1]))
    curves = [Curve("deep", 16, m, 3, m**3 * N, shares[:, :1]) for m in (2, 4, 6)]
    curves.append(Curve("one level", 16, 4, 2, N, shares))
    sample_complexity.print_exponents(curves)
    rule = np.polyfit(np.log([2, 4, 6]), np.log([28, 336, 1548]), 1)[0]  # m sum of m^l
    last = ["16", "3", "3.00", "3.0", "to", "3.0", f"{rule:.2f}", "3", "6"]
    assert capsys.readouterr().out.splitlines()[-1].split() == last
    [(key, found)] = sample_complexity.logs_by_size(curves).items()
    assert key == (16, 3) and found[4] == pytest.approx(log + 3 * math.log(4))
    found[6] = np.append(found[6], found[6] - 0.6)
    slope, local = sample_complexity.exponent([*found], [*found.values()])
    assert local == pytest.approx([3, 3 - 0.3 / math.log(1.5)])
    x, y = np.log([2, 4, 6, 6]), np.concatenate([*found.values()])
    assert slope == pytest.approx(np.cov(x, y)[0, 1] / np.var(x, ddof=1))


def test_section_4_2_the_sweep_counts_all_sentences_where_assumption_6_holds(
    monkeypatch, tmp_path, capsys
):
    """N = C V m (m + m^2) is what train draws, and a curve ends above 99.5%.  Here
    accuracies are made up, 60 to 80% until C = 1, so every printed number is known.
    A grammar with K_rho = 0, another seed, or a lost level or unit would break it."""
    seen, rng, job = [], np.random.default_rng(0), ("deep", 2, 2, 2)
    really_train = sample_complexity.train

    def fake_train(rhm, config, minimise):
        seen.append((rhm, config))
        return None, None

    right = lambda *_: 1 if seen[-1][1].C == 1 / 4 else rng.uniform(0.6, 0.8)
    monkeypatch.setattr(sample_complexity, "train", fake_train)
    monkeypatch.setattr(sample_complexity, "fresh_accuracy", right)
    [curve] = sample_complexity.sweep(tmp_path / "a.png", [job], grammars=12)
    assert curve.N.tolist() == [6, 12, 24] and curve.shares.shape == (3, 12)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for shares in curve.shares:
        assert f"{100 * shares.mean():.2f}% {100 * shares.std():5.2f}" in out
    logs = sample_complexity.log_samples_needed(curve)
    N, spread = np.exp([logs.mean(), logs.std()])
    assert f"N* = {N:.0f} (x/: {spread:.2f}), {N / 8:.2f} V m^L" in out
    seeds = [k for k in range(99) if RHM.random(2, 2, 2, 2, k).K_rho > 0][:12]
    for k, (rhm, config) in zip(3 * seeds, seen, strict=True):
        assert config.seed == k and config.M == 16
        assert np.array_equal(rhm.rules, RHM.random(2, 2, 2, 2, k).rules)
    for N, (rhm, config) in zip(curve.N, seen[::12], strict=True):
        assert sum(stage.N for stage in really_train(rhm, config)[1]) == N


def test_remark_8_a_network_of_one_level_sees_whole_sentences():
    """It learns a grammar of one level, with the sigma and the ridge it is given.  For
    more levels its patch is the whole sentence.  Training and test sentences come from
    different streams."""
    rhm, drawn = sample_complexity.draw_grammars(8, 2, 2, 1, 1).popitem()[1], []
    nets = [train_one_level(rhm, 2000, *x, M=99) for x in ((1,), (2,), (1, 1))]
    assert fresh_accuracy(nets[0], rhm, 0) == 1
    assert len({net[1].W.norm().item() for net in nets}) == 3

    def sample(n, rng, level=1):
        drawn.append(n)
        return RHM.random(8, 2, 2, 2, 0).sample(n, rng, level)

    sealed = SimpleNamespace(V=8, m=2, s=2, L=2, d=4, sample=sample)
    net = train_one_level(sealed, 100, 1, M=9, seed=7)
    fresh_accuracy(net, sealed, 7)
    assert net[1].s == 4 and drawn == [100, 2000]


def test_backpropagation_counts_sentences_until_fresh_ones_are_right(monkeypatch):
    """Adam learns a small grammar within seconds.  With accuracies made up the third
    look finds 99%, so the sentences are known; layerwise training doubles C each time.
    A look at the training sentences, or a run that is not counted, would break it."""
    rhm, until_right = RHM.random(8, 2, 2, 2, 0), backpropagation.until_right
    adam = dict(M=32, learning_rate=0.01)
    learns = backpropagation.backpropagation(rhm, 5, **adam)
    assert until_right(learns, rhm, 5, most=10)[0] < 10
    for learn, setting, sentences in (
        (backpropagation.backpropagation, adam, 3 * 10 * 256),
        (backpropagation.layerwise, dict(M=8, C=1), (1 + 2 + 4) * 16 * (2 + 4)),
    ):
        looks, shares = [], iter([0.5, 0.98, 0.99])
        look = lambda net, rhm, n, rng: looks.append((n, rng)) or next(shares)
        monkeypatch.setattr(backpropagation, "accuracy", look)
        assert until_right(learn(rhm, 5, **setting), rhm, 5)[1] == sentences
        assert looks == 3 * [(2000, [5, 4])]
        never = until_right(learn(rhm, 5, **setting), rhm, 5, most=1e-9)
        assert never == (math.inf, math.inf)


def test_backpropagation_chooses_the_setting_whose_slowest_grammar_is_fastest(
    monkeypatch,
):
    """Setting b wins with 2 and 3 seconds against 1 and 5.  Then c is stopped at 3 on
    its first grammar and never sees the second.  A choice by the first grammar, or by
    the mean over those reached, would take another one."""
    seen, rhms = [], {seed: SimpleNamespace(L=1) for seed in (4, 7)}
    seconds = {"a": {4: 1, 7: 5}, "b": {4: 2, 7: 3}, "c": {4: 4}, "d": {4: 2, 7: 9}}

    def until_right(looks, rhm, seed, most):
        seen.append((looks, seed))
        reached = seconds[looks][seed]
        return (reached, 100) if reached < most else (math.inf, math.inf)

    def learn(rhm, seed, name):
        return name

    monkeypatch.setattr(backpropagation, "until_right", until_right)
    settings = [dict(name=name) for name in "abcd"]
    found = backpropagation.choose(learn, settings, rhms)
    assert found == (dict(name="b"), [(2, 100), (3, 100)])
    assert seen == [*itertools.product("ab", (4, 7)), ("c", 4), ("d", 4), ("d", 7)]
    assert max(map(len, backpropagation.SETTINGS.values())) <= 9


def test_the_notebook_measures_what_the_run_prints(capsys):
    """evaluate has the random numbers of the run, so its numbers are the printed ones.
    MoreSamples brings eight times the sentences at its levels only.  Another stream or
    another number of test sentences would break it."""
    rhm, config = RHM.random(8, 2, 2, 2, 0), Config(C=0.125, seed=3)
    _, stages, all_errors = run(rhm, config)
    printed, measured = capsys.readouterr().out, measurements.evaluate(rhm, config)
    errors, found = measured.errors, measured.found[1]
    assert f"{np.median(errors):13.4f} {errors.max():14.4f} {found:7.2f}%\n" in printed
    assert f"{measured.percent:.2f}% of 10000 fresh sentences right" in printed
    assert f" {measured.N} training sentences" in printed
    halves = [rhm.signal(1) / 2, rhm.signal(2) / 2]
    below = max(all_errors[0]) < halves[1] and max(errors) < halves[0]
    assert measured.below == below
    assert [stage.level for stage in stages] == [2, 1]
    assert np.array_equal(all_errors[1], errors)
    _, more = train(measurements.MoreSamples(rhm, (2,)), config)
    assert [stage.N for stage in more] == [8 * stages[0].N, stages[1].N]


# ---- README --------------------------------------------------------------------------


def python(folder, *words, **environment):
    """What Python prints, run in a folder; an error fails the test."""
    options = dict(capture_output=True, text=True, check=True, cwd=folder)
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *words], **options, env=environment).stdout


def words_and_numbers(lines):
    """Both of some lines; seconds at the end of a line do not count."""
    text, number = re.sub(r"[\d.]+ s$", "", "\n".join(lines), flags=re.M), r"\d+\.?\d*"
    return re.sub(number, "#", text).split(), [*map(float, re.findall(number, text))]


def alike(shown, printed):
    """The same lines, up to 2% in their numbers."""
    (words, numbers), (others, found) = map(words_and_numbers, (shown, printed))
    return words == others and numbers == pytest.approx(found, rel=0.02)


def test_the_readme_shows_what_the_three_modules_print_alone(tmp_path):
    """In an empty folder the three modules print the block of the README, and draw.
    Numbers agree up to the rounding of other builds; "..." stands for lines left out.
    A fourth module, or a table from another version, would break it."""
    for name in MODULES:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    printed = python(tmp_path, "train_layerwise.py").splitlines()
    assert (tmp_path / "layerwise.png").read_bytes().startswith(b"\x89PNG")
    [shown] = re.findall(r"```\n(V=16.*?)```", README, re.DOTALL)
    parts = [part.splitlines() for part in re.split(r"^\.\.\.\n", shown, flags=re.M)]
    assert alike(parts[0], printed[: len(parts[0])])
    assert alike(parts[-1], printed[-len(parts[-1]) :])
    for part in parts[1:-1]:
        windows = (printed[k:][: len(part)] for k in range(len(printed)))
        assert any(alike(part, window) for window in windows)


def test_the_readme_code_prints_what_stands_there(tmp_path):
    """The blocks of code run in another folder, with the modules on the path.  What
    they print is the block after the first one, and in comments of the others."""
    blocks = re.findall(r"^```python\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    out = [python(tmp_path, "-c", block, PYTHONPATH=str(ROOT)) for block in blocks]
    [shown] = re.findall(r"\nprints\n\n```\n(\[\[.*?)```", README, re.DOTALL)
    shown, printed = (words_and_numbers([text])[1] for text in (shown, out[0]))
    assert shown == pytest.approx(printed, abs=0.02) and len(shown) == 19
    assert "\nTrue\n" in out[1] and "# True\n" in blocks[1]
    share = re.search(r"features=Phases\)  # (\S+%) right", blocks[2])[1]
    assert f"{share} of 10000 fresh sentences right" in out[2] and len(out) == 3


def test_the_readme_names_functions_and_tests_that_exist():
    """What stands in backticks in the map is a file, or a name of a module or an
    experiment.  Each lemma of the map has a test of its name, and `pytest -k word`
    finds one.  A name that was changed in one place only would break it."""
    sources = [ROOT / "test_rhm.py", *(ROOT / "experiments").glob("test_*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    tests = " ".join(re.findall(r"^def (test_\w+)", text, re.MULTILINE)) + " "
    modules = [*MODULES]
    scripts = {*(ROOT / "experiments").glob("[a-z]*.py")} - {*sources}
    modules += [f"experiments.{path.stem}" for path in scripts]
    modules = [importlib.import_module(name) for name in modules]

    def exists(name):
        first, *attributes = re.match(r"\w+(?:\.\w+)*", name)[0].split(".")
        found = [getattr(module, first) for module in modules if hasattr(module, first)]
        return found and all(hasattr(found[0], attribute) for attribute in attributes)

    table = README.split("## From the paper to the code")[1].split("\n## ")[0]
    rows = re.findall(r"^(.*) \| (.*)$", table, re.MULTILINE)[1:]
    assert len(rows) > 5
    for statement, code in rows:
        statement = re.sub(r"\(.*?\)", "", statement)  # the arXiv numbers
        for listed in re.findall(r"Lemmas? ([\d ,andto]+)", statement):
            for first, last in re.findall(r"(\d+)(?: to (\d+))?", listed):
                for number in range(int(first), int(last or first) + 1):
                    assert re.search(rf"lemma_{number}[_ ]", tests), statement
        for name in re.findall(r"`(.*?)`", code):
            assert exists(name) or (ROOT / name).is_file(), name
    for words in re.findall(r'pytest -k (\w+|".*?")', README):
        for word in re.findall(r"\w+", words.replace(" or ", " ")):
            assert word.lower() in tests.lower(), word


def test_the_readme_has_the_numbers_of_the_default_grammar_and_of_the_proof():
    """The lowest possible losses are (1 - E||q||^2) / 2, with uniform first symbols.
    What the proof asks of level 4 is given by its power of ten."""
    rhm = RHM.random(16, 4, 2, 4, 0)
    q = [rhm.label_posterior(level) for level in (4, 3, 2, 1)]
    floors = [f"{(1 - (q_l**2).sum(1).mean()) / 2:.3g}" for q_l in q]
    text = " ".join(README.split())
    assert f"lowest possible ones, {', '.join(floors)}. " in text
    asked = theorem_7.proof_constants(rhm)[4]
    N, M = (math.floor(math.log10(number)) for number in (asked.N, asked.M))
    assert f"10^{M} random frequencies" in text and f"10^{N} samples" in text
    assert f"{16 * 4 ** (1 + 2 + 4 + 8):.1e}".replace("+", "") in text  # sentences
    assert all(RHM.random(16, 4, 2, 4, seed).K_rho == 0 for seed in (6, 9))


def test_the_readme_names_files_options_headings_and_functions_that_exist():
    """Files, modules, options of the program, headings of the notebook, functions of
    the exercises.  Each is looked up where it should stand."""
    source = "".join((ROOT / f"{name}.py").read_text() for name in MODULES)
    for name in re.findall(r"`([\w/]+\.py)\b", README):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"python -m experiments\.(\w+)", README):
        assert (ROOT / "experiments" / f"{name}.py").is_file(), name
    options = python(ROOT, "train_layerwise.py", "--help")
    for option in re.findall(r"`[^`\n]*--(\w+)", README):
        assert f"--{option} " in options or option == "help", option
    notebook = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", notebook, re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
    for anchor in re.findall(r"README\.md#([\w-]+)", README):
        assert anchor in anchors, anchor
    edited = re.findall(r"In (?:the last step of )?`(\w+)`", README)
    assert len(edited) == 5  # Phases is in the README itself
    for name in edited:
        assert re.search(rf"(def|class) {name}\(", source + README), name
