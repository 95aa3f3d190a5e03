"""The model with adapters, by transformers and peft."""

from __future__ import annotations

import sys
from typing import Any

TARGETS = ["q_proj", "v_proj"]


def adapted(config: Any) -> Any:
    """The model of this folder with untrained adapters."""
    sys.path.append(str(config["packages"]))  # behind Flower's own packages
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(config["threads"]))
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
