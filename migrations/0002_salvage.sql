-- What a damaged file took with it: messages that were counted in it and could not be carried over by a salvage.
ALTER TABLE durablews_totals ADD COLUMN lost INTEGER NOT NULL DEFAULT 0;

-- JSON: when this outbox was last made from the remains of a damaged one, from which file, and what was found. NULL
-- when it never was.
ALTER TABLE durablews_meta ADD COLUMN salvage TEXT;
