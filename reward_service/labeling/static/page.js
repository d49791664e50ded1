// The labeling page works without this script. With it: keys, answers that survive a lost connection, a pleasant order.
"use strict";

const root = document.documentElement;
const form = document.getElementById("answer");
const statusLine = document.getElementById("status");
const owner = document.querySelector("[data-owner]")?.dataset.owner;
const csrf = form?.elements.csrf.value ?? document.querySelector("[data-csrf]")?.dataset.csrf;
root.classList.add("scripted");

function say(text, problem = false) {
  if (!statusLine) return;
  statusLine.textContent = text;
  statusLine.classList.toggle("problem", problem);
}

// Settings and the answer on its way live in this device's storage; where that is switched off, in memory.
const memory = new Map();
const shelf = {
  get(key) {
    try { return localStorage.getItem(`rondo.${key}`); } catch { return memory.get(key) ?? null; }
  },
  set(key, value) {
    try { localStorage.setItem(`rondo.${key}`, value); } catch { memory.set(key, value); }
  },
  drop(key) {
    try { localStorage.removeItem(`rondo.${key}`); } catch { memory.delete(key); }
  },
};

// --- The outbox: an answer stays in it until the server says that it has it. -----------------------------------------
const slot = `answer.${owner}`;
let sending = false;
let timer = 0;
let failures = 0;

function waiting() {
  const text = shelf.get(slot);
  return text === null ? null : new URLSearchParams(text);
}

function tryAgain(seconds, why) {
  clearTimeout(timer);
  say(`${why} Your answer is kept on this device and sent again by itself.`, true);
  timer = setTimeout(deliver, seconds * 1000);
}

async function deliver() {
  const answer = waiting();
  if (answer === null || sending) return;
  clearTimeout(timer);
  sending = true;
  block(true);
  answer.set("csrf", csrf);
  const pause = Math.min(30, 1 + 2 ** failures);
  try {
    const reply = await fetch("/labels", {
      method: "POST",
      headers: { accept: "application/json", "content-type": "application/x-www-form-urlencoded" },
      body: answer.toString(),
      credentials: "same-origin",
      signal: AbortSignal.timeout(20000),
    });
    const told = await reply.json().catch(() => ({}));
    if (reply.ok) delivered(answer, told);
    else refused(reply, told, answer, pause);
  } catch {
    failures += 1;
    tryAgain(pause, "No connection.");
  } finally {
    sending = false;
  }
}

function delivered(answer, told) {
  failures = 0;
  shelf.drop(slot);
  say(told.message ?? "Saved.");
  if (!form || form.elements.ticket.value === answer.get("ticket")) location.replace("/");
  else block(false);
}

function refused(reply, told, answer, pause) {
  if (told.keep || reply.status >= 500) {
    failures += 1;
    const seconds = Number(reply.headers.get("retry-after")) || pause;
    tryAgain(seconds, told.message ?? "The server is not well.");
    return;
  }
  shelf.drop(slot);
  block(false);
  const here = form && form.elements.ticket.value === answer.get("ticket");
  say(told.message ?? "The answer was refused.", true);
  if (reply.status === 409 && here) offerNext();
}

function offerNext() {
  const link = document.createElement("a");
  link.href = "/";
  link.textContent = "Go on with the next task";
  statusLine.append(" ", link);
  link.focus();
}

function block(on) {
  if (!form) return;
  form.setAttribute("aria-busy", String(on));
  for (const button of form.querySelectorAll("button[type=submit]")) button.setAttribute("aria-disabled", String(on));
}

window.addEventListener("online", deliver);
if (waiting() !== null) deliver();

// --- The answer ------------------------------------------------------------------------------------------------------
const shownAt = performance.now();
let leaseTimer = 0;

function missing(data) {
  if (data.get("action") === "skip") return data.has("reason") ? null : ["Say why you skip it.", "reason"];
  const count = Number(form.dataset.count);
  const choice = data.get("choice");
  if (form.dataset.kind === "ranking" && choice !== "tie" && choice !== "both_bad") {
    for (let n = 1; n <= count; n += 1) if (!data.has(`place-${n}`)) return [`Give response ${n} a place.`, `place-${n}`];
  } else if (choice === null) return ["Choose one of the answers first.", "choice"];
  for (let n = 1; n <= count; n += 1) {
    if (form.elements[`rating-${n}`] && !data.has(`rating-${n}`)) return [`Rate response ${n}.`, `rating-${n}`];
  }
  const left = Number(form.dataset.readS) - (performance.now() - shownAt) / 1000;
  if (left > 0) return [`Please read a little longer: ${Math.ceil(left)} s.`, null];
  return null;
}

function submitted(event) {
  event.preventDefault();
  if (form.getAttribute("aria-busy") === "true") return;
  const data = new FormData(form);
  data.set("action", event.submitter?.value ?? "answer");
  const gap = missing(data);
  if (gap) {
    const [text, name] = gap;
    say(text, true);
    if (name) form.querySelector(`[name="${name}"]`).focus();
    return;
  }
  clearTimeout(leaseTimer);
  shelf.set(slot, new URLSearchParams(data).toString());
  say("Sending …");
  deliver();
}

// --- Keys ------------------------------------------------------------------------------------------------------------
const help = document.getElementById("help");

function press(selector) {
  const input = form.querySelector(selector);
  if (!input) return;
  input.checked = true;
  input.dispatchEvent(new Event("change", { bubbles: true }));
  input.focus({ preventScroll: true });
}

