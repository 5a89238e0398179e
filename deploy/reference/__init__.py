"""The reference pages under docs/reference, made from the contracts and from the code that they describe; nothing here
knows any RPC, error, event, variable or metric by its name."""
