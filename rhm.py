r"""The random hierarchy model: a grammar whose sentences are classified by their root.

    Ren, Dandi, Krzakala, Lee, "Provable Learning of Random Hierarchy Models and
    Hierarchical Shallow-to-Deep Chaining", COLT 2026.
    In this file: Section 2.1 (Definitions 3, 4), Section 4 (Equation 4, Assumption 6),
    Appendix B (random rules).

    V   symbols of every level, 0..V-1       m   rules per symbol
    s   tokens per patch                     L   levels; a sentence has d = s^L tokens

Level 0 is the label, level L the sentence; here L = 3 and s = 2.  Beside each step from
level l-1 to level l stand its rules, its matrix T_l (shares of first tokens), the
posterior q^(l) of the label given the first level-l patch, and the level of the network
that undoes the step.

    level 0              zeta               the label
                      /        \            rules[0]   transition(1)   q^(1)   net[3]
    level 1          nu         .           nu, the parent of mu
                   /    \     /   \         rules[1]   transition(2)   q^(2)   net[2]
    level 2      [ .     . ] .     .        mu = [. .], the first level-2 patch
                  / \   / \ / \   / \       rules[2]   transition(3)   q^(3)   net[1]
    level 3       o o   o o . .   . .       the sentence; o: the leaves under mu

So rules[l-1], transition(l), q^(l) and net[L-l+1] belong to one step.  q^(l) depends on
the parent nu only, and on the rules above it; for l = 1 nu is the label, and q^(1) is
one-hot.  net is the network of model.py, net[0] its one-hot embedding.  Synonyms are
patches that the same symbol generates; they share q.  The paper writes P_l twice:
calligraphic for the set of the V m patches of a level, bold for our T_l.
`python rhm.py` shows a grammar.
"""

import math

import numpy as np


