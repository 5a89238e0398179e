"""The command line `aiaas`: a client of the platform's REST, made from its contracts; it never decides anything."""
