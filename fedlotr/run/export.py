"""The `adapter/` folder of a run: a plain PEFT LoRA, and a README whose lines use it without anything of ours."""

from dataclasses import dataclass
from pathlib import Path

from peft import TaskType
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from fedlotr.adapters.export import export_lora
from fedlotr.adapters.layer import widths
from fedlotr.adapters.tuner import factored_layers
from fedlotr.files import write_atomically
from fedlotr.models.loading import HEADS, adaptable_layers
from fedlotr.training.model import TrainableModel

ENCODER = "encoder."
"""What `MeanPooledClassifier` calls the model inside it."""

README = """\
# A LoRA adapter trained with fedlotr

It needs `transformers` and `peft`, nothing of fedlotr; PEFT's `merge_and_unload()` makes plain merged weights of it.
{first}From this folder:

```python
{code}
```
{labels}
Trained with method `{method}` on `{base}`.
{note}"""

OWN = """\
Its base was a model of the caller's own (`{base}`, a {kind}); \
where you have it, save it here once more, as it was given to `run_simulation`:
`model.save_pretrained("base"); tokenizer.save_pretrained("base")`. """

OWN_CLASS = """\
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from {module} import {kind}

base, adapter = {source!r}, "."  # {base}
tokenizer = AutoTokenizer.from_pretrained(base)
config = {kind}.config_class.from_pretrained(base)
config.num_labels, config.pad_token_id = {num_labels}, {pad_id}
model = {kind}.from_pretrained(base, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, adapter).eval()

texts = {texts!r}
tokenizer.pad_token_id, tokenizer.padding_side = {pad_id}, "right"
batch = tokenizer(*texts, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    output = model(**{{name: batch[name] for name in {inputs!r}}})
logits = getattr(output, "logits", output)
print(logits.argmax(-1).tolist())"""

MEAN_POOLED = """\
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

base, adapter = {source!r}, "."  # {base}
tokenizer = AutoTokenizer.from_pretrained(base)
encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), adapter).eval()
head = load_file(f"{{adapter}}/head.safetensors")

texts = {texts!r}
batch = tokenizer(*texts, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    hidden = encoder(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
logits = (hidden * mask).sum(1) / mask.sum(1) @ head["weight"].T + head["bias"]
print(logits.argmax(-1).tolist())"""

CLASSIFIER = """\
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base, adapter = {source!r}, "."  # {base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForSequenceClassification.from_pretrained(
    base, num_labels={num_labels}, pad_token_id={pad_id}, dtype=torch.float32, ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(model, adapter).eval()

texts = {texts!r}
tokenizer.pad_token_id, tokenizer.padding_side = {pad_id}, "right"
batch = tokenizer(*texts, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits
print(logits.argmax(-1).tolist())"""

CAUSAL = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter = {source!r}, "."  # {base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()

batch = tokenizer({texts[0][0]!r}, return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits
print(tokenizer.decode(model.generate(**batch, max_new_tokens=20)[0]))"""


@dataclass(frozen=True)
class OwnBase:
    """A base that the caller brought, which has no name that others know: its class, and the inputs it takes."""

    kind: str
    inputs: tuple[str, ...]


def write_adapter(
    folder: Path,
    model: TrainableModel,
    *,
    base: str,
    source: Path,
    method: str,
    max_length: int,
    labels: tuple[str, ...],
    pair: bool,
    own: OwnBase | None = None,
    note: str = "",
) -> None:
    """Write the adapter with the model's trained tensors as they are assigned now.

    base: what the base model is called: a hub id or a folder. source: the folder it was loaded from here.
    pair: whether the texts are pairs. own: of a base that the caller brought.
    note: what else its README is to say.
    """
    spec = model.spec
    mean_pooled = spec.kind == "classification" and spec.mean_pooled
    layers = factored_layers(model.module)
    first = adaptable_layers(model.module, "all-linear")[0] if not layers else None
    # A head that is a module of its own is saved as one; a layer drawn before it (a pooler's) by itself.
    saved = {name.split(".")[0] if name.split(".")[0] in HEADS else name for name in model.heads}
    head = {
        f"{name}.{part}": tensor
        for name in model.heads
        for part, tensor in model.module.get_submodule(name).named_parameters(recurse=False)
    }
    placeholder = None
    if first is not None:
        bare = model.module.get_submodule(first)
        placeholder = (_inner(first, mean_pooled), *widths(bare), isinstance(bare, Conv1D))
    task: TaskType | None = TaskType.CAUSAL_LM if spec.kind == "causal-lm" else TaskType.SEQ_CLS
    if mean_pooled or spec.code:  # PEFT's models for a task call a base with arguments that others do not know
        task = None
    export_lora(
        folder,
        {_inner(name, mean_pooled): layer for name, layer in layers.items()},
        base=base,
        task=task,
        head=None if mean_pooled else head,
        modules_to_save=() if mean_pooled else sorted(saved),
        placeholder=placeholder,
    )
    if mean_pooled:
        tensors = {name.rpartition(".")[2]: tensor.detach().clone().contiguous() for name, tensor in head.items()}
        save_file(tensors, folder / "head.safetensors")
    code = (
        OWN_CLASS if spec.code else CAUSAL if spec.kind == "causal-lm" else MEAN_POOLED if mean_pooled else CLASSIFIER
    )
    texts = [["A first text.", "And a second, somewhat longer text."]]
    if pair:
        texts.append(["Its other half.", "And the other half of the second."])
    module, _, kind = (spec.code or "").partition(":")
    code = code.format(
        module=module,
        kind=kind,
        inputs=own.inputs if own else (),
        base=base,
        source=str(source) if own is None else "base",
        texts=texts,
        max_length=max_length,
        num_labels=spec.labels,
        pad_id=spec.pad_id,
    )
    first = "" if own is None else OWN.format(base=base, kind=own.kind)
    names = f"\nLabels: {', '.join(f'{i} = {name}' for i, name in enumerate(labels))}.\n" if labels else ""
    write_atomically(
        folder / "README.md",
        README.format(
            code=code, labels=names, method=method, base=base, first=first, note=f"\n{note}\n" if note else ""
        ),
    )


def _inner(name: str, mean_pooled: bool) -> str:
    return name.removeprefix(ENCODER) if mean_pooled else name
