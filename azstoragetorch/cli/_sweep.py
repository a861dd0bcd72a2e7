"""Find the best `TransferConfig` for a URL: measure a few, then measure the best ones again.

A single measurement means little on a shared network. So settings that are compared are measured in alternation, and
their medians are compared. The functions that choose settings are pure, and separate from those that measure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from azstoragetorch._engine.config import MiB, TransferConfig

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
PART_SIZES = (4 * MiB, 8 * MiB, 16 * MiB, 32 * MiB)
BLOCK_SIZES = (8 * MiB, 16 * MiB, 32 * MiB)
CONNECTIONS = (16, 32, 64, 128)

CLEARLY = 1.10  # times the rate of the defaults; users would not notice a smaller difference
SLIGHTLY = 1.03  # measurements of the same setting differ by about this factor
ENOUGH = 0.97  # the smallest setting with this share of the best rate is chosen, because it takes less memory
FIRST = 8 * MiB  # bytes of the first measurement, when nothing is known yet
_HOPELESS = 2  # this many consecutive settings without an improvement end a sweep
_BETTER = 1.05

Transfer = Callable[[TransferConfig, int], None]
"""Transfers a number of bytes, or makes a number of requests, with a configuration."""


@dataclass
class Gauge:
    """Measures one kind of transfer, with an amount that takes about *seconds*."""

    transfer: Transfer
    largest: int
    """Maximum bytes or requests of one measurement."""
    first: int = FIRST
    seconds: float = 0.5
    tick: Callable[[], None] = lambda: None
    amounts: dict[TransferConfig, int] = field(default_factory=dict)
    _rate: float = 0.0

    def rate(self, config: TransferConfig, *, hint: float = 1.0) -> float:
        """Measure once, in bytes or requests per second.

        *hint* is the expected ratio to the last rate. A configuration is always measured with the same amount.
        """
        amount = self.amounts.get(config)
        if amount is None:
            amount = self.first if not self._rate else int(self._rate * hint * self.seconds)
            amount = min(self.largest, max(self.first, amount))
            if not self._rate and amount < self.largest:
                self._rate = self._measure(config, amount)  # the first one opens connections too
                amount = min(self.largest, max(self.first, int(self._rate * self.seconds)))
            self.amounts[config] = amount
        self._rate = self._measure(config, amount)
        self.tick()
        return self._rate

    def level(self, configs: Iterable[TransferConfig]) -> None:
        """From now on, measure all of *configs* with the same amount."""
        configs = list(configs)
        amount = min(self.largest, max(self.first, int(self._rate * self.seconds)))
        amount = max([self.amounts.get(config, amount) for config in configs])
        self.amounts.update(dict.fromkeys(configs, amount))

    def _measure(self, config: TransferConfig, amount: int) -> float:
        begin = time.perf_counter()
        self.transfer(config, amount)
        return amount / (time.perf_counter() - begin)


def climb(
    gauge: Gauge, settings: Sequence[int], make: Callable[[int], TransferConfig], rounds: int
) -> dict[int, float]:
    """Median rates by setting, from the smallest up to the point where a larger setting is not faster."""
    rates: dict[int, list[float]] = {}
    best, hopeless = 0.0, 0
    for setting in settings:
        rate = gauge.rate(make(setting), hint=2.0)
        rates[setting] = [rate]
        hopeless = 0 if rate > best * _BETTER else hopeless + 1
        best = max(best, rate)
        if hopeless == _HOPELESS:
            break
    return take_turns(gauge, {setting: make(setting) for setting in rates}, rounds, rates)


def take_turns(
    gauge: Gauge,
    configs: Mapping[int, TransferConfig],
    rounds: int,
    rates: dict[int, list[float]] | None = None,
) -> dict[int, float]:
    """Medians of *rounds* measurements of each, in alternation; *rates* are earlier measurements."""
    return medians(measure_in_turns(gauge, configs, rounds, rates))


def medians(measured: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """The median rate of each setting."""
    return {setting: statistics.median(rates) for setting, rates in measured.items()}


def measure_in_turns(
    gauge: Gauge,
    configs: Mapping[int, TransferConfig],
    rounds: int,
    rates: dict[int, list[float]] | None = None,
) -> dict[int, list[float]]:
    """*rounds* measurements of each, in alternation; those with the same index were made close in time."""
    if rates is None:
        gauge.level(configs.values())
        rates = {setting: [] for setting in configs}
    for number in range(rounds):
        # In alternating order, so that a drift of the network favors none.
        for setting in list(configs)[:: -1 if number % 2 else 1]:
            if len(rates[setting]) <= number:
                rates[setting].append(gauge.rate(configs[setting]))
    return rates


def is_clearly_faster(other: Sequence[float], default: Sequence[float]) -> bool:
    """Whether *other* is faster than *default* by a margin, in the median and in all pairs of measurements but one."""
    wins = sum(rate > usual * SLIGHTLY for rate, usual in zip(other, default, strict=True))
    is_faster = statistics.median(other) >= statistics.median(default) * CLEARLY
    return is_faster and wins >= max(1, len(default) - 1)


def is_slower(other: Sequence[float], default: Sequence[float]) -> bool:
    """Whether *other* is slower than *default* by more than the noise."""
    return statistics.median(other) * SLIGHTLY < statistics.median(default)


def earns_its_place(others: Sequence[Sequence[float]], defaults: Sequence[Sequence[float]]) -> bool:
    """Whether to suggest a setting: it is clearly faster in one direction, and slower in none."""
    pairs = list(zip(others, defaults, strict=True))
    return any(is_clearly_faster(*pair) for pair in pairs) and not any(is_slower(*pair) for pair in pairs)


def smallest_good(rates: Mapping[int, float], *, enough: float = ENOUGH) -> int:
    """The smallest setting whose rate is at least *enough* times the best one."""
    best = max(rates.values())
    return min(setting for setting, rate in rates.items() if rate >= best * enough)


def shared(*directions: Mapping[int, float]) -> dict[int, float]:
    """By setting, the rate as a share of the best one; the smallest share among *directions*.

    If the sweep of a direction ended early, its last rate also counts for larger settings.
    """
    settings = sorted(set().union(*directions))
    shares: dict[int, float] = {}
    for setting in settings:
        reached = [
            rates[max(known for known in rates if known <= setting)] / max(rates.values()) for rates in directions
        ]
        shares[setting] = min(reached)
    return shares


def fitting(config: TransferConfig) -> TransferConfig:
    """*config* with enough memory and connections for its concurrency."""
    in_flight = config.initial_concurrency * max(config.part_size, config.block_size)
    return replace(
        config,
        max_connections=max(config.max_connections, config.initial_concurrency),
        read_ahead=max(config.read_ahead, config.initial_concurrency * config.part_size),
        memory_limit=max(config.memory_limit, 2 * in_flight),
    )
