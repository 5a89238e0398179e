-- What analytics has found by itself that people may want to know: hours unlike those before, and ingestion in trouble.

-- Who judges an hour puts it here in the same transaction, so that however many replicas want to, each is judged once.
CREATE TABLE watched_hours (
    hour timestamptz PRIMARY KEY
);

-- type is that of the event, which is made in the same transaction: 2 of spend, 3 of error rates.
CREATE TABLE anomalies (
    organization_id text COLLATE "C" NOT NULL,
    hour timestamptz NOT NULL,
    type smallint NOT NULL,
    observed double precision NOT NULL,
    expected double precision NOT NULL,
    deviations double precision NOT NULL,
    PRIMARY KEY (organization_id, hour, type)
);

CREATE INDEX anomalies_by_hour ON anomalies (hour);

-- What was told of ingestion: whether it is delayed, and how many messages were put aside.
CREATE TABLE ingestion_watch (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    delayed boolean NOT NULL DEFAULT false,
    dead_letters bigint NOT NULL DEFAULT 0,
    dead_letters_time timestamptz NOT NULL DEFAULT 'epoch'
);

INSERT INTO ingestion_watch DEFAULT VALUES;
