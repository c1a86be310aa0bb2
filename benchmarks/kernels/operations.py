"""The operations one by one, each beside what else would do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kernels.baselines import PeftMix, Stacked, chunked_losses, torch_losses
from benchmarks.kernels.measure import Bench, graphed
from benchmarks.kernels.table import Case, Prepared
from opmix_kernels import cost

SCALE = 2.0  # alpha 32 over rank 16
EPS = 1e-5

NORMED = "layer behind a norm, candidates"
BARE = "layer without a norm, candidates"
PRODUCER = "norm_shrink_gate"
BACKWARD = "gated_lowrank_linear, forward and backward to x and coefficients"
JOINT = "joint_lora_linear, forward and backward"
LOSSES = "linear_cross_entropy, forward"
LOSSES_BACKWARD = "linear_cross_entropy, forward and backward"
MERGE = "merge_deltas"
SUMS = "segment_sums"

OURS_WIDE = "norm_shrink_gate + one GEMM (ours)"
OURS_LAYER = "gated_lowrank_linear (ours)"
OURS_LOSSES = "linear_cross_entropy (ours)"
DENSE = "dense GEMM alone, no adapters"
CHUNKED = "chunked library logits + one-pass cross-entropy"


@dataclass(frozen=True)
class Sizes:
    """What is measured; all of it tiny in a dry run."""

    layers: Sequence[tuple[int, int, int]]
    """Width, candidates, tokens of each."""
    adapters: int
    rank: int
    vocabularies: Sequence[tuple[int, int, int]]
    """Rows, width, vocabulary."""
    merges: Sequence[tuple[int, int]]
    """Width, candidates."""
    joint: tuple[int, int, int]
    """Width, adapters, rows of each."""
    sums: tuple[int, int, int]
    """Candidates, tokens, segments."""

    def layer(self, width: int, *, normed: bool = True, consumers: int = 1) -> cost.Layer:
        return cost.Layer(width, (width,) * consumers, normed, self.adapters, self.rank)


REAL = Sizes(
    layers=((2048, 64, 1024), (2048, 128, 512), (2048, 4, 16_384), (768, 64, 1024), (4096, 64, 1024)),
    adapters=7,
    rank=16,
    vocabularies=((16_384, 2048, 128_256), (65_536, 2048, 128_256), (16_384, 2048, 32_000),
                  (16_384, 4096, 256_000)),
    merges=((2048, 1), (2048, 64), (768, 64), (4096, 16)),
    joint=(2048, 8, 4096),
    sums=(64, 32_768, 16),
)  # fmt: skip
QUICK = Sizes(REAL.layers[:1], 7, 16, REAL.vocabularies[:1], REAL.merges[1:2], REAL.joint, REAL.sums)
DRY = Sizes(
    layers=((32, 3, 8),), adapters=2, rank=4, vocabularies=((12, 16, 50),), merges=((32, 2),),
    joint=(32, 2, 8), sums=(2, 16, 3),
)  # fmt: skip


def cases(sizes: Sizes) -> Iterator[Case]:
    """In the order in which they are measured."""
    for index, (width, candidates, tokens) in enumerate(sizes.layers):
        yield from _layer_cases(sizes, width, candidates, tokens, normed=True)
        if index == 0:
            yield from _layer_cases(sizes, width, candidates, tokens, normed=False)
            yield from _backward_cases(sizes, width, candidates, tokens)
            yield from _producer_cases(sizes, width, candidates, tokens)
    for rows, width, vocab in sizes.vocabularies:
        yield from _loss_cases(rows, width, vocab)
    for width, candidates in sizes.merges:
        yield from _merge_cases(sizes, width, candidates)
    yield from _joint_cases(sizes)
    yield from _sums_cases(sizes)


@dataclass(frozen=True)
class Inputs:
    """Of one layer: x [M T, d], W, A, B, coefficients [M, C], the norm's weight or None."""

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    coefficients: Tensor
    norm_weight: Tensor | None

    @classmethod
    def of(cls, bench: Bench, sizes: Sizes, width: int, candidates: int, tokens: int, normed: bool) -> Inputs:
        """Deltas are some per cent of the weights, as probes' are."""
        count, rank = sizes.adapters, sizes.rank
        return cls(
            bench.randn(candidates * tokens, width),
            bench.randn(width, width, scale=width**-0.5, seed=1),
            bench.randn(count, rank, width, scale=width**-0.5, seed=2),
            bench.randn(count, width, rank, scale=0.02, seed=3),
            bench.coefficients(candidates, count),
            1 + 0.1 * bench.randn(width, seed=4) if normed else None,
        )

    def normed(self) -> Tensor:
        if self.norm_weight is None:
            return self.x
        return F.rms_norm(self.x, self.norm_weight.shape, self.norm_weight, EPS)

    @property
    def groups(self) -> int:
        return len(self.coefficients)

    def reference(self, rows: Tensor) -> Tensor:
        """Exact result of some rows, float64."""
        x = self.x[rows].double()
        if self.norm_weight is not None:
            x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * self.norm_weight.double()
        owner = rows // (len(self.x) // self.groups)
        low = torch.einsum("td,crd->tcr", x, self.A.double()) * self.coefficients.double()[owner][:, :, None]
        return x @ self.weight.double().T + SCALE * torch.einsum("tcr,cor->to", low, self.B.double())

    def error(self, y: Tensor) -> float:
        """Largest, relative to the largest value, over rows of the first, a middle and the last candidate."""
        size = len(self.x) // self.groups
        rows = torch.cat(
            [
                torch.arange(m * size, m * size + min(64, size), device=y.device)
                for m in sorted({0, self.groups // 2, self.groups - 1})
            ]
        )
        return relative(y.reshape(len(self.x), -1)[rows], self.reference(rows))


def relative(found: Tensor, expected: Tensor) -> float:
    """NaN counts as infinite."""
    difference = (found.double() - expected.double()).abs().max().item()
    return difference / expected.double().abs().max().item() if difference == difference else float("inf")


def _layer_cases(sizes: Sizes, width: int, candidates: int, tokens: int, *, normed: bool) -> Iterator[Case]:
    layer, rows = sizes.layer(width, normed=normed), candidates * tokens
    operation = NORMED if normed else BARE
    shape = f"d {width}, C {sizes.adapters}, r {sizes.rank}, {candidates} x {tokens} tokens"

    def case(path: str, work: Sequence[cost.Work], build: Callable[[Inputs], Callable[[], Any]], *,
             ours: bool = False, checked: bool = True, needs: tuple[str, ...] = (),
             note: str = "") -> Case:  # fmt: skip
        def prepare(bench: Bench) -> Prepared:
            inputs = Inputs.of(bench, sizes, width, candidates, tokens, normed)
            return Prepared(build(inputs), inputs.error if checked else None)

        return Case(operation, shape, path, ours, work, prepare, needs, note)

    merging = [work for work in layer.merges() for _ in range(candidates)]
    batched = [cost.merge(candidates, width, width, layer.columns)]
    one_by_one = layer.dense(tokens) * candidates
    yield case(DENSE, layer.dense(rows), lambda i: lambda: i.normed() @ i.weight.T, checked=False)
    if normed:
        yield case(OURS_WIDE, layer.wide(rows), _wide, ours=True)
    else:
        yield case(OURS_LAYER, layer.wide(rows), _gated, ours=True)
    yield case("separate shrink and expand-add, torch", layer.separate(rows), _separate)
    yield case("merge + dense, one after another, torch", [*merging, *one_by_one], _merge_torch)
    yield case("the same as a CUDA graph", [*merging, *one_by_one], _merge_graph, needs=("a GPU",))
    yield case(
        "merge_deltas + dense, one after another (ours)", [*merging, *one_by_one], _merge_ours, ours=True
    )
    yield case("batched merge + bmm, torch", [*batched, *one_by_one], _merge_batched)
    yield case("merge_deltas + bmm (ours)", [*batched, *one_by_one], _merge_batched_ours, ours=True)
    yield case("PEFT's forward, one candidate after another", layer.separate(rows), _peft, needs=("peft",),
               note="the work of concatenated adapters; PEFT does more")  # fmt: skip


def _wide(i: Inputs) -> Callable[[], Tensor]:
    from opmix_kernels import WideLayout, norm_shrink_gate

    layout = WideLayout(i.x.shape[1], 1, i.A.shape[0] * i.A.shape[1])
    matrix, A = layout.matrix(0, i.weight, i.B), i.A[None]

    def run() -> Tensor:
        wide = norm_shrink_gate(i.x, A, i.coefficients, scale=SCALE, norm_weight=i.norm_weight, eps=EPS)
        return F.linear(wide[:, layout.span(0)], matrix)

    return run


def _gated(i: Inputs) -> Callable[[], Tensor]:
    from opmix_kernels import LowRankStack, gated_lowrank_linear

    prepared = LowRankStack.build(i.weight, i.A, i.B)
    return lambda: gated_lowrank_linear(
        i.x, i.weight, i.A, i.B, i.coefficients, scale=SCALE, prepared=prepared
    )


def _separate(i: Inputs) -> Callable[[], Tensor]:
    stacked = Stacked(i.A, i.B, SCALE)
    return lambda: stacked.separate(i.normed(), i.weight, i.coefficients)


def _merge_torch(i: Inputs) -> Callable[[], Tensor]:
    stacked, merged = Stacked(i.A, i.B, SCALE), torch.empty_like(i.weight)
    out = torch.empty(i.groups, len(i.x) // i.groups, len(i.weight), dtype=i.x.dtype, device=i.x.device)

    def run() -> Tensor:
        x = i.normed().view(i.groups, -1, i.x.shape[1])
        for m in range(i.groups):
            stacked.merge_into(merged, i.weight, i.coefficients[m])
            torch.mm(x[m], merged.T, out=out[m])
        return out

    return run


def _merge_graph(i: Inputs) -> Callable[[], Tensor]:
    return graphed(_merge_torch(i))


def _merge_ours(i: Inputs) -> Callable[[], Tensor]:
    from opmix_kernels import merge_deltas

    merged = torch.empty_like(i.weight)
    out = torch.empty(i.groups, len(i.x) // i.groups, len(i.weight), dtype=i.x.dtype, device=i.x.device)

    def run() -> Tensor:
        x = i.normed().view(i.groups, -1, i.x.shape[1])
        for m in range(i.groups):
            merge_deltas(i.weight, i.A, i.B, i.coefficients[m], scale=SCALE, out=merged)
            torch.mm(x[m], merged.T, out=out[m])
        return out

    return run


def _merge_batched(i: Inputs) -> Callable[[], Tensor]:
    stacked = Stacked(i.A, i.B, SCALE)
    return lambda: torch.bmm(
        i.normed().view(i.groups, -1, i.x.shape[1]), stacked.merged(i.weight, i.coefficients).mT
    )


def _merge_batched_ours(i: Inputs) -> Callable[[], Tensor]:
    from opmix_kernels import merge_deltas

    return lambda: torch.bmm(
        i.normed().view(i.groups, -1, i.x.shape[1]),
        merge_deltas(i.weight, i.A, i.B, i.coefficients, scale=SCALE).mT,
    )


def _peft(i: Inputs) -> Callable[[], Tensor]:
    linear = nn.Linear(i.weight.shape[1], i.weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(i.weight, requires_grad=False)
    module = nn.Sequential()
    module.add_module("linear", linear)
    mix, rows = PeftMix(module, {"linear": (i.A, i.B)}, SCALE), i.coefficients.tolist()

    @torch.no_grad()
    def run() -> Tensor:
        parts = i.normed().view(i.groups, -1, i.x.shape[1])
        outs = []
        for x, u in zip(parts, rows, strict=True):
            mix.mix(u)
            outs.append(mix.model(x))
        return torch.cat(outs)

    return run


def _producer_cases(sizes: Sizes, width: int, candidates: int, tokens: int) -> Iterator[Case]:
    """What writes [X | Z], against the norm that it replaces."""
    rows = candidates * tokens

    def prepare_norm(bench: Bench) -> Prepared:
        inputs = Inputs.of(bench, sizes, width, candidates, tokens, normed=True)
        return Prepared(inputs.normed)

    for consumers in (1, 3):
        columns = sizes.adapters * sizes.rank * consumers
        shape = f"d {width}, {columns} columns for {consumers}, {candidates} x {tokens} tokens"

        def prepare(bench: Bench, consumers: int = consumers) -> Prepared:
            from opmix_kernels import WideLayout, norm_shrink_gate

            inputs = Inputs.of(bench, sizes, width, candidates, tokens, normed=True)
            A = torch.stack(
                [bench.randn(*inputs.A.shape, scale=width**-0.5, seed=s) for s in range(consumers)]
            )
            layout = WideLayout(width, consumers, sizes.adapters * sizes.rank)

            def error(wide: Tensor) -> float:
                return relative(wide[:64, layout.x], F.rms_norm(
                    inputs.x[:64].double(), (width,), inputs.norm_weight.double(), EPS))  # fmt: skip

            return Prepared(
                lambda: norm_shrink_gate(inputs.x, A, inputs.coefficients, scale=SCALE,
                                         norm_weight=inputs.norm_weight, eps=EPS), error
            )  # fmt: skip

        yield Case(PRODUCER, shape, "F.rms_norm alone, torch", False, [cost.norm(rows, width)], prepare_norm)
        yield Case(
            PRODUCER, shape, "norm_shrink_gate (ours)", True,
            [cost.norm_shrink_gate(rows, width, columns)], prepare,
        )  # fmt: skip


def _backward_cases(sizes: Sizes, width: int, candidates: int, tokens: int) -> Iterator[Case]:
    layer, rows = sizes.layer(width, normed=False), candidates * tokens
    shape = f"d {width}, C {sizes.adapters}, r {sizes.rank}, {candidates} x {tokens} tokens"
    work = [*layer.wide(rows), *cost.gated_lowrank_backward(rows, width, width, layer.columns)]

    def prepare(bench: Bench, forward: Callable[..., Callable[[Tensor, Tensor], Tensor]]) -> Prepared:
        i = Inputs.of(bench, sizes, width, candidates, tokens, normed=False)
        x, u = i.x.requires_grad_(), i.coefficients.requires_grad_()
        layer_forward, upstream = forward(i), bench.randn(rows, width, seed=5)

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer_forward(x, u), (x, u), upstream)

        def error(found: tuple[Tensor, ...]) -> float:
            """Of the last candidate's gradients; a row at a time is independent of the others."""
            last = slice(rows - tokens, rows)
            few = x.detach()[last].double().requires_grad_()
            gates = u.detach()[-1:].double().requires_grad_()
            low = torch.einsum("td,crd->tcr", few, i.A.double()) * gates[:, :, None]
            y = few @ i.weight.double().T + SCALE * torch.einsum("tcr,cor->to", low, i.B.double())
            exact = torch.autograd.grad(y, (few, gates), upstream[last].double())
            return max(relative(found[0][last], exact[0]), relative(found[1][-1:], exact[1]))

        return Prepared(run, error, tolerance=2e-2)

    def ours(i: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
        from opmix_kernels import LowRankStack, gated_lowrank_linear

        prepared = LowRankStack.build(i.weight, i.A, i.B)
        return lambda x, u: gated_lowrank_linear(x, i.weight, i.A, i.B, u, scale=SCALE, prepared=prepared)

    def plain(i: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
        stacked = Stacked(i.A, i.B, SCALE)

        def forward(x: Tensor, u: Tensor) -> Tensor:
            low = (x @ stacked.down.T).view(len(u), -1, len(stacked.down)) * stacked.gates(u)[:, None]
            return torch.addmm(x @ i.weight.T, low.view(len(x), -1), stacked.up.T)

        return forward

    yield Case(BACKWARD, shape, OURS_LAYER, True, work, lambda bench: prepare(bench, ours))
    yield Case(BACKWARD, shape, "torch's autograd of separate products", False, work,
               lambda bench: prepare(bench, plain))  # fmt: skip


def losses_shape(rows: int, width: int, vocab: int) -> str:
    return f"{rows} rows, d {width}, V {vocab}"


def _loss_cases(rows: int, width: int, vocab: int) -> Iterator[Case]:
    shape = losses_shape(rows, width, vocab)

    def inputs(bench: Bench) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(bench.device).manual_seed(9)
        targets = torch.randint(vocab, (rows,), generator=generator, device=bench.device)
        return bench.randn(rows, width), bench.randn(vocab, width, scale=2 * width**-0.5, seed=1), targets

    def forward(bench: Bench, losses: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepared:
        hidden, head, targets = inputs(bench)

        def error(found: Tensor) -> float:
            logits = hidden[:64].double() @ head.double().T
            return relative(found[:64], F.cross_entropy(logits, targets[:64], reduction="none"))

        return Prepared(lambda: losses(hidden, head, targets), error)

    def backward(bench: Bench, losses: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepared:
        hidden, head, targets = inputs(bench)
        hidden.requires_grad_()

        def run() -> Tensor:
            return torch.autograd.grad(losses(hidden, head, targets).sum(), hidden)[0]

        def error(found: Tensor) -> float:
            few = hidden.detach()[:64].double().requires_grad_()
            exact = F.cross_entropy(few @ head.double().T, targets[:64], reduction="sum")
            return relative(found[:64], torch.autograd.grad(exact, few)[0])

        return Prepared(run, error, tolerance=2e-2)

    def ours(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        from opmix_kernels import linear_cross_entropy

        return linear_cross_entropy(hidden, head, targets)

    work = cost.linear_cross_entropy(rows, width, vocab)
    yield Case(LOSSES, shape, OURS_LOSSES, True, work, lambda bench: forward(bench, ours))
    yield Case(LOSSES, shape, CHUNKED, False, cost.chunked_cross_entropy(rows, width, vocab),
               lambda bench: forward(bench, chunked_losses), note="16-bit logits")  # fmt: skip
    if rows * vocab < 3e9:  # 4 and 2 bytes each
        plain = cost.chunked_cross_entropy(rows, width, vocab)
        yield Case(LOSSES, shape, "plain torch, float32 logits in memory", False, plain,
                   lambda bench: forward(bench, torch_losses))  # fmt: skip
        both = [*work, *cost.linear_cross_entropy_backward(rows, width, vocab)]
        yield Case(LOSSES_BACKWARD, shape, OURS_LOSSES, True, both, lambda bench: backward(bench, ours))
        yield Case(LOSSES_BACKWARD, shape, "plain torch, float32 logits in memory", False, both,
                   lambda bench: backward(bench, torch_losses))  # fmt: skip


def _merge_cases(sizes: Sizes, width: int, candidates: int) -> Iterator[Case]:
    shape = f"d {width}, C {sizes.adapters}, r {sizes.rank}, {candidates} candidates"
    columns = sizes.adapters * sizes.rank
    together = [cost.merge(candidates, width, width, columns)]
    one_by_one = [cost.merge(1, width, width, columns)] * candidates

    def prepare(bench: Bench, build: Callable[[Inputs], Callable[[], Tensor]]) -> Prepared:
        i = Inputs.of(bench, sizes, width, candidates, 1, normed=False)

        def error(found: Tensor) -> float:
            delta = torch.einsum("c,cor,crd->od", i.coefficients[-1].double(), i.B.double(), i.A.double())
            return relative(found[-1], i.weight.double() + SCALE * delta)

        return Prepared(build(i), error)

    def ours(i: Inputs, seed: int | None = None) -> Callable[[], Tensor]:
        from opmix_kernels import merge_deltas

        return lambda: merge_deltas(i.weight, i.A, i.B, i.coefficients, scale=SCALE, seed=seed)

    def sequential(i: Inputs) -> Callable[[], Tensor]:
        stacked, out = Stacked(i.A, i.B, SCALE), i.weight.new_empty(i.groups, *i.weight.shape)

        def run() -> Tensor:
            for target, u in zip(out, i.coefficients, strict=True):
                stacked.merge_into(target, i.weight, u)
            return out

        return run

    def batched(i: Inputs) -> Callable[[], Tensor]:
        stacked = Stacked(i.A, i.B, SCALE)
        return lambda: stacked.merged(i.weight, i.coefficients)

    def case(path: str, work: list[cost.Work], build: Callable[[Inputs], Callable[[], Tensor]],
             ours: bool = False) -> Case:  # fmt: skip
        return Case(MERGE, shape, path, ours, work, lambda bench: prepare(bench, build))

    yield case("merge_deltas (ours)", together, ours, True)
    yield case("merge_deltas, stochastic rounding (ours)", together, lambda i: ours(i, 3), True)
    yield case("addmm one after another, torch", one_by_one, sequential)
    yield case("baddbmm, torch", together, batched)


def _joint_cases(sizes: Sizes) -> Iterator[Case]:
    width, adapters, each = sizes.joint
    rows, rank = adapters * each, sizes.rank
    work = [
        *cost.joint_lora(rows, width, width, rank, adapters),
        *cost.joint_lora_backward(rows, width, width, rank, adapters),
    ]

    def prepare(bench: Bench, forward: Callable[..., Tensor], dropout: float) -> Prepared:
        x, weight = (
            bench.randn(rows, width).requires_grad_(),
            bench.randn(width, width, scale=width**-0.5, seed=1),
        )
        A = bench.randn(adapters, rank, width, scale=width**-0.5, seed=2).float().requires_grad_()
        B = bench.randn(adapters, width, rank, scale=0.1, seed=3).float().requires_grad_()
        upstream = bench.randn(rows, width, seed=4)
        seeds = torch.arange(adapters, device=bench.device)

        def run() -> tuple[Tensor, ...]:
            y = forward(x, weight, A, B, dropout, seeds)
            return torch.autograd.grad(y, (x, A, B), upstream)

        def error(found: tuple[Tensor, ...]) -> float:
            last = slice(rows - each, rows)
            few, down, up = (t.detach().double().requires_grad_() for t in (x[last], A[-1], B[-1]))
            y = few @ weight.double().T + SCALE * (few @ down.T) @ up.T
            exact = torch.autograd.grad(y, (few, down, up), upstream[last].double())
            parts = (found[0][last], found[1][-1], found[2][-1])
            return max(relative(a, b) for a, b in zip(parts, exact, strict=True))

        return Prepared(run, error if dropout == 0 else None, tolerance=2e-2)

    def ours(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, dropout: float, seeds: Tensor) -> Tensor:
        from opmix_kernels import joint_lora_linear

        return joint_lora_linear(
            x, weight, A, B, scale=SCALE, dropout=dropout, seeds=seeds if dropout else None, step=1
        )

    def plain(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, dropout: float, seeds: Tensor) -> Tensor:
        grouped = F.dropout(x.view(adapters, -1, width), dropout)
        low = SCALE * torch.bmm(grouped, A.to(x.dtype).mT)
        y = (x @ weight.T).view(adapters, -1, width)
        return torch.baddbmm(y, low, B.to(x.dtype).mT).view(rows, width)

    for dropout in (0.0, 0.05):
        shape = f"d {width}, K {adapters}, r {rank}, {each} rows each, dropout {dropout}"
        note = "masks are random, so the error is that of dropout 0" if dropout else ""
        for path, forward, own in (
            ("joint_lora_linear (ours)", ours, True),
            ("batched products, torch", plain, False),
        ):

            def build(bench: Bench, forward: Callable[..., Tensor] = forward, p: float = dropout) -> Prepared:
                return prepare(bench, forward, p)

            yield Case(JOINT, shape, path, own, work, build, note=note)


def _sums_cases(sizes: Sizes) -> Iterator[Case]:
    candidates, tokens, segments = sizes.sums
    shape = f"{candidates} x {tokens} losses, {segments} segments"
    work = [cost.segment_sums(candidates, tokens, segments)]

    def prepare(bench: Bench, sums: Callable[[Tensor, Tensor], Tensor]) -> Prepared:
        losses = bench.randn(candidates, tokens).float().abs()
        owner = torch.arange(tokens, device=bench.device) * segments // tokens

        def error(found: Tensor) -> float:
            exact = torch.stack([losses.double()[:, owner == s].sum(1) for s in range(segments)], dim=1)
            return relative(found, exact)

        return Prepared(lambda: sums(losses, owner), error, tolerance=1e-9)

    def ours(losses: Tensor, owner: Tensor) -> Tensor:
        from opmix_kernels import segment_sums

        return segment_sums(losses, owner, segments)

    def added(losses: Tensor, owner: Tensor) -> Tensor:
        out = torch.zeros(candidates, segments, dtype=torch.float64, device=losses.device)
        return out.index_add_(1, owner, losses.double())

    yield Case(SUMS, shape, "segment_sums (ours)", True, work, lambda bench: prepare(bench, ours))
    yield Case(SUMS, shape, "index_add_, torch", False, work, lambda bench: prepare(bench, added),
               note="atomics: the order of the sum is not fixed")  # fmt: skip
