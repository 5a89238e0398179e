-- Second factors belong to people and not to organizations, so these tables know none; what organizations require does.
-- Secrets are sealed, each to its row; of recovery codes there is the SHA-256 of 120 random bits.

CREATE TABLE totps (
    user_id text COLLATE "C" PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    sealed_secret bytea NOT NULL,
    -- The last time step (30 s) of which a code was accepted: no step is accepted twice (RFC 6238, 5.2).
    last_step bigint NOT NULL CHECK (last_step > 0),
    enable_time timestamptz NOT NULL,
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    attempts_since timestamptz
);

CREATE TABLE totp_enrollments (
    user_id text COLLATE "C" PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    sealed_secret bytea NOT NULL,
    expire_time timestamptz NOT NULL
);

CREATE TABLE recovery_codes (
    user_id text COLLATE "C" NOT NULL REFERENCES users ON DELETE CASCADE,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    PRIMARY KEY (user_id, digest)
);

CREATE TABLE mfa_requirements (
    organization_id text COLLATE "C" PRIMARY KEY REFERENCES organizations,
    everyone boolean NOT NULL,
    role_ids text[] NOT NULL,
    update_time timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0)
);

CREATE TABLE signing_secrets (
    api_key_id text COLLATE "C" PRIMARY KEY REFERENCES api_keys,
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    sealed_secret bytea NOT NULL,
    create_time timestamptz NOT NULL
);

SELECT wall_between_organizations('mfa_requirements', 'signing_secrets');
