"""The local stack: real servers, the four services and an engine on one machine; never used in production."""
