"""What a client says of its link, in `stats` and in `durablews inspect`: tests wait until both say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import until, until_true

from durablews import cli, housekeeping
from durablews.client import Client

__all__ = ["Look", "look_fixture", "shown"]

Look = Callable[[], dict[str, Any]]


@pytest.fixture(name="look")
def look_fixture(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Look:
    """Return what `durablews inspect --json` says about the link, with notes as quick as the tests."""
    monkeypatch.setattr(housekeeping, "_NOTE_INTERVAL", 0.01)

    def link() -> dict[str, Any]:
        assert cli.main(["inspect", str(tmp_path / "agent.db"), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["link"]
        return found

    return link


async def shown(ws: Client, look: Look, text: str, *, blocked: bool) -> None:
    """Wait until a reason is in `stats` and in `durablews inspect`, with what only the owner can mend or without."""

    async def in_stats() -> bool:
        stats = await ws.stats()
        return text in (stats.reason or "") and (stats.blocked is not None) == blocked

    def in_note() -> bool:
        link = look()
        return text in (link["reason"] or "") and (link["blocked"] is not None) == blocked

    try:
        await until_true(in_stats)
        await until(in_note)
    except TimeoutError:
        pytest.fail(f"{text!r}, blocked: {blocked}, is not what {await ws.stats()} and {look()} say")
