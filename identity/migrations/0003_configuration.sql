-- Declarative configuration: how each organization and its document stand to each other, and what was applied.

-- document is the one that was applied last; problems are why the one that came after it could not be.
CREATE TABLE configurations (
    organization_id text COLLATE "C" PRIMARY KEY REFERENCES organizations,
    document text,
    allow_deletions boolean NOT NULL DEFAULT false,
    source_path text NOT NULL DEFAULT '',
    source_revision text NOT NULL DEFAULT '',
    paused boolean NOT NULL DEFAULT false,
    sync_time timestamptz,
    check_time timestamptz,
    drifted_resources integer NOT NULL DEFAULT 0 CHECK (drifted_resources >= 0),
    problems jsonb NOT NULL DEFAULT '[]',
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0)
);

-- Who applied it is empty for the watched directory.
CREATE TABLE configuration_revisions (
    configuration_revision_id text COLLATE "C" PRIMARY KEY CHECK (configuration_revision_id ~ '^crev_[0-9A-Za-z]{22}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    source_revision text NOT NULL,
    document_sha256 bytea NOT NULL CHECK (octet_length(document_sha256) = 32),
    principal_id text COLLATE "C" NOT NULL,
    changes jsonb NOT NULL,
    apply_time timestamptz NOT NULL
);

CREATE INDEX configuration_revisions_by_apply_time
    ON configuration_revisions (organization_id, apply_time DESC, configuration_revision_id DESC);
