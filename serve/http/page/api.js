// The server: requests with the token, errors, and server-sent events. All URLs are relative, for proxies with a path prefix.

const TOKEN = "ddm-token";

export const storedToken = () => sessionStorage.getItem(TOKEN);
export const storeToken = (token) => sessionStorage.setItem(TOKEN, token);
export const forgetToken = () => sessionStorage.removeItem(TOKEN);

/** An error response or a failed connection; `param` is the name of the field at fault, if there is one. */
export class ApiError extends Error {
  constructor(message, { param = null, status = 0, retryAfter = null } = {}) {
    super(retryAfter ? `${message} (try again in ${retryAfter} s)` : message);
    this.param = param;
    this.status = status;
  }
}

/** The model of that name, or the first, which the server loads if need be; and the names of all. */
export async function fetchModel(name) {
  const response = await send("v1/models");
  const { data } = await response.json();
  let model = data.find(({ id }) => id === name) ?? data[0];
  if (!model.loaded) model = await (await send(`v1/models/${encodeURIComponent(model.id)}`)).json();
  return { model, names: data.map(({ id }) => id) };
}

/** Yield the events of a streamed request for samples, `[name, data]` each. */
export async function* streamSamples(body, signal) {
  const response = await send("v1/samples", { method: "POST", body, signal });
  yield* serverSentEvents(response.body);
}

async function send(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  const token = storedToken();
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(`the server cannot be reached: ${error.message}`);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const { status } = response;
  const retryAfter = response.headers.get("retry-after");
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { param: error.param, status, retryAfter });
  } catch {
    return new ApiError(`the server responded with status ${status}`, { status, retryAfter });
  }
}

/** An EventSource does the same, but it cannot POST. Comments, which keep the connection alive, are skipped. */
async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (pending + value).split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) {
      const [, name, data] = block.match(/^event: (\w+)\ndata: (.*)$/m) ?? [];
      if (name) yield [name, JSON.parse(data)];
    }
  }
}
