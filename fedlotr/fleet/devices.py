"""Devices of clients: how many floating point operations a second they do at training."""

import re
from dataclasses import dataclass

from fedlotr.communication.spread import UNITS, amount, spread, unknown_amount
from fedlotr.errors import InputError, nearest, shorten

UTILISATION = 0.3
"""Of a device's peak that training comes to: our assumption, one for all of them."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """flops: floating point operations a second at training, not at peak. source: where the number comes from."""

    name: str
    flops: float
    source: str


def _peak(name: str, peak: float, source: str) -> Device:
    """peak: operations a second that the maker's figures come to."""
    return Device(name=name, flops=UTILISATION * peak, source=f"{source}; of that {UTILISATION:.0%}, our assumption")


G, T = 1e9, 1e12
NEON = 16
"""float32 operations a cycle of two 128-bit pipes with fused multiply-add, as Cortex-A76, A78 and A710 have them."""
DEVICES = {
    device.name: device
    for device in (
        _peak("raspberry-pi-5", 4 * 2.4 * NEON * G, "4 Cortex-A76 at 2.4 GHz x 16 float32 operations a cycle"),
        _peak(
            "phone-budget", 2 * 2.2 * NEON * G,
            "Snapdragon 4 Gen 2: 2 Cortex-A78 at 2.2 GHz x 16 float32 operations a cycle, without the small cores",
        ),
        _peak(
            "phone", (2.4 + 3 * 2.36) * NEON * G,
            "Snapdragon 7 Gen 1: Cortex-A710, 1 at 2.4 GHz and 3 at 2.36 GHz x 16 float32 operations a cycle, without"
            " the small cores",
        ),
        _peak(
            "phone-flagship", (3.0 * 2 * NEON + 3 * 2.5 * NEON) * G,
            "Snapdragon 8 Gen 1: 1 Cortex-X2 at 3 GHz x 32 and 3 Cortex-A710 at 2.5 GHz x 16 float32 operations a"
            " cycle, without the small cores",
        ),
        _peak(
            "laptop", 4 * 3.0 * 32 * G,
            "4 cores at 3 GHz with AVX2, two 256-bit fused multiply-adds: 32 float32 operations a cycle; a round"
            " figure, of no model",
        ),
        _peak(
            "jetson-orin-nano", 10 * T,
            "the 8 GB module at 625 MHz: 20 dense INT8 TOPS by NVIDIA's datasheet, half as many in FP16",
        ),
        _peak("t4", 65 * T, "NVIDIA T4: 65 TFLOPS in FP16 on tensor cores, by its datasheet"),
        _peak("a100", 312 * T, "NVIDIA A100: 312 dense TFLOPS in bfloat16 on tensor cores, by its datasheet"),
    )
}  # fmt: skip
"""By core counts, clocks and datasheets, without any measurement. CPUs in float32, GPUs in 16 bits, as they train."""

CUSTOM = "flops=RATE, the operations a second that training comes to, as in flops=50G"
_UNITS = {**UNITS, "T": T}


def read_device(given: str, where: str = "devices") -> Device:
    """A device by name, or its rate alone, of which nothing is taken off. where: what gave it. Raises InputError."""
    if given in DEVICES:
        return DEVICES[given]
    key, equals, value = given.partition("=")
    if not equals:
        raise InputError(f"{where} {shorten(given)}: no such device{nearest(given, DEVICES)} (or {CUSTOM})")
    if key != "flops":
        raise InputError(f"{where} {shorten(given)}: expected {CUSTOM}")
    flops = amount(value, _UNITS)
    if flops is None:
        raise InputError(f"{where} {shorten(given)}: {unknown_amount(_UNITS)}, as in flops=50G")
    return Device(name=given, flops=flops, source="given")


def read_devices(given: str, clients: int, seed: int, where: str = "devices") -> list[Device]:
    """The device of each client: one for all; several in turn, after commas; or by shares, 'phone:0.7,laptop:0.3'.

    where: what gave them. Raises InputError.
    """
    return spread(
        re.split("[,;]", given),
        lambda word: read_device(word, where),
        clients,
        seed,
        "device",
        where=f"{where} {shorten(given)}",
        example="phone:0.7,laptop:0.3",
    )
