-- Usage events, the hourly sums over them, and how far both are complete.
--
-- All text is COLLATE "C": ids and names are compared byte for byte, whatever the locale of the server.

-- One row for each request, keyed as UsageEvent says. The columns are what queries ask by; event is the message as it
-- came. Partitions are days in UTC; those that have none yet, late or odd, are in the default partition.
CREATE TABLE usage_events (
    request_id text COLLATE "C" NOT NULL,
    admit_time timestamptz NOT NULL,
    organization_id text COLLATE "C" NOT NULL,
    api_key_id text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    service_account_id text COLLATE "C" NOT NULL,
    model text COLLATE "C" NOT NULL,
    backend_id text COLLATE "C" NOT NULL,
    endpoint smallint NOT NULL,
    outcome smallint NOT NULL,
    prompt_tokens bigint NOT NULL CHECK (prompt_tokens >= 0),
    cached_prompt_tokens bigint NOT NULL CHECK (cached_prompt_tokens BETWEEN 0 AND prompt_tokens),
    completion_tokens bigint NOT NULL CHECK (completion_tokens >= 0),
    cost_micros bigint NOT NULL CHECK (cost_micros >= 0),
    event bytea NOT NULL,
    PRIMARY KEY (request_id, admit_time)
) PARTITION BY RANGE (admit_time);

CREATE INDEX usage_events_by_organization ON usage_events (organization_id, admit_time, request_id);

CREATE TABLE usage_events_default PARTITION OF usage_events DEFAULT;

-- Sums of usage_events, written in the transaction that inserts them. The hour is that of admit_time, in UTC.
CREATE TABLE usage_hourly (
    organization_id text COLLATE "C" NOT NULL,
    hour timestamptz NOT NULL,
    api_key_id text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    service_account_id text COLLATE "C" NOT NULL,
    model text COLLATE "C" NOT NULL,
    backend_id text COLLATE "C" NOT NULL,
    endpoint smallint NOT NULL,
    outcome smallint NOT NULL,
    requests bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    cached_prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    cost_micros bigint NOT NULL,
    PRIMARY KEY (
        organization_id, hour, api_key_id, user_id, service_account_id, model, backend_id, endpoint, outcome
    )
);

-- Until when events are counted; no row while that is unknown.
CREATE TABLE usage_freshness (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    complete_until timestamptz NOT NULL
);

-- Makes the partition of one day, and moves what the default partition already holds of it. Returns whether it was
-- missing. The names and bounds are built here from a date, so that no caller ever writes DDL.
CREATE FUNCTION ensure_usage_events_partition(day date) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    name text := 'usage_events_' || to_char(day, 'YYYYMMDD');
    day_start timestamptz := day::timestamp AT TIME ZONE 'UTC';
    day_end timestamptz := (day + 1)::timestamp AT TIME ZONE 'UTC';
BEGIN
    IF to_regclass(name) IS NOT NULL THEN
        RETURN false;
    END IF;
    -- Other replicas that make it wait here, and so do inserts: one that had already chosen the default partition
    -- would fail when this day is taken from it.
    LOCK TABLE usage_events IN SHARE ROW EXCLUSIVE MODE;
    IF to_regclass(name) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE usage_events INCLUDING ALL)', name);
    EXECUTE format(
        'WITH moved AS (DELETE FROM usage_events_default WHERE admit_time >= $1 AND admit_time < $2 RETURNING *) '
        'INSERT INTO %I SELECT * FROM moved', name
    ) USING day_start, day_end;
    EXECUTE format('ALTER TABLE usage_events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name, day_start, day_end);
    RETURN true;
END
$$;
