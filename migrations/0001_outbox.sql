CREATE TABLE durablews_meta (
    -- What this outbox is. One row.
    one            INTEGER PRIMARY KEY CONSTRAINT one_row CHECK (one = 1),
    schema         INTEGER NOT NULL,
    -- The identity under which servers know these sequences (PROTOCOL.md section 5).
    stream         TEXT NOT NULL CONSTRAINT stream_is_hex CHECK (length(stream) = 32),
    -- Where it lived when a drainer last opened it: the file's inode, a digest of the machine's id.
    file           TEXT,
    machine        TEXT,
    -- The last raise of the sequence that no server has welcomed yet: from what to what.
    raised_from    INTEGER,
    raised_to      INTEGER,
    -- The largest window that was ever used: so many of each priority count as transmitted after a restart.
    largest_window INTEGER NOT NULL DEFAULT 0,
    -- The highest sequence of those that durablews_departed no longer remembers.
    forgotten      INTEGER NOT NULL DEFAULT 0,
    -- 1 while a drainer has it open: found set at an opening, that drainer died with messages in flight.
    draining       INTEGER NOT NULL DEFAULT 0,
    -- The outbox clock: its reading in ms, and the boot clock's when that was read.
    clock          INTEGER NOT NULL DEFAULT 0,
    boot           TEXT,
    boot_clock     INTEGER NOT NULL DEFAULT 0,
    -- The last moment at which a server's Date agreed with the machine's: in which boot, both clocks.
    confirmed_boot TEXT,
    confirmed_wall INTEGER,
    confirmed_at   INTEGER
) STRICT;

CREATE TABLE durablews_caps (
    -- How much may wait. One row; only values that are given explicitly change it.
    one          INTEGER PRIMARY KEY CONSTRAINT one_row CHECK (one = 1),
    max_messages INTEGER NOT NULL CONSTRAINT some_messages CHECK (max_messages > 0),
    max_bytes    INTEGER NOT NULL CONSTRAINT some_bytes CHECK (max_bytes > 0),
    max_age      INTEGER CONSTRAINT some_age CHECK (max_age > 0),  -- ms on the outbox clock
    overflow     TEXT NOT NULL CONSTRAINT known_overflow CHECK (overflow IN ('reject', 'drop_oldest', 'drop_new'))
) STRICT;

CREATE TABLE durablews_totals (
    -- What waits, and what left by which reason. One row, changed in the transaction that it counts.
    one                INTEGER PRIMARY KEY CONSTRAINT one_row CHECK (one = 1),
    messages           INTEGER NOT NULL DEFAULT 0,  -- pending, unanswered and aside
    bytes              INTEGER NOT NULL DEFAULT 0,
    dead_messages      INTEGER NOT NULL DEFAULT 0,  -- refused
    dead_bytes         INTEGER NOT NULL DEFAULT 0,
    enqueued           INTEGER NOT NULL DEFAULT 0,
    acked              INTEGER NOT NULL DEFAULT 0,
    refused            INTEGER NOT NULL DEFAULT 0,  -- became dead letters
    expired            INTEGER NOT NULL DEFAULT 0,
    expired_unanswered INTEGER NOT NULL DEFAULT 0,  -- expired after a transmission: delivery unknown
    dropped            INTEGER NOT NULL DEFAULT 0,  -- by drop_oldest
    dropped_unanswered INTEGER NOT NULL DEFAULT 0,  -- by drop_oldest, after a transmission: delivery unknown
    dropped_new        INTEGER NOT NULL DEFAULT 0,  -- by drop_new: never stored
    dead_dropped       INTEGER NOT NULL DEFAULT 0,  -- dead letters over their own cap
    redelivered        INTEGER NOT NULL DEFAULT 0   -- were unanswered when a connection was lost: sent again
) STRICT;

