"""`durablews check` as people and machines meet it: what it reads, what it prints, how it exits, what it writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import COMMAND, ENVIRONMENT, Inbox
from support import named

import durablews
from durablews import cli
from durablews.analysis.reports import as_github
from durablews.analysis.rewriting import as_toml
from durablews.config import ReconnectConfig, Settings, read_settings
from durablews.configfile import ConfigFile, load
from durablews.errors import ConfigError

# The configuration of the other client, as it comes.
REFERENCE = """{
  "url": "wss://example.com/ws",
  "maxRetries": 10,
  "baseDelay": 1000,
  "maxDelay": 30000,
  "connectionTimeout": 10000,
  "heartbeatInterval": 30000,
  "heartbeatTimeout": 10000,
  "maxMissedHeartbeats": 3,
  "queueMaxSize": 1000,
  "queueMaxAge": 300000,
  "autoReconnect": true
}
"""
GOOD = 'url = "wss://example.com"\noutbox = "/var/lib/agent.db"\n'

Check = Callable[..., tuple[int, str, str]]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Write a file, run the command on it in its folder, and return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(content: str | bytes | None, *flags: str, name: str = "agent.toml") -> tuple[int, str, str]:
        if content is not None:
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        code = cli.main(["check", name, *flags])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# -- the other client's configuration


def test_the_reference_configuration_has_no_error_and_a_score(check: Check) -> None:
    """It is judged as it is, in its own names: a limited number of tries is its only warning."""
    code, out, _ = check(REFERENCE, name="config.json")
    assert code == 0
    assert " error: " not in out
    assert re.findall(r"^config\.json:(\d+):(\d+): (DWS\d+) warning: (\w+)", out, re.MULTILINE) == [
        ("3", "3", "DWS305", "maxRetries")
    ]
    assert "\nscore 95 of 100: no errors, 1 warning, 3 notes\n" in out


def test_what_is_wrong_with_it_is_named_at_its_line(check: Check) -> None:
    """Equal delays, no url and a heartbeat of two minutes: each at its line, and exit code 1."""
    wrong = json.loads(REFERENCE)
    del wrong["url"]
    wrong.update(baseDelay=30000, heartbeatInterval=120000)
    text = json.dumps(wrong, indent=2)
    code, out, _ = check(text, name="config.json")
    lines = text.splitlines()
    where = {name: next(i for i, line in enumerate(lines, 1) if name in line) for name in wrong}
    assert code == 1
    assert "config.json:1:1: DWS003 error: url is missing" in out
    assert f"config.json:{where['baseDelay']}:3: DWS301 error: baseDelay 30s is not below maxDelay 30s" in out
    assert f"config.json:{where['heartbeatInterval']}:3: DWS202 warning: heartbeatInterval 120s" in out
    assert f"config.json:{where['heartbeatInterval']}:3: DWS605 warning: heartbeatInterval 120s is above" in out
    assert check(text, "--profile", "aws-alb", name="config.json")[1].count("DWS202 error: heartbeatInterval 120s") == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"maxRetrys": 3}, "DWS001 error: maxRetrys is not a setting; did you mean maxRetries?"),
        ({"maxRetries": "many"}, "DWS001 error: maxRetries: "),
        ({"heartbeatInterval": 0}, "DWS201 error: heartbeatInterval switches the heartbeat off"),
        ({"queueMaxSize": 0}, "DWS401 error: queueMaxSize is to be without limit"),
        ({"autoReconnect": False}, "DWS308 error: autoReconnect switches reconnecting off"),
        ({"baseDelay": -1}, "DWS301 error: baseDelay -0.001s must be above 0"),
        ({"rejectUnauthorized": False}, "DWS102 error: rejectUnauthorized: TLS verification cannot be switched off"),
    ],
)
def test_the_other_clients_names_are_used(check: Check, change: dict[str, Any], found: str) -> None:
    """Whatever is wrong is said in the words of the file, once."""
    code, out, _ = check(json.dumps({**json.loads(REFERENCE), **change}), name="config.json")
    assert code == 1
    assert out.count(found) == 1
    assert out.count(" error: ") == 1


# -- what is no configuration


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("agent.toml", None, "No such file or directory"),
        ("config.json", None, "No such file or directory"),
        ("config.json", "{", "not JSON"),
        ("config.json", '{"url": NaN}', "not JSON"),
        ("config.json", "[]", "must hold one object with settings, not a list"),
        ("config.json", '"x"', "must hold one object with settings, not a text"),
        ("config.json", "[" * 100_000, "nested too deeply"),
        ("config.json", '{"url": 1, "url": 2}', "url is given twice"),
        ("agent.toml", "url =", "not TOML"),
        ("agent.toml", "a = " + "[" * 100_000, "nested too deeply"),
        ("agent.toml", b"\xff\xfe\x00", "not TOML"),
        ("agent.toml", "", None),
        ("pyproject.toml", "tool.durablews = 1", "tool.durablews must be a table"),
    ],
    ids=named,
)
def test_what_is_no_configuration_is_one_line_and_exit_code_2(
    check: Check, name: str, content: str | bytes | None, why: str | None
) -> None:
    """No traceback, whatever the file is. An empty one is a configuration: one without a url."""
    code, out, err = check(content, name=name)
    if why is None:
        assert (code, "url is missing" in out) == (1, True)
        return
    assert (code, out) == (2, "")
    assert err.startswith(f"durablews: {name}: ")
    assert why in err
    assert err.count("\n") == 1


def test_a_hundred_megabytes_of_noise_are_not_read(tmp_path: Path) -> None:
    """It is too large to be a configuration, which takes no memory to say."""
    path = tmp_path / "noise.json"
    with path.open("wb") as file:
        file.write(os.urandom(1 << 20) * 100)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({96 << 20}, {96 << 20})); "
    command = [
        sys.executable,
        "-c",
        limited + "import sys; from durablews.cli import main; sys.exit(main(sys.argv[1:]))",
    ]
    said = subprocess.run([*command, "check", str(path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == f"durablews: {path}: larger than 1 MiB, so no configuration\n"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--profile", "aws-abl"], "did you mean aws-alb"),
        (["--rate", "fast"], "is not a rate"),
        (["--payload", "big"], "is not a size"),
        (["--max-outage", "soon"], "is not a duration"),
        (["--rtt", "0s"], "must be above 0"),
        (["--fleet", "10"], "go together"),
        (["--fleet", "0", "--accept-rate", "1/s"], "must be 1 or more"),
        (["--plot", "x.svg"], "--plot draws a fleet"),
        (["--select", "DWS999"], "there is no rule"),
        (["--ignore", "heartbeat"], "there is no rule"),
    ],
    ids=" ".join,
)
def test_flags_that_mean_nothing_are_told(check: Check, flags: list[str], why: str) -> None:
    """A figure that cannot be is no figure that is left out."""
    code, out, err = check(GOOD, *flags)
    assert (code, out) == (2, "")
    assert why in err
    assert err.count("\n") == 1


def test_without_a_file_it_says_what_it_wants(capsys: pytest.CaptureFixture[str]) -> None:
    """No file is wrong usage, and not an empty configuration."""
    assert cli.main(["check"]) == 2
    assert "CONFIG is missing" in capsys.readouterr().err


# -- reports

MIXED = """\
url = "ws://example.com/?a=1%0A,2"
outbox = "/var/lib/agent.db"
[heartbeat]
interval = "50s"
"""


def test_the_formats_say_the_same(check: Check) -> None:
    """Text, JSON, GitHub's commands and SARIF: the same findings at the same places."""
    code, text, _ = check(MIXED)
    lines = re.findall(r"^(.+?):(\d+):(\d+): (DWS\d+) (\w+): (.*)$", text, re.MULTILINE)
    assert code == 1
    assert len(lines) >= 2
    _, out, _ = check(MIXED, "--format", "json")
    document = json.loads(out)
    keys = ("path", "line", "column", "code", "severity", "message")
    assert [tuple(str(finding[key]) for key in keys) for finding in document["findings"]] == lines
    assert f"score {document['score']} of 100" in text
    _, out, _ = check(MIXED, "--format", "github")
    assert [re.match(r"::(\w+) file=(.+),line=(\d+),col=(\d+),title=(\w+)::", line)[4] for line in out.splitlines()]  # type: ignore[index]
    assert [line.partition(" ")[0] for line in out.splitlines()] == [
        {"error": "::error", "warning": "::warning", "info": "::notice"}[line[4]] for line in lines
    ]
    _, out, _ = check(MIXED, "--format", "sarif")
    (run,) = json.loads(out)["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    for result, line in zip(run["results"], lines, strict=True):
        region = result["locations"][0]["physicalLocation"]["region"]
        assert (str(region["startLine"]), str(region["startColumn"]), result["ruleId"]) == (*line[1:3], line[3])
        assert rules[result["ruleIndex"]] == result["ruleId"]
        assert result["message"]["text"] == line[5]


def test_nothing_in_a_message_ends_githubs_command() -> None:
    """A line end, or a colon in a file's name, would begin a command of its own."""
    finding = durablews.Finding(
        code="DWS001", severity="info", setting="x", message="100 %\n::error::no", path="a:b,c.toml", line=1, column=1
    )
    assert as_github([finding]) == ("::notice file=a%3Ab%2Cc.toml,line=1,col=1,title=DWS001::100 %25%0A::error::no\n")


def test_what_is_looked_for_can_be_chosen(check: Check) -> None:
    """By code or by its beginning, in one flag or in several; what is left out does not count."""
    assert re.findall(r"DWS\d+", check(MIXED, "--select", "DWS1")[1]) == ["DWS101"]
    assert "DWS101" not in check(MIXED, "--ignore", "DWS101,DWS6")[1]
    code, out, _ = check(MIXED, "--ignore", "DWS1", "--ignore", "DWS2")
    assert (code, "score 100 of 100" in out) == (0, True)


def test_a_comment_switches_a_rule_off_for_its_line(check: Check) -> None:
    """Named codes, or all; on another line, and in a string, it means nothing."""
    base = GOOD + "[heartbeat]\n"
    assert "DWS202" in check(base + 'interval = "50s"\n')[1]
    assert "DWS202" not in check(base + 'interval = "50s"  # durablews: ignore[DWS605, dws202]\n')[1]
    assert "DWS202" not in check(base + 'interval = "50s" # durablews:ignore\n')[1]
    assert "DWS202" in check(base + 'interval = "50s"  # durablews: ignore[DWS605]\n')[1]
    assert "DWS202" in check(base + '# durablews: ignore[DWS202]\ninterval = "50s"\n')[1]


def test_strict_counts_warnings(check: Check) -> None:
    """Without it a warning does not fail a build; a note never does."""
    warning = GOOD + "[reconnect]\nmax_retries = 10\n"
    assert (check(warning)[0], check(warning, "--strict")[0]) == (0, 1)
    note = GOOD + '[heartbeat]\ninterval = "20s"\n'
    assert check(note, "--strict")[0] == 0
    assert "DWS205 info" in check(note)[1]


def test_the_sums_of_a_load_are_printed(check: Check) -> None:
    """Backlog, cap, wear and traffic, with their arithmetic, and in JSON as numbers."""
    known = ("--rate", "2/s", "--payload", "400B", "--max-outage", "72h", "--disk", "300MB")
    _, out, _ = check(GOOD, *known)
    assert "2 a second x 259,200 s = 518,400 messages, 207 MB of payload" in out
    assert "nothing goes in an outage of 72 h" in out
    sums = json.loads(check(GOOD, *known, "--format", "json")[1])["sums"]
    assert sums["backlog"] == 518_400
    assert sums["first_loss"] is None
    assert "heartbeats" not in check(GOOD)[1]


def test_a_fleet_is_drawn_and_plotted(check: Check) -> None:
    """The picture, the table, and the same in JSON and as an SVG; the same seed, the same fleet."""
    fleet = ("--fleet", "2000", "--accept-rate", "100/s", "--outage", "30s")
    code, out, err = check(GOOD, *fleet, "--plot", "fleet.svg")
    assert code == 0
    assert "2,000 devices" in out
    assert "this configuration" in out
    assert err == "durablews: drew fleet.svg\n"
    assert Path("fleet.svg").read_text(encoding="utf-8").startswith("<svg")
    once, again, other = (
        json.loads(check(GOOD, *fleet, "--format", "json", *seed)[1])["fleet"]["this configuration"]
        for seed in ([], [], ["--seed", "2"])
    )
    assert once == again
    assert once["back_after"]["100%"] > 0
    assert once["attempts_a_device"] != other["attempts_a_device"]


def test_the_picture_in_the_documentation_is_what_the_command_draws(check: Check) -> None:
    """The README shows the fleet of its own command, with the defaults, and not another one's."""
    flags = ("--fleet", "10000", "--accept-rate", "500/s", "--outage", "60s", "--plot", "fleet.svg")
    assert check(GOOD, *flags)[0] == 0
    drawn = Path(durablews.__file__).parent / "docs" / "fleet.svg"
    assert Path("fleet.svg").read_text(encoding="utf-8") == drawn.read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="terminals")
