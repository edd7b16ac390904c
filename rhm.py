"""The random hierarchy model: a grammar whose sentences are classified by their root.

    Ren, Dandi, Krzakala, Lee, "Provable Learning of Random Hierarchy Models and
    Hierarchical Shallow-to-Deep Chaining", COLT 2026.  Sections 2.1, 4 and Appendix B.

    V      symbols of every level            m      rules per symbol
    s      tokens per patch                  L      levels;  d = s^L tokens per sentence
    level 0 is the label, level L the sentence; a level-l patch is s tokens of level l,
    and the V m patches that occur are the paper's P_l.  The rules R_l that rewrite a
    level-l symbol nu into a level-(l+1) patch are rules[l, nu], an (m, s) array.

Two patches are synonyms when the same symbol generates both.  This file needs NumPy
only; `python rhm.py` prints a small grammar, one derivation and its signal at every
level.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class RHM:
    """A (V, m)-uniform, non-ambiguous grammar (Section 2.1, Definitions 3 and 4).

    rules: integers (L, V, m, s); kept as a read-only int32 copy.  ValueError, naming
    the condition and the place, when they are no such grammar.
    """

    rules: np.ndarray

    V = property(lambda self: self.rules.shape[1], doc="symbols of every level")
    m = property(lambda self: self.rules.shape[2], doc="rules per symbol")
    s = property(lambda self: self.rules.shape[3], doc="tokens per patch")
    L = property(lambda self: self.rules.shape[0], doc="number of levels")
    d = property(lambda self: self.s**self.L, doc="tokens per sentence")

    def __post_init__(self):
        rules = np.asarray(self.rules)
        if rules.ndim != 4 or not np.issubdtype(rules.dtype, np.integer):
            raise ValueError(
                "rules must be integers with four axes (L, V, m, s), "
                f"got {rules.dtype} with shape {rules.shape}"
            )
        L, V, m, s = rules.shape
        _check_sizes(V, m, s, L)
        outside = np.argwhere((rules < 0) | (rules >= V))
        if len(outside):
            l, nu, j, _ = outside[0]
            raise ValueError(
                f"rules[{l}, {nu}, {j}] = {rules[l, nu, j].tolist()} has a token "
                f"outside the vocabulary 0..{V - 1}"
            )
        rules = rules.astype(np.int32)
        rules.setflags(write=False)
        object.__setattr__(self, "rules", rules)
        for l in range(L):  # equal patches are neighbours once their numbers are sorted
            codes = self._patch_codes(rules[l]).ravel()
            order = np.argsort(codes, kind="stable")
            equal = np.flatnonzero(np.diff(codes[order]) == 0)
            if len(equal):
                a, b = order[equal[0]], order[equal[0] + 1]
                patch = rules[l].reshape(V * m, s)[a].tolist()
                raise ValueError(
                    f"not {m} distinct rules: level-{l} symbol {a // m} has the level-"
                    f"{l + 1} patch {patch} twice"
                    if a // m == b // m
                    else f"ambiguous: level-{l} symbols {a // m} and {b // m} both "
                    f"generate the level-{l + 1} patch {patch}"
                )

    @classmethod
    def random(cls, V, m, s, L, rng, uniform_first_token=True):
        """Draw a grammar: Appendix B's sampler, or that of Cagnetta et al. (2024).

        Appendix B: every symbol is the first token of exactly m patches, so that the
        first token is uniform at every level and kappa = 1.  uniform_first_token=False:
        any V m of the V^s patches, as in Cagnetta et al.  Either way the patches are
        then dealt at random to the V symbols of the level above, m each. rng: a numpy
        Generator.  ValueError when no such grammar exists.
        """
        V, m, s, L = _check_sizes(V, m, s, L)
        rules = np.empty((L, V, m, s), dtype=np.int32)
        powers = V ** np.arange(s - 1, -1, -1)  # patches are numbered in base V
        for l in range(L):
            if uniform_first_token:
                tails = [rng.choice(V ** (s - 1), m, replace=False) for _ in range(V)]
                codes = np.arange(V)[:, None] * V ** (s - 1) + np.array(tails)
            else:
                codes = rng.choice(V**s, V * m, replace=False)
            dealt = rng.permutation(codes.ravel()).reshape(V, m, 1)
            rules[l] = dealt // powers % V
        return cls(rules)

    def sample_tree(self, n, rng, level=1):
        """Draw n derivations; return the symbols of all levels, the latent ones too.

        Definition 3: the label is uniform, a symbol is rewritten by one of its m rules,
        uniformly and independently.  Only the first level-`level` patch, its ancestors
        and its descendants are drawn: same law as those columns of whole sentences.
        Returns L + 1 int32 arrays; number l is (n, s^(l-level+1)) from l = level on,
        and (n, 1) above.  ValueError for n < 0, a level outside 1..L, or over 2^31
        tokens.
        """
        n, level = as_integer("n", n, 0), as_integer("level", level, 1, self.L)
        m, s, depth = self.m, self.s, self.L - level + 1
        if n * s**depth > 2**31:
            raise ValueError(f"{n} x {s}^{depth} tokens are more than 2^31: draw fewer")
        tree = [rng.integers(self.V, size=(n, 1), dtype=np.int32)]
        for l, rules in enumerate(self.rules):
            shape, small = tree[l].shape, np.min_scalar_type(m - 1)
            # Flat indices and np.take: several times faster than rules[tokens, choice].
            index = tree[l] * m + rng.integers(m, size=shape, dtype=small)
            patches = np.take(rules.reshape(-1, s), index, axis=0, mode="clip")
            tokens = patches.reshape(n, shape[1] * s)
            if l + 1 < level:
                tokens = tokens[:, :1]  # the others do not lead to the patch sought
            tree.append(tokens)
        return tree

    def sample(self, n, rng, level=1):
        """Draw n sentences with their labels; all that a learner may see.

        Section 2.3: a stage sees only the leaves under the first level-`level` patch.
        Returns tokens (n, s^(L-level+1)) and labels (n,), int32.  ValueError as
        sample_tree.
        """
        tree = self.sample_tree(n, rng, level)
        return tree[-1], tree[0][:, 0]

    def parse(self, tokens):
        """Recover all latent symbols from whole sentences, bottom up (Section 2.1).

        The parse is unique since no patch has two parents.  tokens: integers (n, d).
        Returns L + 1 int32 arrays (n, s^l), labels first.  ValueError for a wrong shape
        or type, and for a patch that no symbol generates, with its row and level.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self.d:
            raise ValueError(f"tokens must be (n, {self.d}), got shape {tokens.shape}")
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.V:
            row = np.argwhere((tokens < 0) | (tokens >= self.V))[0, 0]
            raise ValueError(f"row {row} has a token outside 0..{self.V - 1}")
        tree = [tokens.astype(np.int32)]
        for l in range(self.L, 0, -1):
            known = self._patch_codes(self.rules[l - 1]).ravel()
            order = np.argsort(known)
            patches = tree[0].reshape(len(tokens), self.s ** (l - 1), self.s)
            codes = self._patch_codes(patches)
            rank = np.searchsorted(known, codes, sorter=order)
            found = order[np.minimum(rank, len(order) - 1)]
            impossible = np.argwhere(known[found] != codes)
            if len(impossible):
                row, i = impossible[0]
                raise ValueError(
                    f"row {row}: no symbol generates the level-{l} patch "
                    f"{patches[row, i].tolist()}"
                )
            tree.insert(0, (found // self.m).astype(np.int32))
        return tree

    def transition(self, l):
        """T_l of Appendix B: share of the rules of nu whose first token is mu, (V, V).

        Row nu is a level-(l-1) symbol, column mu a level-l symbol.
        ValueError for a level outside 1..L.
        """
        l = as_integer("level", l, 1, self.L)
        T = np.zeros((self.V, self.V))
        np.add.at(T, (np.arange(self.V)[:, None], self.rules[l - 1, :, :, 0]), 1)
        return T / self.m

    def _label_and_first_symbol(self, l):
        """P[label = zeta and first level-l symbol = nu], (V, V): labels by symbols."""
        joint = np.eye(self.V) / self.V
        for k in range(1, l + 1):
            joint = joint @ self.transition(k)
        return joint

    def label_posterior(self, level):
        """q_mu^(level) of Eq. (4), exact, by Bayes' rule; float64 (V, V).

        Row nu, summing to 1, is P[label | first level-`level` patch is mu] for every
        patch mu that level-(level-1) symbol nu generates: q depends on mu only through
        nu, so synonyms share it.  A symbol that is never first has a row of NaN.
        ValueError for a level outside 1..L.
        """
        level = as_integer("level", level, 1, self.L)
        joint = self._label_and_first_symbol(level - 1)
        with np.errstate(invalid="ignore"):
            return (joint / joint.sum(0)).T

    def _closest_symbols(self, level):
        """(rho^(level), nu, nu'): the two symbols of level - 1 with the nearest q."""
        level = as_integer("level", level, 1, self.L)
        q = self.label_posterior(level)
        first = np.flatnonzero(~np.isnan(q[:, 0]))
        closest = (np.inf, None, None)
        for i, nu in enumerate(first[:-1]):
            distances = np.linalg.norm(q[first[i + 1 :]] - q[nu], axis=1)
            j = distances.argmin()
            if distances[j] < closest[0]:
                closest = (float(distances[j]), int(nu), int(first[i + 1 + j]))
        # q comes from level - 1 products of sums of V nonnegative terms, so rounding
        # stays below level * V * 2^-52: distances under that are zero.
        zero = closest[0] <= level * self.V * np.finfo(float).eps
        return (0.0, *closest[1:]) if zero else closest

    def signal(self, level):
        """rho^(level): the smallest ||q_mu - q_mu'|| of patches that are not synonyms.

        Assumption 6(b), taken over the symbols that can come first; inf when there are
        no two of them, 0.0 below rounding error.  ValueError for a level outside 1..L.
        """
        return self._closest_symbols(level)[0]

    @property
    def kappa(self):
        """The smallest kappa with P[first level-l patch = mu] >= 1 / (kappa V m).

        Assumption 6(a), for all l and mu; inf where some patch is never first.
        """
        rarest = min(
            self._label_and_first_symbol(l).sum(0).min() for l in range(self.L)
        )
        return float(1 / (self.V * rarest)) if rarest > 0 else np.inf

    @property
    def K_rho(self):
        """The largest K with rho^(l) >= K m^(-l/2) for all l (Assumption 6(b))."""
        return min(self.signal(l) * self.m ** (l / 2) for l in range(1, self.L + 1))

    def assumption_6_failures(self):
        """Say where Assumption 6 fails: a list of lines, empty when it holds."""
        lines = []
        for l in range(1, self.L + 1):
            never = np.flatnonzero(self._label_and_first_symbol(l - 1).sum(0) == 0)
            if len(never):
                lines.append(
                    f"Assumption 6(a) fails at level {l}: kappa is infinite, since "
                    f"symbols {', '.join(map(str, never))} of level {l - 1} "
                    f"are never first"
                )
            rho, nu, other = self._closest_symbols(l)
            if rho == 0:
                lines.append(
                    f"Assumption 6(b) fails at level {l}: K_rho = 0, since symbols "
                    f"{nu} and {other} of level {l - 1} have the same label posterior"
                )
        return lines

    def _patch_codes(self, patches):
        """Patches (..., s) as int64 numbers in base V."""
        return patches @ self.V ** np.arange(self.s - 1, -1, -1)


def typical_signal(V, m, level):
    """Root mean square over grammars of ||q_mu - q_mu'||, for patches not synonymous.

    Behind Lemma 29: over Appendix B's random deal, E ||T z||^2 = ||z||^2 (V-1) / (mV-1)
    for every z that sums to 0, exactly; and q_mu - q_mu' is e_nu - e_nu', of squared
    norm 2, after level - 1 such matrices.
    """
    return np.sqrt(2 * ((V - 1) / max(m * V - 1, 1)) ** (level - 1))


def signal_bound(m, level):
    """Proposition 19: rho^(level) >= (20 m)^(-(level-1)/2) with high probability."""
    return (20 * m) ** (-(level - 1) / 2)


def is_integer(x):
    """Whether x is a Python or NumPy integer, and no bool; not in the paper."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def as_integer(name, x, least, most=np.inf):
    """x as an int, since NumPy's small integers overflow; not in the paper.

    ValueError, with the name, unless x is an integer in least..most.
    """
    if not is_integer(x) or not least <= x <= most:
        wanted = f">= {least}" if most == np.inf else f"in {least}..{most}"
        raise ValueError(f"{name} must be an integer {wanted}, got {x!r}")
    return int(x)


def _check_sizes(V, m, s, L):
    """Sizes as ints; refuse those without a non-ambiguous grammar (Section 2.1)."""
    V, m, s, L = (as_integer(k, x, 1) for k, x in dict(V=V, m=m, s=s, L=L).items())
    if V > 1 and (s > 63 or V**s >= 2**63):
        raise ValueError(f"V^s < 2^63 is needed, got V = {V}, s = {s}")
    if V * m > V**s or V * m >= 2**31:
        raise ValueError(
            f"V m <= V^s, that is m <= V^(s-1), and V m < 2^31 are needed, "
            f"got V m = {V} * {m} = {V * m} and V^s = {V}^{s} = {V**s}"
        )
    return V, m, s, L


def main():
    rng = np.random.default_rng(0)
    rhm = RHM.random(V=4, m=2, s=2, L=3, rng=rng)
    print(
        f"Rules of a random hierarchy model, V={rhm.V}, m={rhm.m}, s={rhm.s}, L={rhm.L}"
    )
    for l in range(rhm.L):
        rules = [
            f"{nu} -> " + " | ".join(" ".join(map(str, patch)) for patch in patches)
            for nu, patches in enumerate(rhm.rules[l])
        ]
        print(f"  level {l} -> {l + 1}:  " + "    ".join(rules))

    print("\nOne derivation, from the label (level 0) to the sentence")
    for l, symbols in enumerate(rhm.sample_tree(1, rng)):
        width = 4 * rhm.s ** (rhm.L - l)
        print(f"  level {l}   " + "".join(f"{nu:^{width}}" for nu in symbols[0]))

    print("\nHow much a first patch tells about the label")
    print("  level      rho   typical   Proposition 19")
    for l in range(1, rhm.L + 1):
        typical, bound = typical_signal(rhm.V, rhm.m, l), signal_bound(rhm.m, l)
        print(f"  {l:5} {rhm.signal(l):8.4f}  {typical:8.4f}   {bound:14.4f}")
    print(f"  kappa = {rhm.kappa:.4g}, K_rho = {rhm.K_rho:.4g}")
    for line in rhm.assumption_6_failures():
        print(line)


if __name__ == "__main__":
    main()
