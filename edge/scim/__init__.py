"""SCIM 2.0's own paths (RFC 7644), over the RPCs of ScimService; nothing here knows a user or a group."""