def test_a_bar_shows_progress_on_a_terminal_and_goes_away(tmp_path: Path) -> None:
    """What takes long says how far it is, on standard error, and leaves nothing behind."""
    (tmp_path / "agent.toml").write_text(GOOD, encoding="utf-8")
    flags = ["check", "agent.toml", "--fleet", "30000", "--accept-rate", "5000/s", "--format", "json"]
    terminal, slave = os.openpty()
    try:
        said = subprocess.run([*COMMAND, *flags], cwd=tmp_path, env=ENVIRONMENT, stdout=-1, stderr=slave, timeout=60)
    finally:
        os.close(slave)
    shown = ""
    with suppress(OSError), open(terminal, encoding="utf-8", newline="") as screen:  # Linux says EIO at the end
        while piece := screen.read(1):
            shown += piece
    assert re.search(r"this configuration  \[#+\.*\] \d+ %", shown)
    assert shown.endswith("\r\x1b[K")
    assert json.loads(said.stdout)["fleet"]


# -- writing


def test_a_configuration_of_the_other_client_becomes_one_of_ours(check: Check) -> None:
    """`--write` makes a file that says the same, in our names and units, and is itself without error."""
    code, _, err = check(REFERENCE, "--write", "new.toml", name="config.json")
    assert (code, err) == (0, "durablews: wrote new.toml\n")
    assert os.stat("new.toml").st_mode & 0o777 == 0o600
    text = Path("new.toml").read_text(encoding="utf-8")
    assert 'interval = "30s"' in text
    assert 'max_age = "5m"' in text
    old, new = (read_settings(load(path), Settings, "") for path in ("config.json", "new.toml"))
    assert new.outbox == "agent.db"
    assert (new.url, new.reconnect, new.heartbeat, new.caps) == (old.url, old.reconnect, old.heartbeat, old.caps)
    assert new.reconnect == ReconnectConfig(max_retries=10)
    assert " error: " not in check(None, name="new.toml")[1]


