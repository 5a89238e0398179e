-- Budgets and their ledger. Amounts are whole numbers in the budget's unit. What a router may spend was leased to it
-- first, and a lease counts as a whole from the moment it is given, so that no number of routers can overspend.
--
-- Locks are taken in one order everywhere: budget_revision, then budget_periods by budget_id, then their leases.

-- One number over all organizations. Who changes a budget, a limit or an override takes this row first; so changes go
-- one after another, and whoever has seen a number has seen every change up to it.
CREATE TABLE budget_revision (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    revision bigint NOT NULL
);

INSERT INTO budget_revision (revision) VALUES (1);

-- The revision of each organization's latest change; no row for one that never had a budget.
CREATE TABLE organization_budgets (
    organization_id text COLLATE "C" PRIMARY KEY REFERENCES organizations,
    revision bigint NOT NULL UNIQUE
);

-- A removed budget stays as a row, since its ledger stays.
CREATE TABLE budgets (
    budget_id text COLLATE "C" PRIMARY KEY CHECK (budget_id ~ '^budget_[0-9A-Za-z]{1,60}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    display_name text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 200),
    user_id text COLLATE "C" NOT NULL,
    service_account_id text COLLATE "C" NOT NULL,
    api_key_id text COLLATE "C" NOT NULL,
    model text COLLATE "C" NOT NULL,
    unit text NOT NULL CHECK (unit IN ('cost', 'tokens', 'requests')),
    period text NOT NULL CHECK (period IN ('daily', 'monthly', 'quarterly', 'annual', 'total')),
    is_hard boolean NOT NULL,
    limit_amount bigint NOT NULL CHECK (limit_amount >= 0),
    alert_percents integer[] NOT NULL,
    disabled boolean NOT NULL,
    delete_time timestamptz,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0),
    CHECK ((user_id <> '')::integer + (service_account_id <> '')::integer + (api_key_id <> '')::integer <= 1)
);

CREATE INDEX budgets_by_create_time ON budgets (organization_id, create_time, budget_id);

-- The same thing is not limited twice: a second one would only hide which of them refuses.
CREATE UNIQUE INDEX budgets_by_scope ON budgets (
    organization_id, user_id, service_account_id, api_key_id, model, unit, period
) WHERE delete_time IS NULL;

-- The period of a budget that a moment is in, by the UTC calendar; that of "total" begins with the budget.
CREATE FUNCTION budget_period_at(
    period text, create_time timestamptz, moment timestamptz, OUT period_start timestamptz, OUT period_end timestamptz
) LANGUAGE sql STABLE AS $$
    SELECT
        CASE WHEN part IS NULL THEN create_time ELSE date_trunc(part, moment, 'UTC') END,
        (date_trunc(part, moment AT TIME ZONE 'UTC') + length) AT TIME ZONE 'UTC'
    FROM (VALUES
        ('daily', 'day', interval '1 day'), ('monthly', 'month', interval '1 month'),
        ('quarterly', 'quarter', interval '3 months'), ('annual', 'year', interval '1 year'), ('total', NULL, NULL)
    ) AS calendar (name, part, length) WHERE name = period
$$;

-- A period is made when it is first leased from or its limit changes. limit_amount holds the overrides too. is_hard is
-- the budget's, repeated here so that PostgreSQL itself refuses an overspend, whatever the code does. A falling period
-- is above the budget's limit with its overrides, since that much was spent and leased when an override ended; what
-- comes back of it is gone.
CREATE TABLE budget_periods (
    budget_id text COLLATE "C" NOT NULL REFERENCES budgets,
    period_start timestamptz NOT NULL,
    period_end timestamptz,
    is_hard boolean NOT NULL,
    limit_amount bigint NOT NULL CHECK (limit_amount >= 0),
    spent bigint NOT NULL DEFAULT 0 CHECK (spent >= 0),
    leased bigint NOT NULL DEFAULT 0 CHECK (leased >= 0),
    falling boolean NOT NULL DEFAULT false,
    PRIMARY KEY (budget_id, period_start),
    CONSTRAINT never_overspent CHECK (NOT is_hard OR spent + leased <= limit_amount)
);

CREATE INDEX budget_periods_falling ON budget_periods (budget_id) WHERE falling;

