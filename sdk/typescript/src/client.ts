/**
 * Connects programs to the platform's gRPC: TLS, an API key, deadlines, and retries of reads. It holds no client: those
 * are made with `createClient(service, connect(...))`.
 */

import { setTimeout as sleep } from "node:timers/promises";

import { MethodOptions_IdempotencyLevel } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, type Transport } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

/** What a program shows to services, and the CAs that it trusts; all PEM. */
export interface Certificate {
  chain: Buffer;
  key: Buffer;
  ca: Buffer;
}

/** Where a service is, and who calls. */
export interface Peer {
  /** "host:port". */
  target: string;
  /** Which service is there: its certificate has to say so, whatever the target is called. */
  service: "identity" | "router" | "analytics";
  apiKey?: string;
  /** Without one the connection is plain text, which only a service on this machine takes. */
  certificate?: Certificate;
  /** Of calls with one answer that name no timeout of their own; streams have none. 10 s unless given. */
  timeoutMs?: number;
}

const ATTEMPTS = 3;
const FIRST_BACKOFF_MS = 50;
const LOOPBACK = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+$/;

/**
 * A transport for calls of one service. What the contracts call a read is tried three times while the service is away
 * (UNAVAILABLE), and nothing else is ever sent twice.
 *
 * Throws an Error for an API key that would leave this machine in plain text.
 */
export function connect({ target, service, apiKey, certificate, timeoutMs = 10_000 }: Peer): Transport {
  if (certificate === undefined && apiKey !== undefined && !LOOPBACK.test(target)) {
    throw new Error("an API key goes to another machine over TLS only: give a certificate");
  }
  const inner = createGrpcTransport(
    certificate === undefined
      ? { baseUrl: `http://${target}` }
      : {
          baseUrl: `https://${target}`,
          nodeOptions: {
            cert: certificate.chain,
            key: certificate.key,
            ca: certificate.ca,
            servername: `${service}.aiaas.internal`,
          },
        },
  );
  const completed = (given: HeadersInit | undefined): Headers => {
    const headers = new Headers(given);
    if (apiKey !== undefined && !headers.has("authorization")) {
      headers.set("authorization", `Bearer ${apiKey}`);
    }
    return headers;
  };
  return {
    async unary(method, signal, timeout, headers, input, values) {
      // One deadline for all attempts.
      const deadline = Date.now() + (timeout ?? timeoutMs);
      const reads = method.idempotency === MethodOptions_IdempotencyLevel.NO_SIDE_EFFECTS;
      for (let attempt = 1; ; attempt++) {
        try {
          const left = Math.max(1, deadline - Date.now());
          return await inner.unary(method, signal, left, completed(headers), input, values);
        } catch (error) {
          const isAway = ConnectError.from(error).code === Code.Unavailable;
          const backoff = Math.random() * FIRST_BACKOFF_MS * 3 ** attempt;
          if (!reads || !isAway || attempt === ATTEMPTS || Date.now() + backoff > deadline) {
            throw error;
          }
          await sleep(backoff, undefined, signal === undefined ? {} : { signal });
        }
      }
    },
    stream(method, signal, timeout, headers, input, values) {
      return inner.stream(method, signal, timeout, completed(headers), input, values);
    },
  };
}
