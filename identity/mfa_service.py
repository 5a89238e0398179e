"""MfaService: requests to the domain, its answers back; it never decides anything but whether a person is calling."""

from aiaas.identity.v1 import mfa_service_pb2 as pb
from aiaas.identity.v1 import mfa_service_pb2_grpc
from identity.fields import check_id
from identity.mfa import MfaRequirement
from identity.mfa_setup import CHANGEABLE, Answer, MfaSetup, MfaState
from identity.principals import caller
from mesh import context as call
from mesh import tokens
from mesh.auth import Principal
from mesh.conversions import to_timestamp
from mesh.errors import PlatformError, Reason
from mesh.updates import etag_of, fields_to_change


class MfaService(mfa_service_pb2_grpc.MfaServiceServicer):
    """Second factors of people, and what organizations require."""

    def __init__(self, setup: MfaSetup) -> None:
        self._setup = setup

    async def GetMfa(self, request: pb.GetMfaRequest, context: object) -> pb.GetMfaResponse:
        """Return what the caller has set up."""
        return pb.GetMfaResponse(mfa=_to_proto(await self._setup.get(_person().user_id)))

    async def EnrollTotp(self, request: pb.EnrollTotpRequest, context: object) -> pb.EnrollTotpResponse:
        """Make a TOTP secret that is not in use yet."""
        answer = Answer(request.totp_code, request.recovery_code)
        new = await self._setup.enroll(_person(), request.password, answer)
        return pb.EnrollTotpResponse(
            secret=new.secret, otpauth_uri=new.otpauth_uri, expire_time=to_timestamp(new.expire_time)
        )

    async def ConfirmTotp(self, request: pb.ConfirmTotpRequest, context: object) -> pb.ConfirmTotpResponse:
        """Take the new secret into use."""
        state, codes = await self._setup.confirm(_person(), request.totp_code)
        return pb.ConfirmTotpResponse(mfa=_to_proto(state), recovery_codes=codes)

    async def DisableTotp(self, request: pb.DisableTotpRequest, context: object) -> pb.DisableTotpResponse:
        """Take the caller's MFA out of use."""
        answer = Answer(request.totp_code, request.recovery_code)
        return pb.DisableTotpResponse(mfa=_to_proto(await self._setup.disable(_person(), request.password, answer)))

    async def RegenerateRecoveryCodes(
        self, request: pb.RegenerateRecoveryCodesRequest, context: object
    ) -> pb.RegenerateRecoveryCodesResponse:
        """Make new recovery codes."""
        codes = await self._setup.regenerate(_person(), request.totp_code)
        return pb.RegenerateRecoveryCodesResponse(recovery_codes=codes)

    async def ResetUserMfa(self, request: pb.ResetUserMfaRequest, context: object) -> pb.ResetUserMfaResponse:
        """Take a member's MFA out of use."""
        state = await self._setup.reset(
            caller(),
            check_id(request.organization_id, "organization_id"),
            check_id(request.user_id, "user_id"),
            request.reason,
        )
        return pb.ResetUserMfaResponse(mfa=_to_proto(state))

    async def GetMfaRequirement(
        self, request: pb.GetMfaRequirementRequest, context: object
    ) -> pb.GetMfaRequirementResponse:
        """Return whom an organization requires to use MFA."""
        found = await self._setup.requirement(check_id(request.organization_id, "organization_id"))
        return pb.GetMfaRequirementResponse(mfa_requirement=_requirement_to_proto(found))

    async def UpdateMfaRequirement(
        self, request: pb.UpdateMfaRequirementRequest, context: object
    ) -> pb.UpdateMfaRequirementResponse:
        """Change whom an organization requires to use MFA."""
        wanted = MfaRequirement(
            check_id(request.organization_id, "organization_id"),
            request.mfa_requirement.everyone,
            tuple(request.mfa_requirement.role_ids),
        )
        changed = fields_to_change(request.update_mask, request.mfa_requirement, CHANGEABLE)
        updated = await self._setup.change_requirement(wanted, changed, request.mfa_requirement.etag)
        return pb.UpdateMfaRequirementResponse(mfa_requirement=_requirement_to_proto(updated))


def _person() -> Principal:
    """The caller, who is signed in: what others act with on somebody's behalf does not touch what guards the sign-in.

    Raises PlatformError(PERMISSION_DENIED).
    """
    principal = caller()
    if not principal.user_id or not call.credential.get().startswith(tokens.SESSION.prefix):
        raise PlatformError(Reason.PERMISSION_DENIED, description="Only somebody who is signed in can do this.")
    return principal


def _to_proto(state: MfaState) -> pb.Mfa:
    return pb.Mfa(
        totp_enabled=state.enable_time is not None,
        recovery_codes_left=state.recovery_codes_left,
        required=state.required,
        enable_time=to_timestamp(state.enable_time),
    )


def _requirement_to_proto(requirement: MfaRequirement) -> pb.MfaRequirement:
    return pb.MfaRequirement(
        organization_id=requirement.organization_id,
        everyone=requirement.everyone,
        role_ids=requirement.role_ids,
        update_time=to_timestamp(requirement.update_time),
        etag=etag_of(requirement.revision),
    )
