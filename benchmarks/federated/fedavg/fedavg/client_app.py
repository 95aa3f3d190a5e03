"""The client: loads the model, trains a round on its rows, sends its adapters."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .model import adapted

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    config = context.run_config
    model = adapted(config)
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoTokenizer

    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    rows = [json.loads(line) for line in Path(str(context.node_config["rows"])).read_text().splitlines()]
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    size = int(config["batch"])
    for step in range(int(config["steps"])):
        batch = [rows[(step * size + number) % len(rows)] for number in range(size)]
        ids = [tokenizer(row["text"])["input_ids"] for row in batch]
        answers = [tokenizer(row["label"])["input_ids"] for row in batch]
        longest = max(len(one) + len(answer) for one, answer in zip(ids, answers, strict=True))
        fill = [longest - len(one) - len(answer) for one, answer in zip(ids, answers, strict=True)]
        both = list(zip(ids, answers, fill, strict=True))
        tokens = torch.tensor([one + answer + [0] * rest for one, answer, rest in both])
        labels = torch.tensor([[-100] * len(one) + answer + [-100] * rest for one, answer, rest in both])
        mask = torch.tensor([[1] * (longest - rest) + [0] * rest for rest in fill])
        optimizer.zero_grad()
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    arrays = ArrayRecord({name: one.contiguous() for name, one in get_peft_model_state_dict(model).items()})
    trained = {"arrays": arrays, "metrics": MetricRecord({"num-examples": len(rows)})}
    return Message(RecordDict(trained), reply_to=message)
