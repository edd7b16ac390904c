r"""The random hierarchy model: a grammar whose sentences are classified by their root.

    level 0                       2                      the label
                           /             \
    level 1            2                     2
                    /     \               /     \
    level 2       0         2           2         1
                 / \       / \         / \       / \
    level 3     1   0     0   0       2   0     3   2    the sentence

A label is replaced by a patch of s symbols, each of them by a patch of s symbols of the
next level, and so on, L times: here s = 2 and L = 3.  The symbols of level L are the
d = s^L tokens of the sentence.  Every level has its own V symbols 0..V-1.  Every symbol
above level L has m rules, the patches that may replace it: they are synonyms.

    symbol nu of level l     at level 0 the label zeta, at level L a token
    level-l patch mu         s neighbours of level l, made from one symbol of level l-1
    first                    leftmost: above, the first level-2 patch is (0, 2)
    rules[l]                 the level-(l+1) patches, m for every symbol of level l
    q_mu^(l), Eq. (4)        P[label | the first level-l patch is mu], for every label

The paper: Ren, Dandi, Krzakala, Lee, "Provable Learning of Random Hierarchy Models and
Hierarchical Shallow-to-Deep Chaining", COLT 2026.  Here are its Section 2.1, Eq. (4),
Assumption 6 and the random rules of Appendix B.  `python rhm.py` prints the grammar of
the drawing.
"""

import itertools
import math

import numpy as np


