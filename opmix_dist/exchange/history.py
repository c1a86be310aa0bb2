"""What an ended run hands on to the one that goes on from it: weights, and what the model has read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from opmix_dist.config import ModelConfig, RunConfig, SharedConfig
from opmix_dist.data.build import open_data
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.mixtures import new_domains
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.seeds import derive_seed


def start_run(config: SharedConfig) -> RunDir | None:
    """The run that this one goes on from; None: there is none."""
    if not isinstance(config, RunConfig) or config.start.run is None:
        return None
    return RunDir(config.start.run)


def history_of(config: SharedConfig) -> dict[str, int]:
    """Tokens that the model had read of each domain before this run, in ``start.run`` and all runs that it
    came from; empty without ``start.run``.

    Raises:
        UserError: that run has not ended, or its summary is damaged.
    """
    run = start_run(config)
    if run is None:
        return {}
    if not run.summary_file.exists():
        raise UserError(f"start.run {run.path} has not ended: {run.summary_file} is missing")
    return tokens_read(run)


def tokens_read(run: RunDir) -> dict[str, int]:
    """What an ended run's model has read of each domain, in that run and before it."""
    summary = run.summary()
    return dict(Counter(summary.history) + Counter(summary.domain_tokens))


def starting_model(config: RunConfig) -> ModelConfig:
    """``model``, with the export of ``start.run`` as its checkpoint where there is one."""
    run = start_run(config)
    return config.model if run is None else config.model.model_copy(update={"checkpoint": str(run.export)})


def open_domains(config: SharedConfig, domains: Sequence[str] | None = None) -> Catalogue:
    """The domains to train on, of which ``data.replay_samples`` may leave a part only.

    Args:
        domains: names in the order wanted; None takes those of the configuration.

    Raises:
        UserError: as :func:`~opmix_dist.data.build.open_data` and :func:`history_of`, or a replay of a domain
            that is not there.
    """
    catalogue = open_data(config.data, domains)
    given = config.data.replay_samples
    if given is None:
        return catalogue
    if isinstance(given, int):
        history = history_of(config)
        new = new_domains(catalogue.names, history)
        given = {name: given for name in catalogue.names if name not in new}
    return catalogue.keeping(given, seed=derive_seed(config.seed, "replay"))


def stage_seed(config: SharedConfig, history: Mapping[str, int], what: str) -> int:
    """A run that goes on from another reads the domains that both have in another order, and starts from
    other adapters."""
    read = sum(history.values())
    return derive_seed(config.seed, what, *([read] if read else []))
