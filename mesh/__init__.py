"""What every process shares: errors, configuration, servers, channels, connections; nothing of any one service."""
