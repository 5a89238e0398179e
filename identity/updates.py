"""What an update may change, as identity's rooms name it; the rules are `mesh.updates`'."""

from mesh.updates import check_etag as check_etag
from mesh.updates import etag_of as etag_of
from mesh.updates import fields_to_change as fields_to_change
