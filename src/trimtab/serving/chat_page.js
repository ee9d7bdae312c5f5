"use strict";
// One message goes to two models. What they say is put on the page as text, and never as HTML.

const at = (id) => document.getElementById(id);
const SIDES = ["left", "right"];
const NOBODY = "";
const STOPPED = "Stopped.";
const histories = { left: [], right: [] };
let running = null;

function stored() {
  try { return sessionStorage.getItem("trimtab-key"); } catch { return null; }
}
let key = stored() || "";

function headers() {
  return key ? { "Content-Type": "application/json", Authorization: `Bearer ${key}` } : { "Content-Type": "application/json" };
}

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function trouble(text) {
  at("trouble").textContent = text || "";
  at("trouble").hidden = !text;
}

async function saidWrong(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function listModels() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    trouble("The server cannot be reached.");
    return;
  }
  if (response.status === 401) {
    at("door").hidden = false;
    at("door-said").textContent = key ? "That is not its key." : "";
    at("key").focus();
    return;
  }
  if (!response.ok) {
    trouble(await saidWrong(response));
    return;
  }
  at("door").hidden = true;
  trouble("");
  fill((await response.json()).data.map((model) => model.id));
  if (matchMedia("(min-width: 44rem)").matches) at("message").focus();
}

function fill(names) {
  // What was tuned stands on the left, and what it is compared with on the right.
  const first = { left: names[1] ?? names[0], right: names.length > 2 ? names[2] : names.length > 1 ? names[0] : NOBODY };
  for (const side of SIDES) {
    const select = at(side);
    const before = select.value;
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    if (side === "right") select.append(new Option("nobody", NOBODY));
    select.value = names.includes(before) ? before : first[side];
  }
}

function settings() {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  return { temperature: number("temperature"), max_tokens: number("longest"), seed: number("seed") };
}

function messagesOf(side, text) {
  const system = at("system").value.trim();
  return [...(system ? [{ role: "system", content: system }] : []), ...histories[side], { role: "user", content: text }];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const line = held.slice(0, end);
      held = held.slice(end + 2);
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function nearBottom() {
  return window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 320;
}

function toBottom() {
  window.scrollTo(0, document.documentElement.scrollHeight);
}

async function ask(side, model, text, box) {
  const words = box.querySelector(".said-text");
  const small = box.querySelector("small");
  const started = performance.now();
  let first = 0;
  let said = "";
  let reason = null;
  let usage = null;
  let wrong = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        model, messages: messagesOf(side, text), stream: true, stream_options: { include_usage: true }, ...settings(),
      }),
    });
    if (response.status === 401) at("door").hidden = false;
    if (!response.ok) throw new Error(await saidWrong(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      if (choice.delta.content) {
        first = first || performance.now();
        said += choice.delta.content;
        const follow = nearBottom();
        words.append(choice.delta.content); // a text node: nothing in it is ever a tag
        if (follow) toBottom();
      }
    }
    if (!reason) wrong = "The answer broke off.";
  } catch (error) {
    wrong = error.name === "AbortError" ? STOPPED : error.message === "Failed to fetch" ? "The server cannot be reached." : error.message;
  }
  box.classList.remove("live");
  if (said) histories[side].push({ role: "user", content: text }, { role: "assistant", content: said });
  else if (!wrong) wrong = "The model said nothing.";
  if (wrong) box.insertBefore(element("p", wrong === STOPPED ? "fine" : "no", wrong), small);
  if (usage) {
    const seconds = (performance.now() - (first || started)) / 1000;
    const parts = [`${usage.completion_tokens} token${usage.completion_tokens === 1 ? "" : "s"}`];
    if (usage.completion_tokens > 1 && seconds > 0) parts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} a second`);
    if (first) parts.push(`first after ${((first - started) / 1000).toFixed(2)} s`);
    if (reason === "length") parts.push("cut off there");
    small.textContent = parts.join(" · ");
  }
}

async function send() {
  const text = at("message").value;
  if (!text.trim() || running) return;
  const asked = SIDES.filter((side) => at(side).value !== NOBODY);
  if (!asked.length) return;
  running = new AbortController();
  at("empty")?.remove();
  const turn = element("section", "turn");
  const pairing = element("div", "pairing");
  const boxes = asked.map((side) => {
    const box = element("article", "answer live");
    const words = element("div", "said-text");
    words.setAttribute("aria-live", "polite");
    words.dir = "auto";
    box.append(element("h2", "", at(side).value), words, element("small", "", ""));
    return box;
  });
  pairing.append(...boxes);
  const asking = element("p", "asked", text);
  asking.dir = "auto";
  turn.append(asking, pairing);
  at("talk").append(turn);
  at("message").value = "";
  busy(true);
  toBottom();
  await Promise.all(asked.map((side, number) => ask(side, at(side).value, text, boxes[number])));
  running = null;
  busy(false);
  at("message").focus({ preventScroll: true });
}

function busy(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
  for (const id of ["left", "right", "fresh"]) at(id).disabled = is;
}

at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
at("stop").addEventListener("click", () => running?.abort());
at("fresh").addEventListener("click", () => {
  histories.left = [];
  histories.right = [];
  at("talk").replaceChildren();
  at("message").focus();
});
document.querySelector("details").addEventListener("toggle", () => { if (nearBottom()) toBottom(); });
at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  try { sessionStorage.setItem("trimtab-key", key); } catch { /* it is asked for again after a reload */ }
  listModels();
});
listModels();
