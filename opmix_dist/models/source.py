"""Where a model's parameters come from: fresh ones, or those of a Hugging Face checkpoint, one at a time.

No rank needs to hold the whole model: it builds one without parameters, and asks for those that it wants,
or for the parts of them. Fresh ones depend on the seed and the name of their module only, so every engine
gets the same on any number of ranks.
"""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from opmix_dist.bounded import read_json, require_ordinary
from opmix_dist.config import ModelConfig
from opmix_dist.errors import UserError
from opmix_dist.models.long_context import with_context
from opmix_dist.seeds import derive_seed

Index = tuple[slice, ...]
MAX_CONFIG_BYTES = 64 << 20
"""Of a JSON file of a checkpoint; an index has a line for each tensor."""
CONFIG_FILES = ("config.json", "generation_config.json")


class ModelSource:
    """One model: its configuration, its parameters by name, its shapes.

    Tied parameters exist once, under the first of their names in ``model.named_parameters()``.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        attention: str = "sdpa",
        trust_remote_code: bool = False,
        seed: int = 0,
        weights: CheckpointFiles | None = None,
    ) -> None:
        """
        Args:
            attention: as ``model.attention``.
            seed: of fresh parameters.
            weights: of a checkpoint; None: fresh ones.

        Raises:
            UserError: an architecture or attention that cannot be had; a checkpoint that lacks a parameter.
        """
        self.hf_config, self.attention, self.seed = hf_config, attention, seed
        self.trust_remote_code, self.weights = trust_remote_code, weights
        self.generation_config = None if weights is None else weights.generation_config()
        self.architecture = type(self._skeleton).__name__
        hf_config.architectures = [self.architecture]
        self._keys = {} if weights is None else self._find_keys(weights)

    def build(self) -> PreTrainedModel:
        """A model of its own with parameters on the meta device, and buffers as they are computed or stored,
        on the CPU."""
        try:
            with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
                model = AutoModelForCausalLM.from_config(
                    copy.deepcopy(self.hf_config),
                    attn_implementation=self.attention,
                    trust_remote_code=self.trust_remote_code,
                    dtype=torch.float32,
                )
        except (ValueError, ImportError) as error:  # an attention that the model or this machine lacks
            raise UserError(f"model.attention {self.attention} cannot be used: {_short(error)}") from None
        except Exception as error:  # transformers checks no values, and raises what it stumbles on
            kind = self.hf_config.model_type
            raise UserError(f"no {kind} model can be built from its config: {_short(error)}") from error
        # else the token that pads, and often ends documents too, starts at 0 and is never trained as an input
        cast(nn.Embedding, model.get_input_embeddings()).padding_idx = None
        model.tie_weights()  # moving to meta has untied them
        self._read_buffers(model)
        return model

    def whole(self) -> PreTrainedModel:
        """The model with all its parameters, in float32 on the CPU."""
        model = self.build()
        parameters = {name: self.tensor(name) for name in self.shapes}
        cast(nn.Module, model).load_state_dict(parameters, strict=False, assign=True)
        model.tie_weights()
        return model

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the parameters, in the model's order."""
        return {name: p.shape for name, p in cast(nn.Module, self._skeleton).named_parameters()}

    def tensor(self, name: str) -> Tensor:
        """A whole parameter, float32 on the CPU."""
        return self.part(name, ())

    def part(self, name: str, index: Index) -> Tensor:
        """``tensor(name)[index]``; of a checkpoint no more than that is read."""
        if self.weights is None:
            return self._fresh(name)[index]
        return self.weights.read(self._keys[name], index).float()

    def persistent_buffers(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides parameters."""
        model = cast(nn.Module, self._skeleton)
        names = model.state_dict().keys()
        return {name: buffer for name, buffer in model.named_buffers() if name in names}

    def save_config(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config.json and generation_config.json for weights of ``dtype``."""
        config = copy.deepcopy(self.hf_config)
        config.dtype = dtype
        config.save_pretrained(folder)
        generation = self.generation_config or GenerationConfig.from_model_config(config)
        generation.save_pretrained(folder)

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        return self.build()

    def _fresh(self, name: str) -> Tensor:
        """Transformers initialises a module's parameters, then its parents may do some of them anew (GPT-2
        scales those that feed the residual stream). All others are on the meta device meanwhile."""
        path, _, _ = name.rpartition(".")
        lineage = _lineage(self._skeleton, path)
        owner, _ = lineage[0]
        meta = dict(owner._parameters)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(derive_seed(self.seed, path))
            try:
                for key, parameter in meta.items():
                    if parameter is not None:
                        owner._parameters[key] = nn.Parameter(torch.full(parameter.shape, torch.nan))
                if callable(reset := getattr(owner, "reset_parameters", None)):
                    reset()
                for module, model in lineage:
                    model._init_weights(module)
                found = cast(Tensor, owner._parameters[name.rpartition(".")[2]]).detach()
            finally:
                owner._parameters.update(meta)
        if found.isnan().any():
            raise UserError(
                f"{self.architecture} does not say how {name} is initialised: start from model.checkpoint"
            )
        return found

    def _find_keys(self, weights: CheckpointFiles) -> dict[str, str]:
        """The name in the files of each parameter: its own, one that is tied to it, or either without or
        with the prefix of the model's body, which files of bare models lack."""
        prefix = f"{self._skeleton.base_model_prefix}."
        aliases: dict[int, list[str]] = {}
        for name, parameter in cast(nn.Module, self._skeleton).named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        found = {}
        for names in aliases.values():
            tried = [*names, *(name.removeprefix(prefix) for name in names), *(prefix + n for n in names)]
            key = next((name for name in tried if name in weights.keys), None)
            if key is None:
                raise UserError(f"cannot load the model {weights.path}: it holds no weights for {names[0]}")
            if weights.shape(key) != self.shapes[names[0]]:
                raise UserError(
                    f"cannot load the model {weights.path}: its {key} is {list(weights.shape(key))}, but its "
                    f"config.json tells of {list(self.shapes[names[0]])}"
                )
            found[names[0]] = key
        return found

    def _read_buffers(self, model: PreTrainedModel) -> None:
        if self.weights is None:
            return
        stored = cast(nn.Module, model).state_dict().keys() & self.weights.keys.keys()
        for name, buffer in cast(nn.Module, model).named_buffers():
            if name in stored:
                buffer.copy_(self.weights.read(name, ()))


def _lineage(model: PreTrainedModel, path: str) -> list[tuple[nn.Module, PreTrainedModel]]:
    """The module at ``path``, its parent and so on up to the model, each with the (sub-)model whose rules of
    initialisation hold for it."""
    found: list[tuple[nn.Module, PreTrainedModel]] = [(model, model)]
    for step in path.split(".") if path else []:
        parent, rules = found[-1]
        module = parent.get_submodule(step)
        found.append((module, module if isinstance(module, PreTrainedModel) else rules))
    return found[::-1]


class CheckpointFiles:
    """The safetensors files of a Hugging Face folder or hub id, mapped into memory when they are needed."""

    def __init__(self, path: str, *, local_only: bool = False) -> None:
        """
        Raises:
            UserError: no safetensors there (pickled weights are never read), or unreadable ones.
        """
        self.path = path
        self._local_only = local_only
        self._open: dict[str, Any] = {}
        self.keys: dict[str, str] = {}
        """File of each tensor."""
        try:
            for file in self._files():
                self.keys |= dict.fromkeys(self._handle(file).keys(), file)
        except (OSError, ValueError, SafetensorError, MemoryError) as error:  # the last as of mapping a file
            raise UserError(f"cannot load the model {path}: {_short(error)}") from None

    def shape(self, key: str) -> torch.Size:
        return torch.Size(self._handle(self.keys[key]).get_slice(key).get_shape())

    def read(self, key: str, index: Index) -> Tensor:
        handle = self._handle(self.keys[key])
        if not index:
            return handle.get_tensor(key)
        # a slice that is empty is an error there, though a shard may be
        shape = handle.get_slice(key).get_shape()
        whole = [slice(None)] * (len(shape) - len(index))
        sizes = [len(range(*part.indices(n))) for part, n in zip([*index, *whole], shape, strict=True)]
        return handle.get_slice(key)[index] if all(sizes) else torch.empty(sizes)

    def generation_config(self) -> GenerationConfig | None:
        try:
            return GenerationConfig.from_pretrained(self.path, local_files_only=self._local_only)
        except (OSError, ValueError, TypeError, AttributeError):  # missing, or no such thing
            return None

    def _files(self) -> list[str]:
        """Of one file there is no index."""
        options: dict[str, Any] = {"local_files_only": self._local_only}
        single = cached_file(
            self.path, SAFE_WEIGHTS_NAME, **options, _raise_exceptions_for_missing_entries=False
        )
        if single is not None:
            return [single]
        index = cached_file(
            self.path, SAFE_WEIGHTS_INDEX_NAME, **options, _raise_exceptions_for_missing_entries=False
        )
        if index is None:
            raise ValueError("it has no safetensors files")
        if Path(self.path).is_dir():
            content = read_json(Path(index), MAX_CONFIG_BYTES)
            try:
                names = sorted({*content["weight_map"].values()})
            except (LookupError, TypeError, AttributeError):
                raise ValueError(f"{index} is no index of weights") from None
            for name in names:
                if not isinstance(name, str) or Path(name).name != name:
                    raise ValueError(f"its index names a file outside of its folder: {name}")
            return [str(Path(self.path) / name) for name in names]
        return get_checkpoint_shard_files(self.path, index, **options)[0]

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            require_ordinary(Path(file))
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]