def test_nothing_is_overwritten_or_half_meant(check: Check) -> None:
    """A file that is there stays as it is, and what cannot be used is not left out in silence."""
    Path("there.toml").write_text("mine", encoding="utf-8")
    code, _, err = check(REFERENCE, "--write", "there.toml", name="config.json")
    assert (code, "is there already" in err) == (2, True)
    assert Path("there.toml").read_text(encoding="utf-8") == "mine"
    code, _, err = check('{"maxRetries": "many"}', "--write", "new.toml", name="config.json")
    assert code == 2
    assert not Path("new.toml").exists()


def test_every_kind_of_value_survives_being_written(check: Check) -> None:
    """Texts with quotes and line ends, names that need quotes, nothing, yes and no, numbers."""
    settings = {
        "url": 'wss://example.com/"\\\u007f\n',
        "proxy": "none",
        "heartbeat": {"adaptive": True, "interval": 0.25},
        "reconnect": {"jitter": 0.5, "max_retries": "none", "max_delay": 86400},
        "auth": {"headers": {"X Site": "ü", "a.b": "'"}},
    }
    check(json.dumps(settings), "--write", "new.toml", name="config.json")
    written = tomllib.loads(Path("new.toml").read_text(encoding="utf-8"))
    old, new = (read_settings(each, Settings, "") for each in ({**settings, "outbox": "agent.db"}, written))
    assert old == new


