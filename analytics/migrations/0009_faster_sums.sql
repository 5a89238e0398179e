-- What one transaction adds to sums travels as an array of these: one value is read in half of the time that an array
-- for each column takes. It is a type of its own, so that tables may get columns while older processes still write.

CREATE TYPE usage_sum AS (
    organization_id text COLLATE "C",
    start timestamptz,
    api_key_id text COLLATE "C",
    user_id text COLLATE "C",
    service_account_id text COLLATE "C",
    model text COLLATE "C",
    backend_id text COLLATE "C",
    endpoint smallint,
    outcome smallint,
    reason text COLLATE "C",
    requests bigint,
    prompt_tokens bigint,
    cached_prompt_tokens bigint,
    completion_tokens bigint,
    cost_micros bigint,
    prompt_cost_micros bigint,
    cached_prompt_cost_micros bigint,
    completion_cost_micros bigint,
    latency bigint[],
    ttft bigint[]
);
