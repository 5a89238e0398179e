"""The router's schema, as plain SQL; it holds no code."""
