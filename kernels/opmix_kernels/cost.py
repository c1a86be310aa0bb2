"""What each operation costs by arithmetic: FLOPs, bytes, time under measured ceilings, and when merging wins.

A path is a sequence of kernels; each takes the longer of its arithmetic and its memory traffic, and a
launch (the roofline: Williams, Waterman and Patterson, CACM 52(4), 2009). Traffic counts every operand once,
from and to the GPU's memory; what stays in a cache within one kernel counts nothing. So these are floors,
which no measurement should undercut by more than its noise, and not predictions.

Tiny example: 2 FLOP/s and 4 bytes/s; a kernel of 6 FLOPs and 8 bytes takes max(6 / 2, 8 / 4) = 3 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """One kernel's work."""

    flops: float
    """A multiply-add is two."""
    bytes: float
    """Read and written."""
    launches: int = 1


def total(path: Sequence[Work]) -> Work:
    """Sums over a path's kernels."""
    return Work(
        sum(work.flops for work in path),
        sum(work.bytes for work in path),
        sum(work.launches for work in path),
    )


@dataclass(frozen=True)
class Ceilings:
    """What one GPU reaches at best, measured: benchmarks/gpu_kernels.py does."""

    flops: float
    """FLOP/s of a large library GEMM in 16 bits."""
    bytes: float
    """Bytes/s, read and written, of a large copy within the GPU's memory."""
    launch: float = 0.0
    """Seconds that a launch costs beyond its work."""

    def seconds(self, path: Sequence[Work]) -> float:
        """Of kernels one after another."""
        return sum(
            max(work.flops / self.flops, work.bytes / self.bytes) + work.launches * self.launch
            for work in path
        )

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which a kernel is bound by arithmetic."""
        return self.flops / self.bytes


def dense(rows: int, d_in: int, d_out: int, itemsize: int = 2) -> Work:
    """x [R, d_in] times W^T [d_in, d_out]: 2 R d_in d_out FLOPs; x, W and y once."""
    return Work(2.0 * rows * d_in * d_out, itemsize * (rows * (d_in + d_out) + d_in * d_out))


def norm(rows: int, width: int, itemsize: int = 2) -> Work:
    """RMSNorm of [R, d]: reads and writes it; its arithmetic is no matrix product and counts nothing."""
    return Work(0.0, 2.0 * itemsize * rows * width)


def norm_shrink_gate(rows: int, width: int, columns: int, itemsize: int = 2) -> Work:
    """[R, d] to [X | Z] with J gated columns: 2 R d J FLOPs; x read, X and Z written, A [J, d] read."""
    return Work(
        2.0 * rows * width * columns,
        itemsize * (rows * (2 * width + columns) + columns * width),
    )


def shrink(rows: int, width: int, columns: int, itemsize: int = 2) -> Work:
    """Z = X A^T alone: as :func:`norm_shrink_gate` without writing X."""
    return Work(2.0 * rows * width * columns, itemsize * (rows * (width + columns) + columns * width))


def expand_add(rows: int, columns: int, d_out: int, itemsize: int = 2) -> Work:
    """Y += Z B^T: 2 R J d_out FLOPs; Z and B read, Y read and written."""
    return Work(2.0 * rows * columns * d_out, itemsize * (rows * (columns + 2 * d_out) + columns * d_out))


def merge(
    candidates: int, d_in: int, d_out: int, columns: int, weight_itemsize: int = 2, itemsize: int = 2
) -> Work:
    """M merged copies of W [d_out, d_in] in one kernel: 2 M J d_in d_out FLOPs; W, A and B read once, M
    copies written."""
    size = d_in * d_out
    moved = weight_itemsize * size + itemsize * (candidates * size + columns * (d_in + d_out))
    return Work(2.0 * candidates * columns * size, moved)


def linear_cross_entropy(rows: int, width: int, vocab: int, itemsize: int = 2) -> list[Work]:
    """Losses of R rows, logits never in memory: 2 R d V FLOPs; hidden states and head read once."""
    return [Work(2.0 * rows * width * vocab, itemsize * width * (rows + vocab) + 4 * rows)]


def linear_cross_entropy_backward(rows: int, width: int, vocab: int, itemsize: int = 2) -> list[Work]:
    """Gradient of hidden states: logits again (2 R d V), softmax less one-hot written in 16 bits, and their
    product with the head (2 R d V)."""
    gradients = itemsize * rows * vocab
    again, product = 2.0 * rows * width * vocab, itemsize * width * (rows + vocab)
    return [Work(again, product + gradients), Work(again, product + gradients)]


def chunked_cross_entropy(rows: int, width: int, vocab: int, itemsize: int = 2) -> list[Work]:
    """The baseline: logits by a library GEMM, written in 16 bits, and one pass over them."""
    logits = itemsize * rows * vocab
    return [
        Work(2.0 * rows * width * vocab, itemsize * width * (rows + vocab) + logits),
        Work(0.0, logits + 4 * rows),
    ]


def gated_lowrank_backward(rows: int, d_in: int, d_out: int, columns: int, itemsize: int = 2) -> list[Work]:
    """To x and the coefficients: [gated G B | G] from G, which also sums P Q, and one GEMM with [A; W]. The
    forward pass writes P [R, J], and it is read here."""
    producer = norm_shrink_gate(rows, d_out, columns, itemsize)
    kept = 2.0 * itemsize * rows * columns
    return [
        Work(producer.flops + 2.0 * rows * columns, producer.bytes + kept),
        dense(rows, d_out + columns, d_in, itemsize),
    ]


def joint_lora(rows: int, d_in: int, d_out: int, rank: int, adapters: int, itemsize: int = 2) -> list[Work]:
    """Forward of K adapters on one base, each row through its own: 2 R r (d_in + d_out) beside the base."""
    # a row meets r columns, whichever adapter's; A and B of all K are read
    others = itemsize * (adapters - 1) * rank
    down, up = shrink(rows, d_in, rank, itemsize), expand_add(rows, rank, d_out, itemsize)
    return [
        dense(rows, d_in, d_out, itemsize),
        Work(down.flops, down.bytes + others * d_in),
        Work(up.flops, up.bytes + others * d_out),
    ]


def joint_lora_backward(
    rows: int, d_in: int, d_out: int, rank: int, adapters: int, itemsize: int = 2
) -> list[Work]:
    """To x, A and B: the mirror image of the forward, and two outer products over each adapter's rows with
    float32 results."""
    results = 4 * adapters * rank
    outer = [
        Work(2.0 * rows * rank * width, itemsize * rows * (rank + width) + results * width)
        for width in (d_in, d_out)
    ]
    return [*joint_lora(rows, d_out, d_in, rank, adapters, itemsize), *outer]


def segment_sums(rows: int, tokens: int, segments: int) -> Work:
    """[M, T] float32 losses and T int64 segments read, [M, S] float64 sums written."""
    return Work(0.0, 4.0 * rows * tokens + 8.0 * tokens + 8.0 * rows * segments)


@dataclass(frozen=True)
class Layer:
    """Linear layers that read one input, each with C adapters of rank r.

    Args:
        d_outs: of each of them: q, k, v; gate, up; or a single one.
        normed: whether an RMSNorm writes their input. Then the producer of [X | Z] takes its place and costs
            Z's columns only; otherwise it copies the input too.
    """

    d_in: int
    d_outs: tuple[int, ...]
    normed: bool
    adapters: int
    rank: int

    @property
    def columns(self) -> int:
        """J = C r of one linear layer."""
        return self.adapters * self.rank

    def dense(self, rows: int) -> list[Work]:
        """Without adapters."""
        before = [norm(rows, self.d_in)] if self.normed else []
        return before + [dense(rows, self.d_in, d_out) for d_out in self.d_outs]

    def wide(self, rows: int) -> list[Work]:
        """``norm_shrink_gate`` and a GEMM over the span [X | Z] for each: the third reads the second's Z too,
        the fourth those of both (``WideLayout``)."""
        spans = [self.d_in + max(1, index) * self.columns for index in range(len(self.d_outs))]
        gemms = [dense(rows, span, d_out) for span, d_out in zip(spans, self.d_outs, strict=True)]
        return [norm_shrink_gate(rows, self.d_in, self.columns * len(self.d_outs)), *gemms]

    def separate(self, rows: int) -> list[Work]:
        """The dense layers, and a shrink and an expand-add for each."""
        added = [
            work
            for d_out in self.d_outs
            for work in (shrink(rows, self.d_in, self.columns), expand_add(rows, self.columns, d_out))
        ]
        return self.dense(rows) + added

    def extra_steps(self, rows: int) -> list[Work]:
        """A GEMM that reads X and Z from two places as more steps of its reduction, after a shrink that
        writes Z only (with a norm: the producer that writes X anyway)."""
        columns = self.columns * len(self.d_outs)
        first = (norm_shrink_gate if self.normed else shrink)(rows, self.d_in, columns)
        return [first, *(dense(rows, self.d_in + self.columns, d_out) for d_out in self.d_outs)]

    def merges(self) -> list[Work]:
        """Merging one candidate."""
        return [merge(1, self.d_in, d_out, self.columns) for d_out in self.d_outs]

    def gemm_seconds(self, ceilings: Ceilings, rows: int) -> float:
        """Of the dense products alone: what overheads are a share of."""
        return ceilings.seconds([dense(rows, self.d_in, d_out) for d_out in self.d_outs])

    def overhead(self, ceilings: Ceilings, path: Sequence[Work], rows: int) -> float:
        """Time of a path over R rows beyond that of the layers without adapters, over that of their GEMMs."""
        beyond = ceilings.seconds(path) - ceilings.seconds(self.dense(rows))
        return beyond / self.gemm_seconds(ceilings, rows)

    def merge_overhead(self, ceilings: Ceilings, tokens: int) -> float:
        """The same of merging a candidate that is evaluated on T tokens."""
        return ceilings.seconds(self.merges()) / self.gemm_seconds(ceilings, tokens)


def llama_block(width: int, kv_width: int, intermediate: int, adapters: int, rank: int) -> tuple[Layer, ...]:
    """The linear layers of one block, by input: q, k, v; o; gate, up; down."""

    def layer(d_in: int, *d_outs: int, normed: bool) -> Layer:
        return Layer(d_in, d_outs, normed, adapters, rank)

    return (
        layer(width, width, kv_width, kv_width, normed=True),
        layer(width, width, normed=False),
        layer(width, intermediate, intermediate, normed=True),
        layer(intermediate, width, normed=False),
    )


def llama_elementwise(rows: int, width: int, kv_width: int, intermediate: int) -> list[Work]:
    """What a block does between its products, kernel by kernel as transformers runs it, with products in 16
    bits and a float32 residual stream: SiLU and its product; rotary embedding (two products, a rotation in
    three passes, a sum); two residual sums; attention's operands once and its result rearranged.

    Norms (:meth:`Layer.wide` and :meth:`Layer.dense` have them) and attention's arithmetic are left out.
    """
    heads = width + kv_width
    moved = (
        2 * 2 * intermediate,  # SiLU
        3 * 2 * intermediate,  # times up
        *(2 * 2 * heads, 2 * 2 * heads),  # times cos, times sin
        *(2 * heads, 2 * 2 * heads),  # half of it negated, both halves joined
        3 * 2 * heads,  # their sum
        *(2 * (4 + 2 + 4) * width,),  # residual sums
        2 * 2 * heads,  # attention reads q, k, v and writes its result
        2 * 2 * width,  # heads side by side again
    )
    return [Work(0.0, float(rows * each)) for each in moved]


def crossover(ceilings: Ceilings, layers: Sequence[Layer], rows: int = 65_536) -> float:
    """Tokens per candidate above which merging each candidate costs less than [X | Z] x [W | B].

    Merging costs the same for any number of tokens, and the launches of one more GEMM per candidate; low-rank
    terms cost per token.

    Args:
        rows: of the batch in which candidates stand side by side.
    """
    merging = sum(ceilings.seconds(layer.merges()) + len(layer.d_outs) * ceilings.launch for layer in layers)
    low_rank = sum(
        ceilings.seconds(layer.wide(rows)) - ceilings.seconds(layer.dense(rows)) for layer in layers
    )
    return merging / (low_rank / rows)


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Llama-like model of L blocks, for what a sweep of candidates can reach."""

    width: int
    kv_width: int
    intermediate: int
    layers: int
    vocab: int

    def flops_per_token(self, length: int) -> float:
        """Of a forward pass without adapters: all products, and the causal half of attention's two over T
        tokens, 2 T d FLOPs for each block."""
        attention = 2 * self.width * (self.width + self.kv_width)
        weights = self.layers * (attention + 3 * self.width * self.intermediate) + self.width * self.vocab
        return 2.0 * weights + 2.0 * length * self.width * self.layers

    def attainable(
        self, ceilings: Ceilings, *, tokens: int, length: int, adapters: int, rank: int,
        elementwise: bool = True, rows: int = 65_536,
    ) -> float:  # fmt: skip
        """Largest share of the floor (FLOPs over the ceiling) that a sweep can reach: every kernel at its own
        floor, head and attention included, and the cheaper of low-rank terms and merging.

        Args:
            tokens: of a candidate; length: of a sample.
            elementwise: count :func:`llama_elementwise`; without: as if they were free, fused into products.
            rows: of one forward pass.
        """
        block = llama_block(self.width, self.kv_width, self.intermediate, adapters, rank)
        floor = self.flops_per_token(length) / ceilings.flops
        plain = sum(ceilings.seconds(layer.dense(rows)) for layer in block)
        norms = plain - sum(layer.gemm_seconds(ceilings, rows) for layer in block)
        low_rank = sum(ceilings.seconds(layer.wide(rows)) for layer in block) - plain
        merging = sum(ceilings.seconds(layer.merges()) for layer in block) * rows / tokens
        others = llama_elementwise(rows, self.width, self.kv_width, self.intermediate) if elementwise else []
        beyond = norms + min(low_rank, merging) + ceilings.seconds(others)
        return floor / (floor + self.layers * beyond / rows)
