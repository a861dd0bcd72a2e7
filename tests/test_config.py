"""`TransferConfig`: values are checked, defaults can be overridden, and configurations can be pickled."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from azstoragetorch import TransferConfig
from azstoragetorch._engine.config import KiB, MiB
from tests.support import run_python

COUNTS = ["part_size", "block_size", "max_concurrency", "max_connections", "memory_limit", "read_ahead", "max_attempts"]
SECONDS = ["connect_timeout", "read_timeout", "max_backoff"]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", ["8", 1.5, None, True])
def test_a_count_is_an_integer(name: str, value: object) -> None:
    is_auto_possible = name == "max_concurrency" and isinstance(value, str)
    with pytest.raises(ValueError if is_auto_possible else TypeError, match=rf'{name} must be ("auto" or )?an integer'):
        TransferConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", ["8", None, True])
def test_a_time_is_a_number(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number of seconds"):
        TransferConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*COUNTS, *SECONDS])
@pytest.mark.parametrize("value", [-1, 1 << 60])
def test_what_is_out_of_range_is_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be between .* not {value}"):
        TransferConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0])
def test_a_timeout_ends(value: float) -> None:
    with pytest.raises(ValueError, match="read_timeout"):
        TransferConfig(read_timeout=value)


@pytest.mark.parametrize(
    "lowest",
    [{"part_size": 64 * KiB}, {"block_size": 64 * KiB}, {"memory_limit": MiB}, {"read_ahead": 0}, {"max_backoff": 0}],
)
def test_the_ends_of_the_ranges_are_allowed(lowest: dict[str, int]) -> None:
    config = TransferConfig(**lowest)  # type: ignore[arg-type]
    for name, value in lowest.items():
        assert getattr(config, name) == value
        if value:
            with pytest.raises(ValueError, match=name):
                TransferConfig(**{name: value - 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["Auto", "fast", "", 0, -1, float("nan"), float("inf"), 1 << 60])
def test_hedging_needs_a_possible_time(value: object) -> None:
    with pytest.raises(ValueError, match="hedge_after must be"):
        TransferConfig(hedge_after=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_the_budget_of_hedging_is_a_share(value: float) -> None:
    with pytest.raises(ValueError, match="hedge_budget must be between 0 and 1"):
        TransferConfig(hedge_budget=value)


@pytest.mark.parametrize("setting", [{"hedge_after": True}, {"hedge_after": []}, {"hedge_budget": "2 %"}])
def test_hedging_takes_numbers(setting: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(setting))} must be"):
        TransferConfig(**setting)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("AUTO", "auto"), ("none", None), ("0.25", 0.25), (None, "auto")]
)
def test_hedging_can_be_set_by_the_environment(
    text: str | None, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is None:
        monkeypatch.delenv("AZSTORAGETORCH_HEDGE_AFTER", raising=False)
    else:
        monkeypatch.setenv("AZSTORAGETORCH_HEDGE_AFTER", text)
    assert TransferConfig().hedge_after == value


def test_a_variable_for_hedging_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZSTORAGETORCH_HEDGE_AFTER", "soon")
    with pytest.raises(ValueError, match="AZSTORAGETORCH_HEDGE_AFTER='soon'"):
        TransferConfig()


def test_a_typo_is_an_error() -> None:
    with pytest.raises(TypeError, match="part_sise"):
        TransferConfig(part_sise=1)  # type: ignore[call-arg]


def test_validation_is_a_switch() -> None:
    with pytest.raises(TypeError, match="validate_content"):
        TransferConfig(validate_content=1)  # type: ignore[arg-type]


def test_parts_that_are_validated_are_as_small_as_the_service_demands() -> None:
    assert TransferConfig(part_size=8 * MiB, validate_content=True).effective_part_size == 4 * MiB
    assert TransferConfig(part_size=1 * MiB, validate_content=True).effective_part_size == 1 * MiB
    assert TransferConfig(part_size=8 * MiB).effective_part_size == 8 * MiB


def test_it_is_a_value() -> None:
    config = TransferConfig(part_size=1 * MiB)
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(TransferConfig(part_size=1 * MiB))
    assert config != TransferConfig(part_size=2 * MiB)
    with pytest.raises(FrozenInstanceError):
        config.part_size = 1  # type: ignore[misc]


class TestTrustedHosts:
    def test_a_list_becomes_a_value(self) -> None:
        config = TransferConfig(trusted_hosts=["Data.Example.com:8443", "*.example.org"])
        assert config.trusted_hosts == ("data.example.com:8443", ".example.org")
        assert pickle.loads(pickle.dumps(config)) == config
        assert config != TransferConfig()
        assert hash(config) == hash(TransferConfig(trusted_hosts=config.trusted_hosts))

    @pytest.mark.parametrize("hosts", ["data.example.com", None, [1], b"a", {"a.example": 1}, ""])
    def test_a_string_is_not_a_list(self, hosts: object) -> None:
        with pytest.raises(TypeError, match="trusted_hosts must be a list or tuple of strings"):
            TransferConfig(trusted_hosts=hosts)  # type: ignore[arg-type]

    @pytest.mark.parametrize("host", ["https://data.example.com", "*", "", "a b@c", "example.com/c", "a,b", "a\nb"])
    def test_what_names_no_host_is_refused(self, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"trusted_hosts: .* is not a host"):
            TransferConfig(trusted_hosts=[host])
        if host and not {" ", ",", "\n"} & set(host):
            monkeypatch.setenv("AZSTORAGETORCH_TRUSTED_HOSTS", host)
            with pytest.raises(ValueError, match=r"AZSTORAGETORCH_TRUSTED_HOSTS: .* is not a host"):
                TransferConfig()

    def test_the_argument_replaces_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AZSTORAGETORCH_TRUSTED_HOSTS", "a.example, b.example")
        assert TransferConfig().trusted_hosts == ("a.example", "b.example")
        assert TransferConfig(trusted_hosts=()).trusted_hosts == ()


class TestConcurrency:
    def test_it_is_found_unless_a_number_is_given(self) -> None:
        assert TransferConfig().max_concurrency == "auto"
        assert TransferConfig(max_concurrency="auto") == TransferConfig()
        assert TransferConfig().initial_concurrency == 16
        assert TransferConfig(max_connections=3).initial_concurrency == 3
        assert TransferConfig(max_concurrency=100).initial_concurrency == 100

    @pytest.mark.parametrize("value", ["Auto", "fast", "", "16"])
    def test_no_other_word_is_possible(self, value: str) -> None:
        with pytest.raises(ValueError, match=f'max_concurrency must be "auto" or an integer, not {value!r}'):
            TransferConfig(max_concurrency=value)  # type: ignore[arg-type]

    @pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("AUTO", "auto"), ("32", 32)])
    def test_an_operator_can_choose(self, monkeypatch: pytest.MonkeyPatch, text: str, value: object) -> None:
        monkeypatch.setenv("AZSTORAGETORCH_MAX_CONCURRENCY", text)
        assert TransferConfig().max_concurrency == value


class TestEnvironment:
    def test_every_default_can_be_overridden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        base = TransferConfig()
        for setting in fields(TransferConfig):
            value = getattr(base, setting.name)
            special = {"trusted_hosts": ("a.example", "b.example"), "hedge_after": 0.5, "hedge_budget": 0.5}
            special["max_concurrency"] = 20
            if setting.name in special:
                other = special[setting.name]
            else:
                other = (not value) if isinstance(value, bool) else value + 1
            with monkeypatch.context() as patch:
                text = ", ".join(other) if isinstance(other, tuple) else str(other)
                patch.setenv(f"AZSTORAGETORCH_{setting.name.upper()}", text)
                assert TransferConfig() == replace(base, **{setting.name: other})

    def test_a_misspelt_variable_is_warned_about_once(self) -> None:
        program = (
            "import warnings; from azstoragetorch import TransferConfig\n"
            "with warnings.catch_warnings(record=True) as caught:\n"
            "    warnings.simplefilter('always')\n"
            "    TransferConfig(); TransferConfig()\n"
            "print([str(warning.message) for warning in caught])"
        )
        said = run_python(program, AZSTORAGETORCH_MAX_CONCURENCY="3", AZSTORAGETORCH_TRUSTED_HOSTS="a.example")
        assert said.count("MAX_CONCURENCY is not a setting and is ignored; did you mean") == 1
        assert "did you mean AZSTORAGETORCH_MAX_CONCURRENCY?" in said
        assert said.count("is ignored") == 1

    def test_an_argument_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AZSTORAGETORCH_PART_SIZE", str(MiB))
        assert TransferConfig(part_size=2 * MiB).part_size == 2 * MiB

    @pytest.mark.parametrize(
        ("variable", "text"),
        [
            ("PART_SIZE", "8MiB"),
            ("PART_SIZE", ""),
            ("READ_TIMEOUT", "soon"),
            ("MAX_CONCURRENCY", "many"),
            ("VALIDATE_CONTENT", "maybe"),
        ],
    )
    def test_what_is_no_value_is_refused_by_the_variable(
        self, monkeypatch: pytest.MonkeyPatch, variable: str, text: str
    ) -> None:
        monkeypatch.setenv(f"AZSTORAGETORCH_{variable}", text)
        with pytest.raises(ValueError, match=f"AZSTORAGETORCH_{variable}"):
            TransferConfig()

    def test_out_of_range_there_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AZSTORAGETORCH_MAX_CONCURRENCY", "0")
        with pytest.raises(ValueError, match="max_concurrency"):
            TransferConfig()

    def test_a_bad_variable_does_not_break_the_import(self) -> None:
        assert run_python("import azstoragetorch.io; print('fine')", AZSTORAGETORCH_PART_SIZE="x") == "fine\n"
