"""A search as a launch of its own: the request comes from the configuration, the answer goes to the user."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from opmix_dist.bounded import read_bounded
from opmix_dist.config import RESUME_MAY_CHANGE, SEARCH_MAY_CHANGE, SearchRunConfig
from opmix_dist.data.build import held_out_samples, open_data
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.mixtures import chosen_mixture
from opmix_dist.determinism import require_repeatable_search, use_deterministic_kernels
from opmix_dist.distributed import Placement, Role, World, has_launcher
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.opening import open_run
from opmix_dist.exchange.rundir import RunDir, SearchDir, write_record
from opmix_dist.exchange.schemas import Proposal, SearchRequest, SearchStage
from opmix_dist.exchange.units import Units
from opmix_dist.faults import points
from opmix_dist.logs import set_up_logging
from opmix_dist.mixture_files import MixtureSource, write_mixture_files
from opmix_dist.models.build import check_tokenizer
from opmix_dist.pool.plan import require_kernels
from opmix_dist.pool.requests import check_components, search_request
from opmix_dist.pool.run_search import Searcher
from opmix_dist.pool.team import require_whole_teams
from opmix_dist.process import die_with_parent
from opmix_dist.report.html import write_report
from opmix_dist.report.tables import law_table, proposal_tables
from opmix_dist.settings import changed_settings
from opmix_dist.terminal import open_console, say

log = logging.getLogger(__name__)
SEARCH = "0001"
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def run_search_alone(config: SearchRunConfig, sources: Mapping[str, MixtureSource]) -> None:
    """Every rank of the launch calls this; all of them search together.

    Args:
        sources: of domains, for the files of the mixture.

    Raises:
        UserError: anything in the configuration, the data or the run directory that the user can mend, before
            anything is written where that can be known before; or the search failed, and why.
    """
    if has_launcher():  # a shell may end before the job that it started
        die_with_parent()
    placement = dataclasses.replace(Placement.from_environment(0), role=Role.POOL)
    set_up_logging(f"search {placement.rank}")
    require_whole_teams(config.pool.ranks_per_model, placement.size)
    points.install(placement.role, placement.rank)
    catalogue = open_data(config.data)
    request = _request(config, catalogue)
    _check(config, catalogue, sources)
    if config.deterministic:
        use_deterministic_kernels()
    run = RunDir(config.run_dir)
    world = World.join(placement, device=config.engine.device, timeout_s=config.engine.collective_timeout_s)
    try:
        require_kernels(config.search.kernels, world.device)
        require_repeatable_search(config, world.device)
        with open_run(run, config, world, SEARCH_MAY_CHANGE):
            _answer(run, config, request, world, sources)
    except BaseException as error:
        world.explain(error)
        world.abandon()
        raise
    world.leave()


def _request(config: SearchRunConfig, catalogue: Catalogue) -> SearchRequest:
    check_components(catalogue.names)
    config.search.check_domains(catalogue.names, str(catalogue.root))
    return search_request(
        config,
        catalogue,
        SEARCH,
        step=0,
        snapshot=_checkpoint(str(config.model.checkpoint)),
        is_checkpoint=True,
        current=_trained_on(config, catalogue),
        tokens_read=dict.fromkeys(catalogue.names, 0),
        tokens_to_train=config.tokens_to_train,
    )


def _checkpoint(given: str) -> str:
    """The folder, wherever the next call is made from, or the hub id."""
    if Path(given).is_dir():
        return str(Path(given).resolve())
    if not _HUB_ID.match(given):
        raise UserError(f"model.checkpoint {given} is no folder, and no hub id such as org/name")
    return given


def _trained_on(config: SearchRunConfig, catalogue: Catalogue) -> dict[str, float]:
    """``mixture.initial`` by domain; a mixture by name is one of the domains that are not new."""
    weights, new = chosen_mixture(config.mixture.initial, catalogue), config.search.new_domains
    if not new or isinstance(config.mixture.initial, dict):
        return weights
    old = sum(weight for name, weight in weights.items() if name not in new)
    if not old:
        return weights  # which the request refuses
    return {name: 0.0 if name in new else weight / old for name, weight in weights.items()}


def _check(config: SearchRunConfig, catalogue: Catalogue, sources: Mapping[str, MixtureSource]) -> None:
    check_tokenizer(config.model, catalogue)
    unknown = sorted(set(sources) - set(catalogue.names))
    if unknown:
        raise UserError(f"--source {unknown[0]}: {catalogue.root} has no such domain")
    held_out_samples(
        config.data,
        catalogue,
        samples_per_domain=config.search.candidates.samples_per_domain,
        seed=config.seed,
    )


def _answer(
    run: RunDir,
    config: SearchRunConfig,
    request: SearchRequest,
    world: World,
    sources: Mapping[str, MixtureSource],
) -> None:
    """Collective. Search, unless that is done, and tell. A search that fails leaves what an earlier one had
    answered, under other settings."""
    search = run.search(request.search)
    earlier: dict[Path, bytes] = {}
    is_done = world.share([float(_is_answered(run, search, config, request))] if world.is_leader else None)
    if not is_done[0]:
        if world.is_leader:
            if search.proposal_file.exists():
                asked = (search.proposal_file, search.status_file, search.request_file, run.config_file)
                earlier = {path: read_bounded(path, files.MAX_JSON_BYTES) for path in asked}
                search.proposal_file.unlink()  # the answer to other settings
            run.write_config(config)
            write_record(search.request_file, request)
        world.barrier()
        Searcher(run, config, world).answer(search)
    try:
        _require_answer(search, world)
    except UserError:
        for path, content in earlier.items():
            files.write_bytes(path, content)
        raise
    if world.is_leader:
        _tell(run, search.proposal(), sources)
    world.barrier()


def _is_answered(run: RunDir, search: SearchDir, config: SearchRunConfig, request: SearchRequest) -> bool:
    """Whether an earlier call has answered this very request under these settings."""
    if not (run.config_file.exists() and search.request_file.exists() and search.proposal_file.exists()):
        return False
    status, earlier = search.status(), run.any_config()
    return (
        status is not None
        and status.stage is SearchStage.PROPOSED
        and isinstance(earlier, SearchRunConfig)
        and not changed_settings(earlier, config, RESUME_MAY_CHANGE)
        and search.request() == request
    )


def _require_answer(search: SearchDir, world: World) -> None:
    """Collective. UserError on every rank where the search failed."""
    reason = None
    if world.is_leader:
        status = search.status()
        proposed = status is not None and status.stage is SearchStage.PROPOSED
        reason = "" if proposed else f"the search failed: {status.reason if status else 'it left no status'}"
    text = world.share_text(reason)
    if text:
        raise UserError(text)


def _tell(run: RunDir, proposal: Proposal, sources: Mapping[str, MixtureSource]) -> None:
    """Tables and decision, the report, and the mixture for other trainers."""
    console = open_console()
    search = run.search(proposal.search)
    laws = [law_table(search.fit(), Units.of(proposal))] if search.fit_file.exists() else []
    for table in (*proposal_tables(proposal), *laws):
        console.print(table)
    for warning in proposal.warnings:
        say(console, f"warning: {warning}")
    if proposal.decision is not None:
        verdict = "move to the proposal" if proposal.decision.move else "keep the mixture"
        say(console, f"{verdict}: {proposal.decision.reason}", style="bold")
    paths = write_mixture_files(run.path / "mixture", proposal.chosen, sources)
    say(console, f"mixture: {paths[0].parent} ({', '.join(path.name for path in paths)})")
    say(console, f"report: {write_report(run)}")
