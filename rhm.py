r"""The random hierarchy model: a grammar whose sentences are classified by their root.

    Ren, Dandi, Krzakala, Lee, "Provable Learning of Random Hierarchy Models and
    Hierarchical Shallow-to-Deep Chaining", COLT 2026.  Sections 2.1, 4 and Appendix B.

    V   symbols of every level, 0..V-1       m   rules per symbol
    s   tokens per patch                     L   levels; a sentence has d = s^L tokens

Level 0 is the label, level L the sentence; here L = 3 and s = 2.  Beside each step from
level l-1 to level l stand its rules, its matrix T_l, the posterior q^(l) of the label
given the first level-l patch, and the level of the network that undoes the step.

    level 0              zeta               the label
                      /        \            rules[0]   transition(1)   q^(1)   net[2]
    level 1          nu         .           nu, the parent of mu
                   /    \     /   \         rules[1]   transition(2)   q^(2)   net[1]
    level 2      [ .     . ] .     .        mu = [. .], the first level-2 patch
                  / \   / \ / \   / \       rules[2]   transition(3)   q^(3)   net[0]
    level 3       o o   o o . .   . .       the sentence; o: the leaves under mu

Synonyms are patches that the same symbol generates.  A level has V m patches, the
paper's set P_l.  This file needs NumPy only; `python rhm.py` shows a small grammar.
"""

import math

import numpy as np


