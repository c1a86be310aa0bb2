import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opmix_dist.search.simplex import (
    Components,
    candidates_near,
    coefficients_of,
    effective,
    nearest_coefficients,
    sample_candidates,
    sobol_candidates,
    two_probe_candidates,
)


def test_rebalance_composition_by_hand():
    components = Components.for_rebalance(["a", "b", "c"], np.array([0.5, 0.3, 0.2]))
    assert components.names == ("old", "a", "b", "c")
    expected = [[0.5, 0.3, 0.2], [0.95, 0.03, 0.02], [0.05, 0.93, 0.02], [0.05, 0.03, 0.92]]
    np.testing.assert_allclose(components.matrix, expected, atol=1e-15)


def test_domain_share_one_gives_pure_probes():
    matrix = Components.for_rebalance(["a", "b"], np.array([0.25, 0.75]), domain_share=1.0).matrix
    np.testing.assert_array_equal(matrix, [[0.25, 0.75], [1, 0], [0, 1]])


def test_one_new_domain_composition_by_hand():
    components = Components.for_one_new_domain(["a", "b"], np.array([0.25, 0.75]), "n")
    assert components.names == ("old", "n")
    assert components.domains == ("a", "b", "n")
    np.testing.assert_allclose(components.matrix, [[0.225, 0.675, 0.1], [0.025, 0.075, 0.9]], atol=1e-15)


def test_several_new_domains_composition_by_hand():
    old = np.array([0.25, 0.75])
    components = Components.for_new_domains(["a", "b"], old, ["m", "n"])
    assert components.names == ("old", "m", "n")
    assert components.domains == ("a", "b", "m", "n")
    expected = [[0.25, 0.75, 0, 0], [0.025, 0.075, 0.9, 0], [0.025, 0.075, 0, 0.9]]
    np.testing.assert_allclose(components.matrix, expected, atol=1e-15)
    one = Components.for_new_domains(["a", "b"], old, ["n"], 0.5)
    np.testing.assert_array_equal(one.matrix, Components.for_one_new_domain(["a", "b"], old, "n").matrix)
    with pytest.raises(ValueError, match="need a new domain"):
        Components.for_new_domains(["a", "b"], old, [])


def test_nearest_coefficients_of_several_new_domains_by_hand():
    matrix = Components.for_new_domains(["a", "b"], np.array([0.25, 0.75]), ["m", "n"]).matrix
    # 0.36 of m is 0.4 of its probe, 0.18 of n is 0.2; what is left is p
    found = nearest_coefficients(np.array([0.115, 0.345, 0.36, 0.18]), matrix)
    np.testing.assert_allclose(found, [0.4, 0.4, 0.2], atol=1e-5)
    # out of reach: as much of `m` as there is
    found = nearest_coefficients(np.array([0, 0, 1.0, 0]), matrix)
    np.testing.assert_allclose(found, [0, 1, 0], atol=1e-5)


def test_nearest_coefficients_mix_about_as_many_probes_as_those_they_are_compared_with():
    matrix = Components.for_rebalance(["a", "b"], np.array([0.5, 0.5])).matrix
    x = np.array([0.68, 0.32])

    # b of `b`, a of `a` and the rest `old`: 0.45 (a - b) = 0.18, so that u = (0.6 - 2 b, 0.4 + b, b)
    def line(b):
        return np.array([0.6 - 2 * b, 0.4 + b, b])

    # sum of squares 6 b^2 - 1.6 b + 0.52 is least at b = 2 / 15
    np.testing.assert_allclose(nearest_coefficients(x, matrix), line(2 / 15), atol=1e-5)
    np.testing.assert_allclose(nearest_coefficients(x, matrix, like=np.eye(3)[1]), line(0), atol=1e-5)
    like = nearest_coefficients(x, matrix, like=line(0.05))
    np.testing.assert_allclose(like, line(0.05), atol=1e-4)
    np.testing.assert_allclose(
        nearest_coefficients(x, matrix, like=np.full(3, 1 / 3)), line(2 / 15), atol=1e-5
    )


