"""A model card: what was trained, on what, how, at what cost and with which result, for people and (YAML) for a hub.

The keys of the header that a hub reads are those of https://huggingface.co/docs/hub/model-cards; ours are under
`fedlotr`. Nothing in a card names a place on the machine that it was written on.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from fedlotr.adapters.methods import METHODS
from fedlotr.config.values import is_data_id
from fedlotr.files import finite
from fedlotr.models.kinds import METRICS, TASK_KINDS
from fedlotr.reporting.console import readable_bytes
from fedlotr.reporting.documents import under
from fedlotr.reporting.escaping import markdown
from fedlotr.reporting.run_record import RunRecord

PIPELINES = {
    "causal-lm": "text-generation",
    "classification": "text-classification",
    "regression": "text-classification",
}
"""What a hub calls the tasks of ours."""


CIRCUMSTANCES = {
    "sampling": "clients drawn by",
    "mode": "a round waits for",
    "fleet": "clients in virtual time",
    "fault": "faults on purpose",
    "attack": "hostile clients",
}
"""Keys of a configuration that say what a federation was like -> what a card calls them."""
USUAL = ("uniform", "sync")


class Card:
    """What is said of a run after one of its rounds."""

    def __init__(self, run: RunRecord, number: int, base: str, *, base_id: str | None, notes: tuple[str, ...]) -> None:
        """number: the round. base: what the base is called; base_id: on the hub, if it is there.

        notes: what has been done to the adapter since.
        """
        self.run, self.base, self.base_id, self.notes = run, base, base_id, notes
        self.rows = [row for row in run.rows if row["round"] <= number]

    @property
    def task(self) -> str:
        """Of the model, by our name."""
        return str(self.run.facts.get("task", "classification"))

    @property
    def data(self) -> str:
        """What the data are called: of a path its last part."""
        return PurePath(str(self.run.summary.get("data") or self.run.config["data"])).name

    def _told(self, text: object) -> str:
        """With the last part of each path that the configuration names in place of that."""
        told = str(text)
        for value in self.run.config.values():
            if isinstance(value, str) and "/" in value and not is_data_id(value):
                told = told.replace(value, PurePath(value).name)
        return told

    def scores(self) -> dict[str, float]:
        """Metric -> value after the round, the decisive one first; nothing where it was not evaluated."""
        row: Mapping[str, Any] = self.rows[-1] if self.rows else {}
        usual = TASK_KINDS[self.task].metrics if self.task in TASK_KINDS else METRICS
        names = dict.fromkeys([*([self.run.metric] if self.run.metric else []), *usual, "loss"])
        return {name: value for name in names if isinstance(value := under(row, name), float | int)}

    def facts(self) -> dict[str, Any]:
        """What our part of the header says."""
        config, summary = self.run.config, self.run.summary
        factored = {"rank": config.get("rank"), "alpha": config.get("alpha"), "basis": config.get("basis")}
        found = {
            "method": config["method"],
            **(factored if METHODS[config["method"]].factored else {}),
            "baseline": config.get("baseline"),
            "strategy": None if config.get("strategy") is None else PurePath(str(config["strategy"])).name,
            "rounds": len(self.rows),
            "clients": config["clients"],
            "clients_per_round": self.run.facts.get("clients_per_round"),
            "local_epochs": config.get("local_epochs"),
            "local_steps": config.get("local_steps"),
            "batch_size": config.get("batch_size"),
            "learning_rate": config.get("lr"),
            "partition": config.get("partition"),
            **{name: self._told(config[name]) for name in CIRCUMSTANCES if config.get(name) not in (None, *USUAL)},
            "seed": config["seed"],
            "trained_numbers": summary.get("trained_numbers"),
            "update_bytes": (summary.get("communication") or {}).get("upload_payload_bytes_per_client_round"),
            "wire_bytes": self.run.bytes_so_far[len(self.rows) - 1] if self.rows and self.run.tells_bytes else None,
            "aggregation_error_max": self._certificate(),
            "privacy": self._privacy(),
            "initial": dict(summary.get("initial") or {}) or None,
            "test_split": self._told(summary["test_split"]) if "test_split" in summary else None,
            "versions": summary.get("versions") or self.run.facts.get("versions"),
        }
        return {name: value for name, value in finite(found).items() if value is not None}

    def header(self, library: str) -> str:
        """The YAML header. library: which one loads what the card is of, peft or transformers."""
        results = [{"type": name, "name": name, "value": value} for name, value in self.scores().items()]
        dataset = {"type": self.data, "name": self.data, "split": self.facts().get("test_split")}
        pipeline = PIPELINES.get(self.task, "text-classification")
        adapted = "adapter" if library == "peft" else "finetune"
        data = str(self.run.config["data"])
        fields: dict[str, Any] = {
            **({"base_model": self.base_id, "base_model_relation": adapted} if self.base_id else {}),
            "library_name": library,
            "pipeline_tag": pipeline,
            **({"datasets": [data.partition(":")[0]]} if "/" in data and is_data_id(data) else {}),
            "tags": ["fedlotr", "federated-learning", *(["lora", "peft"] if library == "peft" else [])],
            "model-index": [
                {
                    "name": self.run.name,
                    "results": [
                        {
                            "task": {"type": pipeline},
                            "dataset": {name: value for name, value in dataset.items() if value is not None},
                            "metrics": results,
                        }
                    ],
                }
            ],
            "fedlotr": {"base": self.base, "data": self.data, **self.facts()},
        }
        if not results:
            del fields["model-index"]
        return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)}---\n"

    def body(self) -> str:
        """How it was made, as a section of Markdown."""
        rows = [f"| {title} | {markdown(text)} |" for title, text in self._said() if text]
        return "\n".join(["## How it was trained", "", "| | |", "|---|---|", *rows, ""])

    def _said(self) -> list[tuple[str, str]]:
        facts, run = self.facts(), self.run
        rank = f", rank {facts['rank']}" if "rank" in facts else ""
        by = f", strategy {facts['strategy']}" if "strategy" in facts else ""
        sent = facts.get("update_bytes")
        wire = facts.get("wire_bytes")
        each = f"{readable_bytes(sent)} of payload an update; " if sent else ""
        taking = f"{facts.get('clients_per_round', 'some')} of {facts['clients']} clients a round"
        if run.baseline is not None:
            taking = f"{facts['clients']} clients' examples, baseline {run.baseline}: nothing was sent"
        return [
            ("base", self.base),
            ("data", ", ".join(filter(None, [self.data, str(run.facts.get("splits", ""))]))),
            ("method", f"{facts['method']}{rank}{by}"),
            ("rounds", f"{facts['rounds']}, {taking}"),
            *((title, str(facts.get(name, ""))) for name, title in CIRCUMSTANCES.items()),
            ("bytes", f"{each}{readable_bytes(wire)} on the wire in all rounds" if wire else ""),
            ("certificate", self._certified()),
            ("privacy", self._promised()),
            ("scores", self._scored()),
            *(("since then", note) for note in self.notes),
        ]

    def _certificate(self) -> float | None:
        errors = [row["aggregation_error"] for row in self.rows if row.get("aggregation_error") is not None]
        return max((error for error in errors if error is not None), default=None)

    def _certified(self) -> str:
        if (error := self._certificate()) is not None:
            return f"the published update is the clients' weighted mean; largest relative error of a round {error:.1e}"
        return f"none: {self.run.summary.get('aggregation_error_reason') or 'it is not defined for this run'}"

    def _privacy(self) -> dict[str, Any] | None:
        """What is promised of the rounds so far."""
        unit = self.run.config.get("privacy", "none")
        if unit == "none":
            return None
        told: Mapping[str, Any] = self.run.summary.get("privacy") or {}
        row: Mapping[str, Any] = self.rows[-1] if self.rows else {}
        return {"unit": unit, "epsilon": row.get("epsilon"), "delta": told.get("delta", self.run.config.get("delta"))}

    def _promised(self) -> str:
        if (promise := self._privacy()) is None:
            return "none is promised"
        if promise["epsilon"] is None:
            told: Mapping[str, Any] = self.run.summary.get("privacy") or {}
            return f"one {promise['unit']}: no epsilon is claimed ({told.get('epsilon_reason') or 'none may be'})"
        return f"one {promise['unit']}: epsilon {promise['epsilon']:.3g} at delta {promise['delta']:.2g}"

    def _scored(self) -> str:
        before: Mapping[str, Any] = self.run.summary.get("initial") or {}
        forms = {name: metric.form for name, metric in METRICS.items()}
        found = []
        for name, value in self.scores().items():
            form = forms.get(name, "{:.4f}")
            first = before.get(name)
            was = f" (before training {form.format(first)})" if isinstance(first, float | int) else ""
            found.append(f"{name} {form.format(value)}{was}")
        where = self._told(self.run.summary.get("test_split") or "")
        return "; ".join(found) + (f", on {where}" if found and where else "")
