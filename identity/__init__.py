"""Who may do what: organizations, people, service accounts, API keys and roles; it never sees a prompt."""