def test_nine_candidates_between_two_probes_by_hand():
    matrix = Components.for_one_new_domain(["a", "b"], np.array([0.25, 0.75]), "n").matrix
    candidates = two_probe_candidates(matrix)
    np.testing.assert_allclose(candidates[:, 1], np.arange(9) / 8, atol=1e-15)
    shares = effective(candidates, matrix)
    np.testing.assert_allclose(shares[:, 2], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], atol=1e-15)
    np.testing.assert_allclose(shares[4], [0.125, 0.375, 0.5], atol=1e-15)


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**63 - 1), st.floats(0.2, 5))
def test_candidates_and_their_mixtures_lie_on_the_simplex(num_components, count, seed, alpha):
    candidates = sample_candidates(num_components, count, seed=seed, alpha=alpha)
    assert candidates.shape == (count, num_components)
    composition = sample_candidates(5, num_components, seed=seed)
    for points in (candidates, effective(candidates, composition)):
        assert (points >= 0).all()
        np.testing.assert_allclose(points.sum(axis=1), 1, atol=1e-12)


def test_candidates_follow_their_seed_and_extend():
    few, many = sample_candidates(4, 5, seed=3), sample_candidates(4, 50, seed=3)
    np.testing.assert_array_equal(few, many[:5])
    assert not np.allclose(few, sample_candidates(4, 5, seed=4))


def test_alpha_one_has_the_moments_of_the_uniform_simplex():
    candidates = sample_candidates(4, 20_000, seed=0)
    np.testing.assert_allclose(candidates.mean(axis=0), 1 / 4, atol=0.005)
    # Dirichlet(1) over K: variance (K - 1) / (K^2 (K + 1)) = 3 / 80.
    np.testing.assert_allclose(candidates.var(axis=0), 3 / 80, rtol=0.05)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_sobol_candidates_lie_on_the_simplex_and_extend(num_components, count, seed):
    candidates = sobol_candidates(num_components, count, seed=seed)
    assert candidates.shape == (count, num_components)
    assert (candidates >= 0).all()
    np.testing.assert_allclose(candidates.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(candidates, sobol_candidates(num_components, 77, seed=seed)[:count])


def test_sobol_candidates_are_uniform_on_the_simplex():
    candidates = sobol_candidates(4, 4096, seed=1)
    np.testing.assert_allclose(candidates.mean(axis=0), 1 / 4, atol=5e-4)
    np.testing.assert_allclose(candidates.var(axis=0), 3 / 80, rtol=5e-3)
    # a Dirichlet(1) over 4 has P(u_k > s) = (1 - s)^3 for every k, and covariance -1 / 80
    for share in (0.1, 0.5, 0.8):
        np.testing.assert_allclose((candidates > share).mean(axis=0), (1 - share) ** 3, atol=2e-3)
    off_diagonal = np.cov(candidates.T)[~np.eye(4, dtype=bool)]
    np.testing.assert_allclose(off_diagonal, -1 / 80, rtol=2e-2)
    assert not np.allclose(sobol_candidates(4, 8, seed=2), candidates[:8])


def test_few_sobol_candidates_are_more_even_than_dirichlet_draws():
    """Means over 20 points, 50 seeds; measured are 0.007 and 0.028."""
    off = [
        [np.abs(draw(5, 20, seed=seed).mean(axis=0) - 1 / 5).mean() for seed in range(50)]
        for draw in (sobol_candidates, sample_candidates)
    ]
    assert np.mean(off[0]) < np.mean(off[1]) / 2


def test_candidates_near_a_centre_by_hand():
    centre = np.array([0.7, 0.3, 0.0])
    near = candidates_near(centre, 6, spread=0.25, seed=5)
    np.testing.assert_allclose(near, 0.75 * centre + 0.25 * sample_candidates(3, 6, seed=5), atol=1e-15)
    np.testing.assert_array_equal(near[:4], candidates_near(centre, 4, spread=0.25, seed=5))
    np.testing.assert_array_equal(candidates_near(centre, 2, spread=0, seed=5), [centre, centre])


def test_coefficients_of_a_mixture_by_hand():
    """x = (0.5, 0.5) is `old`, halves of a and b, or anything between: (w, (1 - w) / 2, (1 - w) / 2) has the
    least sum of squares at w = 1 / 3."""
    overlapping = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(coefficients_of([0.5, 0.5], overlapping), [1 / 3] * 3, atol=1e-6)
    # x = (1, 0) leaves no choice
    np.testing.assert_allclose(coefficients_of([1.0, 0.0], overlapping), [0, 1, 0], atol=1e-6)
    probes = Components.for_one_new_domain(["a", "b"], np.array([0.25, 0.75]), "n").matrix
    np.testing.assert_allclose(coefficients_of([0.125, 0.375, 0.5], probes), [0.5, 0.5], atol=1e-7)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10_000))
