-- The second wall between organizations: whatever a statement forgets, the service sees the rows of the organization
-- that its transaction is for, or of all where it says '*', and of none where it says nothing. The service works as a
-- role that owns nothing, so that it cannot take the wall down. Roles belong to the whole server: one who may not make
-- any finds it made and granted.
DO $$
DECLARE
    tenant_table text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'aiaas_identity') THEN
        BEGIN
            CREATE ROLE aiaas_identity NOLOGIN;
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN NULL;
        END;
    END IF;
    IF NOT pg_has_role(current_user, 'aiaas_identity', 'MEMBER') THEN
        EXECUTE format('GRANT aiaas_identity TO %I', current_user);
    END IF;
    GRANT USAGE ON SCHEMA public TO aiaas_identity;
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO aiaas_identity;
    GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO aiaas_identity;
    REVOKE INSERT, UPDATE, DELETE ON schema_migrations FROM aiaas_identity;
    ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO aiaas_identity;
    ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO aiaas_identity;
    FOR tenant_table IN
        SELECT columns.table_name
        FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
        WHERE table_schema = 'public' AND column_name = 'organization_id' AND table_type = 'BASE TABLE'
    LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', tenant_table);
        -- Each current_setting in a query of its own is worked out once a statement, and not once a row.
        EXECUTE format(
            'CREATE POLICY organization ON %I USING ((SELECT current_setting(''app.organization_id'', true)) = ''*'''
            ' OR organization_id = (SELECT current_setting(''app.organization_id'', true)))',
            tenant_table
        );
    END LOOP;
END
$$;
