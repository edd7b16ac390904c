r"""The random hierarchy model: a grammar whose sentences are classified by their root.

    Ren, Dandi, Krzakala, Lee, "Provable Learning of Random Hierarchy Models and
    Hierarchical Shallow-to-Deep Chaining", COLT 2026.  Sections 2.1, 4 and Appendix B.

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

q^(l) uses T_1 ... T_(l-1) only: q^(1) is one-hot.  net[0] is the one-hot embedding.
Synonyms are patches that the same symbol generates.  The paper writes P_l twice:
calligraphic for the set of the V m patches of a level, bold for our T_l.  Its rho^(l),
Eq. (5), is a lower bound of our `signal`.  `python rhm.py` shows a grammar.
"""

import math
import operator

import numpy as np


class RHM:
    """A (V, m)-uniform, non-ambiguous grammar (Section 2.1, Definitions 3 and 4).

    rules: integers (L, V, m, s), or a list of L arrays or tensors (V, m, s).  There are
    as many labels as symbols.  The label and the rule of each symbol are uniform.
    ValueError for other shapes, a token outside 0..V-1, a patch generated twice; in
    the methods for a level outside 1..L.  rng is a NumPy Generator or a seed.
    """

    def __init__(self, rules):
        try:
            rules = np.stack([np.asarray(level) for level in rules])  # a copy
        except ValueError as error:
            raise ValueError("rules must be (L, V, m, s), not ragged") from error
        if rules.ndim != 4 or rules.size == 0:
            raise ValueError(f"rules must be (L, V, m, s), got shape {rules.shape}")
        self.L, self.V, self.m, self.s = rules.shape
        self.d = self.s**self.L  # tokens per sentence
        self.rules = self._as_tokens(rules)
        self.rules.setflags(write=False)  # the parse would not follow an edit
        self._parents = [{} for _ in range(self.L)]  # [l]: patch of level l+1 -> symbol
        for l, nu, j in np.ndindex(self.L, self.V, self.m):
            patch = tuple(self.rules[l, nu, j].tolist())
            if patch in self._parents[l]:
                twice = f"by symbols {self._parents[l][patch]} and {nu}"
                raise ValueError(f"level-{l + 1} patch {patch} is generated {twice}")
            self._parents[l][patch] = nu

    @classmethod
    def random(cls, V, m, s, L, rng, uniform_first_token=True):
        """Draw V m patches per level and deal them to the V symbols of the level above.

        Appendix B: every symbol is the first token of exactly m patches, so that first
        tokens are uniform at every level and kappa = 1.  uniform_first_token=False: any
        V m of the V^s patches, as in Cagnetta et al. (2024).  ValueError when there is
        no such grammar, or V^s or s^L is too large.
        """
        V, m, s, L = (operator.index(size) for size in (V, m, s, L))
        exists = min(V, m, s, L) >= 1 and s * math.log2(V) < 63 and V * m <= V**s
        if not exists or L * math.log2(s) > 31:
            needed = "sizes >= 1, V m <= V^s < 2^63 and s^L <= 2^31 are needed"
            raise ValueError(f"{needed}, got V = {V}, m = {m}, s = {s}, L = {L}")
        rng = np.random.default_rng(rng)
        # Patches are numbered in base V.  int64: NumPy 1 on Windows would have 32 bits.
        heads, powers = np.arange(V, dtype=np.int64), np.int64(V) ** np.arange(s)[::-1]
        rules = []
        for _ in range(L):
            if uniform_first_token:
                tails = [rng.choice(V ** (s - 1), m, replace=False) for _ in range(V)]
                numbers = heads[:, None] * V ** (s - 1) + tails
            else:
                numbers = rng.choice(V**s, V * m, replace=False)
            dealt = rng.permutation(numbers.ravel()).reshape(V, m, 1)
            rules.append(dealt // powers % V)  # the s digits of every number
        return cls(rules)

    def __repr__(self):
        return f"RHM(V={self.V}, m={self.m}, s={self.s}, L={self.L})"

    def sample_tree(self, n, rng, level=1):
        """Draw n derivations, latent symbols included (Definition 3).

        Only the first level-`level` patch is drawn, with its ancestors and descendants;
        level 1 is the whole sentence.  Returns L + 1 int64 arrays: number l is
        (n, s^(l-level+1)) from l = level on, (n, 1) above.
        """
        self._check_level(level)
        rng = np.random.default_rng(rng)
        tree = [rng.integers(self.V, size=(n, 1))]
        for l, rules in enumerate(self.rules, start=1):
            choice = rng.integers(self.m, size=tree[-1].shape)
            tokens = rules[tree[-1], choice].reshape(n, tree[-1].shape[1] * self.s)
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

    def parse(self, tokens):
        """Recover all symbols of whole sentences, bottom up (Section 2.1).

        The parse is unique, since no patch has two parents.  tokens: integers (n, d).
        Returns L + 1 int64 arrays (n, s^l), labels first.  ValueError for other tokens
        and for a patch that no symbol generates.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self.d:
            raise ValueError(f"tokens must be (n, {self.d}), got shape {tokens.shape}")
        tree = [self._as_tokens(tokens)]
        for l in range(self.L, 0, -1):
            width, parents = self.s ** (l - 1), self._parents[l - 1]
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

    def _label_and_first_symbol(self, l):
        """P[label = zeta, first level-l symbol = nu], (V, V): labels by symbols."""
        joint = np.eye(self.V) / self.V
        for k in range(1, l + 1):
            joint = joint @ self.transition(k)
        return joint

    def label_posterior(self, level):
        """q_mu^(level), Eq. (4): P[label | the first level-`level` patch is mu].

        Row nu of the result, (V, V), is q for all patches of the level-(level-1) symbol
        nu, by Bayes' rule; NaN when nu is never first.
        """
        self._check_level(level)
        joint = self._label_and_first_symbol(level - 1)
        with np.errstate(invalid="ignore"):
            return (joint / joint.sum(0)).T

    def _distances(self, level):
        """||q - q'|| of all pairs of symbols of level - 1, (V, V)."""
        q = self.label_posterior(level)
        distances = np.array([np.linalg.norm(q - row, axis=1) for row in q])
        # A product of level - 1 matrices of size V has rounding errors below this:
        distances[distances <= level * self.V * np.finfo(float).eps] = 0
        distances[np.isnan(distances)] = math.inf  # one of the two is never first
        np.fill_diagonal(distances, math.inf)
        return distances

    def signal(self, level):
        """rho^(level): the smallest ||q_mu - q_mu'|| of patches that are not synonyms.

        The paper's rho, Eq. (5), is its lower bound K_rho m^(-level/2).  inf when fewer
        than two symbols can come first.
        """
        return float(self._distances(level).min())

    @property
    def kappa(self):
        """Smallest kappa with P[first level-l patch is mu] >= 1 / (kappa V m).

        Assumption 6(a), for all l and mu; inf when some patch is never first.
        """
        first = [self._label_and_first_symbol(l).sum(0) for l in range(self.L)]
        rarest = np.min(first)  # of all symbols; its m patches share it equally
        return float(1 / (self.V * rarest)) if rarest > 0 else math.inf

    @property
    def K_rho(self):
        """Largest K with rho^(l) >= K m^(-l/2) for all l (Assumption 6(b))."""
        return min(self.signal(l) * self.m ** (l / 2) for l in range(1, self.L + 1))

    def assumption_6_failures(self):
        """Say where Assumption 6 fails: a list of lines, empty when it holds."""
        lines = []
        for l in range(1, self.L + 1):
            fails, of = f"fails at level {l}", f"of level {l - 1}"
            never = np.flatnonzero(np.isnan(self.label_posterior(l)[:, 0])).tolist()
            if never:
                why = f"kappa = inf, symbols {never} {of} are never first"
                lines.append(f"Assumption 6(a) {fails}: {why}")
            for nu, other in np.argwhere(self._distances(l) == 0)[:1]:
                why = f"K_rho = 0, symbols {nu} and {other} {of} have the same q"
                lines.append(f"Assumption 6(b) {fails}: {why}")
        return lines

    def _check_level(self, level):
        if level not in range(1, self.L + 1):
            raise ValueError(f"level must be in 1..{self.L}, got {level}")

    def _as_tokens(self, tokens):
        """An int64 copy; ValueError unless tokens are integers in 0..V-1."""
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.V:
            got = f"got {tokens.min()} to {tokens.max()}"
            raise ValueError(f"tokens must lie in 0..{self.V - 1}, {got}")
        return tokens.astype(np.int64)


def typical_signal(V, m, level):
    """Root mean square over grammars of ||q_mu - q_mu'||, patches not synonymous.

    Lemmas 21 and 26: E ||T z||^2 = ||z||^2 (V-1)/(mV-1) over Appendix B's deals, for
    every z that sums to 0; q_mu - q_mu' is level - 1 such T applied to e_nu - e_nu'.
    """
    return math.sqrt(2 * ((V - 1) / max(m * V - 1, 1)) ** (level - 1))


def signal_bound(m, level):
    """Proposition 19: rho^(level) >= (20 m)^(-(level-1)/2), for Appendix B's grammars.

    With high probability, when V and m are of order log d and not tiny.
    """
    return (20 * m) ** (-(level - 1) / 2)


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
