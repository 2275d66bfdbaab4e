"""Every rule of `durablews check` finds what it is there for and leaves its opposite alone, and is told everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from judged import RULES as FIXTURES
from judged import FakeMachine, findings_of, fixture

from durablews import cli
from durablews.analysis.findings import score
from durablews.analysis.rules.catalogue import RULES, rule_named, selected
from durablews.analysis.surroundings import ThisMachine
from durablews.errors import ConfigError

DOCS = Path(__file__).resolve().parents[1] / "durablews" / "docs" / "check.md"


@pytest.mark.parametrize("code", RULES)
def test_a_rule_finds_its_bad_fixture(code: str) -> None:
    """The bad one is found, by this rule, with its severity, at the line that is to be changed."""
    found = [finding for finding in fixture(f"{code}.bad.toml") if finding.code == code]
    assert found
    assert {finding.severity for finding in found} == {RULES[code].severity}
    lines = (FIXTURES / f"{code}.bad.toml").read_text(encoding="utf-8").splitlines()
    for finding in found:
        assert finding.line is not None
        word = finding.setting.rpartition(".")[2]
        assert word in lines[finding.line - 1] or finding.setting not in "".join(lines)


@pytest.mark.parametrize("code", RULES)
def test_a_rule_leaves_its_good_fixture_alone(code: str) -> None:
    """The good one is next to the bad one, and not found."""
    assert [finding for finding in fixture(f"{code}.good.toml") if finding.code == code] == []


def test_every_rule_is_listed_explained_documented_and_has_both_fixtures(capsys: pytest.CaptureFixture[str]) -> None:
    """The code, --list-rules, explain, the docs and the fixtures know the same rules, with the same words."""
    assert cli.main(["check", "--list-rules"]) == 0
    listed = dict(re.findall(r"^(DWS\d{3})  \w+ +(.+)$", capsys.readouterr().out, re.MULTILINE))
    assert listed == {code: rule.title for code, rule in RULES.items()}
    for code, rule in RULES.items():
        assert cli.main(["explain", code]) == 0
        told = " ".join(capsys.readouterr().out.split())
        for part in (code, rule.severity, rule.title, rule.why, rule.sums, rule.source):
            assert " ".join(part.split()) in told
    documented = re.findall(r"^\| (DWS\d{3}) \| (\w+) \| (.+?) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert documented == [(rule.code, rule.severity, rule.title) for rule in RULES.values()]
    names = {path.name for path in FIXTURES.iterdir()}
    assert names == {f"{code}.{kind}.toml" for code in RULES for kind in ("good", "bad")}


def test_every_rule_has_a_reason_and_a_source() -> None:
    """No rule is just an opinion: it says why, and where it comes from."""
    for code, rule in RULES.items():
        assert rule.code == code
        assert re.fullmatch(r"DWS\d{3}", code)
        assert len(rule.why) > 40
        assert len(rule.source) > 10
    assert list(RULES) == sorted(RULES)


# -- more of what single rules say


def judged(tmp_path: Path, text: str, machine: FakeMachine | None = None, **known: object) -> dict[str, str]:
    """Return code -> message of what is found in a text."""
    path = tmp_path / "agent.toml"
    if "url" not in text:
        text = 'url = "wss://example.com"\noutbox = "/var/lib/agent.db"\n' + text
    path.write_text(text, encoding="utf-8")
    return {finding.code: finding.message for finding in findings_of(path, machine, **known)}


def test_the_defaults_are_without_error_and_warning(tmp_path: Path) -> None:
    """Who sets nothing but where from and where to has nothing to be told, and the full score."""
    path = tmp_path / "agent.toml"
    path.write_text('url = "wss://example.com"\noutbox = "/var/lib/agent.db"\n', encoding="utf-8")
    findings = findings_of(path)
    assert findings == []
    assert score(findings) == 100


@pytest.mark.parametrize(
    ("interval", "profile", "code"),
    [
        ("45s", None, None),
        ("46s", None, "warning"),
        ("10m", None, "warning"),
        ("45s", "aws-alb", None),
        ("46s", "aws-alb", "warning"),
        ("59s", "aws-alb", "warning"),
        ("60s", "aws-alb", "error"),
        ("46s", "azure-lb", None),
    ],
)
def test_the_idle_limit(tmp_path: Path, interval: str, profile: str | None, code: str | None) -> None:
    """At the limit is too late, above three quarters of it is close, and an unknown path counts as 55 s."""
    path = tmp_path / "agent.toml"
    path.write_text(f'url = "wss://x"\noutbox = "/o.db"\n[heartbeat]\ninterval = "{interval}"\n', encoding="utf-8")
    found = [each for each in findings_of(path, profile=profile) if each.code == "DWS202"]
    assert [each.severity for each in found] == ([] if code is None else [code])


def test_an_idle_limit_is_told_as_promised(tmp_path: Path) -> None:
    """The line says the figure, the limit, whose it is, and what to do."""
    path = tmp_path / "agent.toml"
    path.write_text('url = "wss://x"\noutbox = "/o.db"\n\n[heartbeat]\ninterval = "60s"\n', encoding="utf-8")
    (found,) = [each for each in findings_of(path, profile="aws-alb") if each.code == "DWS202"]
    assert str(found) == (
        f"{path}:5:1: DWS202 error: heartbeat.interval 60s is not below the 60s idle limit of aws-alb; use 45s or less"
    )


def test_an_adaptive_interval_counts_as_what_it_may_become(tmp_path: Path) -> None:
    """It begins at 30 s and may go to 60 s, which is too late for a limit of 60 s."""
    found = judged(tmp_path, "[heartbeat]\nadaptive = true\n", profile="aws-alb")
    assert "60s (adaptive: it may grow to that)" in found["DWS202"]


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("wss://example.com", False),
        ("ws://localhost:8765", False),
        ("ws://127.3.2.1", False),
        ("ws://[::1]:80/", False),
        ("ws://192.168.1.7", True),
        ("ws://localhost.example.com", True),
    ],
)
def test_only_this_machine_may_be_spoken_to_in_the_clear(tmp_path: Path, url: str, found: bool) -> None:
    """A private network is not this machine, and a name that begins with localhost is not localhost."""
    assert ("DWS101" in judged(tmp_path, f'url = "{url}"\noutbox = "/o.db"\n')) == found


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("wss://me:pass@example.com/", "a user or a password"),
        ("wss://example.com/?Access_Token=x", "a secret (Access_Token=)"),
        ("wss://example.com/?apikey", "a secret (apikey=)"),
        ("wss://example.com/?monkey=1", None),
    ],
)
def test_a_secret_in_the_url_is_found_and_not_repeated(tmp_path: Path, url: str, found: str | None) -> None:
    """The report names the parameter and never says what it holds."""
    told = judged(tmp_path, f'url = "{url}"\noutbox = "/o.db"\n')
    assert ("DWS103" in told) == (found is not None)
    if found is not None:
        assert found in told["DWS103"]
        assert "pass@" not in str(told)


def test_files_that_others_may_read(tmp_path: Path) -> None:
    """A token file must be its owner's, and so must a file with a secret; a mode that is not known is no sin."""
    machine = FakeMachine()
    machine.modes = {"/t": 0o644, str(tmp_path / "agent.toml"): 0o644}
    assert "mode 0644" in judged(tmp_path, '[auth]\ntoken_file = "/t"\n', machine)["DWS104"]
    headers = '[auth.headers]\nAuthorization = "x"\n'
    assert "others may read the file (mode 0644)" in judged(tmp_path, headers, machine)["DWS104"]
    machine.modes = {"/t": 0o600}
    assert "DWS104" not in judged(tmp_path, '[auth]\ntoken_file = "/t"\n', machine)
    assert "others" not in judged(tmp_path, headers, machine)["DWS104"]