class RHM:
    """A grammar of V symbols per level, m rules per symbol, no patch twice in a level.

    In Section 2.1: (V, m)-uniform, non-ambiguous, and by Definition 4 labels and rules
    are uniform.  label_posterior, signal, kappa and K_rho count on that: they are wrong
    for a subclass that samples otherwise.

    rules: integers (L, V, m, s); rules[l][nu] are the m level-(l+1) patches that may
    replace symbol nu of level l.  ValueError for other shapes, for symbols outside
    0..V-1, and for a patch that two rules generate.
    Everywhere rng is a NumPy Generator or a seed.
    """

    def __init__(self, rules):
        rules = np.stack([np.asarray(level) for level in rules])  # a copy
        got = f"got {rules.dtype} of shape {rules.shape}"
        if rules.ndim != 4 or not np.issubdtype(rules.dtype, np.integer):
            raise ValueError(f"rules must be integers (L, V, m, s), {got}")
        self.L, self.V, self.m, self.s = rules.shape
        self.d = self.s**self.L  # tokens per sentence
        if not 0 <= rules.min() <= rules.max() < self.V:
            raise ValueError(f"rules (L, V, m, s) must lie in 0..{self.V - 1}, {got}")
        self.rules = rules.astype(np.int64)
        for l, patches in enumerate(self.rules.reshape(self.L, -1, self.s), start=1):
            if len(np.unique(patches, axis=0)) < len(patches):
                raise ValueError(f"two rules generate the same level-{l} patch")

    @classmethod
    def random(cls, V, m, s, L, rng, *, uniform_first_token=True):
        """Draw V m patches per level and deal them to the V symbols of the level above.

        Appendix B: for each first symbol (the head) draw m different rests (tails).  So
        every symbol is first equally often, and kappa = 1.
        uniform_first_token=False: any V m of the V^s patches, as in Cagnetta et al.
        (2024).  ValueError when there is no such grammar, or V^s or s^L is too large.
        """
        exists = min(V, m, s, L) >= 1 and s * math.log2(V) < 63 and V * m <= V**s
        if not exists or s > 32 or L * math.log2(s) > 31:
            needed = "sizes >= 1, V m <= V^s < 2^63, s <= 32, s^L <= 2^31 are needed"
            raise ValueError(f"{needed}, got V = {V}, m = {m}, s = {s}, L = {L}")
        rng = np.random.default_rng(rng)
        rules = []
        for _ in range(L):
            # Patches are numbered in lexicographic order: with V = 4, (1, 3) is 7.
            if uniform_first_token:
                tails = V ** (s - 1)
                numbers = [
                    head * tails + rng.choice(tails, m, replace=False)
                    for head in range(V)
                ]
            else:
                numbers = rng.choice(V**s, V * m, replace=False)
            numbers = rng.permutation(np.ravel(numbers)).reshape(V, m)  # dealt
            symbols = np.unravel_index(numbers, s * (V,))  # s arrays (V, m)
            rules.append(np.stack(symbols, axis=-1))
        return cls(rules)

    def __repr__(self):
        return f"RHM(V={self.V}, m={self.m}, s={self.s}, L={self.L})"

    # ---- Sampling and parsing --------------------------------------------------------

    def rewrite(self, symbols, l, rng):
        """One step of Definition 3: replace each level-l symbol by one of its patches.

        symbols (n, width) of level l -> (n, s width) of level l + 1.
        """
        choice = np.random.default_rng(rng).integers(self.m, size=symbols.shape)
        # self.rules[l][symbols, choice], written so that it is twice as fast:
        rules = self.rules[l].reshape(-1, self.s)  # (V m, s)
        patches = rules.take(self.m * symbols + choice, axis=0)  # (n, width, s)
        return patches.reshape(len(symbols), symbols.shape[1] * self.s)

    def sample_tree(self, n, rng, level=1):
        """Draw n sentences with the hidden symbols of all levels (Definition 3).

        Draws the first level-`level` patch only, the symbols above it and those below.
        Level 1 has one patch, so level = 1 draws whole sentences.  Returns L + 1 int64
        arrays, one per level: (n, 1), (n, s), (n, s^2), ... for level = 1, and (n, 1),
        (n, 1), (n, 1), (n, s), ... for level = 3.
        """
        self._check_level(level)
        rng = np.random.default_rng(rng)
        tree = [rng.integers(self.V, size=(n, 1))]
        for l in range(self.L):
            symbols = self.rewrite(tree[-1], l, rng)  # of level l + 1
            # Above the patch that is sought, only the first symbol leads to it.
            tree.append(symbols if l + 1 >= level else symbols[:, :1])
        return tree

    def sample(self, n, rng, level=1):
        """Draw what a learner may see (Section 2.3).

        Returns the tokens under the first level-`level` patch, (n, s^(L-level+1)), and
        the labels (n,), int64.
        """
        tree = self.sample_tree(n, rng, level)
        return tree[-1], tree[0][:, 0]

    def parse(self, tokens):
        """Recover all symbols of whole sentences, bottom up (Section 2.1).

        The parse is unique, since no patch has two parents.  tokens: integers (n, d).
        Returns L + 1 arrays (n, s^l), labels first.  ValueError for another length and
        for a patch that no symbol generates.
        """
        tree = [np.asarray(tokens)]
        if tree[0].ndim != 2 or tree[0].shape[1] != self.d:
            raise ValueError(f"tokens must be (n, {self.d}), got {tree[0].shape}")
        for l in range(self.L, 0, -1):
            symbol_of = {}  # {level-l patch: the symbol of level l - 1}
            for nu, patches in enumerate(self.rules[l - 1].tolist()):
                symbol_of.update({tuple(patch): nu for patch in patches})
            symbols = []
            for patch in map(tuple, tree[0].reshape(-1, self.s).tolist()):
                if patch not in symbol_of:
                    raise ValueError(f"no symbol generates the level-{l} patch {patch}")
                symbols.append(symbol_of[patch])
            width = self.s ** (l - 1)
            tree.insert(0, np.array(symbols, dtype=np.int64).reshape(-1, width))
        return tree

    # ---- The exact label posterior q, and what Assumption 6 asks of it ---------------

    def ways(self, l):
        """Number of leftmost paths of rules from label zeta to symbol nu of level l.

        (V, V), rows zeta, columns nu, for l = 0..L.  Each column divided by its sum is
        P[label | first symbol is nu], by Bayes' rule.
        """
        self._check_level(l, least=0)
        ways = np.eye(self.V)
        for rules in self.rules[:l]:
            # Entry (nu, a): how many of the m rules of nu begin with symbol a.
            ways = ways @ np.eye(self.V)[rules[:, :, 0]].sum(1)
        return ways  # exact integers: equal ratios of them round to equal floats

    def label_posterior(self, level):
        """q_mu^(level), Eq. (4): P[label | the first level-`level` patch is mu].

        (V, V): synonyms share q, so row nu is the q of all patches that symbol nu of
        level - 1 generates.  NaN when nu is never first.
        """
        self._check_level(level)
        ways = self.ways(level - 1)
        with np.errstate(invalid="ignore"):
            return (ways / ways.sum(0)).T

    def signal(self, level):
        """rho^(level): the smallest ||q_mu - q_mu'|| of patches that are not synonyms.

        The paper's rho, Eq. (5), is a lower bound of ours, K_rho m^(-level/2).
        inf when fewer than two symbols can come first.
        """
        q = self.label_posterior(level)
        pairs = itertools.combinations(q[~np.isnan(q[:, 0])], 2)
        return min((float(np.linalg.norm(a - b)) for a, b in pairs), default=math.inf)

    @property
    def kappa(self):
        """Smallest kappa with P[first level-l patch is mu] >= 1 / (kappa V m).

        Assumption 6(a), for all l and mu; inf when some patch is never first.
        """
        # Symbol nu of level l is first in ways(l).sum(0)[nu] of V m^l ways, and each of
        # its m patches follows with probability 1/m.  So V m P[first level-(l+1) patch
        # is mu] is:
        rarest = min(self.ways(l).sum(0).min() / self.m**l for l in range(self.L))
        return float(1 / rarest) if rarest > 0 else math.inf

    @property
    def K_rho(self):
        """Largest K with rho^(l) >= K m^(-l/2) for all l (Assumption 6(b))."""
        return min(self.signal(l) * self.m ** (l / 2) for l in range(1, self.L + 1))

    def assumption_6_failures(self):
        """Say where Assumption 6 fails: a list of lines, empty when it holds."""
        lines = []
        for l in range(1, self.L + 1):
            q = self.label_posterior(l)
            never = np.flatnonzero(np.isnan(q[:, 0])).tolist()
            if never:
                why = f"kappa = inf, symbols {never} of level {l - 1} are never first"
                lines.append(f"Assumption 6(a) fails at level {l}: {why}")
            if self.signal(l) == 0:
                alike = [np.flatnonzero((q == row).all(1)).tolist() for row in q]
                twins = next(symbols for symbols in alike if len(symbols) > 1)
                why = f"K_rho = 0, symbols {twins} of level {l - 1} have the same q"
                lines.append(f"Assumption 6(b) fails at level {l}: {why}")
        return lines

    def _check_level(self, level, least=1):
        if level not in range(least, self.L + 1):
            raise ValueError(f"level must be in {least}..{self.L}, got {level}")


def main():
    """Show a small grammar: its rules, one derivation, and q."""
    rng = np.random.default_rng(22)
    rhm = RHM.random(V=4, m=2, s=2, L=3, rng=rng)
    print(f"A random hierarchy model: {rhm}")
    for l, rules in enumerate(rhm.rules):
        texts = [f"{nu} -> {mu} | {synonym}" for nu, (mu, synonym) in enumerate(rules)]
        print(f"  level {l} -> {l + 1}:  {'    '.join(texts)}")
    print("\nOne derivation, from the label (level 0) to the sentence")
    for l, symbols in enumerate(rhm.sample_tree(1, rng)):
        width = 4 * rhm.s ** (rhm.L - l)
        print(f"  level {l}   " + "".join(f"{nu:^{width}}" for nu in symbols[0]))
    print("\nq, the law of the label given the first level-2 patch: synonyms share it")
    for (mu, synonym), q in zip(rhm.rules[1], rhm.label_posterior(2)):
        print(f"  {mu} or {synonym}:  q = {q}")


if __name__ == "__main__":
    main()