# -- the same file runs


async def test_a_configuration_of_the_other_client_runs_as_it_is(tmp_path: Path) -> None:
    """What was checked is what runs: a message leaves an outbox with it, and a flag and a variable count more."""
    config = {**json.loads(REFERENCE), "url": "ws://127.0.0.1:1/from-the-file"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    async with durablews.Outbox(tmp_path / "agent.db") as outbox:
        await outbox.send("x")
    inbox = Inbox(tmp_path / "inbox.db")
    async with inbox.serving():
        import asyncio

        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            "run",
            "config.json",
            *("--url", inbox.url, "--until-empty", "--timeout", "20s"),
            cwd=tmp_path,
            env={
                **ENVIRONMENT,
                "DURABLEWS_OUTBOX": "agent.db",
                "DURABLEWS_URL": "ws://127.0.0.1:1/from-the-environment",
            },
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await process.communicate()
        assert process.returncode == 0, err
    assert inbox.payloads() == ["x"]


# -- from Python


def test_from_python(tmp_path: Path) -> None:
    """A file, a mapping or `Settings`, and what is known as texts or numbers; a list of findings comes back."""
    path = tmp_path / "agent.toml"
    path.write_text(MIXED, encoding="utf-8")
    first = durablews.check(path)[0]
    assert (first.code, first.severity, first.setting, first.line, first.column) == ("DWS101", "error", "url", 1, 1)
    assert str(first).startswith(f"{path}:1:1: DWS101 error: url goes to example.com in the clear")
    given = {"url": "wss://x", "outbox": "/o.db", "heartbeat": {"interval": "60s"}}
    (found,) = durablews.check(given, profile="aws-alb", select=["DWS202"])
    assert (found.path, found.line, str(found)[:13]) == (None, None, "DWS202 error:")
    assert durablews.check(Settings(url="wss://x", outbox="/var/lib/o.db")) == []
    settings = Settings(url="wss://x", outbox="/o.db", reconnect=ReconnectConfig(max_retries=3))
    assert {each.code for each in durablews.check(settings)} == {"DWS305", "DWS601"}
    known = {"rate": 2, "payload": 400, "max_outage": "72h"}
    assert durablews.check({**given, "caps": {"max_messages": 1000}}, **known, select=["DWS403"])
    with pytest.raises(ConfigError, match="no_such"):
        durablews.check(tmp_path / "no_such.toml")
    with pytest.raises(ConfigError, match="profile"):
        durablews.check(given, profile="x")


def test_settings_are_judged_as_they_were_given() -> None:
    """What nobody chose is not held against anybody, and what was chosen is, though it equals nothing in a file."""
    assert durablews.check({"url": "wss://x", "outbox": "/var/lib/o.db", "caps": {}}) == []
    assert durablews.check({"url": "wss://x", "outbox": "/var/lib/o.db", "nonsense": 1})[0].code == "DWS001"


# -- what a reader who had not seen the code found


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ('tls.cert_file = "/x.pem"', "DWS001 error: tls.cert_file and tls.key_file go together"),
        ('dialect = "nonsense"', "DWS001 error: "),
        ('proxy = "proxy.corp:3128"', "DWS001 error: proxy must be the URL of a proxy"),
        ('proxy = "user:sekrit@proxy:3128"', "DWS103 error: proxy holds a user or a password"),
        ('outbox = ""', "DWS002 error: outbox must name a file, not a folder"),
        ('outbox = "/"', "DWS002 error: outbox must name a file, not a folder"),
        ('url = "wss://x:99999/"', "DWS003 error: url must begin with"),
        ('url = "wss://x/#part"', "DWS003 error: url must not have a fragment"),
    ],
)
def test_what_connect_refuses_has_an_error(check: Check, settings: str, found: str) -> None:
    """A score of 100 for what does not start would be worse than no check."""
    lines = [line for line in GOOD.splitlines() if line.partition(" ")[0] != settings.partition(" ")[0]]
    code, out, _ = check("\n".join([*lines, settings]) + "\n")
    assert code == 1
    assert found in out
    assert "sekrit" not in out


