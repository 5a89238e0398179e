-- Organizations and everybody who acts in them. Every tenant table has organization_id, and every query names it. Ids
-- are compared byte by byte (COLLATE "C"), so that they sort as they were made. A revision grows with each change of
-- its row and is the etag that clients see.

CREATE TABLE organizations (
    organization_id text COLLATE "C" PRIMARY KEY CHECK (organization_id ~ '^org_[0-9A-Za-z]{1,60}$'),
    display_name text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 200),
    state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'suspended', 'deleted')),
    rate_limits jsonb NOT NULL DEFAULT '{}',
    allowed_models text[] NOT NULL DEFAULT '{}',
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0)
);

CREATE INDEX organizations_by_create_time ON organizations (create_time, organization_id);

-- Custom roles; the built-in ones are in the code.
CREATE TABLE roles (
    role_id text COLLATE "C" PRIMARY KEY CHECK (role_id ~ '^role_[0-9A-Za-z]{1,60}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    display_name text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 200),
    permissions text[] NOT NULL,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0),
    UNIQUE (organization_id, role_id)
);

-- People exist once on the platform; what an organization knows and says of them is in memberships.
CREATE TABLE users (
    user_id text COLLATE "C" PRIMARY KEY CHECK (user_id ~ '^user_[0-9A-Za-z]{1,60}$'),
    email text NOT NULL CHECK (char_length(email) BETWEEN 3 AND 254),
    state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'suspended')),
    create_time timestamptz NOT NULL
);

CREATE UNIQUE INDEX users_by_email ON users (lower(email));

CREATE TABLE memberships (
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    user_id text COLLATE "C" NOT NULL REFERENCES users,
    display_name text NOT NULL CHECK (char_length(display_name) <= 200),
    role_ids text[] NOT NULL,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0),
    PRIMARY KEY (organization_id, user_id)
);

CREATE INDEX memberships_by_create_time ON memberships (organization_id, create_time, user_id);
CREATE INDEX memberships_by_user ON memberships (user_id);
CREATE INDEX memberships_by_role ON memberships USING gin (role_ids);

-- A removed service account stays as a row, since the keys that acted as it stay.
CREATE TABLE service_accounts (
    service_account_id text COLLATE "C" PRIMARY KEY CHECK (service_account_id ~ '^sa_[0-9A-Za-z]{1,60}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    display_name text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 200),
    role_ids text[] NOT NULL,
    disabled boolean NOT NULL DEFAULT false,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    delete_time timestamptz,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0),
    UNIQUE (organization_id, service_account_id)
);

CREATE UNIQUE INDEX service_accounts_by_display_name ON service_accounts (organization_id, display_name)
    WHERE delete_time IS NULL;
CREATE INDEX service_accounts_by_create_time ON service_accounts (organization_id, create_time, service_account_id)
    WHERE delete_time IS NULL;
CREATE INDEX service_accounts_by_role ON service_accounts USING gin (role_ids) WHERE delete_time IS NULL;

-- The key's text is nowhere; digest is its SHA-256. granted holds what whoever set the scopes held at that time: it
-- bounds a key of the organization itself, which has no owner whose roles could.
CREATE TABLE api_keys (
    api_key_id text COLLATE "C" PRIMARY KEY CHECK (api_key_id ~ '^key_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    display_name text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 200),
    service_account_id text COLLATE "C",
    user_id text COLLATE "C" REFERENCES users,
    scopes text[] NOT NULL,
    granted text[] NOT NULL,
    allowed_models text[] NOT NULL,
    allowed_networks text[] NOT NULL,
    rate_limits jsonb NOT NULL,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    creator_id text COLLATE "C" NOT NULL,
    expire_time timestamptz,
    create_time timestamptz NOT NULL,
    last_use_time timestamptz,
    revoke_time timestamptz,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0),
    CHECK (service_account_id IS NULL OR user_id IS NULL),
    FOREIGN KEY (organization_id, service_account_id) REFERENCES service_accounts (organization_id, service_account_id)
);

CREATE INDEX api_keys_by_create_time ON api_keys (organization_id, create_time, api_key_id);
CREATE INDEX api_keys_by_service_account ON api_keys (organization_id, service_account_id, create_time, api_key_id)
    WHERE service_account_id IS NOT NULL;
CREATE INDEX api_keys_by_user ON api_keys (organization_id, user_id, create_time, api_key_id)
    WHERE user_id IS NOT NULL;

-- The first answers to creations that carried a request_id. organization_id is the one the caller named, or the
-- caller's own where the request names none.
CREATE TABLE creations (
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    rpc text NOT NULL,
    request_id text NOT NULL CHECK (char_length(request_id) BETWEEN 1 AND 128),
    created_id text COLLATE "C" NOT NULL,
    create_time timestamptz NOT NULL,
    PRIMARY KEY (organization_id, rpc, request_id)
);

CREATE INDEX creations_by_create_time ON creations (create_time);

-- Numbers the revocations that are announced, so that listeners can tell whether they missed one.
CREATE SEQUENCE revocations AS bigint;
