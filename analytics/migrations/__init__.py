"""The schema of analytics' database as numbered SQL files; one that is on main never changes."""
