"""Profiles of network paths: every figure has a source, and what is not there is said so."""

from __future__ import annotations

import re
import tomllib

import pytest

from durablews.analysis import profiles as module
from durablews.analysis.profiles import Figure, Profile, parse_profiles, profile_named, profiles
from durablews.errors import ConfigError

GOOD = """
[my-path]
title = "My path"
idle_limit = { value = "90s", source = "measured" }
largest_message = { value = "128KB", source = "its manual" }
"""

# What is plausible: seconds of silence, seconds of life, bytes.
RANGES = {"idle_limit": (10, 7200), "lifetime": (30, 7 * 86400), "largest_message": (1024, 2**26)}


def figures(profile: Profile) -> dict[str, Figure]:
    return {name: figure for name in RANGES if (figure := getattr(profile, name)) is not None}


def test_a_profile_is_read_in_seconds_and_bytes() -> None:
    """A figure is a plain number of seconds or bytes, however it is spelled in the file."""
    assert parse_profiles(GOOD) == {
        "my-path": Profile(
            name="my-path",
            title="My path",
            idle_limit=Figure(90.0, "measured"),
            largest_message=Figure(128_000.0, "its manual"),
        )
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[p]\ntitle = "P"\nidle_limit = { value = "60s" }', "profile p, idle_limit: has no source"),
        ('[p]\ntitle = "P"\nlifetime = { value = "2h", source = "" }', "profile p, lifetime: has no source"),
        ('[p]\ntitle = "P"\nlifetime = { value = "2h", source = "  " }', "profile p, lifetime: has no source"),
        ('[p]\ntitle = "P"\nlifetime = { value = "2h", source = 7 }', "profile p, lifetime: has no source"),
        ('[p]\ntitle = "P"\nidle_limit = "60s"', "profile p, idle_limit: must be"),
        ('[p]\ntitle = "P"\nidle_limit = { value = 60, source = "s" }', "profile p, idle_limit: must be"),
        ('[p]\ntitle = "P"\nidle_limit = { source = "s" }', "profile p, idle_limit: must be"),
        ('[p]\ntitle = "P"\nidle_limit = { value = "1 fortnight", source = "s" }', "'1 fortnight' is not a duration"),
        ('[p]\ntitle = "P"\nlargest_message = { value = "60s", source = "s" }', "'60s' is not a size"),
        ('[p]\ntitle = "P"\nidle_limit = { value = "60s", source = "s", max = "1h" }', "not max"),
        ('[p]\ntitle = "P"', "profile p: has no figure"),
        ('[p]\nidle_limit = { value = "60s", source = "s" }', "missing required field `title`"),
        ('[p]\ntitle = "P"\nidle = "1s"\nidle_limit = { value = "60s", source = "s" }', "unknown field `idle`"),
        ('[P_1]\ntitle = "P"\nidle_limit = { value = "60s", source = "s" }', "profile 'P_1': a name is"),
        ("p = 60", "profile p: must be a table"),
        ("[p", "not TOML"),
    ],
)
def test_what_nobody_vouches_for_is_refused(text: str, complaint: str) -> None:
    """A profile without a figure, a figure without a source, and a typing error are named, not loaded."""
    with pytest.raises(ConfigError) as caught:
        parse_profiles(text)
    assert complaint in str(caught.value)


def test_every_profile_of_the_file_is_there() -> None:
    """What the file holds is what `check --profile` offers, the paths that were promised among them."""
    assert list(profiles()) == list(tomllib.loads(module._FILE.read_text(encoding="utf-8")))
    promised = "aws-alb aws-nlb aws-nat aws-api-gateway cloudflare heroku nginx azure-lb azure-front-door"
    promised += " azure-app-service gcp-lb cloud-run cloud-nat envoy haproxy"
    assert set(promised.split()) <= set(profiles())


@pytest.mark.parametrize("name", profiles())
def test_a_profile_is_plausible(name: str) -> None:
    """Each has a kebab-case name, a title, and at least one figure of a plausible size with a source of some length."""
    profile = profiles()[name]
    assert profile.name == name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert profile.title.strip() == profile.title != ""
    assert figures(profile)
    for field, figure in figures(profile).items():
        least, most = RANGES[field]
        assert least <= figure.value <= most
        assert len(figure.source) > 20
    if profile.idle_limit and profile.lifetime:
        assert profile.idle_limit.value <= profile.lifetime.value


def test_some_figures_by_hand() -> None:
    """The seconds and bytes are those of the research, not of a slip of the pen."""
    found = {
        (name, field): figure.value
        for name, profile in profiles().items()
        for field, figure in figures(profile).items()
    }
    assert found["aws-alb", "idle_limit"] == 60
    assert found["aws-nlb", "idle_limit"] == found["aws-nat", "idle_limit"] == 350
    assert found["aws-api-gateway", "idle_limit"] == 600
    assert found["aws-api-gateway", "lifetime"] == 7200
    assert found["aws-api-gateway", "largest_message"] == 32_000
    assert found["heroku", "idle_limit"] == 55
    assert found["cloudflare", "idle_limit"] == 100
    assert found["azure-lb", "idle_limit"] == 240
    assert found["azure-front-door", "lifetime"] == 4 * 3600
    assert found["cloud-nat", "idle_limit"] == 1200
    assert found["uvicorn", "largest_message"] == 16 * 2**20


def test_what_could_not_be_confirmed_says_so() -> None:
    """A figure that is only repeated, and found nowhere, carries the word."""
    unconfirmed = {
        name for name, profile in profiles().items() for f in figures(profile).values() if "[unconfirmed]" in f.source
    }
    assert unconfirmed == {"azure-app-service"}


def test_a_profile_is_found_by_its_name() -> None:
    """The name is the key."""
    assert profile_named("heroku") is profiles()["heroku"]


@pytest.mark.parametrize(
    ("name", "guess"), [("aws-abl", "aws-alb"), ("AWS-ALB", "aws-alb"), ("cloudfare", "cloudflare")]
)
def test_a_name_that_is_nearly_right_is_guessed(name: str, guess: str) -> None:
    """A slip of the pen is answered with the name that was meant, and with all there are."""
    with pytest.raises(ConfigError) as caught:
        profile_named(name)
    assert f"there is no profile {name!r}; did you mean {guess}? there are: aiohttp, aws-alb, " in str(caught.value)
    assert all(known in str(caught.value) for known in profiles())


def test_a_name_like_no_other_gets_the_list() -> None:
    """Nothing is guessed where nothing is near."""
    with pytest.raises(ConfigError, match=r"^there is no profile 'zzz'; there are: aiohttp, aws-alb"):
        profile_named("zzz")
