"""The chain of links: its order, what it lets through, and a link of a user's, which is one class in one file."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedlotr import SimulationConfig, run_simulation
from fedlotr.commands import simulate
from fedlotr.communication.ledger import read_ledger
from fedlotr.errors import InputError
from fedlotr.flower.chain import LINKS, Chain, link_classes
from fedlotr.flower.client_app import Worker
from fedlotr.flower.link import Job, Link
from fedlotr.flower.links.objectives import Objectives
from fedlotr.flower.records import to_record
from fedlotr.run.unmet import unmet_links
from tests.conftest import ROOT
from tests.support import read_run

TOY = '''
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord

from fedlotr.flower import Link, LinkTraits, Refused


class Toy(Link):
    """Halves what every client changes; both sides count, and tell each other."""

    name = "toy"
    traits = LinkTraits(keeps_client_state=True)

    def __init__(self):
        self.rounds, self.seen = 0, np.zeros(8)

    def outgoing(self, draft):
        draft.records["toy"] = ConfigRecord({"rounds": self.rounds})

    def expects(self, client):
        return {"toy": ArrayRecord({"seen": Array(np.zeros(1, np.float32))})}

    def verify(self, reply):
        if reply.records["toy"]["seen"].numpy()[0] != self.seen[reply.client] + 1:
            raise Refused("toy", "it has lost count")

    def commit(self, good):
        self.rounds += 1
        for reply in good:
            self.seen[reply.client] += 1

    def row(self):
        return {"toy_rounds": self.rounds}

    def state(self):
        return {"rounds": self.rounds, "seen": self.seen}

    def load_state(self, state):
        self.rounds, self.seen = state["rounds"], state["seen"]

    def receive(self, job):
        assert job.records["toy"]["rounds"] == job.round - 1
        before = int(job.memory["toy"]["seen"]) if "toy" in job.memory else 0
        job.memory["toy"] = ConfigRecord({"seen": before + 1})

    def send(self, job):
        tensors = job.trained.tensors
        for name, value in tensors.items():
            start = value.new_tensor(job.records["arrays"][name].numpy())
            tensors[name] = start + (value - start) / 2
        seen = float(job.memory["toy"]["seen"])
        job.beside["toy"] = ArrayRecord({"seen": Array(np.full(1, seen, np.float32))})
'''


@pytest.fixture
def toy(tiny_bert: Path, animals: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "mine.py").write_text(TOY, encoding="utf-8")
    return {
        **{"model": str(tiny_bert), "data": str(animals), "clients": 5, "sample": 2, "rounds": 4, "rank": 4},
        **{"max_examples": 6, "public_examples": 16, "batch_size": 4, "max_length": 16, "method": "lotr"},
        **{"engine": "local", "threads": 1, "lr_schedule": "constant", "add_link": f"{tmp_path / 'mine.py'}:Toy"},
    }


def test_a_link_of_a_users_is_one_class_with_both_sides_and_its_state(
    toy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_simulation(SimulationConfig(**toy, out=tmp_path / "whole"))
    for rounds in (2, 4):
        again = SimulationConfig(**{**toy, "rounds": rounds}, out=tmp_path / "cut", resume=rounds > 2)
        resumed = run_simulation(again)
    assert resumed.summary["trained_sha256"] == whole.summary["trained_sha256"]
    assert read_ledger(tmp_path / "cut" / "ledger") == read_ledger(tmp_path / "whole" / "ledger")
    rows = read_run(tmp_path / "whole")[1]
    assert [row["toy_rounds"] for row in rows] == [0, 1, 2, 3], "what was learnt in a round counts after it"
    assert all(row["failed"] == 0 for row in rows), "every client kept count, and so did the server"
    assert re.search(r"links .*bases.*toy", capsys.readouterr().err)
    plain = run_simulation(SimulationConfig(**{**toy, "add_link": None}, out=tmp_path / "plain"))
    assert plain.summary["trained_sha256"] != whole.summary["trained_sha256"]
    up = [entry for entry in read_ledger(tmp_path / "whole" / "ledger") if entry.direction == "up"]
    assert {entry.kind for entry in up if entry.payload_bytes == 4} == {"control"}, "what it sends is no update"


def test_a_run_that_goes_on_says_that_a_links_code_has_changed(toy: dict[str, Any], tmp_path: Path) -> None:
    fields = {**toy, "rounds": 1, "out": tmp_path / "run"}
    run_simulation(SimulationConfig(**fields))
    again = {**fields, "rounds": 2, "resume": True}
    (tmp_path / "mine.py").write_text(f"{TOY}# mended", encoding="utf-8")
    warnings = run_simulation(SimulationConfig(**again)).summary["warnings"]
    assert f"--add-link {toy['add_link']}: its code has changed since the run began" in warnings
    (tmp_path / "other.py").write_text(f"{TOY}# another", encoding="utf-8")
    with pytest.raises(InputError, match="--resume takes that content under any path"):
        run_simulation(SimulationConfig(**{**again, "rounds": 3, "add_link": f"{tmp_path / 'other.py'}:Toy"}))


@pytest.mark.serial
def test_a_link_runs_in_worker_processes_too(toy: dict[str, Any], tmp_path: Path) -> None:
    alone = run_simulation(SimulationConfig(**{**toy, "rounds": 2, "cohort": 1}, out=tmp_path / "local"))
    fields = {**toy, "rounds": 2, "cohort": 1, "engine": "ray", "workers": 2}
    there = run_simulation(SimulationConfig(**fields, out=tmp_path / "ray"))
    assert there.summary["trained_sha256"] == alone.summary["trained_sha256"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"add_link": "moment"}, "--add-link moment: no such link"),
        ({"add_link": "gone.py:Toy"}, "--add-link: there is no file gone.py"),
        ({"privacy": "example", "epsilon": 8.0}, "--add-link .*without noise"),
        ({"add_link": "fedlotr.flower.link:Link"}, "--add-link fedlotr.flower.link:Link: its name is None"),
        ({"add_link": "fedlotr.flower.links.codec:Codec"}, "--add-link .*:Codec: its name is 'codec'; expected one"),
        ({"add_link": "{toy},{toy}"}, "--add-link .*:Toy: its name is 'toy'; expected one that is none of"),
    ],
)
def test_a_link_that_cannot_stand_there_is_one_clear_error(
    toy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: dict[str, Any], said: str
) -> None:
    given = {name: str(value).format(toy=toy["add_link"]) for name, value in given.items()}
    words = {**toy, "out": tmp_path / "run", **given}
    assert simulate.main([f"--{name.replace('_', '-')}={value}" for name, value in words.items()]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_link_that_keeps_something_of_clients_needs_an_engine_that_shows_it(toy: dict[str, Any]) -> None:
    assert list(unmet_links(SimulationConfig(**toy))) == []
    (said,) = unmet_links(SimulationConfig(**{**toy, "engine": "flower"}))
    assert re.search("--add-link .*:Toy with --engine flower: Flower does not show", said)


def test_the_chain_is_in_order_and_every_link_has_a_name_of_its_own() -> None:
    names = [link.name for link in LINKS]
    assert names == [
        *(
            "personal parts",
            "first loss",
            "objectives",
            "moments",
            "carry",
            "bases",  # which arrive before what is folded between them
            "ranks",
            "draws",
            "noised mean of the clients",
            "attacks",
            "codec",
        ),
    ]
    assert link_classes(()) == list(LINKS) and len({*names}) == len(names)


def test_updates_meet_the_links_forth_on_the_way_out_and_back_on_the_way_in() -> None:
    class Noting(Link):
        def __init__(self, name: str) -> None:
            for hook in ("outgoing", "arrived", "verify", "incoming", "receive", "send"):
                setattr(self, hook, lambda *given, hook=hook: met.append((hook, name)))

    met: list[tuple[str, str]] = []
    chain, some = Chain([Noting("first"), Noting("last")]), cast(Any, [None])
    chain.arrived(0, {})
    chain.incoming(some)
    chain.receive(some[0])
    assert met == [(hook, name) for hook in ("arrived", "incoming", "receive") for name in ("last", "first")]
    met.clear()
    chain.verify(some[0])
    chain.send(some[0])
    assert met == [(hook, name) for hook in ("verify", "send") for name in ("first", "last")]


def test_those_train_together_whose_messages_agree_in_all_but_the_values_that_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups: list[list[int]] = []
    monkeypatch.setattr(Worker, "_train_alike", lambda self, jobs: groups.append([job.client for job in jobs]))
    here: Any = object.__new__(Worker)
    here.model, here.chain = SimpleNamespace(moving=lambda number: frozenset({"C"})), Chain([Objectives()])

    def job(client: int, head: float = 0.0, rank: int = 2, control: float | None = None, **config: float) -> Job:
        arrays = {"C": np.full((rank, rank), client, np.float32), "head": np.full(3, head, np.float32)}
        records: dict[str, Any] = {"config": ConfigRecord({"server-round": 1, **config}), "arrays": to_record(arrays)}
        if control is not None:
            records["control"] = to_record({"C": np.full((2, 2), control, np.float32)})
        return Job(client=client, records=records, memory={})

    plain, other = [job(0), job(1)], {"lr-factor": 0.5}
    here.train([*plain, job(2, head=1.0), job(3, rank=1), job(4, control=0.0), job(5, control=1.0), job(6, **other)])
    assert groups == [[0, 1], [2], [3], [4], [5], [6]]
    with pytest.raises(ValueError, match="the strategy sends colour, which this client does not act on"):
        here.train([job(0, colour=1.0)])


def test_what_a_message_holds_is_replaced_by_the_chain_alone() -> None:
    """Where the chain posts, and where a reply leaves the house for one of Flower's strategies."""
    found: dict[str, int] = {}
    for path in sorted((ROOT / "fedlotr" / "flower").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(target, ast.Attribute) and target.attr == "content" for target in targets):
                name = path.relative_to(ROOT / "fedlotr").as_posix()
                found[name] = found.get(name, 0) + 1
    assert found == {"flower/chain.py": 1, "flower/strategy.py": 1}


def test_both_sides_of_a_link_stand_in_one_file_of_its_own() -> None:
    homes = [link.__module__ for link in LINKS]
    assert all(home.startswith("fedlotr.flower.links.") for home in homes) and len({*homes}) == len(homes)
