"""Layerwise training of a deep CNN on a random hierarchy model (Section 2.3).

`python train_layerwise.py` trains on sentences and labels alone, and compares every
level with the exact theory afterwards.  Below: the algorithm, what it calls in the
order of the calls, measurements, the command line.
"""

import argparse
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from types import SimpleNamespace

import numpy as np
import torch

from model import CHUNK, DeepCNN, Level, distinct_rows
from rhm import RHM, as_integer


@dataclass
class Config:
    """The learner's settings; the README compares them with what the theorem asks."""

    C: float = 10.0  # samples: N^(l) = C |P_l| m^l, where |P_l| = V m
    M: int = 512  # random frequencies per level, Eq. (6)
    seed: int = 0  # streams default_rng([seed, k]): k = 1 data, 2 features, 3 and 4 run
    ridge: float = 0.01  # lambda_W = ridge / |P_l|; the proof has ridge = 1
    bandwidth: float = 1.5  # sigma = bandwidth times a quantile (choose_sigma)
    kappa: float = 1.0  # of Assumption 6(a): what the learner assumes in Lemma 17
    eps: float = 0.01  # target error eps_* of Lemma 17; sets the number of steps
    device: str = "cpu"  # or cuda
    threads: int = 1  # of torch; more are faster on a quiet machine only

    def __post_init__(self):
        check_config(self)


def train(rhm, config, report=None, sigmas=None):
    """The training algorithm of Section 2.3; returns (net, stages).

    Bottom up, each level learns to predict the *label* from the first patch of fresh
    sentences, embedded by the levels below.  Of the grammar it uses rhm.sample and the
    sizes V, m, s, L only.  report(net, stage) is called after each stage; sigmas,
    {level: bandwidth}, replace the learner's choice.  A stage has its level, N samples,
    their distinct rows, sigma, T + 1 losses, and the minimum of Eq. (3).
    ValueError for N > 2^31 or a sigma that is not > 0.
    """
    V, m, s, L = rhm.V, rhm.m, rhm.s, rhm.L
    data_rng, feature_rng = (np.random.default_rng([config.seed, k]) for k in (1, 2))
    constants = schedule(V, m, config)  # lambda_W, eta, T
    # 0.5 is not in the paper: the kernel of two different patches is then <= exp(-4).
    sigmas = {L: 0.5} | (sigmas or {})
    net, stages = DeepCNN(V), []
    with torch.no_grad(), torch_threads(config.threads):
        for l in range(L, 0, -1):
            N = math.ceil(config.C * V * m * m**l)  # geometric in l: Section 4.2
            leaves, counts = draw_first_patches(rhm, N, l, data_rng, config.device)
            h = net.embed(leaves)  # U strings, with label counts (U, V) -> (U, s, V)
            if l not in sigmas:
                sigmas[l] = choose_sigma(h, counts, config.bandwidth, feature_rng)
            level = new_level(V, s, sigmas[l], config, feature_rng)
            stage = SimpleNamespace(level=l, N=N, rows=len(h), sigma=sigmas[l])
            stage.losses, stage.minimum = train_level(level, h, counts, *constants)
            net.append(level)
            stages.append(stage)
            if report:
                report(net, stage)
    return net, stages


# ---- What train calls, in the order of the calls -------------------------------------


def schedule(V, m, config):
    """lambda_W, the step eta of Lemma 15, and the number of steps T of Lemma 17.

    T = |P_l| log(100 |P_l| kappa sqrt(V) / eps) is meant for ridge 1.  The curvatures
    of Eq. (3) lie in [lambda_W, 1 + lambda_W], and the best constant step is
    2 / (smallest + largest); Lemma 15 prints 2 / (1 + lambda_W) (README, slip 2).
    """
    P = V * m  # |P_l|, the number of patches of every level
    lambda_W = config.ridge / P
    T = P * (math.log(100 * P * config.kappa * math.sqrt(V)) - math.log(config.eps))
    T = max(1, math.ceil(T))  # without a step W = 0, and Eq. (2) is 0 / 0
    return lambda_W, 2 / (1 + 2 * lambda_W), T