def fresh_source(
    config: ModelConfig, *, vocab_size: int, token_ids: dict[str, int | None], seed: int
) -> ModelSource:
    """Of ``model.config``.

    Raises:
        UserError: unknown model_type or field.
    """
    assert config.config is not None
    fields: dict[str, Any] = {"vocab_size": vocab_size, **token_ids, **config.config}
    try:
        hf = AutoConfig.for_model(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.config: {_short(error)}") from None
    # the instance takes any keyword for a field; its class's defaults tell which ones are
    unknown = sorted(set(config.config) - set(type(hf)().to_dict()))
    if unknown:
        raise UserError(f"model.config.{unknown[0]} is no field of a {hf.model_type} model")
    return ModelSource(hf, attention=config.attention, seed=seed)


def checkpoint_source(
    path: str,
    *,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    local_only: bool = False,
    context: dict[str, Any] | None = None,
) -> ModelSource:
    """Of a folder or hub id, from safetensors only.

    Args:
        context: as ``model.context``.

    Raises:
        UserError: naming the folder or hub id that could not be loaded.
    """
    if Path(path).is_dir():
        _check_configs(Path(path))
    try:
        hf = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=local_only
        )
    except Exception as error:  # transformers raises what it stumbles on
        raise UserError(f"cannot load the model {path}: {_short(error)}") from error
    if getattr(hf, "quantization_config", None) is not None:
        raise UserError(f"cannot load the model {path}: its weights are quantised; take one that is not")
    if context is not None:
        hf = with_context(hf, context)
    weights = CheckpointFiles(path, local_only=local_only)
    layers = getattr(hf.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(weights.keys):  # building them could take for ever
        raise UserError(
            f"cannot load the model {path}: its config.json tells of {layers} layers, and its files hold "
            f"{len(weights.keys)} tensors"
        )
    return ModelSource(hf, attention=attention, trust_remote_code=trust_remote_code, weights=weights)


def _check_configs(folder: Path) -> None:
    """Of what transformers reads, which does not look at sizes: ordinary files, each with one JSON object."""
    for name in CONFIG_FILES:
        if (folder / name).exists() and not isinstance(read_json(folder / name, MAX_CONFIG_BYTES), dict):
            raise UserError(f"cannot load the model {folder}: {name} holds no JSON object")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def open_source(
    config: ModelConfig, *, vocab_size: int, token_ids: dict[str, int | None], seed: int
) -> ModelSource:
    """The model to train, equal on every rank for equal arguments.

    Args:
        vocab_size: of the data's tokenizer; a fresh model gets it, a checkpoint must have at least it.
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of a fresh model.
        seed: of fresh weights.

    Raises:
        UserError: unknown model_type or field, unreadable checkpoint, vocabulary too small.
    """
    if config.config is not None:
        return fresh_source(config, vocab_size=vocab_size, token_ids=token_ids, seed=seed)
    source = checkpoint_source(
        str(config.checkpoint),
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        context=config.context,
    )
    rows = source.hf_config.get_text_config().vocab_size
    if rows < vocab_size:
        raise UserError(
            f"model.checkpoint {config.checkpoint} has {rows} embeddings but the data's tokenizer "
            f"{vocab_size} tokens; prepare the data with this model's tokenizer"
        )
    return source
