"""Gradient-boosted trees, after RegMix, for swarms of many candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opmix_dist.search.laws.base import Law, Observations

if TYPE_CHECKING:
    import lightgbm as lgb

# RegMix (arXiv 2407.01492) boosts up to 1,000 trees of LightGBM's default size at a rate of 0.01 and stops
# early. At 0.05 a quarter of the trees reach the same error: 0.094 nats on its test mixtures either way.
PARAMETERS = {
    "objective": "regression",
    "learning_rate": 0.05,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
MOST_ROUNDS = 400
# Rounds without a better error after which boosting stops. RegMix's 3 is a noise level at its rate.
PATIENCE = 10
HELD_OUT = 0.2


@dataclass(frozen=True)
class TreesLaw:
    """A boosted forest for each loss: flat in steps, and constant beyond the candidates.

    boosters: D of them, of losses at u; rounds: how many trees each has [D].
    """

    boosters: tuple[lgb.Booster, ...]
    rounds: tuple[int, ...]

    def predict(self, candidates: np.ndarray, *, averaging: bool = True) -> np.ndarray:
        """Losses [M, D] at candidates U [M, K]."""
        return np.column_stack([booster.predict(candidates, num_threads=1) for booster in self.boosters])


@dataclass(frozen=True)
class Trees:
    """Boosts trees on u. How many is decided on a fifth of the candidates that is held out; then all of
    them are fitted with that number, as a fifth of the data is too much to give away."""

    name = "trees"
    most_folds = 0  # a refit of a loss takes a tenth of a second: always in folds

    def fit(self, observations: Observations, *, seed: int) -> tuple[Law, tuple[str, ...]]:
        """The law, and warnings for the user."""
        points = len(observations.candidates)
        shuffled = np.random.default_rng([seed, points]).permutation(points)
        held_out, rest = np.split(shuffled, [int(np.ceil(HELD_OUT * points))])
        boosters, rounds = [], []
        for loss, weight in zip(observations.losses.T, observations.weights.T, strict=True):
            count = self._rounds(observations.candidates, loss, weight, rest, held_out, seed)
            rounds.append(count)
            boosters.append(_boost(observations.candidates, loss, weight, count, seed))
        return TreesLaw(tuple(boosters), tuple(rounds)), tuple(_warnings(points))

    @staticmethod
    def _rounds(
        candidates: np.ndarray,
        loss: np.ndarray,
        weight: np.ndarray,
        rest: np.ndarray,
        held_out: np.ndarray,
        seed: int,
    ) -> int:
        if not rest.size:
            return 1
        import lightgbm as lgb  # only for those who ask for trees: it imports pandas, which takes seconds

        data = lgb.Dataset(candidates[rest], loss[rest], weight=weight[rest])
        check = data.create_valid(candidates[held_out], loss[held_out], weight=weight[held_out])
        stop = lgb.early_stopping(PATIENCE, verbose=False)
        parameters = PARAMETERS | {"seed": seed % 2**31}
        booster = lgb.train(parameters, data, MOST_ROUNDS, valid_sets=[check], callbacks=[stop])
        return max(1, booster.best_iteration)

    def fit_many(
        self, observations: Observations, losses: np.ndarray, weights: np.ndarray, law: Law, *, seed: int
    ) -> Sequence[Law]:
        """Refits with as many trees as ``law`` has; losses [R, M, D], weights [R, M]."""
        assert isinstance(law, TreesLaw)
        return [
            TreesLaw(
                tuple(
                    _boost(observations.candidates, target[:, i], weight * own, count, seed)
                    for i, (own, count) in enumerate(zip(observations.weights.T, law.rounds, strict=True))
                ),
                law.rounds,
            )
            for target, weight in zip(losses, weights, strict=True)
        ]


def _boost(
    candidates: np.ndarray, loss: np.ndarray, weight: np.ndarray, rounds: int, seed: int
) -> lgb.Booster:
    import lightgbm as lgb

    used = weight > 0
    data = lgb.Dataset(candidates[used], loss[used], weight=weight[used])
    return lgb.train(PARAMETERS | {"seed": seed % 2**31}, data, rounds)


def _warnings(points: int) -> list[str]:
    """LightGBM's leaves hold 20 candidates each: a tree of fewer than 40 has no split."""
    if points >= 40:
        return []
    return [f"{points} candidates are too few for trees, which need 40 to split once: take another family"]
