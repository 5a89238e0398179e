-- Policies in Rego, and what they decided. modules is a JSON array of [path, source].
CREATE TABLE policies (
    policy_id text COLLATE "C" PRIMARY KEY CHECK (policy_id ~ '^policy_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    display_name text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 200),
    modules text NOT NULL,
    data_json text NOT NULL,
    disabled boolean NOT NULL,
    version bigint NOT NULL DEFAULT 1 CHECK (version > 0),
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0)
);

CREATE INDEX policies_by_create_time ON policies (organization_id, create_time, policy_id);

-- input is a PolicyInput, which holds no secret; duration_micros is how long it took to judge it.
CREATE TABLE policy_decisions (
    policy_decision_id text COLLATE "C" PRIMARY KEY,
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    request_id text COLLATE "C" NOT NULL,
    principal_id text COLLATE "C" NOT NULL,
    input bytea NOT NULL,
    allowed boolean NOT NULL,
    policy_ids text[] NOT NULL,
    denying_policy_id text COLLATE "C" NOT NULL,
    reason text NOT NULL,
    decide_time timestamptz NOT NULL,
    duration_micros bigint NOT NULL
);

CREATE INDEX policy_decisions_by_time ON policy_decisions (organization_id, decide_time, policy_decision_id);
CREATE INDEX policy_decisions_by_age ON policy_decisions (decide_time);

SELECT wall_between_organizations('policies', 'policy_decisions');
