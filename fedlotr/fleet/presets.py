"""Fleets by name, in the words of a fleet's file."""

from fedlotr.fleet.forms import Description

FLEETS = {
    "even": Description(devices="laptop", availability="always"),
    "phones": Description(
        devices="phone-budget:0.4,phone:0.4,phone-flagship:0.2", links="4g", availability="day-night", dropout=0.05
    ),
    "edge": Description(
        devices="raspberry-pi-5:0.7,jetson-orin-nano:0.3", links="broadband", availability="bernoulli:0.9"
    ),
    "institutions": Description(devices="a100,t4", links="data-centre", availability="always"),
}
"""Shares, chances and hours are assumptions of ours, such as one would make, not figures of any fleet."""
