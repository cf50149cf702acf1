"""What a language model says: the same prompts before training, at the best round and at the end of a run."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from fedlotr.adapters.carry import Carry
from fedlotr.errors import shorten
from fedlotr.evaluation.generation import generate, room, stop_ids
from fedlotr.files import as_json, write_atomically
from fedlotr.models.source import first_line
from fedlotr.reporting.documents import Asked, Said, SaidAfter, Samples
from fedlotr.reporting.samples import JSON, MARKDOWN, as_markdown, samples_in
from fedlotr.run.preparation import Prepared
from fedlotr.run.prompts import answer_tokens, chosen, rows_in_words
from fedlotr.said import say

log = logging.getLogger("fedlotr")

Model = tuple[Mapping[str, torch.Tensor], Carry]
"""The tensors that a round published, and what the model carries then."""


class Sampling:
    """The prompts of a run, and what the model says to them, in samples.json and samples.md from the start on.

    A model that transformers cannot generate with, or that fails in it, is no reason for a run to fail: it is said.
    """

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        self._prepared, self._folder = prepared, folder
        self._prompts = chosen(prepared)
        self._tokens = answer_tokens(prepared)
        tokenizer = prepared.checked.tokenizer
        self._stops = stop_ids(prepared.model.module, tokenizer) if self._prompts else ()
        asked: list[Asked] = [
            {
                "row": prompt.row + 1,
                "asked": prompt.asked,
                "prompt": str(tokenizer.decode(prompt.tokens)),
                "left_out": prompt.left_out,
                "reference": prompt.reference,
            }
            for prompt in self._prompts
        ]
        self._samples: Samples = {
            "rows_of": rows_in_words(prepared.checked),
            "tokens": self._tokens,
            "prompts": asked,
            "answers": [],
            "best": None,
            "last": None,
            "notes": [],
        }

    @property
    def wanted(self) -> bool:
        """Whether there is anything to ask, and a model that answers."""
        return bool(self._prompts)

    def begin(self, model: Model) -> None:
        """Have the model answer as it is before training; a run that goes on has these answers already.

        What an end of the run has left, which is not its end any more, is dropped.
        """
        if not self.wanted:
            return
        found = samples_in(self._folder)
        same = found is not None and all(found[key] == self._samples[key] for key in ("rows_of", "tokens", "prompts"))
        if same and found is not None and found["answers"] and found["answers"][0]["round"] == 0:
            self._samples["answers"] = found["answers"][:1]
        else:
            self._ask(0, model)
        self._write()

    def finish(self, last: int, best: int, model_of: Callable[[int], Model | None]) -> None:
        """Have the models of the best and of the last round answer. model_of: a round's; None where it is not here."""
        if not self.wanted:
            return
        self._samples |= {"best": best, "last": last}
        for number in sorted({best, last}):
            if (model := model_of(number)) is not None:
                self._ask(number, model)
            else:
                self._samples["notes"].append(f"The best round ({number}) is left out: no whole checkpoint holds it.")
        self._write()

    def _ask(self, number: int, model: Model) -> None:
        """Have the model of a round answer."""
        if not self.wanted:
            return
        module, (tensors, carry), began = self._prepared.model, model, time.monotonic()
        module.carry(carry)
        module.assign(tensors)
        try:
            answers = generate(module, [prompt.tokens for prompt in self._prompts], self._tokens, self._stops)
        except Exception as error:  # of a model's own code
            log.info("samples", exc_info=True)
            self._prompts = []
            say(f"there are no samples of what the model says after round {number}: {shorten(first_line(error))}")
            return
        said = [self._said(prompt.tokens, ids) for prompt, ids in zip(self._prompts, answers, strict=True)]
        after: SaidAfter = {"round": number, "said": said}
        self._samples["answers"].append(after)
        log.info("samples after round %d: %d prompts in %.1f s", number, len(said), time.monotonic() - began)

    def _said(self, prompt: Sequence[int], answer: Sequence[int]) -> Said:
        limit = room(self._prepared.model.module, prompt, self._tokens)
        return {"text": str(self._prepared.checked.tokenizer.decode(list(answer))), "ended": len(answer) < limit}

    def _write(self) -> None:
        if not self._samples["answers"]:
            return
        config = self._prepared.checked.config
        run = f"{config.method} on {config.model}, {config.data}, seed {config.seed}"
        write_atomically(self._folder / JSON, as_json(self._samples, indent=1) + "\n")
        write_atomically(self._folder / MARKDOWN, as_markdown(self._samples, run))
