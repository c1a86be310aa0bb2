"""Candidates by the error rates of their replies, where a domain has tasks.

The tasks take the place of the domain's held-out samples: a row each, with one target, whose "loss" is the
error of the reply. So all that is made of losses (laws, paired differences, error bars) is made of error
rates, with the errors that come from the number of examples, those of one group taken together. Domains
without tasks keep their losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from opmix_dist.data.batch import TokenBatch, collate
from opmix_dist.data.catalogue import TASKS_FILE, Catalogue
from opmix_dist.data.loader import EvalSet
from opmix_dist.data.samples import Sample
from opmix_dist.errors import UserError
from opmix_dist.exchange.searched_tasks import SearchedTasks
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import sample_loss_sums
from opmix_dist.search_config import TaskMetricConfig
from opmix_dist.seeds import derive_seed
from opmix_dist.tasks.error_rates import clusters
from opmix_dist.tasks.generation import ATTENTION
from opmix_dist.tasks.prompts import prompt_ids
from opmix_dist.tasks.records import Task, read_tasks
from opmix_dist.tasks.scoring import ScoringOptions, score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def require_tasks(catalogue: Catalogue) -> list[str]:
    """The domains that have tasks; UserError when none has."""
    found = [name for name in catalogue.names if (catalogue.root / name / TASKS_FILE).is_file()]
    if not found:
        raise UserError(
            f"search.metric tasks: no domain of {catalogue.root} has a {TASKS_FILE}: put one beside its "
            "shards, or take search.metric loss"
        )
    return found


def search_tasks(catalogue: Catalogue, name: str, count: int, seed: int) -> list[Task]:
    """The first ``count`` of a seeded permutation of a domain's tasks, fewer if it has fewer."""
    tasks = read_tasks(catalogue.root / name)
    order = np.random.default_rng([derive_seed(seed, "tasks", name)]).permutation(len(tasks))
    return [tasks[i] for i in order[:count].tolist()]


def _require_groups(tasks: list[Task], file: Path) -> None:
    """UserError where all are of one group: nothing would tell how sure a difference is."""
    if int(clusters([task.group for task in tasks]).max()) == 0:
        raise UserError(
            f"search.metric tasks: {len(tasks)} task(s) of {file} that the search would choose by are of one "
            "group, so that no error could be told: add tasks of others, or raise search.tasks.per_domain"
        )


