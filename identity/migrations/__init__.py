"""The schema of identity's database as numbered SQL files; one that is on main never changes."""
