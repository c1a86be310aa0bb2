import numpy as np
import pytest

from opmix_dist.search.problem import Problem, paper_composition
from opmix_dist.search.simplex import Components

HALVES = np.full(2, 0.5)


def two_domains(**changes):
    return Problem(**{"composition": np.eye(2), "prior": HALVES, "domains": ("web", "code")} | changes)


def test_objectives_by_hand():
    losses, reference = np.array([[2.0, 3.0], [4.0, 1.0]]), np.array([1.0, 4.0])
    omega = np.array([0.25, 0.75])
    for objective, expected, slopes in (
        ("mean", [2.75, 1.75], [[0.25, 0.75], [0.25, 0.75]]),
        ("relative", [0.25 * 2 + 0.75 * 0.75, 0.25 * 4 + 0.75 * 0.25], [[0.25, 0.1875], [0.25, 0.1875]]),
        ("worst", [3.0, 4.0], [[0, 1], [1, 0]]),
        ("worst_change", [1.0, 3.0], [[1, 0], [1, 0]]),
    ):
        problem = two_domains(objective=objective, omega=omega, reference=reference)
        np.testing.assert_allclose(problem.value(losses), expected)
        for row, slope in zip(losses, slopes, strict=True):
            np.testing.assert_allclose(problem.slope(row), slope)
    np.testing.assert_allclose(two_domains().value(losses), [2.5, 2.5])  # without omega: the plain mean


def test_a_loss_of_omega_zero_is_no_worst_loss():
    problem = two_domains(objective="worst", omega=np.array([1.0, 0.0]))
    assert problem.value(np.array([2.0, 3.0])) == 2.0
    np.testing.assert_array_equal(problem.slope(np.array([2.0, 3.0])), [1, 0])


def test_kl_and_total_by_hand():
    # Two components over three domains: u = (1/2, 1/2) gives x = (0.4, 0.3, 0.3).
    problem = Problem(np.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]), np.array([0.2, 0.6, 0.2]), kl=0.1)
    by_hand = 0.4 * np.log(2) + 0.3 * np.log(0.5) + 0.3 * np.log(1.5)
    assert problem.divergence(HALVES) == pytest.approx(by_hand)
    assert problem.total(np.array([2.0, 4.0]), HALVES) == pytest.approx(3 + 0.1 * by_hand)
    without = Problem(problem.composition, np.array([0.0, 0.8, 0.2]), kl=0.0)
    assert without.divergence(HALVES) == np.inf
    assert without.total(np.array([2.0, 4.0]), HALVES) == 3


def test_violations_give_the_amounts():
    problem = two_domains(
        caps=np.array([np.inf, 0.05]),
        floors=np.array([0.9, 0.0]),
        reference=np.array([2.0, 3.0]),
        max_increase=np.array([0.01, np.inf]),
        losses=("math", "prose"),
    )
    assert problem.violations(np.array([2.041, 9.0]), np.array([0.83, 0.17])) == [
        "cap of code (0.05) is exceeded by 0.12",
        "floor of web (0.9) is missed by 0.07",
        "loss of math rises by 0.041, max_increase allows 0.01",
    ]
    assert problem.violations(np.array([2.01, 9.0]), np.array([0.95, 0.05])) == []
    # Half a millionth is met, two millionths are not.
    assert problem.violations(np.array([2.0100005, 9.0]), np.array([0.95, 0.05])) == []
    assert len(problem.violations(np.array([2.010002, 9.0]), np.array([0.95, 0.05]))) == 1


