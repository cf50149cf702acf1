"""Fleets by name and by file: each client's device, link and chance, every mistake at once, the same by any order."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedlotr.communication.links import PROFILES, read_links
from fedlotr.errors import InputError
from fedlotr.fleet.devices import DEVICES, UTILISATION, read_device, read_devices
from fedlotr.fleet.fleet import Fleet, read_fleet
from fedlotr.fleet.presets import FLEETS


def of(folder: Path, text: str, clients: int = 4, seed: int = 0, link: str | None = None) -> Fleet:
    (folder / "fleet.yaml").write_text(text)
    links = None if link is None else read_links(link, clients, seed)
    return read_fleet(str(folder / "fleet.yaml"), clients, seed, links)


def mistakes(folder: Path, text: str, **given: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        of(folder, text, **given)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize("name", FLEETS)
def test_presets_are_read(name: str) -> None:
    fleet = read_fleet(name, 50, 0, None)
    assert fleet.clients == len(fleet.devices) == len(fleet.available(0)) == 50
    assert fleet.links is None if name == "even" else len(fleet.links or ()) == 50
    assert fleet.in_words().startswith(f"{name}: ") and "\n" not in fleet.in_words()
    linked = read_fleet(name, 50, 0, read_links("3g", 50, 0))
    assert linked.links == (PROFILES["3g"],) * 50, "--link wins over a preset's"
    assert linked.devices == fleet.devices


def test_a_device_is_its_makers_peak_times_one_assumption() -> None:
    assert DEVICES["raspberry-pi-5"].flops == pytest.approx(UTILISATION * 153.6e9)
    assert DEVICES["a100"].flops == pytest.approx(UTILISATION * 312e12)
    assert all(device.name == name and "our assumption" in device.source for name, device in DEVICES.items())
    assert read_device("flops=50G").flops == 50e9, "nothing is taken off of what is given"


def test_devices_are_in_turn_or_by_shares() -> None:
    assert [device.name for device in read_devices("phone, laptop", 3, 0)] == ["phone", "laptop", "phone"]
    assert [device.flops for device in read_devices("flops=1G,flops=2.5T", 2, 0)] == [1e9, 2.5e12]
    drawn = [device.name for device in read_devices("phone:0.7,laptop:0.3", 1000, 3)]
    assert 650 < drawn.count("phone") < 750
    assert drawn == [device.name for device in read_devices("phone:7,laptop:3", 1000, 3)]


@pytest.mark.parametrize(
    "given", ["phne", "", "flops=", "flops=0", "flops=5X", "speed=5G", "phone:0.5,laptop", "phone:0"]
)
def test_devices_that_there_are_not(given: str) -> None:
    with pytest.raises(InputError, match="devices"):
        read_devices(given, 3, 0)


def test_a_file_says_what_all_have_and_another_what_single_ones_have(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(
        "client,device,flops,link,up,down,latency,dropout\n2,,50G,,5M,20M,40ms,1\n0,t4,,3g,,,,\n"
    )
    fleet = of(tmp_path, "devices: [phone, laptop]\nlinks: 4g\ndropout: 0\nclients: own.csv\n")
    assert [device.name for device in fleet.devices] == ["t4", "laptop", "flops=50G", "laptop"]
    assert fleet.links is not None
    assert [link.name for link in fleet.links] == ["3g", "4g", "up=5M,down=20M,latency=40ms", "4g"]
    assert fleet.dropouts == (0, 0, 1, 0) and fleet.drops_out(2, 9) is not None and fleet.drops_out(0, 9) is None
    assert fleet.compute_seconds(2, 1e11) == 2.0
    (tmp_path / "own.jsonl").write_text('{"client": 1, "flops": 2e9}\n')
    assert of(tmp_path, "clients: own.jsonl\n").compute_seconds(1, 1e9) == 0.5
    assert of(tmp_path, "", link="3g").links == (PROFILES["3g"],) * 4


def test_rows_of_all_clients_may_give_the_links_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("client,link\n1,3g\n0,4g\n")
    assert of(tmp_path, "clients: own.csv\n", clients=2).links == (PROFILES["4g"], PROFILES["3g"])


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(
        "client,device,flops,link,up\n9,phone,,,\n0,phne,,,\n1,t4,5G,3g,5M\n2,,,,5M\n0,t4,,,\n"
    )
    found = mistakes(
        tmp_path,
        "devices: phone,labtop\nlinks: 4g;5g\navailability: sometimes\nclients: own.csv\nrepeat: 5\n",
        link="3g",
    )
    assert [problem.partition(":")[0] for problem in found] == ["fleet.yaml"] * 3 + ["own.csv, line 2"] + [
        f"own.csv, line {line}" for line in (3, 4, 5, 6)
    ] + ["fleet.yaml"]
    said = "\n".join(found)
    for words in (
        "availability sometimes: no such kind",
        "devices labtop: no such device, did you mean 'laptop'",
        "links 5g: no such link, did you mean '4g'",
        "client 9, but the run has 4",
        "device phne: no such device, did you mean 'phone'",
        "device and flops: expected one of both; link and up: expected one of both",
        "down is missing",
        "client 0 has a line already",
        "links: --link gives them too; keep one of both",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("device: phone", "device: no such key, did you mean 'devices'"),
        ("dropout: 1.5", "dropout 1.5: expected at most 1"),
        ("dropout: yes", "dropout true: expected a number"),
        ("dropout: .nan", "dropout nan: expected a number"),
        ("devices: {phone: 1}", "expected text"),
        ("devices: []", "expected text"),
        ("trace: t.csv\nrepeat: 0", "repeat 0: expected more than 0"),
        ("trace: t.csv\navailability: always", "trace, availability always: expected one of both"),
        ("repeat: 5", "repeat: always has none"),
        ("zones: 1", "zones: always has none"),
        ("dropout: 0\ndropout: 1", "dropout is set in line 1 and again in line 2"),
        ("- phone", "expected lines of the form 'devices: phone'"),
        ("devices: !!python/name:os.system x", "not YAML"),
        ("clients: none.csv", "none.csv: cannot be read"),
    ],
)
def test_a_file_that_is_no_fleet(text: str, said: str, tmp_path: Path) -> None:
    assert said in mistakes(tmp_path, text)[0]


def test_clients_of_whom_some_have_no_link(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("client,link\n1,3g\n")
    [problem] = mistakes(tmp_path, "clients: own.csv\n")
    assert "3 clients have none in own.csv" in problem


@pytest.mark.parametrize("given", ["phoens", "none.yaml", "\0", "x" * 5000])
def test_neither_a_preset_nor_a_file(given: str) -> None:
    with pytest.raises(InputError, match="--fleet") as caught:
        read_fleet(given, 4, 0, None)
    assert "phones" in str(caught.value) or "FILE" in str(caught.value)


def test_a_large_file_or_another_than_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "b.yaml").write_bytes(b"#" * (2**20 + 1))
    for name, said in (("a.yaml", "not text in UTF-8"), ("b.yaml", "too many for a fleet"), ("", "no such f")):
        with pytest.raises(InputError, match=said):
            read_fleet(str(tmp_path / name), 4, 0, None)


def test_answers_follow_from_the_seed_and_not_from_the_order_of_questions() -> None:
    def answers(fleet: Fleet, order: random.Random) -> list[object]:
        asked = [(kind, client, job) for kind in "dua" for client in range(5) for job in range(20)]
        order.shuffle(asked)
        found: dict[object, object] = {}
        for kind, client, job in asked:
            at = 137.5 * job
            found[kind, client, job] = (
                fleet.drops_out(client, job)
                if kind == "d"
                else (fleet.until(client, at), fleet.next_arrival(at))
                if kind == "u"
                else fleet.available(at).tolist()
            )
        return [found[key] for key in sorted(found)]

    for name in FLEETS:
        first = answers(read_fleet(name, 5, 3, None), random.Random(0))
        assert first == answers(read_fleet(name, 5, 3, None), random.Random(1))
    assert answers(read_fleet("phones", 5, 3, None), random.Random(0)) != answers(
        read_fleet("phones", 5, 4, None), random.Random(0)
    )


def test_jobs_are_broken_off_as_often_as_said_and_anywhere_in_them(tmp_path: Path) -> None:
    for seed in (0, 1):
        fleet = of(tmp_path, "dropout: 0.2\n", clients=100, seed=seed)
        shares = [
            share for client in range(100) for job in range(50) if (share := fleet.drops_out(client, job)) is not None
        ]
        print(f"seed {seed}: {len(shares)} of 5000, mean share {np.mean(shares):.3f}")
        assert abs(len(shares) / 5000 - 0.2) < 0.025, f"seed {seed}"
        assert abs(np.mean(shares) - 0.5) < 0.05 and 0 <= min(shares) < 0.02 and 0.98 < max(shares) < 1, f"seed {seed}"
    assert "20% of all jobs are broken off" in fleet.in_words()
    always = of(tmp_path, "dropout: 1\n")
    assert all(always.drops_out(0, job) is not None for job in range(100))


def test_a_header_is_one_line_without_the_codes_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31m.csv").write_text("client,from,until\n0,0,1\n")
    words = of(tmp_path, 'devices: "t4,a100,phone,laptop,flops=1G"\ntrace: "a\\x1b[31m.csv"\n', clients=5).in_words()
    assert words.startswith("fleet.yaml: 1 t4, 1 a100, 1 phone, 1 laptop, 1 others; messages take no time; there as a")
    assert "\x1b" not in words and words.endswith("4 without a line never")


def test_neither_torch_nor_flower_is_needed() -> None:
    look = "import fedlotr.fleet.fleet, sys; assert not {'torch', 'flwr', 'ray'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
