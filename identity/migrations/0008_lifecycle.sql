-- How organizations, invites and keys come and go, and the log of what became invalid.

-- purge_time is when the data of a deleted organization goes.
ALTER TABLE organizations
    ADD COLUMN purge_time timestamptz,
    ADD CHECK ((state = 'deleted') = (purge_time IS NOT NULL));

CREATE INDEX organizations_by_purge_time ON organizations (purge_time) WHERE purge_time IS NOT NULL;

-- The SHA-256 of the text that a key had before its last rotation, and until when that one is accepted.
ALTER TABLE api_keys
    ADD COLUMN previous_digest bytea CHECK (octet_length(previous_digest) = 32),
    ADD COLUMN previous_expire_time timestamptz,
    ADD CHECK ((previous_digest IS NULL) = (previous_expire_time IS NULL));

-- Whom an organization asks to become a member. The token's text is in the mail alone; digest is its SHA-256. Of an
-- address there is at most one invite that is neither accepted nor revoked.
CREATE TABLE invites (
    invite_id text COLLATE "C" PRIMARY KEY CHECK (invite_id ~ '^invite_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    email text NOT NULL CHECK (char_length(email) BETWEEN 3 AND 254),
    role_ids text[] NOT NULL,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    creator_id text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" REFERENCES users,
    create_time timestamptz NOT NULL,
    expire_time timestamptz NOT NULL,
    accept_time timestamptz,
    revoke_time timestamptz,
    CHECK ((accept_time IS NULL) = (user_id IS NULL)),
    CHECK (accept_time IS NULL OR revoke_time IS NULL)
);

CREATE UNIQUE INDEX invites_open_by_email ON invites (organization_id, lower(email))
    WHERE accept_time IS NULL AND revoke_time IS NULL;
CREATE INDEX invites_by_create_time ON invites (organization_id, create_time, invite_id);

-- The newest revision of the log: one row, held by whoever writes until its transaction ends, so that revisions have no
-- gaps and appear in their order. oldest is the revision that the log begins after.
CREATE TABLE revocation_revision (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    revision bigint NOT NULL,
    oldest bigint NOT NULL,
    CHECK (oldest <= revision)
);

INSERT INTO revocation_revision (revision, oldest) SELECT last_value, last_value FROM revocations;
DROP SEQUENCE revocations;

-- What became invalid, kept for as long as a watcher may have been away.
CREATE TABLE revocations (
    revision bigint PRIMARY KEY,
    subject text NOT NULL
        CHECK (subject IN ('api_key_id', 'user_id', 'service_account_id', 'organization_id', 'role_id')),
    subject_id text COLLATE "C" NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX revocations_by_create_time ON revocations (create_time);

SELECT wall_between_organizations('invites');