@pytest.mark.parametrize(
    ("kind", "writable", "found"),
    [
        ("ext4", True, None),
        ("tmpfs", True, "empty after a power cut"),
        ("nfs4", True, "network file system"),
        ("ext4", False, "may not write to"),
        ("ext4", None, None),
    ],
)
def test_where_the_outbox_is(tmp_path: Path, kind: str, writable: bool | None, found: str | None) -> None:
    """Memory, networks and locked folders are found; a folder that is not there yet may be made on the device."""
    machine = FakeMachine()
    machine.file_systems["/var/lib/agent.db"], machine.folders["/var/lib/agent.db"] = kind, writable  # type: ignore[assignment]
    told = judged(tmp_path, "", machine)
    assert ("DWS002" in told) == (found is not None)
    assert found is None or found in told["DWS002"]


@pytest.mark.parametrize(
    "text", ["[heartbeat]\nenabled = false\n", "heartbeat = false\n", '[heartbeat]\ninterval = "off"\n']
)
def test_a_heartbeat_can_be_switched_off_in_many_words(tmp_path: Path, text: str) -> None:
    """Each is found as what it means, once, and not as a name or a value that is not known."""
    told = judged(tmp_path, text)
    assert "DWS201" in told
    assert "DWS001" not in told


def test_what_a_dead_letter_or_an_unknown_value_is_reported_as() -> None:
    """A rule that is not looked for does not bring up the general one in its stead."""
    from durablews.analysis.judging import judge
    from durablews.analysis.subject import Circumstances, Subject
    from durablews.configfile import read_config

    file = read_config(str(FIXTURES / "DWS201.bad.toml"))
    subject = Subject(file, Circumstances(), FakeMachine())
    assert judge(subject, ignore=["DWS201"]) == []
    assert [each.code for each in judge(subject, select=["DWS2"])] == ["DWS201"]


