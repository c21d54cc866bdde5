// Calls of the service that this page comes from.

/** A call that was refused: `status` and `reason` as docs/guide/serving.md lists them. */
export class Refused extends Error {
  constructor(status, content) {
    super(content.error ?? `the service replied ${status}`);
    this.status = status;
    this.reason = content.reason ?? "";
  }
}

let token = sessionStorage.getItem("token") ?? "";

/** Keeps the token for later calls, for as long as this tab is open. */
export function setToken(text) {
  token = text;
  sessionStorage.setItem("token", text);
}

async function call(method, path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let reply;
  try {
    reply = await fetch(path, { method, body, headers });
  } catch {
    throw new Error("the service does not answer: is `mantis serve` still running?");
  }
  if (!reply.ok) throw new Refused(reply.status, await reply.json().catch(() => ({})));
  return reply;
}

/** The models of the service. */
export const models = async () => (await (await call("GET", "/v1/models")).json()).models;

/** Whether the service has onnxruntime-web for browsers. */
export const hasRuntime = async () => (await (await call("GET", "/v1/page")).json()).runtime;

/** A file of the exported client whose streams have an id, as an ArrayBuffer. */
export const clientFile = async (id, name) =>
  (await call("GET", `/v1/clients/${id}/${name}`)).arrayBuffer();

/** The answer to a stream of one image. */
export async function answer(stream) {
  const reply = await call("POST", "/v1/answers?masks=true", stream);
  return (await reply.json()).answers[0];
}

/** The stream of a photograph, a Blob, by the service. `tasks` null lets the client decide. */
export async function encode(id, photograph, { tasks, level }) {
  const query = new URLSearchParams({ model: id, level });
  for (const task of tasks ?? []) query.append("task", task);
  const reply = await call("POST", `/v1/streams?${query}`, photograph);
  return new Uint8Array(await reply.arrayBuffer());
}
