"""Triton kernels for low-rank candidate mixtures, beside plain-torch references."""

from opmix_kernels.cross_entropy import linear_cross_entropy as linear_cross_entropy
from opmix_kernels.gated_lowrank import gated_lowrank_linear as gated_lowrank_linear
from opmix_kernels.joint_lora import joint_lora_linear as joint_lora_linear
from opmix_kernels.merge import merge_deltas as merge_deltas
from opmix_kernels.segments import segment_sums as segment_sums
from opmix_kernels.shrink import norm_shrink_gate as norm_shrink_gate
from opmix_kernels.wide import LowRankStack as LowRankStack
from opmix_kernels.wide import WideLayout as WideLayout
