"""The client that a competent user of Flower and PEFT would write: LoRA, the base cached in the actor.

It lives in a module of its own because Flower sends an app of `__main__` by value with every message, and its caches
would be empty each time. No dropout, as on our side; tokens are made once and kept in the actor; batches are padded to
their longest. In bfloat16 the base is loaded so and computes under autocast, as the Trainer's `bf16` has it: of the
ways to use bfloat16 with PEFT the fastest here.
"""

import json
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

app = ClientApp()
ENCODER_LINEAR = r"encoder\.encoder\..*\.(query|key|value|dense)"
IGNORED = -100


@dataclass(frozen=True)
class Setting:
    """Where the job lies, and how the base computes. attention: sdpa or eager, as transformers calls them."""

    job: str
    rank: int
    dtype: str
    attention: str


class Classifier(nn.Module):
    """A sentence encoder, the mean of its token vectors, and a linear head."""

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)  # type: ignore[union-attr, arg-type]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: torch.Tensor = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        return logits


def build(setting: Setting) -> PeftModel:
    """The base with LoRA on all linear layers of its blocks; of a classifier also a trained head."""
    job = read_job(setting.job)
    torch.manual_seed(0)
    form: Any = {"dtype": getattr(torch, setting.dtype), "attn_implementation": setting.attention}
    if job["task"] == "causal-lm":
        model: Any = AutoModelForCausalLM.from_pretrained(job["model"], local_files_only=True, **form)
        config = LoraConfig(
            r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return get_peft_model(model, config)
    encoder = AutoModel.from_pretrained(job["model"], local_files_only=True, add_pooling_layer=False, **form)
    model = Classifier(encoder, job["labels"])
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    targets = [name for name, _ in model.named_modules() if re.fullmatch(ENCODER_LINEAR, name)]
    config = LoraConfig(
        r=setting.rank, lora_alpha=2 * setting.rank, target_modules=targets, modules_to_save=["classifier"]
    )
    return get_peft_model(model, config)


@lru_cache(maxsize=1)
def read_job(path: str) -> dict[str, Any]:
    """What to train on what."""
    with open(path, encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


cached_model = lru_cache(maxsize=1)(build)


@lru_cache(maxsize=1)
def tokenizer(path: str) -> Any:
    """The base's."""
    return AutoTokenizer.from_pretrained(read_job(path)["model"], local_files_only=True)


def encoded(path: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as tokens and labels; a language model's come with the job, so that all sides learn the same tokens."""
    job = read_job(path)
    if job["task"] == "causal-lm":
        return [
            {"input_ids": ids, "labels": [i if target else IGNORED for i, target in zip(ids, targets, strict=True)]}
            for ids, targets in ((row["ids"], row["targets"]) for row in rows)
        ]
    texts = tokenizer(path)([row["text"] for row in rows], truncation=True, max_length=job["max_length"])
    return [{"input_ids": ids, "labels": row["label"]} for ids, row in zip(texts["input_ids"], rows, strict=True)]


@cache
def examples(path: str, client: int) -> list[dict[str, Any]]:
    """A client's tokens and labels."""
    return encoded(path, read_job(path)["parts"][client])


def collate(path: str, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch, padded to its longest."""
    batch = tokenizer(path).pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
    labels = [row["labels"] for row in rows]
    if isinstance(labels[0], list):
        width = batch["input_ids"].shape[1]
        labels = [row + [IGNORED] * (width - len(row)) for row in labels]
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": torch.tensor(labels)}


def computed(model: Any, setting: Setting, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, as transformers has it where that is a language model's, and the logits."""
    with torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bfloat16"):
        if batch["labels"].dim() == 2:
            found = model(**batch, use_cache=False)
            return found.loss, found.logits
        logits = model(batch["input_ids"], batch["attention_mask"]).float()
    return nn.functional.cross_entropy(logits, batch["labels"]), logits


def train_client(model: Any, setting: Setting, client: int) -> float:
    """One local epoch of AdamW from the LoRA that the model has; the mean loss."""
    job, data = read_job(setting.job), examples(setting.job, client)
    loader: Any = DataLoader(
        data,  # type: ignore[arg-type]
        batch_size=job["batch_size"],
        shuffle=True,
        collate_fn=lambda rows: collate(setting.job, rows),
        generator=torch.Generator().manual_seed(client),
    )
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=job["lr"])
    total = 0.0
    for batch in loader:
        loss, _ = computed(model, setting, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        total += float(loss.detach()) * len(batch["labels"])
    return total / len(data)


def score(model: Any, setting: Setting) -> dict[str, float]:
    """Of the held-out rows: the accuracy, or a language model's loss a target token."""
    job, right, total, count = read_job(setting.job), 0, 0.0, 0
    rows = encoded(setting.job, job["test"])
    with torch.inference_mode():
        for at in range(0, len(rows), 8):
            batch = collate(setting.job, rows[at : at + 8])
            loss, logits = computed(model, setting, batch)
            if job["task"] == "causal-lm":
                targets = int((batch["labels"][:, 1:] != IGNORED).sum())
                total, count = total + float(loss) * targets, count + targets
            else:
                right += int((logits.argmax(-1) == batch["labels"]).sum())
    return {"held_out_loss": total / count} if job["task"] == "causal-lm" else {"accuracy": right / len(rows)}


@app.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch from the server's LoRA, on one thread."""
    torch.set_num_threads(1)
    config: Any = message.content["config"]
    setting = Setting(str(config["job"]), int(config["rank"]), str(config["dtype"]), str(config["attention"]))
    model = cached_model(setting) if config["cached"] else build(setting)
    arrays: Any = message.content["arrays"]
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    loss = train_client(model, setting, client)
    metrics = MetricRecord({"num-examples": len(examples(setting.job, client)), "loss": loss})
    record = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)
