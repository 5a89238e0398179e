"""The OpenAI-compatible API under /v1; it never reads what is asked or answered."""
