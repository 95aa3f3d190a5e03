"""The methods of transformers' models that the split model refuses by name, each with its reason and remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

from isthmus.errors import NotSupportedError

C = TypeVar("C", bound=type)


class Refusal(NamedTuple):
    """Why a method is refused, and what to do instead."""

    reason: str
    remedy: str


_VOCABULARY = Refusal(
    "the trunk, the root and all silos hold the same model; one silo cannot change its size",
    "give model.path a folder of a model that was resized before it was cut",
)
_MODULE = Refusal(
    "the parts of a split model are not exchanged",
    "change weights in place, or give model.path a folder of the changed model",
)
_OPEN = Refusal(
    "a split model is a silo's recipe, boundary and connection, which no model folder holds",
    "with isthmus.open(run) as silo: silo.model, or isthmus.join(recipe, name).model",
)
_COPY = Refusal(
    "a copy would share the trunk's adapter, the ledger and the connection, and train them as well",
    "use the one model; for another one with the same adapters call isthmus.open or isthmus.join again",
)
_DTYPE = Refusal(
    "the trunk computes in the recipe's dtype, which a silo's call does not change",
    "set model.dtype in the recipe; mixed precision by torch.autocast works on bottom and top",
)
_CONTINUOUS = Refusal(
    "continuous batching pages a KV cache of all blocks, and the trunk keeps its own",
    "call generate; the trunk batches the requests of its silos by itself",
)
_SHARDED = Refusal(
    "a silo's bottom and top are one process's, and are not sharded",
    "run one process a silo; several silos share a trunk",
)
_HUB = Refusal(
    "a silo's adapters are those of bottom and top alone; without the trunk's they are another model",
    "isthmus export RUN writes a whole PEFT adapter; upload that folder",
)
_KERNELS = Refusal("the trunk chooses its own kernels", "leave them as they are")
_INITIAL = Refusal("the weights are those of model.path", "give model.path the folder of another model")

REFUSALS: dict[str, Refusal] = {
    "resize_token_embeddings": _VOCABULARY,
    "resize_position_embeddings": _VOCABULARY,
    "set_input_embeddings": _MODULE,
    "set_output_embeddings": _MODULE,
    "set_decoder": _MODULE,
    "set_encoder": _MODULE,
    "init_weights": _INITIAL,
    "initialize_weights": _INITIAL,
    "dequantize": _INITIAL,
    "__deepcopy__": _COPY,
    "__reduce_ex__": _COPY,
    "_replicate_for_data_parallel": _COPY,
    "share_memory": _COPY,
    "to_empty": _INITIAL,
    "generate_batch": _CONTINUOUS,
    "init_continuous_batching": _CONTINUOUS,
    "continuous_batching_context_manager": _CONTINUOUS,
    "save_distributed_checkpoint": _SHARDED,
    "prepare_distribute_model": _SHARDED,
    "maybe_distribute_model": _SHARDED,
    "push_to_hub": _HUB,
    "set_use_kernels": _KERNELS,
    "set_experts_implementation": _KERNELS,
}
"""Methods of ``SplitForCausalLM`` that raise ``NotSupportedError``."""
CLASS_REFUSALS: dict[str, Refusal] = {
    "from_pretrained": _OPEN,
    "_from_config": _OPEN,
    "register_for_auto_class": _OPEN,
}
"""Class methods that raise it."""
DTYPE = _DTYPE
"""Why ``half``, ``bfloat16``, ``double`` and ``to(dtype)`` are refused where they would change a parameter."""
GENERATION_REFUSALS: dict[str, Refusal] = {
    "cache_implementation": Refusal("the cache of a split model has its own form", "leave cache_implementation out"),
    "cache_config": Refusal("the cache of a split model has its own form", "leave cache_config out"),
    "assistant_early_exit": Refusal(
        "the first blocks with the head, which would draft, lie in different places",
        "pass an assistant_model, prompt_lookup_num_tokens, or a draft (docs/features/drafting.md)",
    ),
    "use_mtp": Refusal(
        "prediction heads of several tokens are not cut", "pass an assistant_model or prompt_lookup_num_tokens"
    ),
    "speculation_type": Refusal(
        "this drafting reads hidden states of the trunk's blocks", "pass an assistant_model or prompt_lookup_num_tokens"
    ),
}
"""Fields of ``GenerationConfig`` that a generation refuses when they are set."""
HUB_MODE = Refusal(
    "this way of decoding is code of the Hub, which reads the outputs of all blocks or handles a cache of its own",
    "use greedy search, sampling, beams, an assistant_model or prompt_lookup_num_tokens",
)
"""Why contrastive search, DoLa, constrained and group beam search are refused."""
CACHE_REFUSALS: dict[str, Refusal] = {
    "__deepcopy__": Refusal(
        "a copy would share its session on the trunk",
        "call model.new_cache() and pass the text again, or crop the cache to go back",
    ),
    "__reduce_ex__": Refusal(
        "a cache's trunk part ends with the connection", "call model.new_cache() and pass the text again"
    ),
    "reset": Refusal("a session on the trunk has one generation", "call model.new_cache()"),
    "offload": Refusal("the trunk keeps its own part of the cache", "leave the cache where it is"),
    "prefetch": Refusal("the trunk keeps its own part of the cache", "leave the cache where it is"),
    "update": Refusal("blocks update the parts of the cache", "pass the cache to the model as past_key_values"),
    "early_initialization": Refusal("the first forward makes the cache's tensors", "leave it out"),
}
"""Methods of ``SplitCache`` that raise it."""


def refuse(name: str, refusal: Refusal) -> NoReturn:
    """Raise the refusal of ``name``.

    Raises:
        NotSupportedError: always.
    """
    raise NotSupportedError(f"{name}: {refusal.reason}", remedy=refusal.remedy)


def refusing(methods: dict[str, Refusal], class_methods: dict[str, Refusal] | None = None) -> Callable[[C], C]:
    """A class decorator: these methods of the class raise their refusal."""

    def decorate(owner: C) -> C:
        for name, refusal in methods.items():
            setattr(owner, name, _method(f"{owner.__name__}.{name}", refusal))
        for name, refusal in (class_methods or {}).items():
            setattr(owner, name, classmethod(_method(f"{owner.__name__}.{name}", refusal)))
        return owner

    return decorate


def _method(name: str, refusal: Refusal) -> Callable[..., NoReturn]:
    def method(self: Any, *_: Any, **__: Any) -> NoReturn:
        refuse(name, refusal)

    method.__name__ = name.rpartition(".")[2]
    method.__doc__ = f"Not supported: {refusal.reason}."
    return method
