"""Backups of what the platform keeps outside its own code's reach: RabbitMQ's definitions; PostgreSQL's are scripts of
the chart (files/backup)."""
