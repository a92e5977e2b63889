"""The filter where texts have fewer tokens than an input has dimensions: all of it in the tokens' own space.

The moments per token are C = floor I + X^T diag(weights) X, so that (C_T + strength C_P)^-1 is, by Woodbury, an inverse
of as many dimensions as there are tokens. Results are those of `filter` up to rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from stethoscope.editing.change import second_moment
from stethoscope.editing.moments import Samples, not_definite, shrinkage

Floor = tuple[float, Float64[Tensor, " tokens"]]  # what every direction has, and the weight of each token


@dataclass(frozen=True, kw_only=True)
class FewTokens:
    """Target's and protected moments of an input, by its values at the tokens of all texts.

    Attributes:
        X: the values.
        gram: X X^T.
        target, protected: floor and the tokens' weights.
    """

    X: Float64[Tensor, "tokens d"]
    gram: Float64[Tensor, "tokens tokens"]
    target: Floor
    protected: Floor

    @classmethod
    def of(cls, at: Mapping[str, Samples], text: str, weights: Mapping[str, float]) -> "FewTokens":
        """From each text's samples, shrunk as `filter.shrunk` does.

        Args:
            text: the target's name.
            weights: of the protected texts.
        """
        X = torch.cat([at[name].rows for name in (text, *weights)]).double()
        gram = second_moment(X.T)
        if not gram.isfinite().all():
            raise not_definite()
        floors, columns, start = [], [], 0
        for name, weight in {text: 1.0, **weights}.items():
            n, d = at[name].seen, X.shape[1]
            own = gram[start : start + n, start : start + n]
            scale, squares = float(own.diagonal().sum()) / max(n, 1) / d, float(own.square().sum()) / max(n * d, 1) ** 2
            amount = shrinkage(scale, squares, d, n) if n else 0.0
            column = torch.zeros(len(X), dtype=torch.float64, device=X.device)
            column[start : start + n] = weight * (1 - amount) / max(n, 1)
            floors.append(weight * amount * scale)
            columns.append(column)
            start += n
        protected = sum(floors[1:]), torch.stack(columns[1:]).sum(0)
        return cls(X=X, gram=gram, target=(floors[0], columns[0]), protected=protected)

    def filtered(
        self, change: Float64[Tensor, "rows d"], strengths: Sequence[float]
    ) -> Iterator[Float64[Tensor, "rows d"]]:
        """As `filter.filtered`."""
        floor, weights = self.target
        seen = change @ self.X.T
        wanted = seen * weights
        reached = floor * seen + wanted @ self.gram
        for strength in strengths:
            if not floor and not weights.any():
                yield torch.zeros_like(change)
                continue
            rest, root, factor = self._inverse(strength)
            solved = torch.cholesky_solve((reached * root).T, factor).T * root
            yield (change * floor + (wanted - solved) @ self.X) / rest

    def separability(self) -> float:
        """As `filter.separability`, by the traces of F and of F F, F being the filter of strength 1."""
        (floor, weights), (n, d) = self.target, self.X.shape
        rest, _, factor = self._inverse(1.0)
        inverse, of_target = torch.cholesky_inverse(factor), weights > 0
        passed = (torch.eye(n, dtype=torch.float64, device=factor.device) - rest * inverse)[of_target][:, of_target]
        trace = floor * ((d - n) / rest + inverse.trace()) + passed.trace()
        across = inverse[:, of_target]
        square = floor**2 * ((d - n) / rest**2 + inverse.square().sum()) + passed.square().sum()
        square += 2 * floor * (across[of_target].trace() - rest * across.square().sum())
        return float((4 * (square - trace) / d + 1).clamp(min=0).sqrt())

    def _inverse(self, strength: float) -> tuple[float, Tensor, Tensor]:
        """The floor of C_T + strength C_P, the roots of its tokens' weights, and the factor of what is to be solved."""
        (floor, weights), (other, others) = self.target, self.protected
        rest, root = floor + strength * other, (weights + strength * others).sqrt()
        inner = root[:, None] * self.gram * root
        inner.diagonal().add_(rest)
        factor, failed = torch.linalg.cholesky_ex(inner)
        if rest <= 0 or failed or not factor.diagonal().isfinite().all():
            raise not_definite()
        return rest, root, factor