@pytest.mark.parametrize(
    "text",
    [
        "[reconnect]\nfactor = 3\nmax_retries = 1000\n",
        "[reconnect]\nfactor = 1\nmax_retries = 999999999\n",
        f"[reconnect]\nbase_delay = {'9' * 400}\n",
        f"[heartbeat]\ninterval = {'9' * 400}\n",
        "[reconnect]\nmax_delay = 1e999\n",
        "[auth.headers]\nAuthorization = 'Bearer eyJ.eyJleHAiOiAxZTk5OX0.x'\n",
        '"\\u001b]0;pwned\\u0007x\\n::error::fake" = 1\n',
    ],
)
def test_no_figure_and_no_name_is_too_much(check: Check, text: str) -> None:
    """Whatever a number or a name is: a finding or none, no traceback, and nothing for the terminal to obey."""
    code, out, err = check(GOOD + text)
    assert code in (0, 1)
    assert err == ""
    assert "\x1b" not in out
    assert not any(line.startswith("::error::fake") for line in out.splitlines())
    for form in ("json", "sarif", "github"):
        assert check(GOOD + text, "--format", form)[0] == code


def test_a_name_that_is_no_unicode_is_shown(check: Check) -> None:
    """JSON can name half a character, which no report may choke on."""
    for form in ("text", "json", "sarif", "github"):
        code, out, _ = check('{"url": "wss://x", "\\ud800": 1}', "--format", form, name="config.json")
        assert (code, "ud800" in out) == (1, True)


