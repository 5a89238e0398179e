-- The OAuth2 provider. Of secrets, codes and tokens there is the SHA-256 alone; private keys are sealed, each to its row.
-- A token stands only while all that it came from does: its authorization, the user's grant, the client.

CREATE TABLE oauth_clients (
    oauth_client_id text COLLATE "C" PRIMARY KEY CHECK (oauth_client_id ~ '^client_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    display_name text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 200),
    kind text NOT NULL CHECK (kind IN ('confidential', 'public')),
    redirect_uris text[] NOT NULL,
    grant_types text[] NOT NULL,
    scopes text[] NOT NULL,
    service_account_id text COLLATE "C",
    disabled boolean NOT NULL DEFAULT false,
    digest bytea CHECK (octet_length(digest) = 32),
    -- The secret before the last rotation, and until when it is accepted.
    previous_digest bytea CHECK (octet_length(previous_digest) = 32),
    previous_expire_time timestamptz,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0),
    UNIQUE (organization_id, oauth_client_id),
    CHECK ((kind = 'confidential') = (digest IS NOT NULL)),
    CHECK ((previous_digest IS NULL) = (previous_expire_time IS NULL)),
    FOREIGN KEY (organization_id, service_account_id) REFERENCES service_accounts (organization_id, service_account_id)
);

CREATE INDEX oauth_clients_by_create_time ON oauth_clients (organization_id, create_time, oauth_client_id);

-- What a user allowed a client; of each pair at most one that stands.
CREATE TABLE oauth_grants (
    oauth_grant_id text COLLATE "C" PRIMARY KEY CHECK (oauth_grant_id ~ '^grant_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    oauth_client_id text COLLATE "C" NOT NULL REFERENCES oauth_clients ON DELETE CASCADE,
    user_id text COLLATE "C" NOT NULL REFERENCES users,
    scopes text[] NOT NULL,
    create_time timestamptz NOT NULL,
    last_use_time timestamptz,
    revoke_time timestamptz
);

CREATE UNIQUE INDEX oauth_grants_standing ON oauth_grants (oauth_client_id, user_id) WHERE revoke_time IS NULL;
CREATE INDEX oauth_grants_by_user ON oauth_grants (organization_id, user_id, create_time, oauth_grant_id);

-- One sign-in of a user at a client: its code, and the family of tokens that came of it. expire_time is the code's, and
-- once the code is used the end of the whole family, however often its tokens are refreshed.
CREATE TABLE oauth_authorizations (
    oauth_authorization_id text COLLATE "C" PRIMARY KEY CHECK (oauth_authorization_id ~ '^authz_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    oauth_client_id text COLLATE "C" NOT NULL REFERENCES oauth_clients ON DELETE CASCADE,
    oauth_grant_id text COLLATE "C" NOT NULL REFERENCES oauth_grants ON DELETE CASCADE,
    user_id text COLLATE "C" NOT NULL REFERENCES users,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    redirect_uri text NOT NULL,
    code_challenge text NOT NULL,
    nonce text NOT NULL,
    scopes text[] NOT NULL,
    auth_time timestamptz NOT NULL,
    create_time timestamptz NOT NULL,
    expire_time timestamptz NOT NULL,
    use_time timestamptz,
    revoke_time timestamptz
);

CREATE INDEX oauth_authorizations_by_client ON oauth_authorizations (oauth_client_id);
CREATE INDEX oauth_authorizations_by_grant ON oauth_authorizations (oauth_grant_id);
CREATE INDEX oauth_authorizations_by_expire_time ON oauth_authorizations (expire_time);

-- use_time is when a refresh token was exchanged; it stays, so that its next use is known for what it is.
CREATE TABLE oauth_tokens (
    oauth_token_id text COLLATE "C" PRIMARY KEY CHECK (oauth_token_id ~ '^(access|refresh)_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    oauth_client_id text COLLATE "C" NOT NULL REFERENCES oauth_clients ON DELETE CASCADE,
    oauth_authorization_id text COLLATE "C" REFERENCES oauth_authorizations ON DELETE CASCADE,
    user_id text COLLATE "C" REFERENCES users,
    service_account_id text COLLATE "C",
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    scopes text[] NOT NULL,
    create_time timestamptz NOT NULL,
    expire_time timestamptz NOT NULL,
    use_time timestamptz,
    revoke_time timestamptz,
    CHECK ((oauth_authorization_id IS NULL) = (user_id IS NULL)),
    CHECK ((user_id IS NULL) <> (service_account_id IS NULL)),
    FOREIGN KEY (organization_id, service_account_id) REFERENCES service_accounts (organization_id, service_account_id)
);

CREATE INDEX oauth_tokens_by_client ON oauth_tokens (oauth_client_id);
CREATE INDEX oauth_tokens_by_authorization ON oauth_tokens (oauth_authorization_id)
    WHERE oauth_authorization_id IS NOT NULL;
CREATE INDEX oauth_tokens_by_expire_time ON oauth_tokens (expire_time);

-- The platform's keys; the one without a retire_time signs, and the others are published until theirs.
CREATE TABLE signing_keys (
    key_id text COLLATE "C" PRIMARY KEY CHECK (key_id ~ '^sigkey_[0-9A-Za-z]{22}$'),
    public_jwk text NOT NULL,
    sealed_private_key bytea NOT NULL,
    create_time timestamptz NOT NULL,
    retire_time timestamptz
);

CREATE UNIQUE INDEX signing_keys_current ON signing_keys ((true)) WHERE retire_time IS NULL;

SELECT wall_between_organizations('oauth_clients', 'oauth_grants', 'oauth_authorizations', 'oauth_tokens');
