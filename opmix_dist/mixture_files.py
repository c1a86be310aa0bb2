"""A mixture in the forms that other trainers read, one file for each.

Shares are written as Python's ``repr`` has them and sum to 1 within 1e-12. Trainers get no source whose
share is 0: Megatron and OLMo-core refuse it, and ``interleave_datasets`` with ``all_exhausted`` would wait
for it without end.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opmix_dist.atomic import write_bytes
from opmix_dist.data.remote import is_url
from opmix_dist.errors import UserError

SUM_TOLERANCE = 1e-6
"""Weights that sum to 1 within this are divided by their sum; what is further off is no mixture."""


@dataclass(frozen=True)
class MixtureSource:
    """Where a domain's data lies, in a trainer's own words.

    paths: Megatron prefixes, files or globs for OLMo-core, folders of MDS shards, or files for Hugging Face.
        Where a format gives each path its own share, those of one domain get equal parts of the domain's.
    remote, local: of a MosaicML stream, in place of the paths.
    """

    paths: tuple[str, ...] = ()
    remote: str | None = None
    local: str | None = None

    def places(self) -> tuple[str, ...]:
        """The paths, else the stream's one place; empty where the user named none."""
        place = self.remote or self.local
        return self.paths or ((place,) if place else ())


Sources = Mapping[str, MixtureSource]


def write_mixture_files(folder: Path, weights: Mapping[str, float], sources: Sources) -> list[Path]:
    """Write the mixture in every format of ``FORMATS`` below ``folder``; returns the files.

    Args:
        weights: share of each domain, summing to 1.
        sources: of the domains that have one. The others' names stand in for their paths, and the file says
            so where its format has comments.

    Raises:
        UserError: as :func:`mixture_text`.
    """
    texts = {name: mixture_text(format, weights, sources) for format, (name, _) in FORMATS.items()}
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())
    return [folder / name for name in texts]


def mixture_text(format: str, weights: Mapping[str, float], sources: Sources) -> str:
    """The mixture in one format, a key of ``FORMATS``.

    Raises:
        UserError: weights that are no mixture, or a source of a domain that is not in it.
    """
    foreign = sorted(set(sources) - set(weights))
    if foreign:
        raise UserError(
            f"source {foreign[0]}: the mixture has no such domain; it has {', '.join(sorted(weights))}"
        )
    return FORMATS[format][1](_normalised(weights), sources)


def parse_sources(texts: list[str]) -> dict[str, MixtureSource]:
    """``["web=a", "web=b", "code=s3://c"]`` to a source for each name; UserError for other forms."""
    paths: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UserError(f"--source {text}: write NAME=PATH")
        paths[name] = (*paths.get(name, ()), path)
    return {name: MixtureSource(found) for name, found in paths.items()}


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"the weight of {name} is {weight}: it must be finite and not negative")
    total = math.fsum(weights.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise UserError(f"the weights of a mixture must sum to 1, these sum to {total:.8g}")
    return {name: float(weight) / total for name, weight in weights.items()}


def _drawn(weights: Mapping[str, float], sources: Sources) -> Iterator[tuple[str, float, MixtureSource]]:
    """Domains that are read at all, with a source that has at least one place."""
    for name, weight in weights.items():
        if weight > 0:
            source = sources.get(name, MixtureSource())
            yield name, weight, source if source.places() else MixtureSource((name,))


def _placeholder_note(weights: Mapping[str, float], sources: Sources) -> str:
    """A YAML comment that names the domains without a source; empty where there are none."""
    names = [name for name in weights if name not in sources or not sources[name].places()]
    return f"# The names of these domains stand in for their paths: {json.dumps(names)}\n" if names else ""


def _megatron(weights: Mapping[str, float], sources: Sources) -> str:
    """Arguments of ``--data-path``, as a shell takes them: WEIGHT PREFIX WEIGHT PREFIX ..."""
    words: list[str] = []
    for _, weight, source in _drawn(weights, sources):
        places = source.places()
        for place in places:
            words += [repr(weight / len(places)), shlex.quote(place)]
    return " ".join(words) + "\n"


def _olmo_core(weights: Mapping[str, float], sources: Sources) -> str:
    """What ``SourceMixtureList.from_yaml`` reads."""
    rows = [
        {"source_name": name, "target_ratio": weight, "paths": list(source.places())}
        for name, weight, source in _drawn(weights, sources)
    ]
    return _placeholder_note(weights, sources) + _yaml({"sources": rows})


def _streams(weights: Mapping[str, float], sources: Sources) -> str:
    """Arguments of a ``streaming.Stream`` each, as LLM Foundry's ``dataset.streams`` has them."""
    streams: dict[str, dict[str, Any]] = {}
    for name, weight, source in _drawn(weights, sources):
        given = {"remote": source.remote, "local": source.local}
        places = [{key: value for key, value in given.items() if value is not None}]
        if not places[0]:
            places = [{"remote" if is_url(path) else "local": path} for path in source.paths]
        for i, place in enumerate(places):
            label = name if len(places) == 1 else f"{name}-{i}"
            streams[label] = {**place, "proportion": weight / len(places)}
    return _placeholder_note(weights, sources) + _yaml({"streams": streams})


def _interleave(weights: Mapping[str, float], sources: Sources) -> str:
    """Lists of equal length: ``interleave_datasets([...], probabilities=...)``; files by domain."""
    drawn = list(_drawn(weights, sources))
    datasets = [source.places() if len(source.places()) > 1 else source.places()[0] for _, _, source in drawn]
    return _json(
        {
            "domains": [name for name, _, _ in drawn],
            "datasets": datasets,
            "probabilities": [weight for _, weight, _ in drawn],
        }
    )


def _plain_json(weights: Mapping[str, float], sources: Sources) -> str:
    return _json(dict(weights))


def _plain_yaml(weights: Mapping[str, float], sources: Sources) -> str:
    return _yaml(dict(weights))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


FORMATS: Mapping[str, tuple[str, Callable[[Mapping[str, float], Sources], str]]] = {
    "megatron": ("megatron.txt", _megatron),
    "olmo-core": ("olmo_core.yaml", _olmo_core),
    "streams": ("streams.yaml", _streams),
    "interleave": ("interleave.json", _interleave),
    "json": ("mixture.json", _plain_json),
    "yaml": ("mixture.yaml", _plain_yaml),
}
"""Name of each format, its file, and how it is written."""
