"""What people see of the edge in a browser: pages that pass on what they fill in; nothing is decided here."""
