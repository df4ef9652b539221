"""Every language model of the zoo as a model of Hugging Face transformers. `import ssmzoo.hf` is the front door.

config.json's model_type "ssmzoo" names the zoo's class and its arguments; the wrapped model is `.model`, so that
its modules have the zoo's names behind "model.". What generation carries is the model's state (`StateCache`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssmzoo.adapt.quantise.stored import restructure
from ssmzoo.inference.export.source import is_ours, read_source
from ssmzoo.inference.export.to_hf import spare_rows
from ssmzoo.inference.export.tokenizer import fast_tokenizer, special_tokens
from ssmzoo.inference.hf_cache import StateCache, as_mask, is_one_token
from ssmzoo.inference.hf_config import MODEL_TYPE, PREFIX, embedding, generic_config, generic_state, head, tied_names
from ssmzoo.inference.hf_hidden import recorded
from ssmzoo.presets import build_model, model_class
from ssmzoo.released.files import CheckpointError

NAMES = [field.name for field in dataclasses.fields(CausalLMOutputWithPast)]
RECOMPUTED = {"use_reentrant": False, "every_n_layers": 1, "offload": False}
CACHE = "cache" if "cache" in NAMES else "past_key_values"  # from transformers 5.24 on, before


class ZooConfig(PreTrainedConfig):
    """target: a class of ssmzoo.models; arguments: of its constructor; quantisation: its form as a model of integers.
    The sizes are for programs that ask for them."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = [CACHE]

    target: str = ""
    arguments: dict | None = None
    quantisation: dict | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool | None = None  # None: as the arguments say; False unties a head
    use_cache: bool = True

    def build(self) -> nn.Module:
        """The zoo's model with fresh weights."""
        node = {"_target_": self.target} | (self.arguments or {})
        if self.quantisation is not None:
            model = build_model(node)
            restructure(model, self.quantisation)
            return model
        takes = inspect.signature(model_class(self.target)).parameters
        untied = self.tie_word_embeddings is False and "tie_embeddings" in takes
        return build_model(node | ({"tie_embeddings": False} if untied else {}))


class ZooForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of ssmzoo with the methods of transformers."""

    config_class = ZooConfig
    main_input_name = "input_ids"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # transformers' word for: the cache cannot be cropped

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        self.model = config.build()
        tied = tied_names(self.model)
        config.tie_word_embeddings = bool(tied)
        self._tied_weights_keys = {PREFIX + name: PREFIX + first for name, first in tied.items()}
        self.takes_keep = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.post_init()

    @classmethod
    def from_model(cls, model: nn.Module, node: dict[str, Any]) -> ZooForCausalLM:
        """Around a model that exists; node: its `_target_` and constructor arguments."""
        wrapped = cls(ZooConfig(**generic_config(model, node)))
        wrapped.model.load_state_dict(model.state_dict())
        return wrapped.train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """transformers' `from_pretrained`, of run folders as well. Raises CheckpointError where weights are missing."""
        path = pretrained_model_name_or_path
        if path is not None and is_ours(path):
            source = read_source(path)
            kwargs["config"] = kwargs.get("config") or run_config(path)
            model = super().from_pretrained(None, *args, state_dict=generic_state(source.model), **kwargs)
            model.generation_config.suppress_tokens = spare_rows(source) or None
            info = {"missing_keys": set()}
        else:
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"]) + sorted(map(str, info.get("mismatched_keys", ())))
        if missing and not kwargs.get("ignore_mismatched_sizes"):
            raise CheckpointError(
                f"{path} does not hold all weights of {model.config.target}: {', '.join(missing[:6])}"
            )
        model.fill_constants()
        return (model, info) if output_loading_info else model

    def fill_constants(self) -> None:
        """Give buffers that no file holds the constructor's values: transformers built the model without any."""
        names = {name for name, _ in self.model.named_buffers()} - self.model.state_dict().keys()
        if names:
            fresh = self.config.build()
            for name in names:
                self.model.get_buffer(name).copy_(fresh.get_buffer(name))

    def _init_weights(self, module: nn.Module) -> None:
        """The zoo's constructors set their initial values."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **loss_options,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids (b l) or inputs_embeds (b l d); attention_mask (b, past + l), 1 for real tokens, 0 for padding on
        any side; labels (b l), shifted here, -100 for none. The loss contains the model's own (`aux`). cache is what
        transformers from 5.24 on calls past_key_values. hidden_states: see `recorded`."""
        if output_attentions:
            raise ValueError("attentions are not returned; ssmzoo.probes looks into the layers")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = input_ids if inputs_embeds is None else inputs_embeds
        cache = self.cache_of(past_key_values if cache is None else cache, use_cache)
        keep = {"logits_to_keep": logits_to_keep} if self.takes_keep and isinstance(logits_to_keep, int) else {}
        state = None if cache is None else cache.state
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        mask = as_mask(attention_mask, x.shape[1])
        told_more = labels is not None or wanted or isinstance(logits_to_keep, Tensor)
        if state is not None and mask is None and not told_more and is_one_token(input_ids):
            logits = cache.token(self.model, input_ids[:, 0])
            output = CausalLMOutputWithPast(logits=logits, **{CACHE: cache})
            return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()
        with recorded(self.model, wanted) as hidden:
            logits, state, aux = self.model(x, state, mask=mask, **keep)
        if not keep:
            logits = logits[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_options)
            loss = loss + sum(value for key, value in aux.items() if key.endswith("_loss"))
        if cache is not None:
            cache.advance(state, x.shape[1])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=tuple(hidden) or None, **{CACHE: cache})
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()

    def cache_of(self, cache: StateCache | None, use_cache: bool | None) -> StateCache | None:
        """The cache of a call: the given one, a new one, or none while training."""
        if cache is not None and not isinstance(cache, StateCache):
            raise ValueError(f"{CACHE} is a {type(cache).__name__}; this model's state is kept in a StateCache")
        wanted = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        return cache if cache is not None or not wanted else StateCache()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """An empty state before the prompt: reading it in chunks needs one from the beginning."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: the state of a recurrent model has "
                "one form only; leave it out"
            )
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = StateCache()

    def get_input_embeddings(self) -> nn.Module | None:
        return embedding(self.model)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._replace(self.get_input_embeddings(), value)

    def get_output_embeddings(self) -> nn.Module:
        return head(self.model)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self._replace(self.get_output_embeddings(), new_embeddings)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        self.model.set_submodule(next(name for name, m in self.model.named_modules() if m is old), new)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """transformers' method; the constructor's arguments follow, so that the saved model is built with the size."""
        table = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        sizes = {"vocab_size": len(table.weight), "pad_vocab_size_multiple": 1}
        known = inspect.signature(type(self.model)).parameters
        self.config.arguments = (self.config.arguments or {}) | {k: v for k, v in sizes.items() if k in known}
        return table

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute every block in the backward pass, without re-entering autograd: the only form that the zoo has."""
        given = {"every_n_layers": every_n_layers, "offload": offload} | (gradient_checkpointing_kwargs or {})
        other = {k: v for k, v in given.items() if v != RECOMPUTED.get(k)}
        if other:
            raise ValueError(f"gradient checkpointing of the zoo's models is {RECOMPUTED}; got {other}")
        self.model.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self.model.set_grad_checkpointing(False)

    @property
    def is_activation_checkpointing(self) -> bool:
        return any(getattr(m, "grad_checkpointing", False) for m in self.model.modules())

    is_gradient_checkpointing = is_activation_checkpointing


def run_config(path: str | Path, **kwargs) -> ZooConfig:
    """The configuration of a run folder or checkpoint; kwargs are those of `PreTrainedConfig.from_dict`."""
    source = read_source(path)
    if source.kind != "language":
        raise CheckpointError(f"{path} holds {source.name}, which is no language model; transformers gets those only")
    fields = generic_config(source.model, source.node, source.quantisation) | special_tokens(source.tokenizer)
    return ZooConfig.from_dict(fields, **kwargs)


def run_tokenizer(path: str | Path, **kwargs):
    """The tokenizer of a run folder or checkpoint as a PreTrainedTokenizerFast."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = read_source(path).tokenizer
    if tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer: it was not trained on text")
    fast, names = fast_tokenizer(tokenizer), special_tokens(tokenizer)
    special = {k.removesuffix("_id"): fast.id_to_token(v) for k, v in names.items() if v is not None}
    return PreTrainedTokenizerFast(tokenizer_object=fast, padding_side="left", **(special | kwargs))


def reads_runs(auto: type, read) -> None:
    """Let a class of transformers with `from_pretrained` read run folders of ours as well."""
    original = auto.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        if is_ours(pretrained_model_name_or_path):
            return read(pretrained_model_name_or_path, **{k: v for k, v in kwargs.items() if k not in HUB})
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    auto.from_pretrained = classmethod(from_pretrained)


HUB = set("cache_dir code_revision force_download local_files_only revision subfolder token trust_remote_code".split())
HUB |= {"_from_auto", "_commit_hash", "use_auth_token", "proxies"}


def register() -> None:
    """Make transformers know the zoo's language models; called by `import ssmzoo.hf`."""
    AutoConfig.register(MODEL_TYPE, ZooConfig, exist_ok=True)
    AutoModelForCausalLM.register(ZooConfig, ZooForCausalLM, exist_ok=True)
    reads_runs(AutoConfig, run_config)
    reads_runs(AutoTokenizer, run_tokenizer)
