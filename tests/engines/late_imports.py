"""What DeepSpeed and Megatron import only when they start: here once for all ranks of a launch."""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import opmix_dist.engines.deepspeed
import opmix_dist.engines.megatron  # noqa: F401
