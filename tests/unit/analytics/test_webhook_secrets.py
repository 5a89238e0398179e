"""Secrets of webhooks: signatures as the specification has them."""

import base64

from analytics.webhook_secrets import as_text, new_secret, sign


def test_signature_is_that_of_the_reference_libraries() -> None:
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    signature = sign([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_each_secret_signs() -> None:
    first, second = new_secret(), new_secret()
    alone = [sign([secret], "event_1", 1, b"{}") for secret in (first, second)]
    assert sign([first, second], "event_1", 1, b"{}") == " ".join(alone)
    assert alone[0] != alone[1]


def test_text_of_a_secret_holds_all_of_it() -> None:
    secret = new_secret()
    assert len(secret) == 32
    assert base64.b64decode(as_text(secret).removeprefix("whsec_"), validate=True) == secret
