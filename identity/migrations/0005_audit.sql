-- The audit log. The service adds to it and reads it; it has no right to change or to remove what is there. Whoever has
-- one is found out by the hashes, the signatures and the checkpoints.
--
-- None of these tables refers to organizations: what was done is to be known when the organization is gone.

-- The end of each chain. Who appends locks this row, after every other lock of its transaction.
CREATE TABLE audit_chains (
    organization_id text COLLATE "C" PRIMARY KEY,
    sequence bigint NOT NULL DEFAULT 0 CHECK (sequence >= 0),
    hash bytea NOT NULL DEFAULT decode(repeat('00', 32), 'hex') CHECK (octet_length(hash) = 32),
    checkpoint_sequence bigint NOT NULL DEFAULT 0
);

CREATE INDEX audit_chains_without_checkpoint ON audit_chains (organization_id) WHERE sequence > checkpoint_sequence;

-- changes is JSON, kept as the text that was hashed.
CREATE TABLE audit_entries (
    organization_id text COLLATE "C" NOT NULL,
    sequence bigint NOT NULL CHECK (sequence > 0),
    audit_entry_id text COLLATE "C" NOT NULL UNIQUE,
    event_time timestamptz NOT NULL,
    principal_kind text NOT NULL,
    principal_id text COLLATE "C" NOT NULL,
    api_key_id text COLLATE "C" NOT NULL,
    method text COLLATE "C" NOT NULL,
    permission text COLLATE "C" NOT NULL,
    resource_type text COLLATE "C" NOT NULL,
    resource_id text COLLATE "C" NOT NULL,
    outcome text NOT NULL CHECK (outcome IN ('succeeded', 'denied', 'failed')),
    reason text NOT NULL,
    changes text NOT NULL,
    request_id text COLLATE "C" NOT NULL,
    client_address text NOT NULL,
    previous_hash bytea NOT NULL,
    hash bytea NOT NULL,
    key_id text NOT NULL,
    signature bytea NOT NULL,
    PRIMARY KEY (organization_id, sequence)
);

CREATE INDEX audit_entries_by_time ON audit_entries (organization_id, event_time);
CREATE INDEX audit_entries_by_principal ON audit_entries (organization_id, principal_id, sequence);
CREATE INDEX audit_entries_by_resource ON audit_entries (organization_id, resource_id, sequence);

CREATE TABLE audit_checkpoints (
    audit_checkpoint_id text COLLATE "C" PRIMARY KEY,
    organization_id text COLLATE "C" NOT NULL,
    sequence bigint NOT NULL,
    hash bytea NOT NULL,
    create_time timestamptz NOT NULL,
    key_id text NOT NULL,
    signature bytea NOT NULL
);

CREATE INDEX audit_checkpoints_by_create_time ON audit_checkpoints (create_time);
CREATE INDEX audit_checkpoints_by_sequence ON audit_checkpoints (organization_id, sequence, audit_checkpoint_id);

REVOKE UPDATE, DELETE ON audit_entries, audit_checkpoints FROM aiaas_identity;
REVOKE DELETE ON audit_chains FROM aiaas_identity;

-- Removes, of one chain, what is kept no longer: about `most` entries up to a checkpoint that is 400 days old, and the
-- checkpoints before that one. Its entry stays, as the chain's beginning. Returns how many entries went, 0 when no chain has
-- any. Whoever calls it cannot have anything newer removed.
CREATE FUNCTION forget_old_audit_entries(most integer) RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp AS $$
DECLARE
    chain record;
    beginning bigint;
    forgotten bigint;
BEGIN
    FOR chain IN
        SELECT organization_id, max(sequence) AS last_old,
            (SELECT min(sequence) FROM audit_entries WHERE organization_id = old.organization_id) AS oldest
        FROM audit_checkpoints AS old WHERE create_time < now() - interval '400 days' GROUP BY organization_id
    LOOP
        CONTINUE WHEN chain.oldest IS NULL OR chain.oldest >= chain.last_old;
        SELECT coalesce(max(sequence) FILTER (WHERE sequence <= chain.oldest + most), min(sequence)) INTO beginning
        FROM audit_checkpoints
        WHERE organization_id = chain.organization_id AND sequence > chain.oldest AND sequence <= chain.last_old;
        DELETE FROM audit_entries WHERE organization_id = chain.organization_id AND sequence < beginning;
        GET DIAGNOSTICS forgotten = ROW_COUNT;
        DELETE FROM audit_checkpoints WHERE organization_id = chain.organization_id AND sequence < beginning;
        RETURN forgotten;
    END LOOP;
    RETURN 0;
END
$$;

-- The wall of 0004_row_level_security.sql around tables that came after it: each has a column organization_id.
CREATE FUNCTION wall_between_organizations(VARIADIC tenant_tables text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    tenant_table text;
BEGIN
    FOREACH tenant_table IN ARRAY tenant_tables LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format(
            'CREATE POLICY organization ON %I USING ((SELECT current_setting(''app.organization_id'', true)) = ''*'''
            ' OR organization_id = (SELECT current_setting(''app.organization_id'', true)))',
            tenant_table
        );
    END LOOP;
END
$$;

SELECT wall_between_organizations('audit_chains', 'audit_entries', 'audit_checkpoints');