@pytest.mark.parametrize("config", [["url"], b"no-such.toml", 7, None])
def test_what_is_no_configuration_is_a_config_error(config: Any) -> None:
    """From Python too nothing but `ConfigError` comes of what is none."""
    with pytest.raises(ConfigError):
        durablews.check(config)


@pytest.mark.parametrize(
    "known", [{"fleet": "10", "accept_rate": 1}, {"rate": []}, {"rtt": "x"}, {"rate": float("nan")}]
)
def test_figures_that_are_none_are_config_errors(known: dict[str, Any]) -> None:
    """So are figures that cannot be."""
    with pytest.raises(ConfigError):
        durablews.check({}, **known)


def test_an_adaptive_heartbeat_counts_as_what_it_does(check: Check) -> None:
    """It moves between 15 and 60 s wherever it begins: neither five minutes nor thirty seconds."""
    adaptive = GOOD + '[heartbeat]\nadaptive = true\ninterval = "{}"\n'
    slow = check(adaptive.format("300s"), "--profile", "azure-lb")[1]
    assert "DWS202" not in slow
    assert "60s x 3 + 10s = 190s" in slow
    assert "heartbeat.interval 15s costs 37.3 MB" in check(adaptive.format("30s"), "--data-budget", "20MB")[1]


def test_the_rules_and_the_sums_agree(check: Check) -> None:
    """What the caps did not keep need not be drained, and a window of bytes is a window too."""
    known = ("--rate", "2/s", "--payload", "400B", "--max-outage", "72h")
    out = check(GOOD + "[caps]\nmax_messages = 1000\n[delivery]\nrate_limit = 3\n", *known)[1]
    assert "DWS503" not in out
    assert "1,000 messages / (3 - 2 a second)" in out
    out = check(GOOD, "--rate", "100/s", "--payload", "100KB", "--rtt", "1s", "--max-outage", "1h")[1]
    assert "DWS502 warning: delivery.window_bytes: 10 messages / 1s = 10.0 a second at most, and 100 come in" in out
    assert "is reached 107s into an outage of 60m" in out or "is reached 107s into an outage of 1h" in out


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"heartbeat": {"interval": 120}}, "heartbeatInterval and heartbeat.interval are the same setting"),
        ({"reconnect": "junk"}, "reconnect must be a table"),
    ],
)
def test_a_setting_in_two_spellings_is_not_guessed(check: Check, change: dict[str, Any], why: str) -> None:
    """Neither of the two is dropped in silence."""
    code, _, err = check(json.dumps({**json.loads(REFERENCE), **change}), name="config.json")
    assert (code, why in err) == (2, True)


