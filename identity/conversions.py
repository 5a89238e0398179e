"""Times between messages and the domain, as identity's rooms name it; the code is `mesh.conversions`'."""

from mesh.conversions import from_timestamp as from_timestamp
from mesh.conversions import to_timestamp as to_timestamp