def test_how_long_a_limited_number_of_tries_lasts(tmp_path: Path) -> None:
    """The sum of the windows: 1 + 2 + 4 + 8 + 16 + 5 x 30 s, for ten."""
    assert "after about 181s of waiting" in judged(tmp_path, "[reconnect]\nmax_retries = 10\n")["DWS305"]


def test_when_messages_begin_to_go(tmp_path: Path) -> None:
    """The hour and the cap are named, and what happens from then on."""
    told = judged(tmp_path, "[caps]\nmax_messages = 90000\n", rate="2/s", payload="400B", max_outage="72h")["DWS403"]
    assert told == (
        "caps.max_messages 90,000 is reached 12.5 h into an outage of 72h: from then on send() raises OutboxFull"
    )


def test_codes_may_be_beginnings_and_must_be_some() -> None:
    """DWS2 is all of the heartbeat; a slip of the pen is answered with what was meant."""
    assert selected(["dws2"]) == {code for code in RULES if code.startswith("DWS2")}
    with pytest.raises(ConfigError, match="did you mean DWS202"):
        rule_named("DWS222")
    for nonsense in ("DWS9", "", "X"):
        with pytest.raises(ConfigError):
            selected([nonsense])


@pytest.mark.parametrize(
    ("code", "setting", "good", "bad"),
    [
        ("DWS302", "reconnect.jitter", [0.25, 1], [0.24]),
        ("DWS304", "reconnect.max_delay", [10, 300], [9.9, 301]),
        ("DWS306", "reconnect.stable_after", [10], [9.9]),
        ("DWS505", "delivery.max_attempts", [12], [11]),
        ("DWS601", "reconnect.max_retries", [5, 20], [4, 21]),
        ("DWS602", "reconnect.base_delay", [0.5, 5], [0.49, 5.1]),
        ("DWS603", "reconnect.max_delay", [10, 60], [9.9, 61]),
        ("DWS604", "reconnect.connect_timeout", [5, 30], [4.9, 31]),
        ("DWS605", "heartbeat.interval", [15, 60], [14, 61]),
        ("DWS606", "heartbeat.timeout", [5, 15], [4.9, 16]),
        ("DWS607", "heartbeat.max_missed", [2, 5], [1, 6]),
        ("DWS608", "caps.max_messages", [100, 10**6], [99]),
        ("DWS609", "caps.max_age", [601], [59]),
    ],
)
def test_both_ends_of_every_range(tmp_path: Path, code: str, setting: str, good: list[float], bad: list[float]) -> None:
    """A figure at the end of a range is in it, and one just beyond is not."""
    table, name = setting.split(".")
    for value in good:
        assert code not in judged(tmp_path, f"[{table}]\n{name} = {value}\n")
    for value in bad:
        assert code in judged(tmp_path, f"[{table}]\n{name} = {value}\n")