@pytest.mark.parametrize("switch", [1, "false", None])
def test_a_switch_is_a_switch(check: Check, switch: Any) -> None:
    """`autoReconnect` is true or false, and nothing else is taken for a number of tries."""
    code, out, _ = check(json.dumps({**json.loads(REFERENCE), "autoReconnect": switch}), name="config.json")
    assert (code, "DWS001 error: autoReconnect must be true or false" in out) == (1, True)
    assert "maxRetries 10" in out


def test_files_are_written_after_the_report_and_never_over_the_configuration(check: Check) -> None:
    """What cannot be written is said, and the findings are there all the same."""
    fleet = ("--fleet", "10", "--accept-rate", "1/s")
    for flags in ((*fleet, "--plot", "agent.toml"), (*fleet, "--plot", "no/x.svg"), ("--write", "no/x.toml")):
        code, out, err = check(GOOD, *flags)
        assert code == 2
        assert "\nscore " in f"\n{out}"
        assert err.startswith("durablews: --")
    assert Path("agent.toml").read_text(encoding="utf-8") == GOOD


def test_a_pyproject_without_our_table_is_none_of_ours(check: Check) -> None:
    """And with it, what is missing is missing in the table."""
    code, _, err = check("[project]\nname = 'x'\n", name="pyproject.toml")
    assert (code, "has no table [tool.durablews]" in err) == (2, True)
    code, out, _ = check("[project]\nname = 'x'\n\n[tool.durablews]\noutbox = '/var/lib/o.db'\n", name="pyproject.toml")
    assert (code, "pyproject.toml:4:1: DWS003" in out) == (1, True)
    out = check(
        "[tool.durablews]\nurl = 'wss://x'\n[tool.durablews.heartbeat]\ninterval = '50s'\n", name="pyproject.toml"
    )[1]
    assert "pyproject.toml:4:1: DWS202" in out


def test_a_byte_order_mark_is_no_part_of_a_configuration(check: Check) -> None:
    """Editors on Windows write one."""
    assert check(b"\xef\xbb\xbf" + GOOD.encode())[0] == 0
    assert check(b'\xef\xbb\xbf{"url": "wss://x"}', name="config")[0] == 0


def test_a_fleet_needs_whole_connections_and_no_outage(check: Check) -> None:
    """1.83 a second is not played as 1, and a plain restart is an outage of nothing."""
    assert "must be a whole number" in check(GOOD, "--fleet", "10", "--accept-rate", "110/min")[2]
    assert check(GOOD, "--fleet", "10", "--accept-rate", "5/s", "--outage", "0s")[0] == 0


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "base_delay": st.floats(1e-9, 29),
            "max_delay": st.floats(30, 1e9),
            "max_connection_age": st.one_of(st.just("none"), st.integers(1, 10**9)),
        },
    ),
    st.fixed_dictionaries({}, optional={"drain_timeout": st.floats(0, 1e9), "rate_limit": st.floats(1e-6, 1e9)}),
)
def test_what_is_written_says_the_same(reconnect: dict[str, Any], delivery: dict[str, Any]) -> None:
    """No unit rounds a figure, whatever it is."""
    settings = {"url": "wss://x", "outbox": "o.db", "reconnect": reconnect, "delivery": delivery}
    file = ConfigFile(path="x", settings=settings, places={}, spelled={}, ignored={}, is_reference=False)
    assert read_settings(tomllib.loads(as_toml(file)), Settings, "") == read_settings(settings, Settings, "")


def test_the_example_in_the_readme_is_true(check: Check) -> None:
    """The command that is shown, on a file with a heartbeat of a minute, prints what is shown."""
    readme = (Path(durablews.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```console\n\$ durablews check agent\.toml (.*)\n((?:.|\n)*?)```", readme)
    assert shown
    _, out, _ = check(GOOD + '\n[heartbeat]\ninterval = "60s"\n', *shown[1].split())
    assert out == shown[2]


def test_sarif_levels_and_version(check: Check) -> None:
    """A warning is a warning there, and a path is a URI."""
    os.mkdir("a folder#1")
    path = "a folder#1/agent.toml"
    log = json.loads(check(GOOD + "[reconnect]\nmax_retries = 10\n", "--format", "sarif", name=path)[1])
    assert log["version"] == "2.1.0"
    (result,) = log["runs"][0]["results"]
    assert result["level"] == "warning"
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a%20folder%231/agent.toml"
