-- Sign-on from outside and directories: issuers that organizations trust, and what directories say of their people.

-- client_secret is sealed, and NULL for a client without one. withheld is what whoever set it up did not hold: the
-- issuer vouches for nobody who holds any of it.
CREATE TABLE issuers (
    issuer_id text COLLATE "C" PRIMARY KEY CHECK (issuer_id ~ '^iss_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    display_name text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 200),
    issuer_url text NOT NULL,
    client_id text NOT NULL,
    client_secret bytea,
    scopes text[] NOT NULL,
    email_domains text[] NOT NULL,
    claim_names jsonb NOT NULL,
    group_roles jsonb NOT NULL,
    default_role_ids text[] NOT NULL,
    withheld text[] NOT NULL,
    create_users boolean NOT NULL,
    trust_mfa boolean NOT NULL,
    disabled boolean NOT NULL,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0),
    UNIQUE (organization_id, issuer_id)
);

CREATE INDEX issuers_by_create_time ON issuers (organization_id, create_time, issuer_id);
CREATE INDEX issuers_by_email_domain ON issuers USING gin (email_domains) WHERE NOT disabled;

-- Who a token's subject is. role_ids are those that the issuer gave, beside what the member holds otherwise.
CREATE TABLE issuer_users (
    organization_id text COLLATE "C" NOT NULL,
    issuer_id text COLLATE "C" NOT NULL,
    subject text COLLATE "C" NOT NULL CHECK (char_length(subject) BETWEEN 1 AND 255),
    user_id text COLLATE "C" NOT NULL REFERENCES users,
    role_ids text[] NOT NULL,
    create_time timestamptz NOT NULL,
    PRIMARY KEY (issuer_id, subject),
    FOREIGN KEY (organization_id, issuer_id) REFERENCES issuers (organization_id, issuer_id) ON DELETE CASCADE
);

CREATE INDEX issuer_users_by_user ON issuer_users (organization_id, user_id);

-- Sign-ins that have begun. Both digests are SHA-256; secrets are the nonce and the PKCE verifier, sealed.
CREATE TABLE issuer_sign_ins (
    state_digest bytea PRIMARY KEY CHECK (octet_length(state_digest) = 32),
    browser_digest bytea NOT NULL CHECK (octet_length(browser_digest) = 32),
    organization_id text COLLATE "C" NOT NULL,
    issuer_id text COLLATE "C" NOT NULL,
    secrets bytea NOT NULL,
    return_path text NOT NULL,
    expire_time timestamptz NOT NULL,
    FOREIGN KEY (organization_id, issuer_id) REFERENCES issuers (organization_id, issuer_id) ON DELETE CASCADE
);

CREATE INDEX issuer_sign_ins_by_expire_time ON issuer_sign_ins (expire_time);

CREATE TABLE scim_settings (
    organization_id text COLLATE "C" PRIMARY KEY REFERENCES organizations,
    enabled boolean NOT NULL,
    group_roles jsonb NOT NULL,
    default_role_ids text[] NOT NULL,
    last_use_time timestamptz,
    update_time timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0)
);

-- What a directory says of a user beyond the membership. A row without a membership is a user whom the directory has
-- deactivated; kept_role_ids are what that user is given back, role_ids what the directory gave.
CREATE TABLE scim_users (
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    user_id text COLLATE "C" NOT NULL REFERENCES users,
    user_name text NOT NULL CHECK (char_length(user_name) BETWEEN 1 AND 254),
    external_id text COLLATE "C",
    display_name text NOT NULL CHECK (char_length(display_name) <= 200),
    name jsonb NOT NULL,
    role_ids text[] NOT NULL,
    kept_role_ids text[] NOT NULL,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    PRIMARY KEY (organization_id, user_id)
);

CREATE UNIQUE INDEX scim_users_by_user_name ON scim_users (organization_id, lower(user_name));
CREATE INDEX scim_users_by_external_id ON scim_users (organization_id, external_id);

CREATE TABLE scim_groups (
    scim_group_id text COLLATE "C" PRIMARY KEY CHECK (scim_group_id ~ '^group_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    display_name text COLLATE "C" NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 200),
    external_id text COLLATE "C",
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    UNIQUE (organization_id, scim_group_id),
    UNIQUE (organization_id, display_name)
);

CREATE TABLE scim_group_members (
    organization_id text COLLATE "C" NOT NULL,
    scim_group_id text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    PRIMARY KEY (organization_id, scim_group_id, user_id),
    FOREIGN KEY (organization_id, scim_group_id) REFERENCES scim_groups (organization_id, scim_group_id)
        ON DELETE CASCADE,
    FOREIGN KEY (organization_id, user_id) REFERENCES scim_users (organization_id, user_id) ON DELETE CASCADE
);

CREATE INDEX scim_group_members_by_user ON scim_group_members (organization_id, user_id);

SELECT wall_between_organizations(
    'issuers', 'issuer_users', 'issuer_sign_ins', 'scim_settings', 'scim_users', 'scim_groups', 'scim_group_members'
);
