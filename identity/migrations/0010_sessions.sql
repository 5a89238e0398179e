-- How people sign in. Passwords, challenges, recoveries and throttles belong to people and not to organizations, so these
-- tables know none; sessions do.

-- hash is bcrypt's, over a digest of the password.
CREATE TABLE passwords (
    user_id text COLLATE "C" PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    hash text NOT NULL,
    update_time timestamptz NOT NULL
);

-- digest is the SHA-256 of the token. Whoever is no member any more, and whose issuer is gone, has no sessions.
CREATE TABLE sessions (
    session_id text COLLATE "C" PRIMARY KEY CHECK (session_id ~ '^session_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    multi_factor boolean NOT NULL,
    issuer_id text COLLATE "C",
    client_address text NOT NULL,
    user_agent text NOT NULL CHECK (char_length(user_agent) <= 200),
    create_time timestamptz NOT NULL,
    last_use_time timestamptz NOT NULL,
    expire_time timestamptz NOT NULL,
    end_time timestamptz,
    FOREIGN KEY (organization_id, user_id) REFERENCES memberships (organization_id, user_id) ON DELETE CASCADE,
    FOREIGN KEY (organization_id, issuer_id) REFERENCES issuers (organization_id, issuer_id) ON DELETE CASCADE
);

CREATE INDEX sessions_by_user ON sessions (user_id, create_time, session_id);
CREATE INDEX sessions_by_member ON sessions (organization_id, user_id);
CREATE INDEX sessions_by_issuer ON sessions (organization_id, issuer_id) WHERE issuer_id IS NOT NULL;
CREATE INDEX sessions_by_expire_time ON sessions (expire_time);

SELECT wall_between_organizations('sessions');

-- Sign-ins that wait for a second factor.
CREATE TABLE challenges (
    challenge_id text COLLATE "C" PRIMARY KEY,
    organization_id text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    issuer_id text COLLATE "C",
    attempts integer NOT NULL DEFAULT 0,
    expire_time timestamptz NOT NULL,
    FOREIGN KEY (organization_id, user_id) REFERENCES memberships (organization_id, user_id) ON DELETE CASCADE,
    FOREIGN KEY (organization_id, issuer_id) REFERENCES issuers (organization_id, issuer_id) ON DELETE CASCADE
);

CREATE INDEX challenges_by_expire_time ON challenges (expire_time);
CREATE INDEX challenges_by_member ON challenges (organization_id, user_id);

SELECT wall_between_organizations('challenges');

CREATE TABLE recoveries (
    recovery_id text COLLATE "C" PRIMARY KEY,
    user_id text COLLATE "C" NOT NULL REFERENCES users ON DELETE CASCADE,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    expire_time timestamptz NOT NULL
);

CREATE INDEX recoveries_by_user ON recoveries (user_id);
CREATE INDEX recoveries_by_expire_time ON recoveries (expire_time);

-- Attempts by what they are counted for: a digest of what it is and of whom. Losing them in a crash is no harm.
CREATE UNLOGGED TABLE throttles (
    subject bytea PRIMARY KEY,
    attempts integer NOT NULL,
    attempt_time timestamptz NOT NULL,
    free_time timestamptz NOT NULL
);

CREATE INDEX throttles_by_attempt_time ON throttles (attempt_time);
