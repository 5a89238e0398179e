-- The registry of models and backends. Every change first takes the one row of registry_revision, so changes go one
-- after another, and a router that polls the number sees that something changed.

CREATE TABLE registry_revision (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    revision bigint NOT NULL
);

INSERT INTO registry_revision (revision) VALUES (1);

CREATE TABLE models (
    model_id text COLLATE "C" PRIMARY KEY,
    owner text NOT NULL,
    context_tokens bigint NOT NULL CHECK (context_tokens >= 0),
    endpoints integer[] NOT NULL CHECK (cardinality(endpoints) > 0),
    create_time timestamptz NOT NULL DEFAULT now(),
    update_time timestamptz NOT NULL DEFAULT now(),
    revision bigint NOT NULL
);

-- Every name that a client can write: a model's id at position 0, its aliases after it. One name means one model.
CREATE TABLE model_names (
    name text COLLATE "C" PRIMARY KEY,
    model_id text COLLATE "C" NOT NULL REFERENCES models ON DELETE CASCADE,
    position integer NOT NULL,
    UNIQUE (model_id, position)
);

CREATE TABLE backends (
    backend_id text COLLATE "C" PRIMARY KEY,
    base_url text NOT NULL,
    engine integer NOT NULL,
    weight integer NOT NULL CHECK (weight BETWEEN 1 AND 1000),
    limit_concurrent_requests integer NOT NULL CHECK (limit_concurrent_requests >= 0),
    draining boolean NOT NULL,
    first_byte_timeout_millis bigint NOT NULL CHECK (first_byte_timeout_millis >= 0),
    credential_variable text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    update_time timestamptz NOT NULL DEFAULT now(),
    revision bigint NOT NULL
);

CREATE TABLE backend_models (
    backend_id text COLLATE "C" NOT NULL REFERENCES backends ON DELETE CASCADE,
    model_id text COLLATE "C" NOT NULL REFERENCES models,
    upstream_model text NOT NULL,
    position integer NOT NULL,
    PRIMARY KEY (backend_id, model_id)
);

CREATE INDEX backend_models_by_model ON backend_models (model_id, backend_id);

-- The first answers to creations that carried a request_id, for a day.
CREATE TABLE creations (
    scope text NOT NULL,
    request_id text NOT NULL,
    digest bytea NOT NULL,
    answer text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (scope, request_id)
);

CREATE INDEX creations_by_create_time ON creations (create_time);