CREATE TABLE durablews_entries (
    -- The queue. Write through durablews_outbox or the library: caps and counts are kept there.
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given out twice, even when the queue was empty
    priority      INTEGER NOT NULL DEFAULT 0 CONSTRAINT priority_range CHECK (priority BETWEEN -100 AND 100),
    -- 0 pending; 1 unanswered: sent on a connection that was lost before the answer came;
    -- 2 refused: a dead letter; 3 aside: larger than what the server takes just now
    ack_state     INTEGER NOT NULL DEFAULT 0 CONSTRAINT known_ack_state CHECK (ack_state BETWEEN 0 AND 3),
    transmissions INTEGER NOT NULL DEFAULT 0,
    nacks         INTEGER NOT NULL DEFAULT 0,
    sent_at       INTEGER,                            -- ms UTC, for people
    refusal       TEXT,                               -- JSON: code, reason, unknown (it may have been applied)
    created_at    INTEGER NOT NULL,                   -- ms UTC, for people: nothing is ordered or expired by it
    born          INTEGER,                            -- ms on the outbox clock; NULL until the drainer has seen it
    ttl           INTEGER,                            -- ms; NULL: as max_age says
    topic         TEXT,
    headers       TEXT,                               -- JSON object of strings
    bytes         INTEGER NOT NULL,                   -- payload, topic and headers
    checksum      INTEGER,                            -- CRC-32 of the payload; NULL when SQL wrote it
    payload       ANY NOT NULL                        -- TEXT is JSON text, BLOB is bytes
) STRICT;

-- seq is the rowid, the last column of every index: this one is (priority, seq).
CREATE INDEX durablews_queue ON durablews_entries (priority) WHERE ack_state < 2;
CREATE INDEX durablews_answered ON durablews_entries (ack_state, priority) WHERE ack_state > 0;
CREATE INDEX durablews_unseen ON durablews_entries (seq) WHERE born IS NULL;
CREATE INDEX durablews_deadline ON durablews_entries (born + ttl) WHERE ttl IS NOT NULL;

CREATE TABLE durablews_departed (
    -- The last 10 000 that left without an ack, so that their senders can be told.
    id     INTEGER PRIMARY KEY,
    seq    INTEGER NOT NULL,
    reason TEXT NOT NULL CONSTRAINT known_reason CHECK (reason IN ('expired', 'dropped', 'refused', 'renumbered')),
    unknown INTEGER NOT NULL DEFAULT 0,  -- 1: it had been transmitted, so it may have been applied all the same
    became INTEGER,                      -- the new sequence of a renumbered one
    at     INTEGER NOT NULL              -- ms UTC
) STRICT;
CREATE INDEX durablews_departed_seq ON durablews_departed (seq);
CREATE TRIGGER durablews_departed_forget AFTER INSERT ON durablews_departed WHEN NEW.id > 10000 BEGIN
    UPDATE durablews_meta SET forgotten = max(
        forgotten, coalesce((SELECT max(seq) FROM durablews_departed WHERE id <= NEW.id - 10000), 0));
    DELETE FROM durablews_departed WHERE id <= NEW.id - 10000;
END;

