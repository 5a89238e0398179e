"""Field masks and etags."""

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from aiaas.identity.v1.api_key_service_pb2 import ApiKey
from aiaas.type.v1.limits_pb2 import RateLimits
from mesh.errors import PlatformError, Reason
from mesh.updates import check_etag, fields_to_change

CHANGEABLE = ("display_name", "rate_limits")


def test_without_a_mask_what_is_set_and_can_be_changed_is_changed() -> None:
    resource = ApiKey(display_name="x", user_id="user_1", rate_limits=RateLimits())
    assert fields_to_change(FieldMask(), resource, CHANGEABLE) == {"display_name", "rate_limits"}
    assert not fields_to_change(FieldMask(), ApiKey(user_id="user_1"), CHANGEABLE)


def test_mask_names_fields_also_to_clear_them() -> None:
    assert fields_to_change(FieldMask(paths=["rate_limits"]), ApiKey(), CHANGEABLE) == {"rate_limits"}


@pytest.mark.parametrize("path", ["user_id", "rate_limits.models", "api_key.display_name", "", "*", "__class__"])
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(PlatformError) as raised:
        fields_to_change(FieldMask(paths=["display_name", path]), ApiKey(), CHANGEABLE)
    assert (raised.value.reason, raised.value.field) == (Reason.INVALID_ARGUMENT, "update_mask")


def test_only_the_current_etag_or_none_passes() -> None:
    check_etag("", 3, "f")
    check_etag("3", 3, "f")
    with pytest.raises(PlatformError) as raised:
        check_etag("2", 3, "f")
    assert (raised.value.reason, raised.value.field) == (Reason.FAILED_PRECONDITION, "f")
