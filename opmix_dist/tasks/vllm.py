"""Replies by vLLM in this process, where that is installed. Written for, and run with, vLLM 0.32."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opmix_dist.errors import UserError
from opmix_dist.seeds import derive_seed
from opmix_dist.tasks.generation import Generated, Sampling

if TYPE_CHECKING:
    from vllm import LLM


def require_vllm(setting: str) -> None:
    """UserError, which names ``setting``, where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise UserError(f"{setting} vllm: vLLM is not installed: install it, or take transformers")


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM runs a model.

    setting: what errors name.
    max_tokens: most of a prompt with its reply.
    memory: share of the device's memory that it may have, parameters included.
    sequences: most that are replied to at once; None: vLLM's default.
    """

    setting: str
    device: torch.device
    dtype: torch.dtype
    max_tokens: int
    memory: float
    sequences: int | None = None


class VLLM:
    """A model that replies, whole on one device. Its kernels round otherwise than transformers'."""

    def __init__(self, folder: str, options: EngineOptions, *, weights: bool = True) -> None:
        """Collective over the ranks of the default process group, where there is one.

        Args:
            folder: with a config.json, whose parameters are read unless ``weights`` is false; until
                :meth:`load` they then are random.

        Raises:
            UserError: vLLM is missing, made for other devices, or cannot run the model.
        """
        require_vllm(options.setting)
        self._device, self._joined = options.device, dist.is_initialized()
        _prepare_environment()
        from vllm.platforms import current_platform

        if (made_for := current_platform.device_type) != options.device.type:
            raise UserError(
                f"{options.setting} vllm: vLLM is installed for {made_for}, and this runs on "
                f"{options.device.type}: install vLLM for that, or take transformers"
            )
        kept = _default_group_kept(self._joined)
        with _seeds_kept(options.device), _rank_variables(options.device), kept:
            self._llm = _start(folder, options, weights=weights)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        *,
        end_ids: Sequence[int],
        sampling: Sampling | None = None,
    ) -> Generated:
        """As :func:`tasks.generation.generate`. Its tokens are those of prompts and replies but for each
        reply's last, which is read by nobody: vLLM pads nothing. Draws depend on the seed and a prompt's
        place."""
        from vllm import SamplingParams, TokensPrompt

        if not prompts:
            return Generated([], 0)
        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        how = [
            SamplingParams(
                max_tokens=limit,
                ignore_eos=True,  # the checkpoint's own tokens that end a reply
                stop_token_ids=list(end_ids),
                detokenize=False,
                **_draws(sampling, place),
            )
            for place, limit in enumerate(limits)
        ]
        with _seeds_kept(self._device):
            outputs = self._llm.generate(asked, how, use_tqdm=False)
        replies = [list(output.outputs[0].token_ids) for output in outputs]
        tokens = sum(len(p) + len(reply) - 1 for p, reply in zip(prompts, replies, strict=True))
        return Generated(replies, tokens)

    def load(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take over all parameters, by their names in a checkpoint.

        Kernels may keep weights in a form of their own, which is made again; writing to the model's own
        parameters (its ``load_weights`` alone) would miss that.

        Raises:
            UserError: some of the model's parameters are not among these.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        def take(model: nn.Module) -> set[str]:
            wanted = {name for name, _ in model.named_parameters()}
            initialize_layerwise_reload(model)
            loaded = cast(Any, model).load_weights(parameters)
            finalize_layerwise_reload(model, self._llm.model_config)
            for module in model.modules():
                # a head that is tied to the embedding is not loaded, so on a CPU it stayed packed as it was
                if isinstance(module, VocabParallelEmbedding):
                    module.quant_method.process_weights_after_loading(module)
            return wanted - set(wanted if loaded is None else loaded)

        with torch.no_grad(), set_current_vllm_config(self._llm.llm_engine.vllm_config):
            (missing,) = self._llm.apply_model(take)
        if missing:
            raise UserError(
                f"vLLM finds no parameter for its {min(missing)} in this model: take transformers to generate"
            )

    def close(self) -> None:
        """Free its memory and its process groups. Not collective."""
        with _default_group_kept(self._joined):
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class FolderReplies:
    """The likeliest replies of the model in a folder, in float32 as transformers' here; vLLM is started when
    there are prompts, and again when longer ones come."""

    def __init__(self, folder: str, device: str, max_new_tokens: int) -> None:
        """UserError where vLLM is not installed."""
        require_vllm("--generation")
        self.folder, self.device, self.max_new_tokens = folder, torch.device(device), max_new_tokens
        self._llm: VLLM | None = None
        self._longest = 0

    def __call__(self, prompts: Sequence[Sequence[int]], end_ids: Sequence[int]) -> Generated:
        longest = max(map(len, prompts)) + self.max_new_tokens
        if self._llm is None or longest > self._longest:
            self.close()
            options = EngineOptions(
                "--generation", self.device, torch.float32, longest, _free_share(self.device)
            )
            self._llm, self._longest = VLLM(self.folder, options), longest
        return self._llm.generate(prompts, [self.max_new_tokens] * len(prompts), end_ids=end_ids)

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()
            self._llm = None


def _start(folder: str, options: EngineOptions, *, weights: bool) -> LLM:
    from vllm import LLM, SamplingParams, TokensPrompt

    more = {} if options.sequences is None else {"max_num_seqs": options.sequences}
    try:
        llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            load_format="auto" if weights else "dummy",
            generation_config="vllm",  # else a checkpoint's own settings would be mixed in
            dtype=cast(Any, options.dtype),
            max_model_len=options.max_tokens,
            gpu_memory_utilization=options.memory,
            # the KV of old parameters would be stale, and a resumed run would start with another cache
            enable_prefix_caching=False,
            enforce_eager=options.device.type == "cpu",  # compiling takes longer there than it saves
            distributed_executor_backend="external_launcher" if dist.is_initialized() else None,
            seed=0,
            **more,
        )
        # on a CPU, that its attention cannot take the model shows only now
        token = TokensPrompt(prompt_token_ids=[0])
        llm.generate([token], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        return llm
    except Exception as error:  # vLLM raises what it stumbles on: of memory, dtypes, architectures
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()  # it leaves its groups, over which the next start would stumble
        text = " ".join(str(error).split())[:400] or type(error).__name__
        raise UserError(f"{options.setting} vllm: vLLM cannot run the model: {text}") from error


def _prepare_environment() -> None:
    """Before vLLM's first import. What users set themselves stays, but for where the engine runs."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


@contextmanager
def _rank_variables(device: torch.device) -> Iterator[None]:
    """By which vLLM finds its place in a process group that it did not make; a role's ranks are not those of
    the launch."""
    if not dist.is_initialized():
        yield
        return
    places = {"RANK": dist.get_rank(), "LOCAL_RANK": device.index or 0, "WORLD_SIZE": dist.get_world_size()}
    before = {name: os.environ.get(name) for name in places}
    os.environ.update({name: str(place) for name, place in places.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _default_group_kept(joined: bool) -> Iterator[None]:
    """vLLM's end of its work, or of a start that failed, ends the process's default group too, also one that
    was ``joined`` before it."""
    if not joined:
        yield
        return
    from vllm.distributed import parallel_state

    def end_own_group() -> None:
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None

    before = parallel_state.destroy_distributed_environment
    parallel_state.destroy_distributed_environment = end_own_group
    try:
        yield
    finally:
        parallel_state.destroy_distributed_environment = before


@contextmanager
def _seeds_kept(device: torch.device) -> Iterator[None]:
    """vLLM seeds the process's generators; nothing here draws from others than torch's."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _draws(sampling: Sampling | None, place: int) -> dict[str, Any]:
    if sampling is None:
        return {"temperature": 0.0}
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": derive_seed(sampling.seed, place),
    }


def _free_share(device: torch.device) -> float:
    """Of the device's memory, what may be taken besides what is there."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return 0.9 * free / total
    return 0.5 * os.sysconf("SC_AVPHYS_PAGES") / os.sysconf("SC_PHYS_PAGES")
