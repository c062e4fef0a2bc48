"use strict";
// Shows an episode as it happens. Whatever came from a model or from the web is set as text, never as markup; see demo/server.py.

const $ = (id) => document.getElementById(id);
let asking = null; // the AbortController of the question in flight
let live = null; // the turn that is being written: its <li>, and the paragraphs in it by class

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// A link only for what is http or https, whatever the server says.
function link(source) {
  let url;
  try {
    url = new URL(source.url);
  } catch {
    return element("span", "", source.title);
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") return element("span", "", source.title);
  const made = element("a", "", source.title);
  made.href = url.href;
  made.title = url.href;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}

function list(sources, into) {
  for (const source of sources) {
    const item = element("li");
    item.append(link(source));
    if (source.title !== source.url) item.append(" ", element("small", "", source.url));
    into.append(item);
  }
}

function beginLive() {
  if (live) live.item.remove();
  live = { item: element("li", "turn live"), paragraphs: {} };
  live.item.setAttribute("aria-busy", "true");
  $("turns").append(live.item);
}

function endLive() {
  if (!live) return;
  live.item.classList.remove("live");
  live.item.removeAttribute("aria-busy");
  live = null;
}

function livePart(className) {
  if (!live.paragraphs[className]) {
    live.paragraphs[className] = element("p", className);
    live.item.append(live.paragraphs[className]);
  }
  return live.paragraphs[className];
}

// Thought and answer go on where they were; the call is the whole line so far. Strings are appended as text nodes.
function showWriting(told) {
  if (told.anew || !live) beginLive();
  if (told.thought) livePart("think").append(told.thought);
  if (told.call) livePart("call").textContent = told.call;
  if (told.answer) livePart("answered").append(told.answer);
}

function showTurn(turn) {
  const item = element("li", "turn");
  if (turn.thought) item.append(element("p", "think", turn.thought));
  if (turn.call) item.append(element("p", "call", turn.call));
  if (turn.problem) item.append(element("p", "problem", turn.problem));
  if (turn.sources.length) {
    const sources = element("ul", "hits");
    list(turn.sources, sources);
    item.append(sources);
  }
  if (turn.observation) {
    const seen = element("details", "observation");
    const failed = turn.error ? `, ${turn.error}` : "";
    seen.append(element("summary", "", `what it read (${turn.observation.length} characters${failed})`), element("pre", "", turn.observation));
    item.append(seen);
  }
  if (turn.answer !== null) item.append(element("p", "answered", turn.answer));
  if (live) live.item.replaceWith(item);
  else $("turns").append(item);
  live = null;
}

function showEnd(end) {
  const calls = `${end.num_tool_calls} tool call${end.num_tool_calls === 1 ? "" : "s"}`;
  if (end.problem) {
    status(`The episode failed: ${end.problem}`, "failed");
    return;
  }
  status(`${end.stop.replaceAll("_", " ")}: ${calls}, ${end.seconds.toFixed(1)} s`, end.answer === null ? "failed" : "done");
  $("answer").hidden = false;
  $("answer-text").textContent = end.answer === null ? "No answer." : end.answer;
  $("sources-title").hidden = end.sources.length === 0;
  list(end.sources, $("sources"));
}

function status(text, state) {
  $("status").textContent = text;
  $("run").dataset.state = state;
}

// Reads `event: name` and `data: json` blocks from the response; true once the `end` event has come.
async function follow(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return false;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const [event, data] = block.split("\n");
      const told = JSON.parse(data.slice("data: ".length));
      if (event === "event: end") {
        showEnd(told);
        return true;
      }
      if (event === "event: writing") showWriting(told);
      else showTurn(told);
    }
  }
}

async function ask(question) {
  asking = new AbortController();
  for (const id of ["turns", "sources"]) $(id).replaceChildren();
  $("run").hidden = false;
  $("answer").hidden = true;
  $("ask").hidden = true;
  $("cancel").hidden = false;
  status("thinking", "running");
  try {
    const response = await fetch("/ask", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ question }),
      signal: asking.signal,
    });
    if (!response.ok) status(`The question was not taken: ${(await response.json()).error}`, "failed");
    else if (!(await follow(response.body))) status("The connection ended before an answer.", "failed");
  } catch (error) {
    if (asking.signal.aborted) status("cancelled", "failed");
    else status(`No connection: ${error.message}`, "failed");
  } finally {
    asking = null;
    endLive();
    $("ask").hidden = false;
    $("cancel").hidden = true;
  }
}

function submit() {
  const question = $("question").value.trim();
  if (question && asking === null) ask(question);
}

async function about() {
  const told = await (await fetch("/about")).json();
  $("model").textContent = told.model;
  for (const question of told.examples) {
    const button = element("button", "example", question);
    button.type = "button";
    button.addEventListener("click", () => {
      $("question").value = question;
      submit();
    });
    $("examples").append(" ", button);
    $("examples").hidden = false;
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
$("cancel").addEventListener("click", () => asking?.abort());
about();
