"""Model classes as a user would write them, in a module that workers can import; nothing of fedlotr is in it."""

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, PretrainedConfig, PreTrainedModel


class DeepClassifier(BertPreTrainedModel):
    """BERT's first token under a classifier of two layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Sequential(nn.Linear(config.hidden_size, 12), nn.Tanh(), nn.Linear(12, config.num_labels))
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: torch.Tensor = self.classifier(hidden[:, 0])
        return logits


class BagConfig(PretrainedConfig):
    model_type = "bag-of-words"

    def __init__(self, vocab_size: int = 512, width: int = 24, **others: Any) -> None:
        super().__init__(**others)
        self.vocab_size, self.width = vocab_size, width


class BagOfWords(PreTrainedModel):
    """An architecture that transformers does not know: the mean of the words' vectors, mixed twice."""

    config_class = BagConfig

    def __init__(self, config: BagConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.mix = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, 16)
        self.score = nn.Linear(16, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        mask = attention_mask.unsqueeze(-1).float()
        hidden = torch.tanh(self.mix(self.words(input_ids))) * mask
        logits: torch.Tensor = self.score(torch.tanh(self.out(hidden.sum(1) / mask.sum(1))))
        return logits
