-- What each part of a request cost, how long it took and why it failed, in the hourly sums; and the sums of days.

-- latency and ttft are histograms: one number for each bucket that holds something, bucket * 2^40 + requests, ascending.
-- analytics/sketches.py says which durations a bucket takes. Rows that are older than this have empty ones, and parts of
-- zero; `python -m analytics rebuild` makes them anew from the events.
ALTER TABLE usage_hourly
    ADD COLUMN reason text COLLATE "C" NOT NULL DEFAULT '',
    ADD COLUMN prompt_cost_micros bigint NOT NULL DEFAULT 0,
    ADD COLUMN cached_prompt_cost_micros bigint NOT NULL DEFAULT 0,
    ADD COLUMN completion_cost_micros bigint NOT NULL DEFAULT 0,
    ADD COLUMN latency bigint[] NOT NULL DEFAULT '{}',
    ADD COLUMN ttft bigint[] NOT NULL DEFAULT '{}',
    DROP CONSTRAINT usage_hourly_pkey,
    ADD PRIMARY KEY (
        organization_id, hour, api_key_id, user_id, service_account_id, model, backend_id, endpoint, outcome, reason
    );

-- The same for days in UTC that are closed.
CREATE TABLE usage_daily (LIKE usage_hourly INCLUDING ALL);
ALTER TABLE usage_daily RENAME COLUMN hour TO day;

-- A day is summed from its hours once, when it is over: then it is closed, and whatever comes late is added to both.
-- Hours before hourly_since are gone or about to go; only days know of them, and what comes for them goes to days alone.
CREATE TABLE usage_rollups (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    closed_until timestamptz NOT NULL,
    hourly_since timestamptz NOT NULL,
    CHECK (hourly_since <= closed_until)
);

INSERT INTO usage_rollups (closed_until, hourly_since) VALUES ('epoch', 'epoch');

-- Histograms laid one behind the other become one: counts of the same bucket are added.
CREATE FUNCTION merge_cells(cells bigint[]) RETURNS bigint[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(array_agg((bucket << 40) + requests ORDER BY bucket), '{}') FROM (
        SELECT cell >> 40 AS bucket, sum(cell & 1099511627775)::bigint AS requests
        FROM unnest(cells) AS cell GROUP BY 1
    ) AS buckets
$$;

CREATE AGGREGATE sum_sketches(bigint[]) (
    SFUNC = array_cat, STYPE = bigint[], INITCOND = '{}', FINALFUNC = merge_cells, PARALLEL = SAFE
);

-- Drops the partitions of days before one, and returns how many there were. Readers and inserts wait for it as it for
-- them, so it gives up soon.
CREATE FUNCTION drop_usage_events_partitions(first_kept date) RETURNS integer
LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
DECLARE
    name text;
    dropped integer := 0;
BEGIN
    FOR name IN
        SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = 'usage_events'::regclass AND relname ~ '^usage_events_\d{8}$'
            AND relname < 'usage_events_' || to_char(first_kept, 'YYYYMMDD')
        ORDER BY relname
    LOOP
        -- Another replica may have been faster.
        EXECUTE format('DROP TABLE IF EXISTS %I', name);
        dropped := dropped + 1;
    END LOOP;
    RETURN dropped;
END
$$;
