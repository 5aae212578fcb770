// Requests to the server that this page came from.

async function failure(response) {
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`the server answered ${response.status}`);
  }
}

export async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Error("the server does not answer; is it still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export const askJson = async (path, options) => (await ask(path, options)).json();

// Draw pictures: calls see(event) for each server-sent event and returns when all are drawn.
// With `files` ({image, mask}) these are edited.
export async function draw(fields, see, signal, files = null) {
  const wanted = { ...fields, stream: true, progress: true };
  let options = { method: "POST", signal };
  let path = "/v1/images/generations";
  if (files) {
    path = "/v1/images/edits";
    options.body = new FormData();
    for (const [name, value] of Object.entries(wanted)) {
      if (value !== null) options.body.append(name, String(value));
    }
    for (const [name, file] of Object.entries(files)) {
      if (file) options.body.append(name, file, `${name}.png`);
    }
  } else {
    options.body = JSON.stringify(wanted);
    options.headers = { "content-type": "application/json" };
  }
  const response = await ask(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const line = event.split("\n").find((l) => l.startsWith("data: "));
      if (!line) continue;
      const data = JSON.parse(line.slice(6));
      if (data.type === "error") throw new Error(data.error.message);
      see({ ...data, kind: data.type.split(".")[1] });
    }
  }
}