class RHM:
    """A (V, m)-uniform, non-ambiguous grammar (Section 2.1, Definitions 3 and 4).

    rules: integers (L, V, m, s); rules[l][nu] are the m patches of level l + 1 that
    symbol nu of level l may become.  There are as many labels as symbols.  The label
    and the rule of each symbol are uniform.  ValueError for other shapes, for a token
    outside 0..V-1, and for a patch that is generated twice; in the methods, where level
    is not in 1..L.  Everywhere rng is a NumPy Generator or a seed.
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
        for l in range(1, self.L + 1):
            self._parents(l)  # raises the error for a patch that has two

    @classmethod
    def random(cls, V, m, s, L, rng, *, uniform_first_token=True):
        """Draw V m patches per level and deal them to the V symbols of the level above.

        Appendix B: for each first token (the head) draw m different rests (tails).  So
        first tokens are uniform at every level, and kappa = 1.
        uniform_first_token=False: any V m of the V^s patches, as in Cagnetta et al.
        (2024).  ValueError when there is no such grammar, or V^s or s^L is too large.
        """
        exists = min(V, m, s, L) >= 1 and s * math.log2(V) < 63 and V * m <= V**s
        if not exists or L * math.log2(s) > 31:
            needed = "sizes >= 1, V m <= V^s < 2^63 and s^L <= 2^31 are needed"
            raise ValueError(f"{needed}, got V = {V}, m = {m}, s = {s}, L = {L}")
        rng = np.random.default_rng(rng)
        # A patch is a number of s digits in base V: with V = 4, patch (1, 3) is 7.
        powers, rules = np.array([V**k for k in reversed(range(s))]), []
        for _ in range(L):
            if uniform_first_token:
                tails = [rng.choice(V ** (s - 1), m, replace=False) for _ in range(V)]
                drawn = [head * V ** (s - 1) + tail for head, tail in enumerate(tails)]
            else:
                drawn = rng.choice(V**s, V * m, replace=False)
            dealt = rng.permutation(np.ravel(drawn)).reshape(V, m, 1)
            rules.append(dealt // powers % V)  # the digits of every number, (V, m, s)
        return cls(rules)

    def __repr__(self):
        return f"RHM(V={self.V}, m={self.m}, s={self.s}, L={self.L})"

    def sample_tree(self, n, rng, level=1):
        """Draw n derivations, latent symbols included (Definition 3).

        Only the first level-`level` patch is drawn, with its ancestors and descendants.
        Level 1 has one patch only, so that level = 1 draws the whole sentence.  Returns
        L + 1 int64 arrays, for levels 0, 1, 2, ...: with level = 1 they are (n, 1),
        (n, s), (n, s^2), ...; with level = 3 (n, 1), (n, 1), (n, 1), (n, s), ...
        """
        self._check_level(level)
        rng = np.random.default_rng(rng)
        tree = [rng.integers(self.V, size=(n, 1))]
        for l, rules in enumerate(self.rules, start=1):
            choice = rng.integers(self.m, size=tree[-1].shape)
            # rules[tree[-1], choice], written so that it is twice as fast:
            patches = rules.reshape(-1, self.s).take(self.m * tree[-1] + choice, axis=0)
            tokens = patches.reshape(n, tree[-1].shape[1] * self.s)
            # Above the patch sought, only the first token leads to it.
            tree.append(tokens if l >= level else tokens[:, :1])
        return tree

    def sample(self, n, rng, level=1):
        """Draw what a learner may see (Section 2.3), by sample_tree.

        Returns the leaves under the first level-`level` patch, (n, s^(L-level+1)), and
        the labels (n,), int64.
        """
        tree = self.sample_tree(n, rng, level)
        return tree[-1], tree[0][:, 0]

    def _parents(self, l):
        """{level-l patch: the symbol of level l-1 that generates it}."""
        parents = {}
        for nu, patches in enumerate(self.rules[l - 1].tolist()):
            for patch in map(tuple, patches):
                if patch in parents:
                    twice = f"generated by symbols {parents[patch]} and {nu}"
                    raise ValueError(f"level-{l} patch {patch} is {twice}")
                parents[patch] = nu
        return parents

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
            width, parents = self.s ** (l - 1), self._parents(l)
            patches = [tuple(patch) for patch in tree[0].reshape(-1, self.s).tolist()]
            symbols = [parents.get(patch) for patch in patches]
            if None in symbols:
                k = symbols.index(None)
                unknown = f"no symbol generates the level-{l} patch {patches[k]}"
                raise ValueError(f"sentence {k // width}: {unknown}")
            tree.insert(0, np.array(symbols, dtype=np.int64).reshape(-1, width))
        return tree

    def transition(self, l):
        """T_l (V, V): the share of the rules of nu whose first token is mu, Appendix B.

        Rows nu of level l-1, columns mu of level l: here mu is one token, not a patch.
        The paper writes a bold P_l.
        """
        self._check_level(l)
        return np.eye(self.V)[self.rules[l - 1, :, :, 0]].mean(1)

    def ways(self, l):
        """In how many ways label zeta leads to nu as the first symbol of level l.

        (V, V), rows zeta, columns nu: the product m T_1 ... m T_l, for l = 0..L.  Whole
        numbers are exact (below 2^53), and equal fractions of them are equal floats: so
        equal posteriors have distance 0.
        """
        ways = np.eye(self.V)
        for rules in self.rules[:l]:
            ways = ways @ np.eye(self.V)[rules[:, :, 0]].sum(1)
        return ways

    def label_posterior(self, level):
        """q_mu^(level), Eq. (4): P[label | the first level-`level` patch is mu].

        Row nu of the result, (V, V), is q for all patches of the level-(level-1) symbol
        nu: Bayes' rule with uniform labels.  NaN when nu is never first.
        """
        self._check_level(level)
        ways = self.ways(level - 1)
        with np.errstate(invalid="ignore"):
            return (ways / ways.sum(0)).T

    def signal(self, level):
        """rho^(level): the smallest ||q_mu - q_mu'|| of patches that are not synonyms.

        The paper's rho, Eq. (5), is its lower bound K_rho m^(-level/2).  inf when fewer
        than two symbols can come first.
        """
        q = self.label_posterior(level)
        q = q[~np.isnan(q[:, 0])]
        nearest = [np.linalg.norm(q[:k] - q[k], axis=1).min() for k in range(1, len(q))]
        return float(min(nearest, default=math.inf))

    @property
    def kappa(self):
        """Smallest kappa with P[first level-l patch is mu] >= 1 / (kappa V m).

        Assumption 6(a), for all l and mu; inf when some patch is never first.
        """
        # Symbol nu of level l is first in ways(l).sum(0)[nu] of V m^l ways.  The m
        # patches of level l + 1 that it generates share them equally.
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
            rows = self.label_posterior(l).tolist()
            never = [nu for nu, q in enumerate(rows) if math.isnan(q[0])]
            if never:
                why = f"kappa = inf, symbols {never} of level {l - 1} are never first"
                lines.append(f"Assumption 6(a) fails at level {l}: {why}")
            if self.signal(l) == 0:
                nu = next(nu for nu, q in enumerate(rows) if rows.count(q) > 1)
                twins = [other for other, q in enumerate(rows) if q == rows[nu]]
                why = f"K_rho = 0, symbols {twins} of level {l - 1} have the same q"
                lines.append(f"Assumption 6(b) fails at level {l}: {why}")
        return lines

    def _check_level(self, level):
        if level not in range(1, self.L + 1):
            raise ValueError(f"level must be in 1..{self.L}, got {level}")


def typical_signal(V, m, level):
    """Root mean square over grammars of ||q_mu - q_mu'||, patches not synonymous.

    Lemmas 21 and 26: E ||T z||^2 = ||z||^2 (V-1)/(mV-1) over Appendix B's deals, for
    every z that sums to 0; q_mu - q_mu' is level - 1 such T applied to e_nu - e_nu'.
    """
    return math.sqrt(2 * ((V - 1) / max(m * V - 1, 1)) ** (level - 1))


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