-- amount is what was given and not taken back; amount - spent of those that are not settled is the period's leased.
-- One that was not renewed in time is expired for good, whether or not anybody has written so: whoever reads it
-- compares expire_time with clock_timestamp() under the row's lock.
CREATE TABLE budget_leases (
    budget_lease_id text COLLATE "C" PRIMARY KEY CHECK (budget_lease_id ~ '^lease_[0-9A-Za-z]{1,60}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    budget_id text COLLATE "C" NOT NULL,
    period_start timestamptz NOT NULL,
    router_id text COLLATE "C" NOT NULL,
    router_instance_id text COLLATE "C" NOT NULL,
    request_id text COLLATE "C" NOT NULL,
    sequence bigint NOT NULL DEFAULT 0 CHECK (sequence >= 0),
    amount bigint NOT NULL CHECK (amount >= 0),
    spent bigint NOT NULL DEFAULT 0 CHECK (spent BETWEEN 0 AND amount),
    reserved bigint NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'expired', 'settled')),
    expire_time timestamptz NOT NULL,
    create_time timestamptz NOT NULL,
    FOREIGN KEY (budget_id, period_start) REFERENCES budget_periods
);

CREATE UNIQUE INDEX budget_leases_by_request ON budget_leases (router_id, request_id, budget_id);
CREATE INDEX budget_leases_by_budget ON budget_leases (budget_id, create_time, budget_lease_id);
CREATE INDEX budget_leases_active ON budget_leases (budget_id, period_start) WHERE state = 'active';
CREATE INDEX budget_leases_settled ON budget_leases (expire_time) WHERE state = 'settled';
CREATE INDEX budget_leases_unsettled ON budget_leases (router_id, create_time, budget_lease_id) WHERE state <> 'settled';

-- Where leases were spent, in running totals of each lease, so that a repeated report changes nothing. Those of a
-- settled lease are added to budget_ledger and removed here, in the transaction that settles it.
CREATE TABLE budget_lease_lines (
    budget_lease_id text COLLATE "C" NOT NULL REFERENCES budget_leases,
    hour_start timestamptz NOT NULL,
    api_key_id text COLLATE "C" NOT NULL,
    model text COLLATE "C" NOT NULL,
    spent bigint NOT NULL CHECK (spent >= 0),
    requests bigint NOT NULL CHECK (requests >= 0),
    PRIMARY KEY (budget_lease_id, hour_start, api_key_id, model)
);

CREATE TABLE budget_ledger (
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    budget_id text COLLATE "C" NOT NULL REFERENCES budgets,
    hour_start timestamptz NOT NULL,
    api_key_id text COLLATE "C" NOT NULL,
    model text COLLATE "C" NOT NULL,
    spent bigint NOT NULL CHECK (spent >= 0),
    requests bigint NOT NULL CHECK (requests >= 0),
    PRIMARY KEY (organization_id, budget_id, hour_start, api_key_id, model)
);

CREATE INDEX budget_ledger_by_hour ON budget_ledger (hour_start);

-- Each threshold is passed once in a period.
CREATE TABLE budget_alerts (
    budget_alert_id text COLLATE "C" PRIMARY KEY,
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    budget_id text COLLATE "C" NOT NULL REFERENCES budgets,
    period_start timestamptz NOT NULL,
    percent integer NOT NULL CHECK (percent BETWEEN 1 AND 1000),
    spent bigint NOT NULL,
    limit_amount bigint NOT NULL,
    cross_time timestamptz NOT NULL,
    UNIQUE (budget_id, period_start, percent)
);

CREATE INDEX budget_alerts_by_cross_time ON budget_alerts (organization_id, cross_time, budget_alert_id);

CREATE TABLE budget_overrides (
    budget_override_id text COLLATE "C" PRIMARY KEY CHECK (budget_override_id ~ '^override_[0-9A-Za-z]{1,60}$'),
    organization_id text COLLATE "C" NOT NULL REFERENCES organizations,
    budget_id text COLLATE "C" NOT NULL REFERENCES budgets,
    amount bigint NOT NULL CHECK (amount > 0),
    expire_time timestamptz NOT NULL,
    reason text NOT NULL CHECK (char_length(reason) BETWEEN 1 AND 1000),
    state text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'active', 'rejected', 'revoked', 'expired')),
    requester_id text COLLATE "C" NOT NULL,
    approver_id text COLLATE "C" NOT NULL DEFAULT '',
    -- The period that it raises, from its approval on.
    period_start timestamptz,
    create_time timestamptz NOT NULL,
    decide_time timestamptz,
    revision bigint NOT NULL DEFAULT 1 CHECK (revision > 0),
    CHECK (approver_id <> requester_id)
);

CREATE INDEX budget_overrides_by_create_time ON budget_overrides (budget_id, create_time, budget_override_id);
CREATE INDEX budget_overrides_running ON budget_overrides (expire_time) WHERE state IN ('pending', 'active');

-- Events that wait to be published, written in the transaction that made them happen; event is a PlatformEvent.
CREATE TABLE unpublished_events (
    event_id text COLLATE "C" PRIMARY KEY,
    event bytea NOT NULL,
    create_time timestamptz NOT NULL
);

CREATE INDEX unpublished_events_by_create_time ON unpublished_events (create_time, event_id);
