-- Prices of models, in micro-dollars per million tokens. A row is never changed: a later version takes its place from
-- valid_from on. Prices go with their model, so that one registered again under the same id is priced anew, and inherits
-- nothing by accident; every usage event keeps the amounts it was billed by.
CREATE TABLE prices (
    price_id text COLLATE "C" PRIMARY KEY,
    model_id text COLLATE "C" NOT NULL REFERENCES models ON DELETE CASCADE,
    prompt_micros_per_million bigint NOT NULL
        CHECK (prompt_micros_per_million BETWEEN 0 AND 1000000000000000),
    cached_prompt_micros_per_million bigint NOT NULL
        CHECK (cached_prompt_micros_per_million BETWEEN 0 AND 1000000000000000),
    completion_micros_per_million bigint NOT NULL
        CHECK (completion_micros_per_million BETWEEN 0 AND 1000000000000000),
    valid_from timestamptz NOT NULL,
    create_time timestamptz NOT NULL,
    UNIQUE (model_id, valid_from)
);
