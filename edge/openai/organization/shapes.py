"""The answers of OpenAI's administration API; what this platform does not know is null, never a guess.

https://platform.openai.com/docs/api-reference/administration
"""

from typing import Literal

from msgspec import Struct, field


class CompletionsResult(Struct, kw_only=True, tag_field="object", tag="organization.usage.completions.result"):
    """What one group used in one bucket, of endpoints that generate text."""

    input_tokens: int
    output_tokens: int
    input_cached_tokens: int
    input_uncached_tokens: int
    num_model_requests: int
    project_id: str | None = None
    user_id: str | None = None
    api_key_id: str | None = None
    model: str | None = None
    batch: bool | None = None
    service_tier: str | None = None
    api_source: Literal["unlabeled"] | None = None


class EmbeddingsResult(Struct, kw_only=True, tag_field="object", tag="organization.usage.embeddings.result"):
    """What one group used in one bucket, of embeddings."""

    input_tokens: int
    num_model_requests: int
    project_id: str | None = None
    user_id: str | None = None
    api_key_id: str | None = None
    model: str | None = None


class Amount(Struct, kw_only=True):
    """Money."""

    value: float
    currency: Literal["usd"] = "usd"


class CostsResult(Struct, kw_only=True, tag_field="object", tag="organization.costs.result"):
    """What one group cost in one bucket."""

    amount: Amount
    line_item: str | None = None
    project_id: str | None = None
    user_id: str | None = None
    api_key_id: str | None = None
    api_source: Literal["unlabeled"] | None = None
    quantity: float | None = None
    quantity_unit: str | None = None


Result = CompletionsResult | EmbeddingsResult | CostsResult


class Bucket(Struct, kw_only=True, tag_field="object", tag="bucket"):
    """A stretch of time, in Unix seconds, its end exclusive; without results where nothing was used."""

    start_time: int
    end_time: int
    results: list[Result]


class BucketPage(Struct, kw_only=True, tag_field="object", tag="page"):
    """Buckets in the order of time."""

    data: list[Bucket]
    has_more: bool
    next_page: str | None = None


class Project(Struct, kw_only=True, tag_field="object", tag="organization.project"):
    """An organization of this platform."""

    id: str
    name: str
    created_at: int
    archived_at: int | None = None
    status: Literal["active", "archived"]


class ProjectPage(Struct, kw_only=True, tag_field="object", tag="list"):
    """Projects, oldest first."""

    data: list[Project]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class OwnerUser(Struct, kw_only=True):
    """The user as whom a key acts; empty names where the caller may not see them."""

    id: str
    name: str = ""
    email: str = ""
    created_at: int = 0
    role: Literal["member"] = "member"


class OwnerServiceAccount(Struct, kw_only=True):
    """The service account as which a key acts."""

    id: str
    name: str = ""
    created_at: int = 0
    role: Literal["member"] = "member"


class Owner(Struct, kw_only=True):
    """As whom a key acts; nothing where it acts for its organization."""

    type: Literal["user", "service_account"] | None = None
    user: OwnerUser | None = None
    service_account: OwnerServiceAccount | None = None


class ProjectApiKey(Struct, kw_only=True, tag_field="object", tag="organization.project.api_key"):
    """An API key, never with its text."""

    id: str
    name: str
    redacted_value: str
    created_at: int
    last_used_at: int | None = None
    expires_at: int | None = None
    owner: Owner = field(default_factory=Owner)
    owner_project_access: Literal["active", "inactive"] = "active"


class ProjectApiKeyPage(Struct, kw_only=True, tag_field="object", tag="list"):
    """API keys that are accepted, oldest first."""

    data: list[ProjectApiKey]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool
