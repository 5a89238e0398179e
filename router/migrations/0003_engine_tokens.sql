-- The replicas of the router, and how far their engines' own token counters moved.

-- One row for each replica that ever said it is alive, by the id that stays over its restarts. A replica that has left in
-- good order is not alive from then on; one that was killed is not once its heartbeat is old.
CREATE TABLE routers (
    router_id text COLLATE "C" PRIMARY KEY,
    router_instance_id text NOT NULL,
    address text NOT NULL,
    version text NOT NULL,
    draining boolean NOT NULL,
    requests_in_flight bigint NOT NULL,
    unpublished_entries bigint NOT NULL,
    start_time timestamptz NOT NULL,
    heartbeat_time timestamptz NOT NULL,
    has_left boolean NOT NULL
);

-- The last reading of each engine, and in slot_time whose turn the reading is: a replica that moves it forward reads the
-- engine for that slot, and only it may write what it read. What was read is absent until then.
CREATE TABLE engine_readings (
    backend_id text COLLATE "C" PRIMARY KEY,
    slot_time timestamptz NOT NULL,
    base_url text,
    read_time timestamptz,
    process_start_time_s double precision,
    prompt_tokens bigint,
    cached_prompt_tokens bigint,
    completion_tokens bigint
);

-- How far the counters moved from one reading to the next. Backends that are gone keep theirs until they are old.
CREATE TABLE engine_tokens (
    backend_id text COLLATE "C" NOT NULL,
    start_time timestamptz NOT NULL,
    end_time timestamptz NOT NULL CHECK (end_time > start_time),
    prompt_tokens bigint NOT NULL CHECK (prompt_tokens >= 0),
    cached_prompt_tokens bigint NOT NULL CHECK (cached_prompt_tokens >= 0),
    completion_tokens bigint NOT NULL CHECK (completion_tokens >= 0),
    reset boolean NOT NULL,
    PRIMARY KEY (backend_id, start_time)
);

CREATE INDEX engine_tokens_by_end_time ON engine_tokens (end_time);