CREATE TABLE durablews_ids (
    -- The callers' own ids: a second send with the same one stores nothing new. The last 10 000 that left stay known.
    id  TEXT PRIMARY KEY,
    seq INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX durablews_ids_seq ON durablews_ids (seq);

CREATE TABLE durablews_link (
    -- Who drains this outbox and how its link stands, as of when that last changed. One row.
    one          INTEGER PRIMARY KEY CONSTRAINT one_row CHECK (one = 1),
    pid          INTEGER,
    host         TEXT,
    started_at   INTEGER,
    state        TEXT NOT NULL DEFAULT 'DISCONNECTED',
    since        INTEGER,
    reason       TEXT,
    blocked      TEXT,
    next_attempt INTEGER
) STRICT;

CREATE TABLE durablews_evicted (
    -- What an insert is about to drop; empty between statements.
    seq       INTEGER PRIMARY KEY,
    ack_state INTEGER NOT NULL,
    bytes     INTEGER NOT NULL
) STRICT;

CREATE VIEW durablews_evictable AS
-- What drop_oldest takes, in its order: never sent before unanswered, lower priority first, then older. One insert
-- makes room by dropping at most the first 1000: a bound on what a single statement may cost and destroy.
SELECT seq, ack_state, bytes,
       row_number() OVER nearest AS freed_messages,
       sum(bytes) OVER nearest AS freed_bytes
FROM (
    SELECT * FROM (
        SELECT seq, ack_state, priority, bytes FROM durablews_entries
        WHERE ack_state < 2 AND ack_state = 0 ORDER BY priority, seq LIMIT 1000)
    UNION ALL
    SELECT * FROM (
        SELECT seq, ack_state, priority, bytes FROM durablews_entries
        WHERE ack_state > 0 AND ack_state = 1 ORDER BY priority, seq LIMIT 1000))
WINDOW nearest AS (ORDER BY ack_state, priority, seq ROWS UNBOUNDED PRECEDING)
LIMIT 1000;

CREATE VIEW durablews_outbox AS
-- The SQL interface. INSERT INTO durablews_outbox (payload) VALUES ('{"celsius": 21.4}') is a valid enqueue from any
-- language or trigger, with every cap and count; priority, topic, headers and ttl (seconds) are optional.
SELECT seq, priority, topic, headers, payload, ttl / 1000.0 AS ttl,
       CASE ack_state WHEN 0 THEN 'pending' WHEN 1 THEN 'unanswered' WHEN 2 THEN 'refused' ELSE 'aside' END AS ack_state,
       transmissions, sent_at, refusal, created_at, bytes
FROM durablews_entries;

CREATE VIEW durablews_arrivals AS
-- A checked message with its size: the second half of an INSERT INTO durablews_outbox.
SELECT priority, topic, headers, payload, ttl, bytes FROM durablews_entries;

CREATE TRIGGER durablews_outbox_insert INSTEAD OF INSERT ON durablews_outbox BEGIN
    SELECT RAISE(ABORT, 'durablews: the outbox gives out seq, leave it out of the INSERT')
    WHERE NEW.seq IS NOT NULL;
    SELECT RAISE(ABORT, 'durablews: payload must be JSON text or a BLOB')
    WHERE typeof(NEW.payload) NOT IN ('text', 'blob');
    -- json_valid reads up to the first NUL only
    SELECT RAISE(ABORT, 'durablews: a TEXT payload must be valid JSON; store bytes as a BLOB')
    WHERE typeof(NEW.payload) = 'text' AND (NOT json_valid(NEW.payload) OR instr(NEW.payload, char(0)) > 0);
    SELECT RAISE(ABORT, 'durablews: priority must be an integer from -100 to 100')
    WHERE NEW.priority IS NOT NULL AND (typeof(NEW.priority) <> 'integer' OR NEW.priority NOT BETWEEN -100 AND 100);
    SELECT RAISE(ABORT, 'durablews: topic must be text')
    WHERE NEW.topic IS NOT NULL AND typeof(NEW.topic) <> 'text';
    SELECT RAISE(ABORT, 'durablews: headers must be the text of a JSON object of strings')
    WHERE NEW.headers IS NOT NULL AND CASE
        WHEN typeof(NEW.headers) <> 'text' OR NOT json_valid(NEW.headers) OR instr(NEW.headers, char(0)) > 0 THEN 1
        ELSE json_type(NEW.headers) <> 'object' OR EXISTS (SELECT 1 FROM json_each(NEW.headers) WHERE type <> 'text') END;
    SELECT RAISE(ABORT, 'durablews: ttl must be a number of seconds above 0')
    WHERE NEW.ttl IS NOT NULL AND (typeof(NEW.ttl) NOT IN ('integer', 'real') OR NEW.ttl < 0.001 OR NEW.ttl > 1e11);
    INSERT INTO durablews_arrivals (priority, topic, headers, payload, ttl, bytes)
    VALUES (coalesce(NEW.priority, 0), NEW.topic, NEW.headers, NEW.payload, CAST(NEW.ttl * 1000 AS INTEGER),
            length(CAST(NEW.payload AS BLOB)) + coalesce(length(CAST(NEW.topic AS BLOB)), 0)
            + coalesce(length(CAST(NEW.headers AS BLOB)), 0));
END;

CREATE TRIGGER durablews_arrivals_insert INSTEAD OF INSERT ON durablews_arrivals BEGIN
    SELECT RAISE(ABORT, 'durablews: the message is larger than the byte cap of this outbox')
    WHERE NEW.bytes > (SELECT max_bytes FROM durablews_caps);

    -- A LIMIT of 0 ends a statement before it looks at its sources; a condition in WHERE would come after the view has
    -- sorted a thousand rows, at a millisecond for each INSERT.
    INSERT INTO durablews_evicted (seq, ack_state, bytes)
    SELECT seq, ack_state, bytes FROM durablews_entries WHERE seq IN (
        SELECT e.seq FROM durablews_evictable AS e, durablews_totals AS t, durablews_caps AS c
        WHERE e.freed_messages - 1 < t.messages + 1 - c.max_messages
           OR e.freed_bytes - e.bytes < t.bytes + NEW.bytes - c.max_bytes)
    LIMIT (SELECT 1000 * (c.overflow = 'drop_oldest'
                          AND (t.messages + 1 > c.max_messages OR t.bytes + NEW.bytes > c.max_bytes))
           FROM durablews_totals AS t, durablews_caps AS c);
    UPDATE durablews_totals SET
        messages = messages - (SELECT count(*) FROM durablews_evicted),
        bytes = bytes - (SELECT coalesce(sum(bytes), 0) FROM durablews_evicted),
        dropped = dropped + (SELECT count(*) FROM durablews_evicted WHERE ack_state = 0),
        dropped_unanswered = dropped_unanswered + (SELECT count(*) FROM durablews_evicted WHERE ack_state = 1)
    WHERE EXISTS (SELECT 1 FROM durablews_evicted);
    INSERT INTO durablews_departed (seq, reason, unknown, at)
    SELECT seq, 'dropped', ack_state = 1, CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)
    FROM durablews_evicted;
    DELETE FROM durablews_entries WHERE seq IN (SELECT seq FROM durablews_evicted);
    DELETE FROM durablews_evicted;

    -- A statement that fails takes the drops above back with it.
    SELECT RAISE(ABORT, 'durablews: the outbox is full (message cap)')
    FROM durablews_totals AS t, durablews_caps AS c
    WHERE c.overflow <> 'drop_new' AND t.messages + 1 > c.max_messages;
    SELECT RAISE(ABORT, 'durablews: the outbox is full (byte cap)')
    FROM durablews_totals AS t, durablews_caps AS c
    WHERE c.overflow <> 'drop_new' AND t.bytes + NEW.bytes > c.max_bytes;

    INSERT INTO durablews_entries (priority, topic, headers, payload, ttl, bytes, created_at)
    SELECT NEW.priority, NEW.topic, NEW.headers, NEW.payload, NEW.ttl, NEW.bytes,
           CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)
    FROM durablews_totals AS t, durablews_caps AS c
    WHERE t.messages + 1 <= c.max_messages AND t.bytes + NEW.bytes <= c.max_bytes;
    UPDATE durablews_totals SET
        messages = messages + changes(), bytes = bytes + changes() * NEW.bytes,
        enqueued = enqueued + changes(), dropped_new = dropped_new + 1 - changes();
END;

CREATE TRIGGER durablews_outbox_update INSTEAD OF UPDATE ON durablews_outbox BEGIN
    SELECT RAISE(ABORT, 'durablews: an entry keeps what it was sent with; UPDATE is refused');
END;

CREATE TRIGGER durablews_outbox_delete INSTEAD OF DELETE ON durablews_outbox BEGIN
    SELECT RAISE(ABORT, 'durablews: an entry leaves when it is acknowledged or by a policy; DELETE is refused');
END;

INSERT INTO durablews_meta (one, schema, stream) VALUES (1, 1, lower(hex(randomblob(16))));
INSERT INTO durablews_caps (one, max_messages, max_bytes, max_age, overflow) VALUES (1, 1000000, 1073741824, NULL, 'reject');
INSERT INTO durablews_totals (one) VALUES (1);
INSERT INTO durablews_link (one) VALUES (1);
