-- Statements: what organizations owe for months, each chained to the one before, with their lines and the keys that sign.
-- Nothing here is ever changed or removed; whoever does so past the triggers is found out by hashes and signatures.

-- The private keys are encrypted, each bound to its id.
CREATE TABLE statement_keys (
    key_id text COLLATE "C" PRIMARY KEY,
    public_key bytea NOT NULL,
    sealed_private_key bytea NOT NULL,
    create_time timestamptz NOT NULL
);

CREATE TABLE statements (
    statement_id text COLLATE "C" PRIMARY KEY,
    organization_id text COLLATE "C" NOT NULL,
    year smallint NOT NULL,
    month smallint NOT NULL CHECK (month BETWEEN 1 AND 12),
    lines integer NOT NULL,
    requests bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    cost_micros bigint NOT NULL,
    issue_time timestamptz NOT NULL,
    previous_hash bytea NOT NULL,
    hash bytea NOT NULL,
    key_id text COLLATE "C" NOT NULL REFERENCES statement_keys,
    signature bytea NOT NULL,
    UNIQUE (organization_id, year, month)
);

-- kind by its number in the contract: 1 usage, 2 correction. year and month are those of the usage.
CREATE TABLE statement_lines (
    statement_id text COLLATE "C" NOT NULL REFERENCES statements,
    line_number integer NOT NULL CHECK (line_number > 0),
    organization_id text COLLATE "C" NOT NULL,
    kind smallint NOT NULL,
    year smallint NOT NULL,
    month smallint NOT NULL,
    api_key_id text COLLATE "C" NOT NULL,
    model text COLLATE "C" NOT NULL,
    price_id text COLLATE "C" NOT NULL,
    requests bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    cached_prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    cost_micros bigint NOT NULL,
    hash bytea NOT NULL,
    signature bytea NOT NULL,
    PRIMARY KEY (statement_id, line_number)
);

CREATE INDEX statement_lines_by_month ON statement_lines (organization_id, year, month);

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is never changed', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON statement_keys
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON statements
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON statement_lines
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
