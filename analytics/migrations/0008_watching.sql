-- What analytics has found by itself that people may want to know: hours unlike those before, and ingestion in trouble.

-- Who judges an hour puts it here in the same transaction, so that however many replicas want to, each is judged once.
CREATE TABLE watched_hours (
    hour timestamptz PRIMARY KEY
);

-- type is that of the event, which is made in the same transaction: 2 of spend, 3 of error rates.
CREATE TABLE anomalies (
    organization_id text COLLATE "C" NOT NULL,
    hour timestamptz NOT NULL,
    type smallint NOT NULL,
    observed double precision NOT NULL,
    expected double precision NOT NULL,
    deviations double precision NOT NULL,
    PRIMARY KEY (organization_id, hour, type)
);

CREATE INDEX anomalies_by_hour ON anomalies (hour);

-- What was told of ingestion: whether it is delayed, and how many messages were put aside.
CREATE TABLE ingestion_watch (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    delayed boolean NOT NULL DEFAULT false,
    dead_letters bigint NOT NULL DEFAULT 0,
    dead_letters_time timestamptz NOT NULL DEFAULT 'epoch'
);

INSERT INTO ingestion_watch DEFAULT VALUES;

-- What dashboards read: Grafana sees these views and nothing else. Numbers of the contract are words here, money is
-- dollars, and there is neither an event as it came nor anything that a client wrote but the names of models.
CREATE SCHEMA grafana;

CREATE FUNCTION grafana.outcome(outcome smallint) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(
        (ARRAY['succeeded', 'refused', 'failed', 'cancelled', 'truncated', 'deadline_exceeded', 'aborted'])[outcome],
        outcome::text
    )
$$;

-- The duration that a share of those in a histogram do not exceed, within 1 %; analytics/sketches.py says how it is made.
CREATE FUNCTION grafana.percentile_seconds(cells bigint[], share double precision) RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT 2 * 1.02 ^ (cell >> 40) / 2.02 / 1e6 FROM (
        SELECT cell, sum(cell & 1099511627775) OVER (ORDER BY cell) AS until, sum(cell & 1099511627775) OVER () AS total
        FROM unnest(cells) AS cell
    ) AS counted
    WHERE until >= share * total ORDER BY cell LIMIT 1
$$;

CREATE VIEW grafana.usage_hourly AS
SELECT
    hour AS time, organization_id, api_key_id, model, grafana.outcome(outcome) AS outcome, requests, prompt_tokens,
    cached_prompt_tokens, completion_tokens, cost_micros / 1e6 AS cost_dollars
FROM usage_hourly;

CREATE VIEW grafana.usage_daily AS
SELECT
    day AS time, organization_id, api_key_id, model, grafana.outcome(outcome) AS outcome, requests, prompt_tokens,
    cached_prompt_tokens, completion_tokens, cost_micros / 1e6 AS cost_dollars
FROM usage_daily;

-- 2 is refused, 4 cancelled by the client, which is no failure.
CREATE VIEW grafana.reliability AS
SELECT
    time, organization_id, model, requests, failed_requests, refused_requests,
    grafana.percentile_seconds(latency, 0.5) AS latency_p50_seconds,
    grafana.percentile_seconds(latency, 0.95) AS latency_p95_seconds,
    grafana.percentile_seconds(latency, 0.99) AS latency_p99_seconds,
    grafana.percentile_seconds(ttft, 0.5) AS ttft_p50_seconds,
    grafana.percentile_seconds(ttft, 0.95) AS ttft_p95_seconds,
    grafana.percentile_seconds(ttft, 0.99) AS ttft_p99_seconds
FROM (
    SELECT
        hour AS time, organization_id, model,
        coalesce(sum(requests) FILTER (WHERE outcome <> 2), 0)::bigint AS requests,
        coalesce(sum(requests) FILTER (WHERE outcome NOT IN (1, 2, 4)), 0)::bigint AS failed_requests,
        coalesce(sum(requests) FILTER (WHERE outcome = 2), 0)::bigint AS refused_requests,
        sum_sketches(latency) AS latency, sum_sketches(ttft) AS ttft
    FROM usage_hourly GROUP BY 1, 2, 3
) AS summed;

CREATE VIEW grafana.freshness AS
SELECT complete_until, extract(epoch FROM now() - complete_until)::double precision AS lag_seconds FROM usage_freshness;

CREATE VIEW grafana.webhook_deliveries AS
SELECT
    delivery.create_time AS time, organization_id, webhook_id, event_id,
    (ARRAY['pending', 'succeeded', 'failed'])[state] AS state, attempts, http_status
FROM webhook_deliveries AS delivery JOIN webhooks USING (webhook_id);

CREATE VIEW grafana.reconciliations AS
SELECT
    start_time AS time, end_time, (ARRAY['journal', 'ledger', 'engines'])[kind] AS kind,
    (ARRAY['running', 'agreed', 'differed', 'incomplete'])[state] AS state, compared, differences, republished,
    residual_prompt_tokens, residual_completion_tokens, finish_time
FROM reconciliations;

CREATE VIEW grafana.anomalies AS
SELECT
    hour AS time, organization_id, CASE type WHEN 2 THEN 'spend' WHEN 3 THEN 'error_rate' END AS kind, observed,
    expected, deviations
FROM anomalies;

-- Whom Grafana comes as. Roles belong to the whole server: one who may not make any finds it made, or goes without until
-- an administrator does what docs/grafana.md says. It cannot log in before it is given a password.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'aiaas_grafana') THEN
        BEGIN
            CREATE ROLE aiaas_grafana NOLOGIN CONNECTION LIMIT 20;
            ALTER ROLE aiaas_grafana SET default_transaction_read_only = on;
            ALTER ROLE aiaas_grafana SET statement_timeout = '30s';
            ALTER ROLE aiaas_grafana SET search_path = grafana;
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN NULL;
            WHEN insufficient_privilege THEN
                RAISE NOTICE 'the role aiaas_grafana is not there and may not be made';
                RETURN;
        END;
    END IF;
    GRANT USAGE ON SCHEMA grafana TO aiaas_grafana;
    GRANT SELECT ON ALL TABLES IN SCHEMA grafana TO aiaas_grafana;
END
$$;