def draw_first_patches(rhm, N, level, rng, device="cpu", block=2**19):
    """N fresh samples of Section 2.3, equal ones merged, `block` at a time.

    Eq. (3) sees the data only through how often each leaf string under the first
    level-`level` patch came with each label.
    Returns the distinct strings (U, s^(L-level+1)) and their label counts (U, V).
    ValueError for N outside 1..2^31.
    """
    N = as_integer(f"the number of samples of level {level}", N, 1, 2**31)
    V, width = rhm.V, rhm.s ** (rhm.L - level + 1)
    leaves = torch.zeros(0, width, dtype=torch.int32, device=device)
    counts = torch.zeros(0, V, dtype=torch.int64, device=device)
    for start in range(0, N, block):
        tokens, labels = rhm.sample(min(block, N - start), rng, level)
        tokens, labels = (torch.as_tensor(a, device=device) for a in (tokens, labels))
        rows, numbers = distinct_rows(torch.cat([leaves, tokens]), V)
        old, new = numbers[: len(leaves)], numbers[len(leaves) :]
        added = torch.bincount(new * V + labels, minlength=len(rows) * V).view(-1, V)
        leaves, counts = rows, added.index_add(0, old, counts)
    return leaves, counts


def choose_sigma(h, counts, factor, rng, pairs=20_000):
    """The bandwidth sigma of Eq. (6), by a rule that is not in the paper.

    Lemma 10 wants sigma in proportion to the smallest distance between embeddings of
    two symbols (Assumption 9), which the learner does not know.  Two random tokens are
    the same symbol with probability about 1/V.  So distances inside a symbol end, and
    those between two begin, at about the 1/V quantile: see the histogram in
    experiments/layerwise.png.  sigma is `factor` times that quantile.
    h: embeddings (U, s, V); each row weighs as much as its counts (U, V).
    """
    weights = counts.sum(1).cpu().numpy() / counts.sum().item()
    rows = torch.from_numpy(rng.choice(len(h), size=(2, pairs), p=weights))
    places = torch.from_numpy(rng.integers(h.shape[1], size=(2, pairs)))
    tokens = h[rows.to(h.device), places.to(h.device)]  # (2, pairs, V)
    apart = (tokens[0] - tokens[1]).norm(dim=1)
    apart = apart[apart > 0]  # without the pairs of equal tokens
    # If all tokens are equal, any sigma will do.
    return factor * apart.quantile(1 / h.shape[2]).item() if len(apart) else 1.0


def new_level(V, s, sigma, config, rng):
    """A level before training: M random frequencies of Eq. (6), and W = 0."""
    omega = rng.standard_normal((config.M, s * V)) / as_positive("sigma", sigma, 1e-30)
    omega = torch.tensor(omega, dtype=torch.float32, device=config.device)
    return Level(omega, omega.new_zeros(V, 2 * config.M))


@torch.no_grad()
def train_level(level, h, counts, lambda_W, eta, T):
    """Train a level in place: gather the two averages of Eq. (3), then descend.

    h (U, s, V): embedded patches; counts (U, V): how often each came with each label.
    Returns the T + 1 losses and their minimum, as gradient_descent does.
    """
    frequencies = counts.to(level.W.dtype) / counts.sum()  # (U, V)
    covariance, correlation = 0, 0
    for rows, p in zip(h.split(CHUNK), frequencies.split(CHUNK)):
        x = level.patch_embedding(rows.flatten(1))  # (u, 2M)
        covariance += x.T @ (p.sum(1, keepdim=True) * x)  # E^[x x^T]
        correlation += p.T @ x  # E^[e_zeta x^T], whose mean is Eq. (8)
    W, losses, least = gradient_descent(covariance, correlation, lambda_W, eta, T)
    level.W.copy_(W)
    return losses, least


