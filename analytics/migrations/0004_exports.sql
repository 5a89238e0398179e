-- Usage as files in object storage: what was asked for, how far it is, and what organizations want each month.

-- States by their number in the contract: 1 pending, 2 running, 3 succeeded, 4 failed, 5 expired. Whoever writes a file
-- holds it until lease_end_time, under a number that grows with each claim; filter is a serialized UsageFilter.
CREATE TABLE exports (
    export_id text COLLATE "C" PRIMARY KEY,
    organization_id text COLLATE "C" NOT NULL,
    granularity smallint NOT NULL,
    format smallint NOT NULL,
    compression smallint NOT NULL,
    start_time timestamptz NOT NULL,
    end_time timestamptz NOT NULL,
    filter bytea NOT NULL,
    state smallint NOT NULL DEFAULT 1,
    progress_percent smallint NOT NULL DEFAULT 0,
    rows bigint NOT NULL DEFAULT 0,
    size_bytes bigint NOT NULL DEFAULT 0,
    sha256 bytea NOT NULL DEFAULT '',
    failure_reason text NOT NULL DEFAULT '',
    creator_id text COLLATE "C" NOT NULL,
    request_id text COLLATE "C" NOT NULL,
    create_time timestamptz NOT NULL,
    finish_time timestamptz,
    expire_time timestamptz,
    due_time timestamptz NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    claim integer NOT NULL DEFAULT 0,
    lease_end_time timestamptz,
    -- Whether something of it may be in storage that is to go.
    is_leftover boolean NOT NULL DEFAULT false
);

CREATE INDEX exports_by_organization ON exports (organization_id, create_time, export_id);
CREATE UNIQUE INDEX exports_by_request ON exports (organization_id, creator_id, request_id) WHERE request_id <> '';
CREATE INDEX exports_to_do ON exports (due_time) WHERE state IN (1, 2) OR is_leftover;
CREATE INDEX exports_to_expire ON exports (expire_time) WHERE state = 3;

CREATE TABLE export_schedules (
    organization_id text COLLATE "C" PRIMARY KEY,
    enabled boolean NOT NULL,
    granularity smallint NOT NULL,
    format smallint NOT NULL,
    compression smallint NOT NULL,
    next_run_time timestamptz,
    last_export_id text COLLATE "C" NOT NULL DEFAULT '',
    revision bigint NOT NULL DEFAULT 1
);

CREATE INDEX export_schedules_due ON export_schedules (next_run_time) WHERE enabled;
