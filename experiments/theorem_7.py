"""What Theorem 7 asks and what we use: `python -m experiments.theorem_7` prints the table.

Not a measurement of the theorem: the constants of its proof, for the default grammar,
beside the settings of the default run and what that run reaches.
"""

import math
from types import SimpleNamespace

import numpy as np

from experiments.layerwise import compare_patches
from rhm import RHM
from train_layerwise import Config, diagnose, schedule, train


def proof_constants(rhm, eps=0.01, delta=1e-6):
    """{level: constants} of the proof of Theorem 7, slips 1 to 3 of the README mended.

    eps: the error allowed at level 1; delta: the probability of failure at each level.
    Section 4.2 chains the levels, Lemmas 10, 15, 16 and 17 give the constants of one.
    ValueError where Assumption 6 fails.
    """
    if rhm.kappa == math.inf or rhm.K_rho == 0:
        raise ValueError("Theorem 7 needs a finite kappa and K_rho > 0")
    V, s, L, P, kappa = rhm.V, rhm.s, rhm.L, rhm.V * rhm.m, rhm.kappa
    found = {}
    for l in range(1, L + 1):
        # Lemma 11: the accuracy that level l needs of the embeddings below it.
        if l < L:
            rho = rhm.signal(l + 1)
            below = rho / math.sqrt(2000 * P**2 * s * math.log(P * kappa / eps))
        else:
            rho, below = math.sqrt(2), 0  # one-hot tokens
        # Lemmas 15 and 17: what the learner would do with the proof's ridge.
        config = Config(ridge=1.0, kappa=kappa, eps=eps)
        lambda_W, eta, T = schedule(V, rhm.m, config)
        eps_S = lambda_W / 4  # Lemma 16
        eps_O = eps / (600 * P**2 * kappa * math.sqrt(V))  # Lemma 17
        found[l] = SimpleNamespace(
            eps=eps,
            below=below,
            eps_S=eps_S,
            eps_O=eps_O,
            rho=rho,
            kappa=kappa,
            sigma=(rho - 2 * below) / math.sqrt(2 * math.log(2 / eps_O)),  # Lemma 10
            M=s * V / min(eps_O**2, eps_S**4),  # Lemma 10, without constants and logs
            lambda_W=lambda_W,
            eta=eta,
            T=T,
            N=math.ceil(32 * kappa * P / eps**2 * math.log(4 * P / delta)),  # Lemma 17
            inside=2 * eps,  # of two outputs: Assumption 9 for the level above
            between=rhm.signal(l) - 2 * eps,
        )
        eps = below
    return found


def default_run(rhm, config):
    """{level: what the default run uses and reaches}, under the names of the proof."""
    lambda_W, _, T = schedule(rhm.V, rhm.m, config)
    found = {}

    def report(net, stage):
        l, seed = stage.level, [config.seed, 3, stage.level]
        pairs = compare_patches(net, rhm, l, np.random.default_rng(seed))
        found[l] = SimpleNamespace(
            eps=diagnose(net, rhm, l, np.random.default_rng(seed))["errors"].max(),
            eps_S=round(pairs["eps_S"], 6),  # 1e-8 by rounding at the bottom
            eps_O=pairs["eps_O"],
            inside=pairs["inside"].max(),
            between=pairs["between"].min(),
            sigma=stage.sigma,
            M=config.M,
            N=stage.N,
            lambda_W=lambda_W,
            T=T,
        )

    train(rhm, config, report)
    return found


def show(value):
    """Whole numbers up to a million as they are, others with two digits."""
    return f"{value:,.0f}" if 50 <= value < 1e6 else f"{value:.2g}"


def main():
    rhm = RHM.random(V=16, m=4, s=2, L=4, rng=np.random.default_rng(0))
    columns = proof_constants(rhm), default_run(rhm, Config())
    print("level 4, 3, 2, 1 | asked by the proof | used or found")
    print("--- | --- | ---")
    for name, meaning in dict(
        N="samples N",
        M="frequencies M (order)",
        lambda_W="ridge lambda_W",
        T="steps T",
        sigma="bandwidth sigma",
        eps_O="overlap eps_O of two patches",
        eps_S="distance eps_S within a patch",
        eps="largest error of the outputs",
        inside="distances inside a symbol, at most",
        between="between two symbols, at least",
    ).items():
        cells = []
        for column in columns:
            values = [getattr(column[l], name) for l in sorted(column, reverse=True)]
            texts = [show(float(value)) for value in values]
            cells.append(texts[0] if len(set(texts)) == 1 else ", ".join(texts))
        print(f"{meaning} | {' | '.join(cells)}")


if __name__ == "__main__":
    main()