@pytest.mark.parametrize(
    ("code", "text", "good", "bad"),
    [
        ("DWS203", '[heartbeat]\ntimeout = "6s"\n', {"rtt": 2}, {"rtt": 2.1}),
        ("DWS204", '[heartbeat]\ninterval = "50s"\n', {"stale_after": 160}, {"stale_after": 159}),
        ("DWS206", '[reconnect]\nmax_connection_age = "119m"\n', {"profile": "aws-api-gateway"}, None),
        ("DWS206", '[reconnect]\nmax_connection_age = "120m"\n', None, {"profile": "aws-api-gateway"}),
        ("DWS303", "", {"fleet": 500, "accept_rate": 500}, {"fleet": 501, "accept_rate": 500}),
        (
            "DWS402",
            "[caps]\nmax_messages = 1000\n",
            {"disk": 13_420_000, "payload": 400},
            {"disk": 12_410_000, "payload": 400},
        ),
        ("DWS406", "[caps]\nmax_bytes = 10000\n", {"payload": 1000}, {"payload": 1001}),
        ("DWS406", "", {"payload": 1 << 20}, {"payload": (1 << 20) + 1}),
        ("DWS501", "[delivery]\nack_timeout = 2.1\n", {}, None),
        ("DWS501", "[delivery]\nack_timeout = 2\n", None, {}),
        ("DWS501", "[delivery]\nack_timeout = 6\n", {"rtt": 2.9}, {"rtt": 3}),
        ("DWS610", '[heartbeat]\ninterval = "31s"\n', {"profile": "aws-nat"}, {"profile": "nginx"}),
        ("DWS610", 'proxy = "http://proxy:3128"\n[heartbeat]\ninterval = "31s"\n', None, {}),
        ("DWS610", 'proxy = "none"\n[heartbeat]\ninterval = "31s"\n', {}, None),
    ],
)
def test_both_sides_of_every_sum(
    tmp_path: Path, code: str, text: str, good: dict[str, object] | None, bad: dict[str, object] | None
) -> None:
    """What the owner knows decides, to the figure."""
    if good is not None:
        assert code not in judged(tmp_path, text, **good)
    if bad is not None:
        assert code in judged(tmp_path, text, **bad)


def test_the_advice_of_the_first_window_is_enough(tmp_path: Path) -> None:
    """Who does as it says is not told again."""
    told = judged(tmp_path, "", fleet=10_000, accept_rate=500)["DWS303"]
    advised = re.search(r"first_delay = (\w+)", told)
    assert advised
    assert "DWS303" not in judged(
        tmp_path, f'[reconnect]\nfirst_delay = "{advised[1]}"\n', fleet=10_000, accept_rate=500
    )


def test_a_proxy_of_the_environment_counts_for_the_urls_it_is_for(tmp_path: Path) -> None:
    """HTTP_PROXY is not asked for wss://, and what is asked for is named."""
    machine = FakeMachine()
    machine.environment = {"HTTP_PROXY": "http://p:1"}
    assert "DWS106" not in judged(tmp_path, "", machine)
    assert "HTTP_PROXY" in judged(tmp_path, 'url = "ws://localhost/"\noutbox = "/o.db"\n', machine)["DWS106"]
    machine.environment = {"https_proxy": "http://p:1"}
    assert "HTTPS_PROXY" in judged(tmp_path, "", machine)["DWS106"]


def test_this_machine_knows_what_is_mounted_where(tmp_path: Path) -> None:
    """The longest mount point that holds a file counts, the last of two at one place, and no beginning of a name."""
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/a / ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\nx /data nfs4 rw 0 0\n/dev/b /data xfs rw 0 0\n"
        "y /with\\040blank cifs rw 0 0\n",
        encoding="utf-8",
    )
    machine = ThisMachine(str(mounts))
    kinds = {"/run/x.db": "tmpfs", "/running.db": "ext4", "/data/o.db": "xfs", "/with blank/o.db": "cifs", "/o": "ext4"}
    assert {path: machine.file_system(path) for path in kinds} == kinds
    assert ThisMachine(str(tmp_path / "none")).file_system("/o") is None
    assert (machine.is_folder(str(tmp_path)), machine.is_folder(str(mounts))) == (True, False)
    mounts.chmod(0o640)
    assert machine.mode(str(mounts)) == 0o640
    assert machine.mode("/nowhere/at all") is None
    assert machine.writable_folder(str(tmp_path / "o.db")) is True
    assert machine.writable_folder("/nowhere/at/all.db") is None