class RHM:
    """A (V, m)-uniform, non-ambiguous grammar (Section 2.1, Definitions 3 and 4).

    rules: integers (L, V, m, s).  The label and the rule of each symbol are uniform.
    ValueError for a token outside 0..V-1 and for a patch that is generated twice.
    """

    def __init__(self, rules):
        rules = np.asarray(rules)
        if rules.ndim != 4:
            raise ValueError(f"rules must be (L, V, m, s), got shape {rules.shape}")
        self.L, self.V, self.m, self.s = rules.shape
        _check_sizes(self.V, self.m, self.s, self.L)
        self.rules = _as_tokens("rules", rules, self.V)
        self.d = self.s**self.L  # tokens per sentence
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
        V m of the V^s patches, as in Cagnetta et al. (2024).  rng: a NumPy Generator.
        ValueError when there is no such grammar, or V^s or s^L is too large.
        """
        V, m, s, L = _check_sizes(V, m, s, L)
        rules = np.empty((L, V, m, s), dtype=np.int32)
        # Patches are numbered in base V.  int64, for NumPy 1 on Windows has 32 bits.
        powers = V ** np.arange(s - 1, -1, -1, dtype=np.int64)
        for l in range(L):
            if uniform_first_token:
                tails = [rng.choice(V ** (s - 1), m, replace=False) for _ in range(V)]
                numbers = np.arange(V, dtype=np.int64)[:, None] * V ** (s - 1) + tails
            else:
                numbers = rng.choice(V**s, V * m, replace=False)
            dealt = rng.permutation(numbers.ravel()).reshape(V, m, 1)
            rules[l] = dealt // powers % V  # the s digits of every number
        return cls(rules)

    def sample_tree(self, n, rng, level=1):
        """Draw n derivations, latent symbols included (Definition 3).

        Only the first level-`level` patch is drawn, with its ancestors and descendants;
        level 1 is the whole sentence.  Returns L + 1 int32 arrays: number l is
        (n, s^(l-level+1)) from l = level on, (n, 1) above.
        ValueError for n < 0, a level outside 1..L, or more than 2^31 tokens.
        """
        n, level = as_integer("n", n, 0), as_integer("level", level, 1, self.L)
        if n * self.s ** (self.L - level + 1) > 2**31:
            raise ValueError(f"{n} samples of level {level} are more than 2^31 tokens")
        small = np.min_scalar_type(self.m - 1)  # small integers are drawn faster
        tree = [rng.integers(self.V, size=(n, 1), dtype=np.int32)]
        for l, rules in enumerate(self.rules):
            choice = rng.integers(self.m, size=tree[l].shape, dtype=small)
            row = tree[l] * self.m + choice  # faster than rules[tree[l], choice]
            patches = rules.reshape(-1, self.s).take(row, axis=0)
            tokens = patches.reshape(n, row.shape[1] * self.s)
            # Above the patch sought, only the first token leads to it.
            tree.append(tokens if l + 1 >= level else tokens[:, :1])
        return tree

    def sample(self, n, rng, level=1):
        """Draw what a learner may see (Section 2.3), by sample_tree.

        Returns the leaves under the first level-`level` patch, (n, s^(L-level+1)), and
        the labels (n,), int32.
        """
        tree = self.sample_tree(n, rng, level)
        return tree[-1], tree[0][:, 0]

    def parse(self, tokens):
        """Recover all symbols of whole sentences, bottom up (Section 2.1).

        The parse is unique, since no patch has two parents.  tokens: integers (n, d).
        Returns L + 1 int32 arrays (n, s^l), labels first.  ValueError for other tokens
        and for a patch that no symbol generates.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self.d:
            raise ValueError(f"tokens must be (n, {self.d}), got shape {tokens.shape}")
        tree = [_as_tokens("tokens", tokens, self.V)]
        for l in range(self.L, 0, -1):
            width, parents = self.s ** (l - 1), self._parents[l - 1]
            patches = list(zip(*tree[0].reshape(-1, self.s).T.tolist()))
            symbols = [parents.get(patch) for patch in patches]
            if None in symbols:
                k = symbols.index(None)
                unknown = f"no symbol generates the level-{l} patch {patches[k]}"
                raise ValueError(f"row {k // width}: {unknown}")
            tree.insert(0, np.array(symbols, dtype=np.int32).reshape(-1, width))
        return tree

    def transition(self, l):
        """T_l (V, V): the share of the rules of nu whose first token is mu, Appendix B.

        Rows nu of level l-1, columns mu of level l.  The paper writes a bold P_l.
        ValueError for a level outside 1..L.
        """
        l = as_integer("level", l, 1, self.L)
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
        nu, by Bayes' rule; NaN when nu is never first.  ValueError as transition.
        """
        level = as_integer("level", level, 1, self.L)
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
        than two symbols can come first.  ValueError as transition.
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
            never = np.flatnonzero(np.isnan(self.label_posterior(l)[:, 0])).tolist()
            if never:
                why = f"symbols {never} of level {l - 1} are never first"
                lines.append(f"Assumption 6(a) fails at level {l}: kappa = inf, {why}")
            for nu, other in np.argwhere(self._distances(l) == 0)[:1]:
                why = f"symbols {nu} and {other} of level {l - 1} have the same q"
                lines.append(f"Assumption 6(b) fails at level {l}: K_rho = 0, {why}")
        return lines


def typical_signal(V, m, level):
    """Root mean square over grammars of ||q_mu - q_mu'||, patches not synonymous.

    Lemmas 21 and 26: E ||T z||^2 = ||z||^2 (V-1)/(mV-1) over Appendix B's deals, for
    every z that sums to 0; q_mu - q_mu' is level - 1 such T applied to e_nu - e_nu'.
    """
    return np.sqrt(2 * ((V - 1) / max(m * V - 1, 1)) ** (level - 1))


def signal_bound(m, level):
    """Proposition 19: rho^(level) >= (20 m)^(-(level-1)/2) with high probability."""
    return (20 * m) ** (-(level - 1) / 2)


def as_integer(name, x, least, most=math.inf):
    """x as a Python int, or ValueError unless it is one in least..most."""
    is_integer = isinstance(x, (int, np.integer)) and not isinstance(x, bool)
    if not is_integer or not least <= x <= most:
        wanted = f">= {least}" if most == math.inf else f"in {least}..{most}"
        raise ValueError(f"{name} must be an integer {wanted}, got {x!r}")
    return int(x)  # because small NumPy integers overflow


def _check_sizes(V, m, s, L):
    """Sizes as ints; refuse those without a non-ambiguous grammar (Section 2.1)."""
    V, m, s, L = (as_integer(*size, 1) for size in zip("VmsL", (V, m, s, L)))
    got = f"got V = {V}, m = {m}, s = {s}, L = {L}"
    # min: so that enormous exponents do not overflow
    if min(s, 63) * math.log2(V) >= 63 or min(L, 32) * math.log2(s) > 31:
        raise ValueError(f"V^s < 2^63 and s^L <= 2^31 are needed, {got}")
    if V * m > V**s:
        raise ValueError(f"V m <= V^s is needed, {got}")
    return V, m, s, L


def _as_tokens(name, tokens, V):
    """An int32 copy of tokens; ValueError unless they are integers in 0..V-1."""
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {tokens.dtype}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < V:
        got = f"got {tokens.min()} to {tokens.max()}"
        raise ValueError(f"{name} must lie in 0..{V - 1}, {got}")
    return tokens.astype(np.int32)


def main():
    """Show a small grammar: its rules, one derivation, q, and the signal by level."""
    rng = np.random.default_rng(22)
    rhm = RHM.random(V=4, m=2, s=2, L=3, rng=rng)
    print("A random hierarchy model: V = 4, m = 2, s = 2, L = 3")
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
    print("\nrho, the smallest distance of two q, a typical one, and Proposition 19")
    for l in range(1, rhm.L + 1):
        typical, bound = typical_signal(rhm.V, rhm.m, l), signal_bound(rhm.m, l)
        print(f"  level {l}   {rhm.signal(l):.4f}   {typical:.4f}   {bound:.4f}")
    print(f"  kappa = {rhm.kappa:.4g}, K_rho = {rhm.K_rho:.4g}")


if __name__ == "__main__":
    main()
