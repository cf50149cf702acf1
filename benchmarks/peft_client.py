"""The client that a competent user of Flower and PEFT would write: LoRA, the base cached in the actor.

It lives in a module of its own because Flower sends an app of `__main__` by value with every message, and its caches
would be empty each time. No dropout, as on our side; tokens are made once and kept in the actor.
"""

import json
import re
from functools import cache, lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

app = ClientApp()
ENCODER_LINEAR = r"encoder\.encoder\..*\.(query|key|value|dense)"


class Classifier(nn.Module):
    """A sentence encoder, the mean of its token vectors, and a linear head."""

    def __init__(self, path: str, labels: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(path, local_files_only=True, add_pooling_layer=False)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: torch.Tensor = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        return logits


def build(job: dict[str, Any], rank: int) -> PeftModel:
    """The base with LoRA on all linear layers of its encoder, and a trained head."""
    torch.manual_seed(0)
    model = Classifier(job["model"], job["labels"])
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    targets = [name for name, _ in model.named_modules() if re.fullmatch(ENCODER_LINEAR, name)]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=["classifier"])
    return get_peft_model(model, config)


@lru_cache(maxsize=1)
def read_job(path: str) -> dict[str, Any]:
    """What to train on what."""
    with open(path, encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


cached_model = lru_cache(maxsize=1)(lambda path, rank: build(read_job(path), rank))


@lru_cache(maxsize=1)
def tokenizer(path: str) -> Any:
    """The base's."""
    return AutoTokenizer.from_pretrained(read_job(path)["model"], local_files_only=True)


@cache
def examples(path: str, client: int) -> list[dict[str, Any]]:
    """A client's tokens and labels."""
    job = read_job(path)
    rows = job["parts"][client]
    encoded = tokenizer(path)([row["text"] for row in rows], truncation=True, max_length=job["max_length"])
    return [{"input_ids": ids, "label": row["label"]} for ids, row in zip(encoded["input_ids"], rows, strict=True)]


@app.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch of AdamW from the server's LoRA."""
    config: Any = message.content["config"]
    path, rank = str(config["job"]), int(config["rank"])
    job = read_job(path)
    model = cached_model(path, rank) if config["cached"] else build(job, rank)
    arrays: Any = message.content["arrays"]
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    pad = tokenizer(path)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}

    shuffle = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    data = examples(path, int(context.node_config["partition-id"]))
    loader: Any = DataLoader(
        data,  # type: ignore[arg-type]
        batch_size=job["batch_size"],
        shuffle=True,
        collate_fn=collate,
        generator=shuffle,
    )
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=job["lr"])
    total = 0.0
    for batch in loader:
        loss = nn.functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        total += float(loss.detach()) * len(batch["labels"])
    metrics = MetricRecord({"num-examples": len(data), "loss": total / len(data)})
    record = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)
