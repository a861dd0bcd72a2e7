"""Find the `TransferConfig` that serves a place best: measure a few, look what came out, measure the best again.

A single measurement is worth little where others use the network too, so everything that is compared is measured in
turns, and medians are compared. What choosing needs is kept apart from measuring: those are pure functions.
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

CLEARLY = 1.10  # times the rate of the defaults: below this a user would not notice
SLIGHTLY = 1.03  # measurements of the same setting differ by about this much
ENOUGH = 0.97  # a smaller setting that reaches this share of the best is preferred: it costs less memory
FIRST = 8 * MiB  # bytes of the first measurement, when nothing is known yet
_HOPELESS = 2  # settings in a row that bring nothing end a sweep
_BETTER = 1.05

Transfer = Callable[[TransferConfig, int], None]
"""Move so many bytes, or do so many requests, with this configuration."""


@dataclass
class Gauge:
    """Measures one kind of transfer; what it moves is chosen so that a measurement takes about *seconds*."""

    transfer: Transfer
    largest: int
    """Bytes or requests that can be moved at once, at most."""
    first: int = FIRST
    seconds: float = 0.5
    tick: Callable[[], None] = lambda: None
    amounts: dict[TransferConfig, int] = field(default_factory=dict)
    _rate: float = 0.0

    def rate(self, config: TransferConfig, *, hint: float = 1.0) -> float:
        """Bytes or requests a second, by one measurement. *hint* is how much faster this may be than the last one.

        A configuration is always measured with the same amount.
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
        """Measure all of *configs* with the same amount from now on."""
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
    """Rates by setting, from the smallest up for as long as that brings something; medians of *rounds*."""
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
    """Medians of *rounds* measurements of each, made in turns; *rates* are those made already."""
    return medians(measure_in_turns(gauge, configs, rounds, rates))


def medians(measured: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """The median of each."""
    return {setting: statistics.median(rates) for setting, rates in measured.items()}


def measure_in_turns(
    gauge: Gauge,
    configs: Mapping[int, TransferConfig],
    rounds: int,
    rates: dict[int, list[float]] | None = None,
) -> dict[int, list[float]]:
    """*rounds* measurements of each, made in turns; those with the same index were made next to each other."""
    if rates is None:
        gauge.level(configs.values())
        rates = {setting: [] for setting in configs}
    for number in range(rounds):
        # There and back, so that a drift of the network favours none.
        for setting in list(configs)[:: -1 if number % 2 else 1]:
            if len(rates[setting]) <= number:
                rates[setting].append(gauge.rate(configs[setting]))
    return rates


def is_clearly_faster(other: Sequence[float], default: Sequence[float]) -> bool:
    """Whether *other* beats *default* by a margin, in the median and, but for one, in every pair of measurements."""
    wins = sum(rate > usual * SLIGHTLY for rate, usual in zip(other, default, strict=True))
    is_faster = statistics.median(other) >= statistics.median(default) * CLEARLY
    return is_faster and wins >= max(1, len(default) - 1)


def is_slower(other: Sequence[float], default: Sequence[float]) -> bool:
    """Whether *other* is slower than *default*, by more than measurements differ anyway."""
    return statistics.median(other) * SLIGHTLY < statistics.median(default)


def earns_its_place(others: Sequence[Sequence[float]], defaults: Sequence[Sequence[float]]) -> bool:
    """Whether a setting is to be suggested: clearly faster in one direction, and slower in none."""
    pairs = list(zip(others, defaults, strict=True))
    return any(is_clearly_faster(*pair) for pair in pairs) and not any(is_slower(*pair) for pair in pairs)


def smallest_good(rates: Mapping[int, float], *, enough: float = ENOUGH) -> int:
    """The smallest setting whose rate is *enough* of the best one."""
    best = max(rates.values())
    return min(setting for setting, rate in rates.items() if rate >= best * enough)


def shared(*directions: Mapping[int, float]) -> dict[int, float]:
    """By setting, the share of its best that the worst off of the *directions* reaches.

    A direction whose sweep ended early has at larger settings what it had at its last one.
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
    """*config* with the memory and connections that its concurrency can use."""
    in_flight = config.max_concurrency * max(config.part_size, config.block_size)
    return replace(
        config,
        max_connections=max(config.max_connections, config.max_concurrency),
        read_ahead=max(config.read_ahead, config.max_concurrency * config.part_size),
        memory_limit=max(config.memory_limit, 2 * in_flight),
    )
