/**
 * Makes an organization and a key over gRPC, streams a chat with it, and reads how an error is told.
 *
 * AIAAS_API_KEY is a platform administrator's key, AIAAS_IDENTITY and AIAAS_ROUTER are host:port of the two services,
 * and AIAAS_TLS_CERTIFICATE_PATH, AIAAS_TLS_KEY_PATH and AIAAS_TLS_CA_PATH the files of a certificate for `tool`.
 */

import { readFileSync } from "node:fs";

import { type Client, Code, ConnectError, createClient } from "@connectrpc/connect";

import { type Certificate, connect } from "../src/client.js";
import { ApiKeyService } from "../src/gen/aiaas/identity/v1/api_key_service_pb.js";
import { OrganizationService } from "../src/gen/aiaas/identity/v1/organization_service_pb.js";
import { InferenceService } from "../src/gen/aiaas/router/v1/inference_service_pb.js";
import { Endpoint } from "../src/gen/aiaas/type/v1/usage_event_pb.js";

function setting(name: string): string {
  const value = process.env[name];
  if (!value) {
    throw new Error(`${name} is not set`);
  }
  return value;
}

/** The id of a new organization, and the secret of a key on it, which is told this once. */
async function makeKey(certificate: Certificate): Promise<[string, string]> {
  const identity = connect({
    target: setting("AIAAS_IDENTITY"),
    service: "identity",
    apiKey: setting("AIAAS_API_KEY"),
    certificate,
  });
  const { organization } = await createClient(OrganizationService, identity).createOrganization({
    organization: { displayName: "Example in TypeScript" },
  });
  const organizationId = organization?.organizationId ?? "";
  const { secret } = await createClient(ApiKeyService, identity).createApiKey({
    organizationId,
    apiKey: { displayName: "example" },
  });
  return [organizationId, secret];
}

/** Streams one answer: a head, server-sent events as OpenAI writes them, and a tail with what was used. */
async function chat(inference: Client<typeof InferenceService>, model: string): Promise<void> {
  const body = { model, messages: [{ role: "user", content: "Say hello." }], max_tokens: 8, stream: true };
  const request = { endpoint: Endpoint.CHAT_COMPLETIONS, body: new TextEncoder().encode(JSON.stringify(body)) };
  for await (const { part } of inference.infer(request)) {
    if (part.case === "data") {
      for (const line of new TextDecoder().decode(part.value).split("\n")) {
        if (line.startsWith("data: {")) {
          const chunk = JSON.parse(line.slice("data: ".length)) as { choices: { delta: { content?: string } }[] };
          process.stdout.write(chunk.choices[0]?.delta.content ?? "");
        }
      }
    } else if (part.case === "tail") {
      console.log(`\ntokens: ${part.value.usage?.completionTokens}`);
    }
  }
}

const certificate = {
  chain: readFileSync(setting("AIAAS_TLS_CERTIFICATE_PATH")),
  key: readFileSync(setting("AIAAS_TLS_KEY_PATH")),
  ca: readFileSync(setting("AIAAS_TLS_CA_PATH")),
};
const [organizationId, secret] = await makeKey(certificate);
console.log(`organization: ${organizationId}`);
const router = connect({ target: setting("AIAAS_ROUTER"), service: "router", apiKey: secret, certificate });
const inference = createClient(InferenceService, router);
const { models } = await inference.listServedModels({});
console.log(`models: ${models.map(({ model }) => model).join(", ")}`);
await chat(inference, "smollm2");
try {
  await chat(inference, "no-such-model");
} catch (error) {
  const refused = ConnectError.from(error);
  console.log(`refused: ${Code[refused.code]}: ${refused.rawMessage}`);
}
