-- Where the server has TimescaleDB, events lie in a hypertable of it, in chunks of a day that it makes by itself and
-- compresses after a week. Columns, keys and every query are the same on both, and so are the answers. Sums stay tables:
-- they are written in the transaction that inserts events, which no continuous aggregate is.

-- Removes events before a moment that have no partition of their own, so many at most, and returns how many.
CREATE FUNCTION remove_stray_usage_events(since timestamptz, most integer) RETURNS integer
LANGUAGE sql AS $$
    WITH gone AS (
        DELETE FROM usage_events_default
        WHERE ctid = ANY(ARRAY(SELECT ctid FROM usage_events_default WHERE admit_time < since LIMIT most))
        RETURNING 1
    )
    SELECT count(*)::integer FROM gone
$$;

DO $migration$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb') THEN
        RETURN;
    END IF;
    CREATE EXTENSION IF NOT EXISTS timescaledb;
    ALTER TABLE usage_events RENAME TO usage_events_partitioned;
    CREATE TABLE usage_events (LIKE usage_events_partitioned INCLUDING ALL);
    PERFORM create_hypertable(
        'usage_events', by_range('admit_time', INTERVAL '1 day'), create_default_indexes => false
    );
    INSERT INTO usage_events SELECT * FROM usage_events_partitioned;
    DROP FUNCTION remove_stray_usage_events;
    DROP TABLE usage_events_partitioned;
    ALTER TABLE usage_events SET (
        timescaledb.compress,
        timescaledb.compress_segmentby = 'organization_id',
        timescaledb.compress_orderby = 'admit_time, request_id'
    );
    PERFORM add_compression_policy('usage_events', INTERVAL '7 days');

    CREATE FUNCTION remove_stray_usage_events(since timestamptz, most integer) RETURNS integer
    LANGUAGE sql AS 'SELECT 0';
    CREATE OR REPLACE FUNCTION ensure_usage_events_partition(day date) RETURNS boolean
    LANGUAGE sql AS 'SELECT false';
    CREATE OR REPLACE FUNCTION drop_usage_events_partitions(first_kept date) RETURNS integer
    LANGUAGE sql SET lock_timeout = '2s' AS $$
        SELECT count(*)::integer
        FROM drop_chunks('usage_events', older_than => first_kept::timestamp AT TIME ZONE 'UTC')
    $$;
END
$migration$;
