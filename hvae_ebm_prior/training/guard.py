"""A guard against divergence: it finds unhealthy steps, and goes back to a state that was good."""

import copy
import math
import warnings
from collections.abc import Sequence

from ..density.energy_model import EnergyModel
from .config import TrainingConfig
from .record import TrainingRecord

# Steps between two snapshots of a healthy state.
SNAPSHOT_EVERY = 25
# Steps over which the energy gap is averaged.
GAP_MEMORY = 10


class TrainingDiverged(RuntimeError):
    """Training blew up more often than allowed; the prior is at its last good state.

    Args:
        message: what happened and what to do.
        history: records of the steps that were taken, kept as an attribute.
    """

    def __init__(self, message: str, history: Sequence[TrainingRecord] = ()) -> None:
        super().__init__(message)
        self.history = history


class Guard:
    """Notices divergence and goes back to a good state: one whose next `SNAPSHOT_EVERY` steps were healthy.

    Args:
        prior: the prior in training, which holds the averaged energies.
        trainee: the copy that the optimiser moves.
        config: limits.
    """

    def __init__(self, prior: EnergyModel, trainee: EnergyModel, config: TrainingConfig) -> None:
        self.prior = prior
        self.trainee = trainee
        self.limit = max(20.0, config.gap_limit * math.sqrt(prior.dim))
        self.restarts = config.restarts
        self.restarts_left = config.restarts
        self.smoothed = 0.0
        # State dicts of the average: `candidate` becomes `good` at the next snapshot, if nothing happens until then.
        self.good = self.candidate = copy.deepcopy(prior.state_dict())

    def trouble(self, loss: float, recovery: float, gradient_norm: float) -> str:
        """What is wrong with a step; empty for a healthy one.

        Args:
            loss: mean loss.
            recovery: mean loss of recovery, minus the energy gap between chains and data; NaN without chains.
            gradient_norm: norm of the gradient.

        Returns:
            The trouble.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient's norm is {gradient_norm}"
        if math.isnan(recovery):
            return ""
        self.smoothed += (recovery - self.smoothed) / GAP_MEMORY
        if abs(self.smoothed) > self.limit:
            return (
                f"the energy gap between chains and data, averaged over {GAP_MEMORY} steps, is {-self.smoothed:.4g} "
                f"nats (limit {self.limit:.4g})"
            )
        return ""

    def keep(self, step: int) -> None:
        """Every `SNAPSHOT_EVERY` steps, the last snapshot counts as good and a new one is taken."""
        if step % SNAPSHOT_EVERY == 0:
            self.good = self.candidate
            self.candidate = copy.deepcopy(self.prior.state_dict())

    def restore(self, trouble: str, history: list[TrainingRecord], learning_rate: float) -> None:
        """Put prior and trainee back to the last good state, with a warning.

        Args:
            trouble: what was wrong.
            history: records so far.
            learning_rate: the learning rate from now on.

        Raises:
            TrainingDiverged: this happened more often than allowed.
        """
        self.prior.load_state_dict(self.good)
        self.trainee.load_state_dict(self.good)
        self.candidate = self.good
        self.smoothed = 0.0
        if self.restarts_left == 0:
            raise TrainingDiverged(
                f"training diverged {self.restarts + 1} times, last at step {len(history) + 1}: {trouble}. The prior "
                "is at its last good state. Lower learning_rate or LangevinConfig.step_size, raise the number of noise "
                "levels, or learn by objective='score', which has no chains",
                history,
            )
        self.restarts_left -= 1
        warnings.warn(
            f"step {len(history) + 1}: {trouble}; back to the last good state, "
            f"learning rate now at most {learning_rate:.3g}",
            RuntimeWarning,
            stacklevel=6,
        )