def test_paper_expansion_by_hand():
    old = np.array([0.5, 0.3, 0.2])
    composition = Components.for_rebalance(["a", "b", "c"], old).matrix
    np.testing.assert_array_equal(paper_composition(composition), np.vstack([old, np.eye(3)]))
    problem = Problem(composition, old, kl=1.0, expansion="paper")
    # Only the probe of b, which is pure b on paper and 93% b in truth.
    assert problem.divergence(np.eye(4)[2]) == pytest.approx(-np.log(0.3))
    effective = Problem(composition, old, kl=1.0).divergence(np.eye(4)[2])
    by_hand = 0.05 * np.log(0.05 / 0.5) + 0.93 * np.log(0.93 / 0.3) + 0.02 * np.log(0.02 / 0.2)
    assert effective == pytest.approx(by_hand)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_paper_expansion_finds_the_domain_for_any_share_and_a_pure_old_mixture(share):
    names = ["a", "b", "c"]
    for old in ([0.98, 0.01, 0.01], [1.0, 0.0, 0.0]):
        composition = Components.for_rebalance(names, np.array(old), domain_share=share).matrix
        np.testing.assert_allclose(paper_composition(composition)[1:], np.eye(3), atol=1e-12)


def test_paper_expansion_of_two_probes_is_the_effective_one():
    composition = Components.for_one_new_domain(["a", "b"], np.array([0.4, 0.6]), "n").matrix
    np.testing.assert_array_equal(paper_composition(composition), composition)


def test_paper_expansion_refuses_other_components():
    composition = np.array([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0], [0.1, 0.1, 0.8]])
    with pytest.raises(ValueError, match="component 1 does not"):
        Problem(composition, np.ones(3) / 3, expansion="paper")


def test_a_prior_of_zero_rules_components_out():
    composition = np.array([[0.5, 0.5], [1.0, 0.0]])
    prior = np.array([1.0, 0.0])
    names = {"domains": ("web", "code")}
    np.testing.assert_array_equal(Problem(composition, prior, **names).usable, [False, True])
    np.testing.assert_array_equal(Problem(composition, prior, kl=0.0, **names).usable, [True, True])
    with pytest.raises(ValueError, match="prior is 0 for code, and every component contains"):
        Problem(composition[:1], prior, **names)
    with pytest.raises(ValueError, match=r"code has a floor of 0\.1 and a prior of 0"):
        Problem(composition, prior, floors=np.array([0.0, 0.1]), **names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"composition": np.ones(2)}, r"composition must be \[K, X\]"),
        ({"composition": np.array([[0.5, 0.6]])}, "each row of the composition must sum to 1"),
        ({"prior": np.ones(3) / 3}, "prior must have 2"),
        ({"prior": np.array([0.5, 0.6])}, "prior must sum to 1"),
        ({"kl": -0.1}, "kl must be finite"),
        ({"objective": "best"}, "objective must be one of mean, relative, worst, worst_change, got best"),
        ({"expansion": "full"}, "expansion must be one of effective, paper, got full"),
        ({"domains": ("web",)}, "has 2 domains, but 1 are named"),
        ({"caps": np.ones(3)}, "caps must have 2"),
        ({"caps": np.array([1.0, np.nan])}, "caps must not be negative, got nan for code"),
        ({"floors": np.array([-0.1, 0.0])}, "floors must not be negative, got -0.1 for web"),
        ({"floors": np.array([np.inf, 0.0])}, "floors must be finite"),
        ({"omega": np.array([1.0, -1.0])}, "omega must not be negative, got -1.0 for loss 1"),
        ({"omega": np.zeros(2)}, "one of it above 0"),
        ({"omega": np.ones(3), "losses": ("a", "b")}, "omega must have 2"),
        ({"reference": np.array([1.0, 0.0]), "losses": ("a", "b")}, "reference of b is 0.0"),
        ({"objective": "relative"}, "the objective relative needs the current model's losses"),
        ({"objective": "worst_change"}, "the objective worst_change needs"),
        ({"max_increase": np.array([0.1, 0.1])}, "max_increase needs the current model's losses"),
        (
            {"max_increase": np.array([0.1, -0.1]), "reference": np.ones(2)},
            "not be negative, got -0.1 for loss 1",
        ),
    ],
)
def test_wrong_input_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        two_domains(**changes)


def test_one_number_holds_for_every_loss():
    problem = two_domains(reference=np.array([2.0, 3.0]), max_increase=0.1)
    np.testing.assert_allclose(problem.ceiling(2), [2.1, 3.1])
    np.testing.assert_array_equal(two_domains().ceiling(2), [np.inf, np.inf])