def gradient_descent(covariance, correlation, lambda_W, eta, T):
    """T steps of gradient descent on Eq. (3) from W = 0 (Section 2.3).

    covariance: E^[x x^T], uncentred, (2M, 2M); correlation: E^[e_zeta x^T], (V, 2M).
    Returns W (V, 2M), the T + 1 losses, and the loss of the closed-form minimiser.
    """
    # Efficiency only: with E^[x x^T] = Q diag(spectrum) Q^T the same steps, done on WQ,
    # cost V 2M products each instead of V (2M)^2.
    spectrum, Q = torch.linalg.eigh(covariance)
    spectrum = spectrum.clamp(min=0)  # below 0 by rounding only
    target = correlation @ Q

    def loss(WQ):  # Eq. (3) multiplied out, with ||e_zeta|| = 1
        return 0.5 + (WQ * (0.5 * (spectrum + lambda_W) * WQ - target)).sum()

    WQ = torch.zeros_like(target)
    losses = [loss(WQ)]
    for _ in range(T):  # W <- W - eta (W E^[x x^T] - E^[e_zeta x^T] + lambda_W W)
        WQ = WQ - eta * (WQ * spectrum - target + lambda_W * WQ)
        losses.append(loss(WQ))
    minimiser = target / (spectrum + lambda_W)  # E^[e x^T] (E^[x x^T] + lambda_W I)^-1
    return WQ @ Q.T, torch.stack(losses).cpu().numpy(), loss(minimiser).item()


# ---- Measurements: they look at the grammar, after the fact --------------------------


def predict(net, tokens):
    """Outputs of the network for NumPy tokens, as a float64 array; not in the paper."""
    tokens = torch.as_tensor(tokens, device=net[0].W.device)
    with torch.no_grad(), torch_threads(1):
        h = net.embed(tokens)
    return (h[:, 0] if h.shape[1] == 1 else h).double().cpu().numpy()


def accuracy(net, rhm, n, rng):
    """Share of n >= 1 fresh sentences whose label is the argmax (Section 2.2)."""
    tokens, labels = rhm.sample(as_integer("n", n, 1), rng)
    return float((predict(net, tokens).argmax(1) == labels).mean())


def distances_to_q(outputs, rhm, level):
    """||output - q^(level)|| for all symbols of level - 1; inf for one never first."""
    q, outputs = rhm.label_posterior(level), outputs.reshape(-1, rhm.V)
    to_q = torch.cdist(torch.from_numpy(outputs), torch.from_numpy(q)).numpy()
    to_q[:, np.isnan(q[:, 0])] = math.inf
    return to_q


def network_parse(net, rhm, tokens):
    """Sentences (n, d) as the network reads them, in the form of RHM.parse.

    A token counts as the symbol with the q nearest to its embedding; not in the paper.
    """
    tree = [tokens]
    for l in range(rhm.L - 1, -1, -1):
        to_q = distances_to_q(predict(net[: rhm.L - l], tokens), rhm, l + 1)
        tree.insert(0, to_q.argmin(1).reshape(len(tokens), rhm.s**l))
    return tree


def diagnose(net, rhm, level, rng, n=10_000):
    """Compare a level's outputs for n >= 1 fresh patches with q; not in the paper.

    Returns a dict: errors (n,), ||output - q_mu||, which Lemma 17 bounds by eps_*;
    nearest, the share of outputs whose nearest q is their own.
    """
    tree = rhm.sample_tree(as_integer("n", n, 1), rng, level)
    symbol = tree[level - 1][:, 0]
    to_q = distances_to_q(predict(net[: rhm.L - level + 1], tree[-1]), rhm, level)
    errors = to_q[np.arange(n), symbol]
    right = (to_q.argmin(1) == symbol) & np.isfinite(errors)  # NaN is not right
    return dict(errors=errors, nearest=right.mean())


