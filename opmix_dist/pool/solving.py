"""From measured losses to a mixture: the method of search, error bars and the decision, as configured.

Everything here runs on one rank and is mathematics; ``opmix_dist.search`` does it.
"""

from __future__ import annotations

import numpy as np

from opmix_dist.exchange.schemas import SearchRequest
from opmix_dist.pool.evaluations import Evaluations
from opmix_dist.pool.requests import staying
from opmix_dist.search.ask_tell import MixtureSearch, SearchResult
from opmix_dist.search.bootstrap import Bootstrap, bootstrap, optimism_on_samples
from opmix_dist.search.gradient_search import GradientSearch
from opmix_dist.search.law_search import LawSearch
from opmix_dist.search.problem import Problem
from opmix_dist.search.simplex import sample_candidates, sobol_candidates, two_probe_candidates
from opmix_dist.search_config import CandidateConfig, ProposalConfig, SearchConfig
from opmix_dist.seeds import derive_seed


def search_problem(request: SearchRequest, settings: ProposalConfig, reference: np.ndarray) -> Problem:
    """What the proposal minimises, and its bounds.

    Args:
        reference: the snapshot's losses [D], in the order of the request's domains.
    """
    names = request.domains
    increase = settings.max_increase
    if isinstance(increase, float):
        increase = dict.fromkeys(names, increase)
    rise = None if increase is None else np.array([increase.get(name, np.inf) for name in names])
    return Problem(
        composition=np.array(request.composition),
        prior=np.array([request.prior[name] for name in names]),
        kl=settings.kl,
        objective=settings.objective,
        omega=None if settings.omega is None else np.array([settings.omega[name] for name in names]),
        reference=reference,
        max_increase=rise,
        floors=None if request.floors is None else np.array(request.floors),
        caps=None if request.caps is None else np.array(request.caps),
        expansion=settings.expansion,
        domains=names,
        losses=names,
    )


def search_method(problem: Problem, request: SearchRequest, settings: SearchConfig) -> MixtureSearch:
    """The method that asks for candidates and ends with a proposal."""
    if settings.method == "gradient":
        return GradientSearch(
            problem,
            start=staying(request),
            max_evaluations=settings.gradient.max_evaluations,
            tolerance=settings.gradient.tolerance,
            components=request.components,
        )
    return LawSearch(
        problem,
        first_candidates(request, settings.candidates),
        seed=derive_seed(request.seed, "law"),
        family=settings.law.family,
        gradients=settings.gradients,
        refine_rounds=settings.refinement.rounds,
        refine_count=settings.refinement.count,
        tolerance=settings.refinement.tolerance,
        huber_delta=settings.law.huber_delta,
        num_starts=settings.law.num_starts,
        averaging=settings.law.averaging,
        components=request.components,
    )


def first_candidates(request: SearchRequest, settings: CandidateConfig) -> np.ndarray:
    """What laws begin with, U [M, K]. The current mixture is one of them by default: Dirichlet draws over
    many components lie far from it, and a law that has to extrapolate to it misjudges what moving gains."""
    if len(request.new_domains) == 1:
        return two_probe_candidates(np.array(request.composition))
    components = len(request.components)
    fixed = staying(request)[None] if settings.include_current else np.zeros((0, components))
    count, seed = settings.count - len(fixed), derive_seed(request.seed, "candidates")
    if settings.design == "sobol":
        drawn = sobol_candidates(components, count, seed=seed)
    else:
        drawn = sample_candidates(components, count, seed=seed, alpha=settings.dirichlet_alpha)
    return np.vstack([fixed, drawn])


def sampled_losses(
    result: SearchResult, request: SearchRequest, settings: ProposalConfig, measured: Evaluations
) -> np.ndarray | None:
    """Losses at the candidates on other held-out samples [B, M, D]; None where there are no laws, laws were
    fitted to gradients, which would have to be drawn too, or nothing is to be resampled.

    Args:
        measured: of the candidates of ``result.fit``.
    """
    if result.fit is None or result.fit.observations.gradients is not None or settings.bootstrap < 2:
        return None
    rng = np.random.default_rng([derive_seed(request.seed, "held-out samples")])
    return measured.resampled(settings.bootstrap, rng)


def error_bars(
    result: SearchResult,
    problem: Problem,
    request: SearchRequest,
    settings: ProposalConfig,
    sampled: np.ndarray | None,
) -> Bootstrap | None:
    """Resampled laws and their proposals; None where there are no laws, or none are asked for.

    Args:
        sampled: of ``sampled_losses``.
    """
    if result.fit is None or settings.bootstrap == 0:
        return None
    return bootstrap(
        result.fit,
        problem,
        count=settings.bootstrap,
        seed=derive_seed(request.seed, "bootstrap"),
        keep=staying(request, like=result.proposal.u),
        proposal=result.proposal,
        sampled=sampled,
    )


def overrated(
    result: SearchResult, problem: Problem, request: SearchRequest, sampled: np.ndarray | None
) -> float | None:
    """By how much the gain measured on the search's own samples is too high on average, nats; None where
    nothing tells.

    Args:
        sampled: of ``sampled_losses``.
    """
    if result.fit is None or sampled is None:
        return None
    return optimism_on_samples(
        result.fit,
        problem,
        sampled,
        keep=staying(request, like=result.proposal.u),
        proposal=result.proposal,
        seed=derive_seed(request.seed, "optimism"),
    )
