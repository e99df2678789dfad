"""Boolean composition of labels and priors: what is sampled instead of one prior's density.

An expression stands for a weight w(u_t, t) >= 0 on the Gaussian part of the conditional priors, so sampling it means to
put log w in the place of F:

    Label     p(y | u_t)                              NOT   1 - p(y | u_t)
    prior     exp F^(u_t, t)                          NOT   1 / (1 + exp F^(u_t, t)) ^ strength
    AND       the product: energies add               NOT   OR of the parts' NOTs
    OR        the sum: logsumexp of energies          NOT   AND of the parts' NOTs

(Du et al., 2020, compose energies so.) To subtract an energy without bound would let chains run away to where it is
high; the NOT of a label or prior is at most 1, so the density that it multiplies stays normalisable. An energy is
defined up to a constant: an `Expert`'s `offset` sets where its prior counts as true, and the shares of a mixture.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..energies.coupling import check_values, find_set
from .energy_model import EnergyModel, Terms

# F and log p(y | u_t) of a prior at the present latents.
TermsOf = Callable[[EnergyModel], Terms]
# log w (N,) by noise, of all layers or of the first ones, at levels (N,).
Target = Callable[..., Tensor]


class Expression:
    """A condition; `&`, `|` and `~` compose it."""

    def __and__(self, other: "Expression | EnergyModel") -> "Expression":
        return AND(self, other)

    def __or__(self, other: "Expression | EnergyModel") -> "Expression":
        return OR(self, other)

    def __invert__(self) -> "Expression":
        return NOT(self)


@dataclass(frozen=True, eq=False)
class Label(Expression):
    """One label of the prior that is sampled.

    Attributes:
        name: the label set.
        value: a category's index or name, or a tensor (N,) of indices, one per sample; -1 asks for nothing.
    """

    name: str
    value: int | str | Tensor


@dataclass(frozen=True, eq=False)
class Expert(Expression):
    """A prior as a part of an expression.

    Attributes:
        prior: the prior.
        strength: factor on F^.
        offset: subtracted from F^, in nats.
    """

    prior: EnergyModel
    strength: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Composite(Expression):
    """Several parts: all of them, or any."""

    parts: tuple[Expression, ...]
    any: bool


@dataclass(frozen=True, eq=False)
class Negation(Expression):
    """NOT of a label or prior, with a factor on its logarithm."""

    part: Label | Expert
    strength: float = 1.0


def AND(*parts: Expression | EnergyModel) -> Expression:
    """All of these."""
    return Composite(as_expressions(parts), any=False)


def OR(*parts: Expression | EnergyModel) -> Expression:
    """Any of these."""
    return Composite(as_expressions(parts), any=True)


def NOT(part: Expression | EnergyModel, strength: float = 1.0) -> Expression:
    """Away from this; `strength` multiplies the logarithm of its weight."""
    if not strength > 0:
        raise ValueError(f"strength: expected a positive number, got {strength!r}")
    expression = as_expressions((part,))[0]
    if isinstance(expression, Composite):
        return Composite(tuple(NOT(inner, strength) for inner in expression.parts), any=not expression.any)
    if isinstance(expression, Label | Expert):
        return Negation(expression, strength)
    assert isinstance(expression, Negation)
    return expression.part


def as_expressions(parts: Sequence[object]) -> tuple[Expression, ...]:
    """Expressions of expressions and priors."""
    if not parts:
        raise ValueError("expected at least one label or prior to compose")
    expressions: list[Expression] = []
    for part in parts:
        if not isinstance(part, Expression | EnergyModel):
            raise TypeError(f"expected labels, priors or expressions of them, got {type(part).__name__}")
        expressions.append(Expert(part) if isinstance(part, EnergyModel) else part)
    return tuple(expressions)


def log_weight(expression: Expression, sampled: EnergyModel, terms: TermsOf) -> Tensor:
    """log w (N,) of an expression.

    Args:
        expression: as `make_condition` checked it, with labels as tensors.
        sampled: the prior that labels belong to.
        terms: F and log p(y | u_t) of a prior at the present latents.

    Returns:
        log w in nats, (N,).
    """
    if isinstance(expression, Composite):
        inside = torch.stack([log_weight(part, sampled, terms) for part in expression.parts])
        return inside.logsumexp(0) if expression.any else inside.sum(0)
    if isinstance(expression, Expert):
        return expression.strength * (terms(expression.prior)[0] - expression.offset)
    if isinstance(expression, Negation) and isinstance(expression.part, Expert):
        return -expression.strength * F.softplus(log_weight(expression.part, sampled, terms))
    label = expression.part if isinstance(expression, Negation) else expression
    assert isinstance(label, Label) and isinstance(label.value, Tensor)  # noqa: PT018
    f, log_probabilities = terms(sampled)
    if label.name not in log_probabilities:  # not coupled at this level
        return torch.zeros_like(f)
    log_p, category = log_probabilities[label.name], label.value.clamp(min=0)[:, None]
    if isinstance(expression, Negation):
        log_w = expression.strength * log_p.scatter(1, category, -torch.inf).logsumexp(1)
    else:
        log_w = log_p.gather(1, category).squeeze(1)
    return torch.where(label.value >= 0, log_w, 0.0)


def atoms(expression: Expression) -> Iterator[Label | Expert]:
    """The labels and priors in an expression."""
    if isinstance(expression, Composite):
        for part in expression.parts:
            yield from atoms(part)
    elif isinstance(expression, Negation):
        yield expression.part
    elif isinstance(expression, Label | Expert):
        yield expression


def rebuild(expression: Expression, change: Callable[[Label | Expert], Label | Expert]) -> Expression:
    """An expression with every label and prior changed."""
    if isinstance(expression, Composite):
        return replace(expression, parts=tuple(rebuild(part, change) for part in expression.parts))
    if isinstance(expression, Negation):
        return replace(expression, part=change(expression.part))
    assert isinstance(expression, Label | Expert)
    return change(expression)


@dataclass(frozen=True, eq=False)
class Condition:
    """What is sampled in the place of a prior.

    Attributes:
        expression: labels and priors; None for the prior alone.
        guidance: factor on log w of an expression of labels.
        log_likelihood: log p(y | x) (N,) of images; None for none.
    """

    expression: Expression | None = None
    guidance: float = 1.0
    log_likelihood: Callable[[Tensor], Tensor] | None = None

    def rows(self, chunk: slice) -> "Condition":
        """The condition of some samples."""

        def change(atom: Label | Expert) -> Label | Expert:
            if isinstance(atom, Label) and isinstance(atom.value, Tensor):
                return replace(atom, value=atom.value[chunk])
            return atom

        return replace(self, expression=self.expression and rebuild(self.expression, change))

    @property
    def experts(self) -> list[EnergyModel]:
        """The priors that the expression names."""
        parts = () if self.expression is None else atoms(self.expression)
        return [part.prior for part in parts if isinstance(part, Expert)]

    def log_weight(self, prior: EnergyModel, terms: TermsOf) -> Tensor:
        """What takes the place of F, (N,): labels alone multiply the prior, an expression of priors takes its place.

        Args:
            prior: the prior that is sampled.
            terms: F and log p(y | u_t) of a prior at the present state.

        Returns:
            log w in nats, (N,), without the log-likelihood.
        """
        # An expression may name a prior several times, whose networks run once.
        terms = functools.cache(terms)
        if self.expression is None:
            return terms(prior)[0]
        log_w = log_weight(self.expression, prior, terms)
        return log_w if self.experts else terms(prior)[0] + self.guidance * log_w

    def target(self, prior: EnergyModel, t: Tensor) -> Target:
        """log w (N,) of noise u (N, D) at levels `t`, as target(u, t, layers=None), for one chain of `prior`."""
        terms_at = {each: each.terms_at(t) for each in (prior, *self.experts)}

        def target(u: Tensor, t: Tensor, layers: int | None = None) -> Tensor:
            log_likelihood = None
            if self.log_likelihood is None or layers is not None:
                states = prior.transform.states(u, layers)
            else:
                states, features = prior.transform.states_and_features(u)
                log_likelihood = check_likelihood(self.log_likelihood(prior.backbone.decode(features)), len(u))

            log_w = self.log_weight(prior, lambda each: terms_at[each](states, t))
            return log_w if log_likelihood is None else log_w + log_likelihood

        return target


def check_likelihood(values: object, n: int) -> Tensor:
    """The values of a log-likelihood; TypeError or ValueError unless they are (n,) and differentiable."""
    if not isinstance(values, Tensor) or not values.requires_grad:
        raise TypeError("log_likelihood: expected a tensor computed from the images by differentiable operations")
    if tuple(values.shape) != (n,):
        raise ValueError(
            f"log_likelihood: expected one number per image, shape ({n},), got {tuple(values.shape)}; sum over pixels"
        )
    return values


def make_condition(
    prior: EnergyModel,
    n: int,
    labels: "Mapping[str, Any] | Expression | None",
    guidance: float,
    log_likelihood: Callable[[Tensor], Tensor] | None,
) -> Condition | None:
    """The condition of what to sample, checked.

    Args:
        prior: the prior to sample.
        n: number of samples.
        labels: label set -> category, or an expression.
        guidance: factor on log w of an expression of labels.
        log_likelihood: of images.

    Returns:
        The condition; None for the prior alone.

    Raises:
        TypeError, ValueError: an unknown label set or category, priors that do not fit together, or a wrong guidance.
    """
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance: expected a non-negative number, got {guidance}")
    if log_likelihood is not None and not callable(log_likelihood):
        raise TypeError(f"log_likelihood: expected a function of images, got {type(log_likelihood).__name__}")
    if labels is not None and not isinstance(labels, Expression | EnergyModel):
        if not isinstance(labels, Mapping):
            raise TypeError(f"labels: expected {{label set: category}} or an expression, got {type(labels).__name__}")
        labels = AND(*(Label(name, value) for name, value in labels.items())) if labels else None
    if labels is None:
        return None if log_likelihood is None else Condition(None, guidance, log_likelihood)

    def check(atom: Label | Expert) -> Label | Expert:
        if isinstance(atom, Label):
            return replace(atom, value=label_values(atom, prior, n))
        other = atom.prior
        if other.latent_shapes != prior.latent_shapes or other.backbone is not prior.backbone:
            raise ValueError("priors can be composed over one backbone alone: make them with the same adapter object")
        if other.schedule != prior.schedule:
            raise ValueError(
                f"priors can be composed at equal noise levels alone, got {other.schedule} and {prior.schedule}"
            )
        return atom

    expression = rebuild(as_expressions((labels,))[0], check)
    if guidance != 1 and any(isinstance(atom, Expert) for atom in atoms(expression)):
        raise ValueError(
            "guidance: it goes with labels alone; give priors in an expression a strength, as "
            "Expert(prior, strength=...)"
        )
    return Condition(expression, guidance, log_likelihood)


def label_values(label: Label, prior: EnergyModel, n: int) -> Tensor:
    """Categories (n,) of a label on the prior's device; TypeError or ValueError where there is no such label."""
    labels = find_set(label.name, prior.coupling)
    if isinstance(label.value, Tensor) and label.value.ndim:
        return check_values(label.name, label.value, labels, n, prior.device)
    value: Any = label.value.item() if isinstance(label.value, Tensor) else label.value
    return torch.full((n,), labels.index(label.name, value), dtype=torch.long, device=prior.device)
