-- How requests for a model find a backend, of the models that have a policy of their own. It is JSON, as it is read and
-- written as a whole; what it lacks has its default.
CREATE TABLE routing_policies (
    model_id text COLLATE "C" PRIMARY KEY REFERENCES models ON DELETE CASCADE,
    policy jsonb NOT NULL,
    update_time timestamptz NOT NULL DEFAULT now(),
    revision bigint NOT NULL
);