def test_coefficients_give_the_mixture_and_mix_at_least_as_much(num_components, num_domains, seed):
    composition = sample_candidates(num_domains, num_components, seed=seed)
    u = sample_candidates(num_components, 1, seed=seed + 1)[0]
    found = coefficients_of(u @ composition, composition)
    np.testing.assert_allclose(found @ composition, u @ composition, atol=1e-6)
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found**2).sum() <= (u**2).sum() + 1e-5


def test_a_mixture_out_of_reach_names_the_nearest_share():
    """Of (0.1, 0.9) .. (0.9, 0.1) the nearest to (0.95, 0.05) is the end."""
    composition = np.array([[0.1, 0.9], [0.9, 0.1]])
    with pytest.raises(ValueError, match=r"web: 0.95 \(nearest in reach: 0.9\), math: 0.05 \(.*: 0.1\)"):
        coefficients_of([0.95, 0.05], composition, domains=["web", "math"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Components.for_rebalance(["a", "a"], np.array([0.5, 0.5])), "a more than once"),
        (lambda: Components.for_rebalance(["old", "b"], np.array([0.5, 0.5])), "old more than once"),
        (lambda: Components.for_rebalance(["a", "b"], np.array([0.5, 0.4])), "sum to 1, got a sum of 0.9"),
        (lambda: Components.for_rebalance(["a", "b"], np.array([1.5, -0.5])), "not negative"),
        (lambda: Components.for_rebalance(["a", "b"], np.array([np.nan, 1.0])), "finite"),
        (lambda: Components.for_rebalance(["a", "b"], np.array([1.0])), "2 shares"),
        (lambda: Components.for_rebalance([], np.array([])), "at least one domain"),
        (lambda: Components.for_rebalance(["a"], np.array([1.0]), domain_share=0), "domain_share"),
        (lambda: Components.for_one_new_domain(["a"], np.array([1.0]), "a"), "a more than once"),
        (lambda: Components(("x",), ("a", "b"), np.eye(2)), r"\(1, 2\)"),
        (lambda: two_probe_candidates(np.eye(3)), "two components"),
        (lambda: two_probe_candidates(np.array([[0.5, 0.5], [0.1, 0.9]])), "not 0.5 to 0.9"),
        (lambda: sample_candidates(3, 0, seed=0), "candidates"),
        (lambda: effective(np.eye(2), np.eye(3)), "do not fit"),
        (lambda: sobol_candidates(0, 3, seed=0), "need components"),
        (lambda: candidates_near(np.array([0.5, 0.5]), 1, spread=1.5, seed=0), "spread"),
        (lambda: coefficients_of([0.5, 0.5], np.eye(3)), "does not fit"),
    ],
)
def test_wrong_input_says_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()
