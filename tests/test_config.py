"""Settings: what may be written, what is said when it is wrong, and which layer wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.config import (
    AuthConfig,
    CapsConfig,
    DeliveryConfig,
    HeartbeatConfig,
    ReconnectConfig,
    Settings,
    merge,
    parse_duration,
    parse_size,
    read_environment,
    read_settings,
)
from durablews.configfile import load
from durablews.errors import ConfigError


def read(**settings: Any) -> Settings:
    return read_settings(settings, Settings, "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1500ms", 1.5), ("30s", 30), ("5m", 300), ("72h", 259_200), ("7d", 604_800), ("30", 30), (" 1.5 s ", 1.5)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    """A number with a unit, or seconds."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1", "1,5s", "1e3", "5 minutes", "nan", "inf", "1h30m"])
def test_what_is_no_duration_is_said_to_be_none(text: str) -> None:
    """An unreadable duration is an error that shows how to write one."""
    with pytest.raises(ConfigError, match=r'"30s", "5m" or "72h"'):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("400B", 400), ("50MB", 50_000_000), ("1GiB", 2**30), ("1.5KiB", 1536), ("10", 10), ("1 gb", 10**9)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    """Bytes, or decimal and binary units in any case."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "B", "-5", "1e3", "50 apples", "1PB", "9" * 400])
def test_what_is_no_size_is_said_to_be_none(text: str) -> None:
    """An unreadable size is a ConfigError, never anything else."""
    with pytest.raises(ConfigError):
        parse_size(text)


@given(st.text(max_size=12))
def test_no_text_breaks_the_parsers(text: str) -> None:
    """Whatever is written: a value or a ConfigError."""
    for parse in (parse_duration, parse_size):
        try:
            assert parse(text) >= 0
        except ConfigError:
            pass


def test_texts_numbers_and_structs_mean_the_same() -> None:
    """A duration may be text or a number, a table a mapping or its struct."""
    expected = HeartbeatConfig(interval=20.0)
    assert read(heartbeat={"interval": "20s"}).heartbeat == expected
    assert read(heartbeat={"interval": 20}).heartbeat == expected
    assert read(heartbeat=expected).heartbeat == expected
    assert read().heartbeat == HeartbeatConfig()


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"caps": {"max_age": "none"}}, "caps.max_age"),
        ({"delivery": {"rate_limit": "None"}}, "delivery.rate_limit"),
        ({"delivery": {"max_attempts": "none"}}, "delivery.max_attempts"),
        ({"reconnect": {"max_retries": "none"}}, "reconnect.max_retries"),
        ({"proxy": "none"}, "proxy"),
    ],
)
def test_none_switches_off_what_may_be_off(settings: dict[str, Any], where: str) -> None:
    """In files and the environment, where there is no None."""
    value: Any = read_settings(settings, Settings, "")
    for name in where.split("."):
        value = getattr(value, name)
    assert value is None


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"heartbeat": {"interval": "none"}}, "heartbeat.interval"),
        ({"heartbeat": {"interval": 0}}, "heartbeat.interval"),
        ({"heartbeat": {"interval": -1}}, "heartbeat.interval"),
        ({"heartbeat": {"interval": float("nan")}}, "heartbeat.interval"),
        ({"heartbeat": {"interval": float("inf")}}, "heartbeat.interval"),
        ({"heartbeat": {"interval": True}}, "heartbeat.interval"),
        ({"heartbeat": {"max_missed": 0}}, "heartbeat.max_missed"),
        ({"heartbeat": {"max_missed": 2.5}}, "heartbeat.max_missed"),
        ({"heartbeat": 3}, "heartbeat"),
        ({"reconnect": {"factor": 0.5}}, "reconnect.factor"),
        ({"reconnect": {"jitter": "half"}}, "reconnect.jitter"),
        ({"reconnect": {"jitter": 2}}, "reconnect.jitter"),
        ({"reconnect": {"max_retries": -1}}, "reconnect.max_retries"),
        ({"reconnect": {"base_delay": 50}}, "reconnect.base_delay"),
        ({"caps": {"max_bytes": "1XB"}}, "caps.max_bytes"),
        ({"caps": {"max_bytes": "0B"}}, "caps.max_bytes"),
        ({"caps": {"max_messages": 0}}, "caps.max_messages"),
        ({"caps": {"overflow": "ignore"}}, "caps.overflow"),
        ({"delivery": {"window": 0}}, "delivery.window"),
        ({"delivery": {"window": "5"}}, "delivery.window"),
        ({"delivery": {"window_bytes": 0}}, "delivery.window_bytes"),
        ({"delivery": {"ack_timeout": 0}}, "delivery.ack_timeout"),
        ({"delivery": {"on_retry": "drop"}}, "delivery.on_retry"),
        ({"delivery": {"rate_limit": 0}}, "delivery.rate_limit"),
        ({"delivery": {"rate_limit": float("inf")}}, "delivery.rate_limit"),
        ({"delivery": {"max_attempts": 0}}, "delivery.max_attempts"),
        ({"max_message_size": 10}, "max_message_size"),
        ({"max_message_size": "5TB"}, "max_message_size"),
        ({"durability": "maybe"}, "durability"),
        ({"compression": "gzip"}, "compression"),
        ({"tls": {"cert_file": "c.pem"}}, "tls.cert_file"),
        ({"url": 5}, "url"),
    ],
)
def test_an_error_begins_with_the_name_of_its_setting(settings: dict[str, Any], setting: str) -> None:
    """Whoever reads it knows where to look."""
    with pytest.raises(ConfigError) as caught:
        read_settings(settings, Settings, "")
    assert str(caught.value).startswith(setting)
    with pytest.raises(ConfigError, match=r"^agent\.toml.*" + setting.replace(".", r"\.")):
        read_settings(settings, Settings, "agent.toml")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hartbeat": {}}, "hartbeat is not a setting; did you mean heartbeat?"),
        ({"heartbeat": {"intervall": 3}}, "heartbeat.intervall is not a setting; did you mean interval?"),
        ({"delivery": {"qqqqqq": 3}}, "delivery.qqqqqq is not a setting"),
    ],
)
def test_an_unknown_name_is_an_error_that_offers_a_known_one(settings: dict[str, Any], said: str) -> None:
    """A misspelt setting is never ignored."""
    with pytest.raises(ConfigError) as caught:
        read_settings(settings, Settings, "")
    assert str(caught.value) == said


SECRET = "s3cr3t-t0ken"


@pytest.mark.parametrize(
    "settings",
    [
        {"auth": {"headers": f"Bearer {SECRET}"}},
        {"auth": {"headers": {"Authorization": [SECRET]}}},
        {"auth": {"headers": {"Authorization": {"token": SECRET}}}},
        {"auth": {"headers": {SECRET: 5}}},
        {"auth": SECRET},
        {"auth": {"token_file": [SECRET]}},
        {"auth": {"token": SECRET}},
        {"token": SECRET},
        {"url": [f"wss://user:{SECRET}@example.com"]},
        {"url": {"password": SECRET}},
        {"proxy": [f"http://user:{SECRET}@proxy"]},
        {"tls": {"key_file": SECRET}},
    ],
)
def test_no_secret_stands_in_an_error(settings: dict[str, Any]) -> None:
    """Errors end up in logs: what may be secret is never quoted."""
    with pytest.raises(ConfigError) as caught:
        read_settings(settings, Settings, "agent.toml")
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_file_that_is_no_toml_is_said_to_be_none_without_quoting_it(tmp_path: Path) -> None:
    """Neither a missing file, nor bytes, nor a broken table: always a ConfigError that names the file."""
    path = tmp_path / "agent.toml"
    with pytest.raises(ConfigError, match=r"agent\.toml"):
        load(str(path))
    for content in (f'url = "{SECRET}\n'.encode(), b"\xff\xfe", f"[auth]\ntoken = {SECRET}\n".encode()):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"agent\.toml: not TOML") as caught:
            load(str(path))
        assert SECRET not in str(caught.value)


def test_a_file_is_read_as_nested_names(tmp_path: Path) -> None:
    """The same names in TOML; in a pyproject.toml below [tool.durablews]."""
    path = tmp_path / "agent.toml"
    path.write_text('url = "wss://h"\n[heartbeat]\ninterval = "20s"\n')
    assert read_settings(load(str(path)), Settings, "").heartbeat.interval == 20.0
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "x"\n[tool.durablews.heartbeat]\ninterval = 7\n')
    assert load(str(project)) == {"heartbeat": {"interval": 7}}
    project.write_text('[project]\nname = "x"\n')
    assert load(str(project)) == {}


def test_later_layers_win_name_by_name() -> None:
    """File, environment, keywords: each replaces only what it names, and none is changed."""
    file = {"url": "a", "heartbeat": {"interval": 1, "timeout": 2}}
    environment = {"heartbeat": {"interval": 3}}
    keywords = {"url": "b", "caps": CapsConfig(max_messages=5)}
    merged = merge(file, None, environment, keywords)
    assert merged == {"url": "b", "heartbeat": {"interval": 3, "timeout": 2}, "caps": {"max_messages": 5}}
    assert file == {"url": "a", "heartbeat": {"interval": 1, "timeout": 2}}
    assert environment == {"heartbeat": {"interval": 3}}


def test_the_environment_names_every_setting() -> None:
    """DURABLEWS_ and the name, with its table before it; other variables are left alone."""
    found = read_environment(
        {
            "PATH": "/bin",
            "DURABLEWS_URL": "wss://h",
            "DURABLEWS_HEARTBEAT_INTERVAL": "20s",
            "DURABLEWS_DELIVERY_WINDOW": "64",
            "DURABLEWS_DELIVERY_RATE_LIMIT": "2.5",
            "DURABLEWS_DELIVERY_MAX_ATTEMPTS": "none",
            "DURABLEWS_RECONNECT_JITTER": "0.25",
            "DURABLEWS_CAPS_MAX_BYTES": "50MB",
            "DURABLEWS_MAX_MESSAGE_SIZE": "2048",
        }
    )
    settings = read_settings(found, Settings, "")
    assert settings.url == "wss://h"
    assert settings.heartbeat.interval == 20.0
    assert settings.delivery == DeliveryConfig(window=64, rate_limit=2.5)
    assert settings.reconnect == ReconnectConfig(jitter=0.25)
    assert settings.caps == CapsConfig(max_bytes=50_000_000)
    assert settings.max_message_size == 2048


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("TRUE", True), ("1", True), ("yes", True), ("on", True), ("false", False), ("0", False)],
)
def test_yes_and_no_have_several_words(text: str, value: bool) -> None:
    """A switch in the environment, or as text in a mapping, is what people write."""
    found = read_environment({"DURABLEWS_HEARTBEAT_ADAPTIVE": text})
    assert read_settings(found, Settings, "").heartbeat.adaptive is value
    assert read(heartbeat={"application": text}).heartbeat.application is value


@pytest.mark.parametrize("given", ["maybe", "", "2", 1, None])
def test_a_switch_is_on_or_off(given: object) -> None:
    """Anything else is an error that names the setting."""
    with pytest.raises(ConfigError, match=r"^heartbeat\.adaptive"):
        read(heartbeat={"adaptive": given})


def test_the_settings_of_the_link_have_ranges() -> None:
    """Delays are above zero, and what may be off can be."""
    settings = read(reconnect={"first_delay": "20m", "max_connection_age": "2h"}, auth={"provider_timeout": "3s"})
    assert (settings.reconnect.first_delay, settings.reconnect.max_connection_age) == (1200, 7200)
    assert settings.auth.provider_timeout == 3
    assert read(reconnect={"first_delay": "none", "max_connection_age": None}).reconnect == ReconnectConfig()
    for table, name in (
        ("reconnect", "first_delay"),
        ("reconnect", "max_connection_age"),
        ("auth", "provider_timeout"),
    ):
        with pytest.raises(ConfigError, match=rf"^{table}\.{name}"):
            read(**{table: {name: 0}})


def test_a_text_setting_that_looks_like_a_number_stays_text() -> None:
    """A file may be called 2024, or 1e5."""
    found = read_environment({"DURABLEWS_OUTBOX": "2024", "DURABLEWS_AUTH_TOKEN_FILE": "1e5"})
    settings = read_settings(found, Settings, "")
    assert (settings.outbox, settings.auth) == ("2024", AuthConfig(token_file="1e5"))


def test_an_unknown_variable_is_an_error_without_its_value() -> None:
    """A misspelt variable is never ignored, and what it holds is not shown."""
    with pytest.raises(ConfigError, match=r"did you mean DURABLEWS_HEARTBEAT_INTERVAL\?"):
        read_environment({"DURABLEWS_HEARTBEAT_INTERVALL": "20s"})
    with pytest.raises(ConfigError) as caught:
        read_environment({"DURABLEWS_TOKEN": SECRET})
    assert SECRET not in str(caught.value)


def test_only_caps_that_were_given_are_written_to_the_outbox() -> None:
    """Caps live in the file: an unset one is not there, "none" is; ages are in ms and never 0."""
    assert CapsConfig().explicit() == {}
    assert CapsConfig(max_age=None).explicit() == {"max_age": None}
    assert CapsConfig(max_age=0.0001, overflow="drop_new").explicit() == {"max_age": 1, "overflow": "drop_new"}
    assert read(caps=CapsConfig(max_bytes=5)).caps.explicit() == {"max_bytes": 5}


def test_a_struct_with_a_value_out_of_range_is_refused_too() -> None:
    """msgspec checks ranges only when it converts: a struct that was built by hand is converted."""
    with pytest.raises(ConfigError, match=r"^heartbeat\.interval"):
        read_settings(HeartbeatConfig(interval=-4.0), HeartbeatConfig, "heartbeat")
