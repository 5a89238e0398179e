-- Reports on whether journals, ledger, engines and analytics agree, and the lines on which they do not.

-- kind and state are numbers of the contract: state 1 running, 2 agreed, 3 differed, 4 incomplete. Whoever makes a report
-- sets claim_time and may finish only what he claimed; another takes a claim that is too old to be alive. What differed is
-- announced once, as an event.
CREATE TABLE reconciliations (
    reconciliation_id text COLLATE "C" PRIMARY KEY,
    kind smallint NOT NULL CHECK (kind BETWEEN 1 AND 3),
    start_time timestamptz NOT NULL,
    end_time timestamptz NOT NULL CHECK (end_time > start_time),
    state smallint NOT NULL DEFAULT 1 CHECK (state BETWEEN 1 AND 4),
    compared bigint NOT NULL DEFAULT 0,
    differences bigint NOT NULL DEFAULT 0,
    republished bigint NOT NULL DEFAULT 0,
    missing_sources text[] NOT NULL DEFAULT '{}',
    residual_prompt_tokens bigint NOT NULL DEFAULT 0,
    residual_completion_tokens bigint NOT NULL DEFAULT 0,
    create_time timestamptz NOT NULL,
    finish_time timestamptz,
    claim_time timestamptz,
    scheduled boolean NOT NULL,
    announced boolean NOT NULL DEFAULT true,
    creator_id text COLLATE "C" NOT NULL DEFAULT '',
    request_id text COLLATE "C" NOT NULL DEFAULT ''
);

CREATE INDEX reconciliations_by_create_time ON reconciliations (create_time, reconciliation_id);
CREATE INDEX reconciliations_unfinished ON reconciliations (create_time) WHERE state IN (1, 4);
CREATE INDEX reconciliations_unannounced ON reconciliations (create_time) WHERE NOT announced;
-- However many replicas want it, each hour is compared once.
CREATE UNIQUE INDEX reconciliations_scheduled ON reconciliations (start_time, kind) WHERE scheduled;
CREATE UNIQUE INDEX reconciliations_by_request_id ON reconciliations (creator_id, request_id) WHERE request_id <> '';

-- The largest first; difference is a serialized ReconciliationDifference.
CREATE TABLE reconciliation_differences (
    reconciliation_id text COLLATE "C" NOT NULL REFERENCES reconciliations ON DELETE CASCADE,
    position integer NOT NULL,
    difference bytea NOT NULL,
    PRIMARY KEY (reconciliation_id, position)
);

-- Events of an hour across organizations, for which no other index helps. They come in about the order of their times,
-- so that a range of pages is enough to find them, and hardly anything is written.
CREATE INDEX usage_events_by_admit_time ON usage_events USING brin (admit_time) WITH (autosummarize = true);
CREATE INDEX usage_hourly_by_hour ON usage_hourly (hour);
