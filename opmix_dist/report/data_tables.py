"""Drawings of prepared data in a terminal, and the same as plain values for scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.excerpt import Excerpt, Passage
from opmix_dist.data.overview import DomainOverview, total
from opmix_dist.data.verify import DomainReport, Duplicate, VerifyReport
from opmix_dist.report.run_data import RunData

SHORT_FINGERPRINT = 12
LISTED_DUPLICATES = 20
"""Of a domain and kind, that get a line of their own."""
LEARNT, UNLEARNT, PLAIN = "+ ", "  ", "| "
"""Gutters: every line of a text has one, so that no text can pass for another's."""


def overview_table(domains: Sequence[DomainOverview], run: RunData | None) -> Table:
    """A row for each domain, then their sum. Of a run, what it draws: both together fit no terminal."""
    return _folder_table(domains) if run is None else _run_table(domains, run)


def _run_table(domains: Sequence[DomainOverview], run: RunData) -> Table:
    table = Table()
    for name in ("domain", "train\nsamples", "weight", "samples\ndrawn", "epochs", "share\ndrawn"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    if run.allowed:
        table.add_column("may be\ndrawn", justify="right")
    for domain in domains:
        allowed = f"{run.allowed[domain.name]:,}" if domain.name in run.allowed else ""
        table.add_row(domain.name, f"{domain.train.samples:,}", *_run_cells(run, domain.name), allowed)
    table.add_section()
    table.add_row(f"{len(domains)} in all", f"{_sum(domains, 'train')['samples']:,}", *_run_total(run))
    return table


def _folder_table(domains: Sequence[DomainOverview]) -> Table:
    table = Table()
    table.add_column("domain")
    table.add_column("packing")
    for split in ("train", "eval"):
        for what in ("samples", "tokens", "documents"):
            table.add_column(f"{split}\n{what}", justify="right")
    table.add_column("bytes\nstored", justify="right")
    somewhere_else = any(domain.here_bytes != domain.stored_bytes for domain in domains)
    if somewhere_else:
        table.add_column("bytes\nhere", justify="right")
    table.add_column("stored as")
    for domain in domains:
        table.add_row(
            domain.name,
            domain.packing,
            *_counts(domain),
            decimal(domain.stored_bytes),
            *([decimal(domain.here_bytes)] if somewhere_else else []),
            f"{domain.dtype}, {domain.compression}",
        )
    table.add_section()
    table.add_row(
        f"{len(domains)} in all",
        "",
        *(f"{count:,}" for split in ("train", "eval") for count in _sum(domains, split).values()),
        decimal(sum(domain.stored_bytes for domain in domains)),
        *([decimal(sum(domain.here_bytes for domain in domains))] if somewhere_else else []),
        "",
    )
    return table


def overview_lines(catalogue: Catalogue, run: RunData | None) -> Iterator[str]:
    """What all domains have in common, below their table."""
    yield (
        f"tokenizer {catalogue.tokenizer_fingerprint[:SHORT_FINGERPRINT]}, vocabulary "
        f"{catalogue.vocab_size:,}, samples of at most {catalogue.sequence_length:,} tokens"
    )
    if run is not None:
        yield (
            f"drawn as of the checkpoint of step {run.step}" if run.step is not None else "no checkpoint yet"
        )


def overview_rows(
    catalogue: Catalogue, domains: Sequence[DomainOverview], run: RunData | None
) -> Iterator[dict[str, Any]]:
    """A plain row for each domain, then one for the folder."""
    for domain in domains:
        row = {
            **asdict(domain),
            "train": domain.train.model_dump(),
            "eval": domain.eval.model_dump(),
        }
        row = {"domain": row.pop("name"), **row}
        if run is not None:
            drawn = run.drawn.get(domain.name)
            row |= {
                "weight": run.weights.get(domain.name, 0.0),
                "drawn_samples": drawn.samples if drawn else None,
                "drawn_epochs": drawn.epochs if drawn else None,
                "drawn_share": drawn.share if drawn else None,
                "allowed_samples": run.allowed.get(domain.name),
            }
        yield row
    yield {
        "domains": len(domains),
        "train": _sum(domains, "train"),
        "eval": _sum(domains, "eval"),
        "shards": sum(domain.shards for domain in domains),
        "stored_bytes": sum(domain.stored_bytes for domain in domains),
        "here_bytes": sum(domain.here_bytes for domain in domains),
        "tokenizer_fingerprint": catalogue.tokenizer_fingerprint,
        "vocab_size": catalogue.vocab_size,
        "sequence_length": catalogue.sequence_length,
        **({"checkpoint_step": run.step} if run is not None else {}),
    }


def _counts(domain: DomainOverview) -> list[str]:
    return [
        f"{count:,}"
        for split in (domain.train, domain.eval)
        for count in (split.samples, split.tokens, split.documents)
    ]


def _sum(domains: Sequence[DomainOverview], split: str) -> dict[str, int]:
    return total([getattr(domain, split) for domain in domains]).model_dump()


def _run_cells(run: RunData, name: str) -> list[str]:
    weight = f"{run.weights.get(name, 0.0):.4f}"
    drawn = run.drawn.get(name)
    if drawn is None:
        return [weight, "", "", ""]
    return [weight, f"{drawn.samples:,}", f"{drawn.epochs:.2f}", f"{drawn.share:.4f}"]


def _run_total(run: RunData) -> list[str]:
    if run.step is None:
        return [f"{sum(run.weights.values()):.4f}", "", "", ""]
    samples = sum(drawn.samples for drawn in run.drawn.values())
    share = sum(drawn.share for drawn in run.drawn.values())
    return [f"{sum(run.weights.values()):.4f}", f"{samples:,}", "", f"{share:.4f}"]


def excerpt_text(excerpt: Excerpt, sequence_length: int) -> Text:
    """One sample: a line of numbers, its passages line by line, rules between documents."""
    masked = f" ({excerpt.targets_masked} with data.mask_documents)"
    text = Text()
    text.append(f"{excerpt.domain} {excerpt.split} sample {excerpt.sample}", style="bold")
    text.append(f": {excerpt.file} row {excerpt.row}\n")
    text.append(
        f"{excerpt.tokens} of {sequence_length} tokens, documents {excerpt.documents}, targets "
        f"{excerpt.targets}{masked if excerpt.targets_masked != excerpt.targets else ''}\n"
    )
    if excerpt.fault:
        text.append(f"training refuses it: it {excerpt.fault}\n", style="bold red")
    for passage in excerpt.passages:
        _append(text, passage, excerpt.chat)
    if not excerpt.passages[-1].ends_document:
        text.append("--- goes on in the next sample\n", style="cyan")
    return text


def excerpt_legend(chat: bool) -> Text:
    """What the marks mean."""
    text = Text("--- is where a document ends", style="dim")
    if chat:
        text.append("; lines that begin with + are learnt, the others are context")
    return text


def _append(text: Text, passage: Passage, chat: bool) -> None:
    gutter, style = PLAIN, ""
    if chat:
        gutter, style = (LEARNT, "green") if passage.learnt else (UNLEARNT, "dim")
    for line in passage.text.removesuffix("\n").split("\n"):
        text.append(f"{gutter}{line}\n", style=style)
    if passage.ends_document:
        text.append("---\n", style="cyan")


def verify_table(report: VerifyReport) -> Table:
    """A row for each domain."""
    table = Table()
    table.add_column("domain")
    for name in ("shards", "samples", "documents", "tokens", "faults"):
        table.add_column(name, justify="right")
    for name in ("eval in\ntrain", "twice\nin eval", "repeated\ndocuments"):
        table.add_column(name, justify="right")
    for domain in report.domains:
        repeated = "" if domain.repeated is None else f"{domain.repeated:,}"
        counts = (len(domain.faults), len(domain.in_train), len(domain.within_eval))
        sizes = (domain.shards, domain.samples, domain.documents, domain.tokens)
        table.add_row(domain.name, *(f"{count:,}" for count in (*sizes, *counts)), repeated)
    return table


def verify_lines(report: VerifyReport) -> Iterator[str]:
    """Each finding, then the verdict."""
    yield from (f"fault: {what}" for what in report.shared_faults)
    for fault in report.faults:
        yield f"fault: {fault.domain}{f' {fault.split}' if fault.split else ''}: {fault.what}"
    for domain in report.domains:
        yield from _duplicate_lines(domain, domain.in_train, "is also in")
        yield from _duplicate_lines(domain, domain.within_eval, "is there already, in")
        if domain.repeated:
            there_before = "documents are there before, in this domain or one above"
            yield f"duplicate: {domain.name}: {domain.repeated} {there_before}"
    if report.left_out:
        yield f"{report.left_out} more domains were neither checked nor searched for duplicates"
    faults = len(report.faults) + len(report.shared_faults)
    verdict = "sound" if not faults else _count(faults, "fault")
    yield f"{verdict}; {_count(report.repetitions, 'duplicate')}"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _duplicate_lines(domain: DomainReport, found: Sequence[Duplicate], how: str) -> Iterator[str]:
    for one in found[:LISTED_DUPLICATES]:
        yield (
            f"duplicate: {one.domain} eval sample {one.sample} {how} {one.other_domain} {one.other_split} "
            f"sample {one.other_sample}: {one.opening}"
        )
    if len(found) > LISTED_DUPLICATES:
        yield f"duplicate: {domain.name} eval: {len(found) - LISTED_DUPLICATES} more like this"
