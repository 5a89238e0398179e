-- Events that people may want to be told of, the webhooks that want them, and what is on its way to these.

-- One row for each event, which its id makes count once. The columns are what queries ask by; event is the message as
-- it came. Events of the platform have the organization id "platform".
CREATE TABLE platform_events (
    event_id text COLLATE "C" PRIMARY KEY,
    organization_id text COLLATE "C" NOT NULL,
    type smallint NOT NULL,
    event_time timestamptz NOT NULL,
    event bytea NOT NULL
);

CREATE INDEX platform_events_by_organization ON platform_events (organization_id, event_time, event_id);
CREATE INDEX platform_events_by_time ON platform_events (event_time);

-- The secrets are encrypted. The previous one signs too, until its time is over. success_time and failure_time tell of
-- deliveries and are no change of the webhook, so they leave the revision, which is the etag, alone.
CREATE TABLE webhooks (
    webhook_id text COLLATE "C" PRIMARY KEY,
    organization_id text COLLATE "C" NOT NULL,
    display_name text NOT NULL,
    url text NOT NULL,
    types smallint[] NOT NULL,
    disabled boolean NOT NULL,
    sealed_secret bytea NOT NULL,
    previous_sealed_secret bytea,
    previous_secret_end_time timestamptz,
    success_time timestamptz,
    failure_time timestamptz,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL,
    revision bigint NOT NULL DEFAULT 1,
    request_id text COLLATE "C" NOT NULL,
    CHECK ((previous_sealed_secret IS NULL) = (previous_secret_end_time IS NULL))
);

CREATE INDEX webhooks_by_organization ON webhooks (organization_id, create_time, webhook_id);
CREATE UNIQUE INDEX webhooks_by_request_id ON webhooks (organization_id, request_id) WHERE request_id <> '';

-- One event on its way to one webhook. state is its number in the contract: 1 pending, 2 succeeded, 3 failed. Whoever
-- sends one moves due_time to where another may take it to be lost, and only then sends it.
CREATE TABLE webhook_deliveries (
    webhook_delivery_id text COLLATE "C" PRIMARY KEY,
    webhook_id text COLLATE "C" NOT NULL REFERENCES webhooks ON DELETE CASCADE,
    event_id text COLLATE "C" NOT NULL REFERENCES platform_events,
    state smallint NOT NULL DEFAULT 1 CHECK (state BETWEEN 1 AND 3),
    attempts integer NOT NULL DEFAULT 0,
    http_status integer NOT NULL DEFAULT 0,
    failure_reason text NOT NULL DEFAULT '',
    create_time timestamptz NOT NULL,
    attempt_time timestamptz,
    -- Since when it is tried; 24 hours later it is given up.
    start_time timestamptz NOT NULL,
    due_time timestamptz NOT NULL
);

CREATE INDEX webhook_deliveries_by_webhook ON webhook_deliveries (webhook_id, create_time, webhook_delivery_id);
CREATE INDEX webhook_deliveries_by_event ON webhook_deliveries (event_id);
CREATE INDEX webhook_deliveries_by_time ON webhook_deliveries (create_time);
CREATE INDEX webhook_deliveries_pending ON webhook_deliveries (webhook_id, due_time) WHERE state = 1;
