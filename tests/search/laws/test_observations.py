import numpy as np
import pytest

from opmix_dist.search.laws import Observations

U = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
LOSSES = np.array([[1.0, 2.0], [1.5, 2.5], [3.0, 4.0]])


def test_parts_keep_what_belongs_to_their_candidates():
    gradients = np.arange(12.0).reshape(3, 2, 2)
    composition = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    observations = Observations(U, LOSSES, 0.1 * LOSSES, gradients, composition, "ab", "kl", "xyz")
    for rows in (np.array([2, 0]), np.array([True, False, True])):
        part, order = observations.take(rows), [2, 0] if rows.dtype == int else [0, 2]
        np.testing.assert_array_equal(part.losses, LOSSES[order])
        np.testing.assert_array_equal(part.stderr, 0.1 * LOSSES[order])
        np.testing.assert_array_equal(part.gradients, gradients[order])
        np.testing.assert_allclose(part.mixtures, U[order] @ composition)
        assert (part.names, part.components, part.domains) == (("a", "b"), ("k", "l"), "xyz")


def test_components_are_domains_unless_a_composition_says_otherwise():
    plain = Observations(U, LOSSES, components=["web", "code"])
    np.testing.assert_array_equal(plain.mixtures, U)
    assert tuple(plain.mixture_domains) == ("web", "code")
    mixed = Observations(U, LOSSES, composition=np.eye(2), components=["old", "code"])
    assert tuple(mixed.mixture_domains) == ()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"losses": LOSSES[:2]}, "need U"),
        ({"candidates": 2 * U}, "sum to 1"),
        ({"stderr": -LOSSES}, "standard errors"),
        ({"stderr": LOSSES[:, :1]}, "stderr must be"),
        ({"gradients": np.zeros((3, 2, 3))}, "gradients must be"),
        ({"composition": np.eye(3)}, "composition must be"),
        ({"composition": 2 * np.eye(2)}, "sum to 1"),
        ({"names": ["a"]}, "losses have 2 columns, but 1"),
        ({"components": ["a", "b", "c"]}, "candidates have 2 columns, but 3"),
        ({"domains": ["a"]}, "mixtures have 2 columns, but 1"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        Observations(**({"candidates": U, "losses": LOSSES} | changed))
