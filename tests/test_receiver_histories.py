"""Random histories of frames, failures, refusals and cuts against rules and ledger."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from test_receiver_exchange import Client, applied, database, failing, insert, number, refuse, told

from durablews.receiver.exchange import Apply
from durablews.wire.frames import JSON, Codec, Item, ItemMeta

# Random histories. A careful client sends 1..40 in two priorities; the history decides about frame sizes, how many
# frames travel before answers are read, cuts, failures and refusals.
Decision = st.sampled_from(["fine", "fine", "fine", "fail", "refuse", "later", "cut", "old", "commit lost"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_histories_apply_once_and_in_order(data: st.DataObject) -> None:
    """Whatever fails, repeats, is refused or cut: the number never decreases, nothing is applied twice or out of order,
    and nothing that was acked is missing (P5)."""
    connection = database()
    waiting = {0: list(range(1, 21)), 1: list(range(21, 41))}
    acked: set[int] = set()
    dead: set[int] = set()
    numbers = {0: 0, 1: 0}
    older: list[tuple[Client, str]] = []
    client = Client(connection)
    client.hello()
    sent: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(120):
        if not waiting[0] and not waiting[1]:
            break
        priority = data.draw(st.sampled_from([p for p in waiting if waiting[p]]))
        pipeline: list[tuple[str, list[int]]] = []
        start = 0
        for size in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)):
            part = waiting[priority][start : start + size]
            if part:
                after = sent[priority][-1] if sent[priority] and sent[priority][-1] < part[0] else None
                items = [Item(seq, "1", ItemMeta()) for seq in part]
                pipeline.append(
                    (Codec(JSON).encode_msgs(priority, after, [item.outgoing() for item in items]).decode(), part)
                )
                sent[priority] += part
            start += size
        cut = False
        for frame, part in pipeline:
            decision = data.draw(Decision)
            if decision == "cut":
                older.append((client, frame))
                cut = True
                break
            if decision == "old" and older:
                late, late_frame = older.pop()
                before = applied(connection)
                outcome = late.exchange.handle(connection, late_frame, insert)
                assert applied(connection) == before
                assert not outcome.frames
            chosen = data.draw(st.sampled_from(part))
            apply: Apply = insert
            if decision == "fail":
                apply = failing
            elif decision in ("refuse", "later"):
                apply = refuse(chosen, retry=None if decision == "refuse" else 1)
            outcome = client.exchange.handle(connection, frame, apply)
            assert not connection.in_transaction
            for p in numbers:
                assert number(connection, p) >= numbers[p]
                numbers[p] = number(connection, p)
            if decision == "commit lost":
                cut = True
                break
            for answer in told(outcome):
                if answer["t"] == "ack":
                    done = [seq for seq in waiting[priority] if seq <= answer["s"]]
                    acked.update(done)
                    waiting[priority] = waiting[priority][len(done) :]
                else:
                    assert answer["s"] > numbers[priority]
                    if answer.get("final"):
                        dead.add(answer["s"])
                        waiting[priority].remove(answer["s"])
                    sent[priority] = [seq for seq in sent[priority] if seq < answer["s"]]
            if outcome.close is not None:
                assert outcome.close.code == 1013
                cut = True
                break
        if cut:
            client = Client(connection)
            client.hello()
            sent = {0: [], 1: []}
    done = applied(connection)
    assert len(done) == len(set(done))
    for low in (1, 21):
        mine = [seq for seq in done if low <= seq < low + 20]
        assert mine == sorted(mine)
    assert acked <= set(done)
    assert not dead & set(done)