@dataclass
class TaskMetric:
    """What replies of simulated models are scored on, in the rows of a search's held-out samples.

    by_domain: the tasks of each domain that has some.
    rows: int64 [n], the row of each task.
    loss_rows: the other rows [N - n], which are samples.
    tokens: that this rank has computed for replies and likelihoods so far.
    """

    by_domain: dict[str, list[Task]]
    rows: np.ndarray
    loss_rows: np.ndarray
    tokenizer: PreTrainedTokenizerFast
    settings: TaskMetricConfig
    tokens: int = field(default=0)

    @classmethod
    def instead(
        cls, heldout: EvalSet, catalogue: Catalogue, settings: TaskMetricConfig, *, mask: bool, seed: int
    ) -> tuple[EvalSet, TaskMetric]:
        """Held-out samples with tasks in place of those of the domains that have some.

        Args:
            mask: whether the samples' documents are apart.

        Raises:
            UserError: no domain has tasks, or they cannot be written by the chat template.
        """
        with_tasks = require_tasks(catalogue)
        tokenizer = catalogue.load_tokenizer()
        ids = heldout.domain_ids.numpy()
        parts: list[TokenBatch] = []
        by_domain: dict[str, list[Task]] = {}
        domains: list[int] = []
        rows: list[int] = []
        loss_rows: list[int] = []
        start = 0
        for d, name in enumerate(catalogue.names):
            if name in with_tasks:
                chosen = search_tasks(catalogue, name, settings.per_domain, seed)
                _require_groups(chosen, catalogue.root / name / TASKS_FILE)
                where = f"{catalogue.root / name / TASKS_FILE}: a task"
                stand_ins = [_stand_in(prompt_ids(tokenizer, task, where)) for task in chosen]
                part = collate(
                    [_cut(one, catalogue.sequence_length) for one in stand_ins],
                    catalogue.sequence_length,
                    mask_documents=mask,
                )
                by_domain[name] = chosen
                rows += range(start, start + len(chosen))
            else:
                part = heldout.batch[torch.from_numpy(np.flatnonzero(ids == d))]
                loss_rows += range(start, start + len(part))
            parts.append(part)
            domains += [d] * len(part)
            start += len(part)
        metric = cls(by_domain, np.array(rows), np.array(loss_rows, dtype=np.int64), tokenizer, settings)
        return EvalSet(TokenBatch.cat(parts), torch.tensor(domains)), metric

    @property
    def tasks(self) -> list[Task]:
        """Domain by domain [n]."""
        return [task for tasks in self.by_domain.values() for task in tasks]

    @property
    def counts(self) -> np.ndarray:
        """Of each task, how many its domain has: int64 [n]."""
        sizes = [len(tasks) for tasks in self.by_domain.values()]
        return np.repeat(sizes, sizes)

    @property
    def clusters(self) -> np.ndarray:
        """Of each of the N rows the group that it belongs to, int64 [N] from 0: a domain's tasks about the
        same are no independent examples, samples are."""
        groups = [""] * (len(self.rows) + len(self.loss_rows))
        names = [f"{name}/{task.group}" if task.group else "" for name, tasks in self.by_domain.items()
                 for task in tasks]  # fmt: skip
        for row, name in zip(self.rows.tolist(), names, strict=True):
            groups[row] = name
        return clusters(groups)

    @property
    def record(self) -> SearchedTasks:
        digests = {name: [task.digest for task in tasks] for name, tasks in self.by_domain.items()}
        return SearchedTasks(digests=digests)

    @property
    def fingerprint(self) -> str:
        """Of all that decides an error besides the model."""
        state = hashlib.sha256(self.settings.model_dump_json().encode())
        for task in self.tasks:
            state.update(task.model_dump_json().encode())
        return state.hexdigest()

    def take_tokens(self) -> int:
        """Those since the last call."""
        taken, self.tokens = self.tokens, 0
        return taken

    @torch.no_grad()
    def sums(
        self,
        adapters: JointAdapters,
        U: np.ndarray,
        heldout: TokenBatch,
        *,
        batch_size: int,
        on_progress: Callable[[int], None],
    ) -> np.ndarray:
        """[M, N] float64 of the simulated models W(u_m), merged one after the other: errors of tasks, loss
        sums of samples.

        An error e of n tasks counts as (e + 1 / 2n) n / (n + 1), so that k errors are a rate of
        (k + 1/2) / (n + 1): laws of losses know no rate of 0.
        """
        found, counts = np.zeros((len(U), len(heldout))), self.counts
        samples = heldout[torch.from_numpy(self.loss_rows)]
        options = ScoringOptions(
            batch_size=self.settings.batch_size,
            max_new_tokens=self.settings.max_new_tokens,
            choices=self.settings.choices,
            allow_code=self.settings.allow_code,
        )
        for m, u in enumerate(torch.as_tensor(U, dtype=torch.float64)):
            with adapters.merged(u):
                if len(samples):
                    adapters.model.eval()
                    found[m, self.loss_rows] = sample_loss_sums(
                        cast(torch.nn.Module, adapters.model), samples, batch_size
                    ).numpy()
                with generating(adapters.model):
                    scored = score(adapters.model, self.tokenizer, self.tasks, options)
            found[m, self.rows] = (scored.errors + 0.5 / counts) * counts / (counts + 1)
            self.tokens += scored.generated_tokens + scored.scored_tokens
            on_progress(len(heldout))
        return found


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, attention is one that takes a cache and padding on the left."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _stand_in(prompt: list[int]) -> Sample:
    """A row for a task: its prompt, whose last token is the one target."""
    tokens = np.array(prompt, dtype=np.uint32)
    end = len(tokens)
    return Sample(tokens, np.array([end], np.uint32), np.array([[end - 1, end]], np.uint32))


def _cut(sample: Sample, length: int) -> Sample:
    """The end of a longer one."""
    return sample if len(sample.tokens) <= length else _stand_in(sample.tokens[-length:].tolist())
