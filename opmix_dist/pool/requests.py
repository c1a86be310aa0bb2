"""What a search is asked: components, prior and bounds, from the configuration and where the model stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from opmix_dist.config import SharedConfig
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.mixtures import NO_HISTORY, named_mixture, new_domains, old_mixture
from opmix_dist.errors import UserError
from opmix_dist.exchange.schemas import SearchRequest
from opmix_dist.search.proposal import repetition_caps
from opmix_dist.search.simplex import OLD, Components, nearest_coefficients
from opmix_dist.seeds import derive_seed


def check_components(domains: Sequence[str]) -> None:
    """UserError where a domain bears the name of a component that is none."""
    if OLD in domains:
        raise UserError(
            f"a domain cannot be named `{OLD}`: it is the component of what was trained on so far"
        )


def search_request(
    config: SharedConfig,
    catalogue: Catalogue,
    search: str,
    *,
    step: int,
    snapshot: str,
    current: Mapping[str, float],
    tokens_read: Mapping[str, int],
    tokens_to_train: int | None,
    is_checkpoint: bool = False,
    history: Mapping[str, int] = NO_HISTORY,
) -> SearchRequest:
    """The request of the search named ``search``.

    Args:
        snapshot, is_checkpoint: as in :class:`~opmix_dist.exchange.schemas.SearchRequest`.
        current: the mixture that the model was trained on, by domain.
        tokens_read: of each domain so far, in this run.
        tokens_to_train: on the mixture that is sought; None: not known, and nothing is capped for it.
        history: tokens of each domain before this run, where it goes on from another: what was read then and
            now is the old mixture, in place of ``current``.

    Raises:
        UserError: there is nothing but new domains; one has a share already, of which no history tells; or
            the prior keeps one out.
    """
    settings = config.search
    new = settings.new_domains or new_domains(catalogue.names, history)
    tokens = {name: history.get(name, 0) + tokens_read[name] for name in catalogue.names} if history else {}
    components = _components(config, catalogue, current, new, tokens)
    return SearchRequest(
        search=search,
        step=step,
        snapshot=snapshot,
        is_checkpoint=is_checkpoint,
        new_domains=new,
        components=list(components.names),
        domains=list(catalogue.names),
        composition=components.matrix.tolist(),
        current=dict(current),
        prior=_prior(config, catalogue, current, new, components),
        floors=_by_domain(settings.proposal.floors, catalogue, 0.0),
        caps=share_caps(config, catalogue, tokens_read, tokens_to_train),
        base_lr=config.optimizer.lr,
        seed=derive_seed(config.seed, "search", search),
    )


def _components(
    config: SharedConfig,
    catalogue: Catalogue,
    current: Mapping[str, float],
    new: Sequence[str],
    tokens: Mapping[str, int],
) -> Components:
    """Args:
    tokens: read of each domain, now and before this run; empty: ``current`` tells what was read.
    """
    names, share = catalogue.names, config.search.probes.domain_share
    old = [name for name in names if name not in new]
    if not old:
        raise UserError(
            f"data.domains has new domains only ({', '.join(new)}): name old ones too, or leave "
            "search.new_domains out"
        )
    for name in new:
        if current[name] > 0 and not tokens:
            raise UserError(
                f"search.new_domains: {name} has a share of {current[name]:g} in the current mixture "
                "already: leave it out to rebalance"
            )
    mixture = old_mixture(tokens, old) if tokens else np.array([current[name] for name in old])
    if not new:
        return Components.for_rebalance(names, mixture, share)
    found = Components.for_new_domains(old, mixture, new, share)
    order = [found.domains.index(name) for name in names]
    return Components(found.names, tuple(names), found.matrix[:, order])


def _prior(
    config: SharedConfig,
    catalogue: Catalogue,
    current: Mapping[str, float],
    new: Sequence[str],
    components: Components,
) -> dict[str, float]:
    """What the KL term pulls towards. A current mixture without the one domain that joins would keep it out
    for good: the component nearest to it pulls then."""
    chosen = config.search.proposal.prior
    prior = named_mixture(chosen, catalogue, current)
    if chosen == "current" and len(new) == 1 and not current[new[0]]:
        return dict(zip(catalogue.names, components.matrix[0].tolist(), strict=True))
    if new and config.search.proposal.kl > 0:
        for name, shares in zip(catalogue.names, components.matrix.T, strict=True):
            if shares.any() and not prior[name]:
                raise UserError(
                    f"search.proposal.prior {chosen} has no share of {name}, and its KL would keep it out: "
                    "give it one in mixture.initial, or set search.proposal.prior to uniform"
                )
    return prior


def _by_domain(given: Mapping[str, float], catalogue: Catalogue, default: float) -> list[float] | None:
    return [given.get(name, default) for name in catalogue.names] if given else None


def share_caps(
    config: SharedConfig, catalogue: Catalogue, tokens_read: Mapping[str, int], tokens_to_train: int | None
) -> list[float] | None:
    """Largest share of each domain [D], at most 1, in what is left to train; None where nothing bounds one.

    A domain has at most its share in ``search.proposal.caps``, is read ``search.proposal.max_repetitions``
    times at most over the whole run, and where it would stop the run (``data.on_exhausted``), no more than
    its ``data.max_epochs`` either.
    """
    caps = _by_domain(config.search.proposal.caps, catalogue, 1.0)
    repetitions = config.search.proposal.max_repetitions
    stops = config.data.on_exhausted == "stop"
    epochs = config.data.epochs_by_domain(catalogue.names) if stops else {}
    if tokens_to_train is None or (repetitions is None and not epochs):
        return caps
    samples, length = catalogue.samples("train").astype(np.float64), catalogue.sequence_length
    allowed = samples * (np.inf if repetitions is None else repetitions)
    # the sampler may be one sample behind the mixture now, and one ahead of it at the end
    before_stop = np.floor(samples * [epochs.get(name, np.inf) for name in catalogue.names]) - 2
    read = np.array([tokens_read[name] for name in catalogue.names], dtype=np.float64)
    available = np.maximum(np.minimum(allowed, before_stop) * length - read, 0.0)
    return np.minimum(
        repetition_caps(available, 1.0, tokens_to_train), 1.0 if caps is None else caps
    ).tolist()


def keeps_old(request: SearchRequest) -> bool:
    """Whether the component ``old`` is the current mixture: not so where a domain has a tenth of it, or where
    the model comes from other runs that had other mixtures."""
    old = np.array(request.composition[request.components.index(OLD)])
    return bool(np.allclose(old, [request.current[name] for name in request.domains], rtol=0, atol=1e-9))


def newcomers(request: SearchRequest) -> list[str]:
    """New domains that have no share in the current mixture."""
    return [name for name in request.new_domains if not request.current[name]]


def staying(request: SearchRequest, like: np.ndarray | None = None) -> np.ndarray:
    """Coefficients u [K] of going on as before: the component ``old`` alone.

    Models that mix several probes gain from averaging, whatever the probes were trained on. To compare with
    the coefficients ``like`` [K], the same mixture p is therefore reached as a old + (1 - a) (each domain's
    probe by its share in p): these probes are on share s of their domains and 1 - s of p. Of all a, that is
    taken whose sum u^2, the inverse of the effective number of probes, is nearest to that of ``like``; of
    two, the one with the nearer weight of ``old``.

    Where ``old`` is not the current mixture, the u whose C^T u is nearest to it. Of one domain that joins and
    has no share yet, that is ``old``, which has a tenth of it.
    """
    alone = np.eye(len(request.components))[request.components.index(OLD)]
    if not keeps_old(request):
        if len(request.new_domains) == 1 and newcomers(request):
            return alone
        current = np.array([request.current[name] for name in request.domains])
        return nearest_coefficients(current, np.array(request.composition), like)
    if like is None or request.new_domains:
        return alone
    spread = np.array([0.0 if name == OLD else request.current[name] for name in request.components])
    s, target = spread @ spread, like @ like  # sum u^2 is a^2 + (1 - a)^2 s, least at a = s / (1 + s)
    root = np.sqrt(max(target * (1 + s) - s, 0.0))
    found = [float(np.clip((s + sign * root) / (1 + s), 0, 1)) for sign in (-1, 1)]
    misses = [abs(a**2 + (1 - a) ** 2 * s - target) for a in found]
    nearest = [a for a, miss in zip(found, misses, strict=True) if miss <= min(misses) + 1e-12]
    a = min(nearest, key=lambda a: abs(a - like @ alone))
    return a * alone + (1 - a) * spread
