"""GPUs by the names that ``opmix plan --gpu`` takes: their memory, and where their peaks are."""

from __future__ import annotations

from dataclasses import dataclass

from opmix_dist.errors import UserError

USABLE = 0.95
"""Share of the memory that a plan fills at most. The rest is for the driver's context, collectives' buffers,
kernels' workspaces and what an allocator cannot use of its pieces: a convention, nothing measured."""


@dataclass(frozen=True)
class Gpu:
    """device: as torch calls it, for :mod:`opmix_dist.models.devices`. gigabytes: 10^9 bytes, as its vendor's
    data sheet has them. per_node: in the vendor's usual machines."""

    name: str
    device: str
    gigabytes: float
    per_node: int = 8

    @property
    def bytes(self) -> int:
        return int(self.gigabytes * 1e9)

    @property
    def usable_bytes(self) -> int:
        return int(USABLE * self.bytes)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", "NVIDIA A100-SXM4-80GB", 80),
        Gpu("a100-40", "NVIDIA A100-SXM4-40GB", 40),
        Gpu("h100", "NVIDIA H100 80GB HBM3", 80),
        Gpu("h100-nvl", "NVIDIA H100 NVL", 94),
        Gpu("h200", "NVIDIA H200", 141),
        Gpu("gh200", "NVIDIA GH200 480GB", 96, per_node=1),
        Gpu("b200", "NVIDIA B200", 180),
        Gpu("gb200", "NVIDIA GB200", 186, per_node=4),
        Gpu("b300", "NVIDIA B300", 270),
        Gpu("gb300", "NVIDIA GB300", 279, per_node=4),
        Gpu("l40s", "NVIDIA L40S", 48),
        Gpu("l4", "NVIDIA L4", 24),
        Gpu("mi300x", "AMD Instinct MI300X", 192),
        Gpu("mi325x", "AMD Instinct MI325X", 256),
    )
}


def find_gpu(name: str, option: str = "--gpu") -> Gpu:
    """
    Raises:
        UserError: no such name; ``option`` is where it was given.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise UserError(f"{option} {name} is not known: choose one of {', '.join(GPUS)}")
    return gpu