def run(rhm, config):
    """Train, print; returns (net, stages, diagnoses).  Not in the paper."""
    start, diagnoses = time.perf_counter(), []
    print(f"V={rhm.V} m={rhm.m} s={rhm.s} L={rhm.L}, seed {config.seed}", end="; ")
    print(f"kappa = {rhm.kappa:.4g}, K_rho = {rhm.K_rho:.4g}")
    header = "level   samples     rows    sigma      rho   median  largest  nearest"
    print(*rhm.assumption_6_failures(), header, sep="\n")

    def report(net, stage):
        l = stage.level
        found = diagnose(net, rhm, l, np.random.default_rng([config.seed, 3, l]))
        diagnoses.append(found)
        errors, percent = found["errors"], 100 * found["nearest"]
        print(
            f"{l:5} {stage.N:9} {stage.rows:8} {stage.sigma:8.4f} {rhm.signal(l):8.4f} "
            f"{np.median(errors):8.4f} {errors.max():8.4f} {percent:7.2f}%",
            flush=True,
        )

    net, stages = train(rhm, config, report)
    rng = np.random.default_rng([config.seed, 4])
    share, sentence = accuracy(net, rhm, 10_000, rng), rhm.sample(1, rng)[0]
    print("\nA fresh sentence as the network reads it, and as the grammar parses it:")
    read, parsed = network_parse(net, rhm, sentence), rhm.parse(sentence)
    for l in range(rhm.L + 1):
        width = 4 * rhm.s ** (rhm.L - l)  # a symbol stands above its first token
        for name, tree in ("network", read), ("grammar", parsed):
            symbols = "".join(f"{nu:<{width}}" for nu in tree[l][0])
            print(f"level {l}  {name}  {symbols[:64].rstrip()}")  # 16 tokens
    N, seconds = sum(stage.N for stage in stages), time.perf_counter() - start
    print(f"\n{100 * share:.2f}% of 10000 fresh sentences right", end=" ")
    print(f"(chance {100 / rhm.V:.2f}%), {N} training sentences, {seconds:.1f} s")
    return net, stages, diagnoses


# ---- The command line, threads, and what is refused ----------------------------------


def main(argv=None):
    """The command line; bad input ends it with one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Train a deep CNN layer by layer on a random hierarchy model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, text in (
        ("V", 16, "symbols of every level"),
        ("m", 4, "rules per symbol"),
        ("s", 2, "tokens per patch"),
        ("L", 4, "levels; sentences have s^L tokens"),
        ("C", Config.C, "samples: C V m m^l for level l"),
        ("M", Config.M, "random frequencies per level"),
        ("seed", Config.seed, "of grammar, data and features"),
        ("device", Config.device, "cpu or cuda"),
        ("threads", Config.threads, "of torch; more help on a quiet machine only"),
        ("figure", "experiments/layerwise.png", "picture to write"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    # One line, where argparse prints the usage as well:
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {text}\n")
    options = vars(parser.parse_args(argv))
    figure, sizes = options.pop("figure"), [options.pop(name) for name in "VmsL"]
    try:
        from experiments import layerwise as picture
    except ImportError:
        picture = None  # the three modules alone
    try:
        config = Config(**options)
        rhm = RHM.random(*sizes, np.random.default_rng(config.seed))
        if picture:
            picture.check_figure(figure)
        net, stages, diagnoses = run(rhm, config)
        if picture:
            with torch_threads(1):
                picture.plot_layers(net, rhm, config, stages, diagnoses, figure)
        print(
            f"Picture: {figure}" if picture else "No picture: no experiments/layerwise.py"
        )
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        parser.error((str(error) or "out of memory").splitlines()[0])


@contextmanager
def torch_threads(threads):
    """Hold torch to so many threads, then restore the caller's; not in the paper.

    Two threads wait for each other: beside a busy program up to 100 times longer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_config(config):
    """Refuse settings without a meaning; make NumPy's numbers Python's own."""
    for name, least in dict(M=1, seed=0, threads=1).items():
        setattr(config, name, as_integer(name, getattr(config, name), least))
    for name in ("C", "ridge", "bandwidth", "kappa", "eps"):
        setattr(config, name, as_positive(name, getattr(config, name)))
    if str(config.device).split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {config.device}")
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot use device {config.device}: {reason}") from error


def as_positive(name, x, least=0):
    """x as a Python float, or ValueError unless it is between least and 1e9."""
    if not isinstance(x, Real) or not least < x < 1e9:
        raise ValueError(f"{name} must be between {least} and 1e9, got {x!r}")
    return float(x)


if __name__ == "__main__":
    main()