function open(name) {
  const details = form.querySelector(`details.${name}`);
  details.open = true;
  details.querySelector(".panel input, .panel textarea").focus();
}

const pairKeys = {
  1: () => press('[name="choice"][value="1"]'),
  2: () => press('[name="choice"][value="2"]'),
  3: () => strength(1),
  4: () => strength(2),
  5: () => strength(3),
};
const anyKeys = {
  t: () => press('[name="choice"][value="tie"]'),
  b: () => press('[name="choice"][value="both_bad"]'),
  p: () => press('[name="choice"][value="ranking"]'),
  j: () => mark(marked + 1),
  k: () => mark(marked - 1),
  s: () => open("skip"),
  n: () => open("note"),
  u: () => document.getElementById("undo")?.click(),
  m: () => shelf.set("mono", root.classList.toggle("mono") ? "1" : ""),
  g: () => document.getElementById("guidelines").focus(),
  "?": () => help.showModal(),
};

function strength(value) {
  if (form.querySelector('[name="choice"]:is([value="1"], [value="2"]):checked')) press(`[name="strength"][value="${value}"]`);
  else say("Choose a response first.", true);
}

function typing(target) {
  return target.matches("textarea, select, input:not([type=radio], [type=checkbox])");
}

function keyed(event) {
  if (event.defaultPrevented || event.altKey || event.metaKey || event.isComposing || help.open) return;
  const target = event.target;
  if (event.key === "Escape") {
    const details = target.closest("details[open]");
    if (details) { details.open = false; details.querySelector("summary").focus(); }
    return;
  }
  if (event.key === "Enter") {
    const inSkip = target.closest("details.skip .panel");
    const own = target.matches("a, button, summary") || (target.matches("textarea") && !event.ctrlKey);
    if (own || event.repeat) return;
    event.preventDefault();
    form.requestSubmit(form.querySelector(inSkip ? "details.skip button" : ".send > .submit"));
    return;
  }
  if (event.ctrlKey || typing(target) || shelf.get("keys") === "off" || event.repeat) return;
  const key = event.key.toLowerCase();
  const act = (form.dataset.kind === "pair" ? pairKeys[key] : placeKey(key)) ?? anyKeys[key];
  if (!act) return;
  event.preventDefault();
  say("");
  act();
}

// --- Ranking: one response is marked, and a digit gives it its place -------------------------------------------------
const places = form ? [...form.querySelectorAll(".places")] : [];
let marked = 0;

function placeKey(key) {
  const digit = Number(key);
  if (!(digit >= 1 && digit <= places.length)) return undefined;
  return () => {
    press(`[name="place-${marked + 1}"][value="${digit}"]`);
    const next = places.findIndex((place) => !place.querySelector(":checked"));
    if (next >= 0) mark(next);
  };
}

function mark(index, { focus = true } = {}) {
  if (!places.length) return;
  marked = Math.max(0, Math.min(places.length - 1, index));
  places.forEach((place, n) => place.closest(".response").classList.toggle("marked", n === marked));
  if (!focus) return;
  const place = places[marked];
  (place.querySelector(":checked") ?? place.querySelector("input")).focus({ preventScroll: true });
  place.closest(".response").scrollIntoView({ block: "nearest" });
}

function tellOrder() {
  const byPlace = new Map();
  for (const place of places) {
    const value = place.querySelector(":checked")?.value;
    if (value) byPlace.set(value, [...(byPlace.get(value) ?? []), place.dataset.response]);
  }
  const groups = [...byPlace].sort(([a], [b]) => Number(a) - Number(b)).map(([, names]) => names.join(" = "));
  document.getElementById("order").textContent = groups.length
    ? `Best first: ${groups.join("  ›  ")}`
    : "Give each response its place.";
}

function changed(event) {
  if (!event.target.name.startsWith("place-")) return;
  const ranked = form.querySelector('[name="choice"][value="ranking"]');
  ranked.checked = true;
  tellOrder();
}

// --- Start -----------------------------------------------------------------------------------------------------------
if (shelf.get("mono")) root.classList.add("mono");

function leaseEnds() {
  say("The time for this task is over and somebody else may get it. You can still try to submit.", true);
}

function start() {
  form.addEventListener("submit", submitted);
  document.addEventListener("keydown", keyed);
  document.getElementById("show-help").addEventListener("click", () => help.showModal());
  const useKeys = document.getElementById("use-keys");
  useKeys.checked = shelf.get("keys") !== "off";
  useKeys.addEventListener("change", () => shelf.set("keys", useKeys.checked ? "on" : "off"));
  const left = Number(form.dataset.leftS);
  if (left > 0 && left < 2e6) leaseTimer = setTimeout(leaseEnds, left * 1000);
  if (places.length) {
    form.addEventListener("change", changed);
    form.addEventListener("focusin", (event) => {
      const response = event.target.closest(".response");
      if (response) marked = Number(response.id.split("-")[1]) - 1;
      document.querySelectorAll(".response").forEach((one, n) => one.classList.toggle("marked", n === marked));
    });
    tellOrder();
    mark(0, { focus: false });
  }
}

if (form) start();
const pauseS = Number(document.querySelector("[data-look-again-s]")?.dataset.lookAgainS);
if (pauseS) {
  setInterval(() => { if (navigator.onLine && !document.hidden) location.reload(); }, pauseS * 1000);
  document.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() === "u" && shelf.get("keys") !== "off") document.getElementById("undo")?.click();
  });
}
