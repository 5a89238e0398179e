"""The commands that are written by hand, as no single RPC is what they do; still only REST, as any customer has it."""
