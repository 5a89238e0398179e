-- The wall between organizations as before, told so that it does not spoil plans. PostgreSQL takes an OR of two unknown
-- comparisons to hide 199 rows of 200, so it read and sorted all of a large organization for a page of it, where an
-- index has the page in order; a CASE it takes to hide every second one.
CREATE OR REPLACE FUNCTION wall_between_organizations(VARIADIC tenant_tables text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    tenant_table text;
BEGIN
    FOREACH tenant_table IN ARRAY tenant_tables LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format('DROP POLICY IF EXISTS organization ON %I', tenant_table);
        -- Each current_setting in a query of its own is worked out once a statement, and not once a row.
        EXECUTE format(
            'CREATE POLICY organization ON %I USING (CASE (SELECT current_setting(''app.organization_id'', true))'
            ' WHEN ''*'' THEN true ELSE organization_id = (SELECT current_setting(''app.organization_id'', true)) END)',
            tenant_table
        );
    END LOOP;
END
$$;

SELECT wall_between_organizations(VARIADIC array_agg(tablename::text))
FROM pg_policies WHERE schemaname = 'public' AND policyname = 'organization';
