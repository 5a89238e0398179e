"""The platform on one machine with Docker: compose.yaml, and what makes its secrets."""
