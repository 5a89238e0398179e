"""OpenAI's administration API under /v1/organization, as far as it reads: usage, costs, projects, API keys. A project
is what identity calls an organization. Thin words around RPCs of analytics and identity; nothing is counted here."""
