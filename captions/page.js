// The page: what the user does and sees. transcriber.js does the recognition, microphone.js the sound.

import { Microphone, explain, microphones, obstacle, prepare } from "./microphone.js";
import { plain, srt } from "./subtitles.js";
import { RATE } from "./timeline.js";
import { Refused, Transcriber, model } from "./transcriber.js";

const $ = (id) => document.getElementById(id);
const SERVER = new URL("../v1/realtime", location.href); // the page is at /captions/, or deeper behind a proxy
const PARAGRAPH_SECONDS = 2; // a longer pause begins a new line

const words = []; // all final words: {text, start, end, session, fresh}
let key = sessionStorage.getItem("key") ?? "";
let running = null; // {transcriber, microphone, stopping}
let before = 0; // seconds of audio in earlier runs
let unsaved = false;

// --- what the user sees ---

function say(text, kind = "") {
  if ($("message").textContent !== text) $("message").textContent = text; // a screen reader reads it once
  $("message").className = kind;
}

function state(name, text = name) {
  $("state").dataset.state = name;
  $("state").textContent = text;
}

function addFinal(added) {
  const following = atEnd();
  for (const word of added) {
    const last = words.at(-1);
    word.start += before;
    word.end += before;
    word.fresh = !last || running.fresh || word.start - last.end > PARAGRAPH_SECONDS;
    running.fresh = false;
    if (word.fresh) $("final").append(document.createElement("p"));
    words.push(word);
    // Words that become final together share a text node: a screen reader reads them as one.
    const line = $("final").lastChild;
    if (word.fresh || word === added[0]) line.append(document.createTextNode(""));
    line.lastChild.data += word.fresh ? word.text.trimStart() : word.text;
  }
  if (!added.length) return;
  unsaved = true;
  enable();
  if (following) toEnd();
}

function showPartial(partial) {
  const following = atEnd();
  const text = partial.map((word) => word.text).join("");
  if ($("partial").textContent !== text) $("partial").textContent = text;
  if (text) $("hint").hidden = true;
  if (following) toEnd();
}

const atEnd = () => $("transcript").scrollHeight - $("transcript").scrollTop - $("transcript").clientHeight < 60;
function toEnd() { $("transcript").scrollTop = $("transcript").scrollHeight; }
$("transcript").onscroll = () => { $("latest").hidden = atEnd(); };
$("latest").onclick = () => { toEnd(); $("transcript").focus(); };

function showLevel(level) {
  const db = Math.round(Math.max(-60, Math.min(0, level)));
  $("level").firstChild.style.transform = `scaleX(${(db + 60) / 60})`;
  $("level").className = db > -3 ? "over" : "";
  $("level").setAttribute("aria-valuenow", db);
  $("level").setAttribute("aria-valuetext", `${db} dB`);
}

function showTimes() {
  const seconds = Math.floor(before + (running ? running.transcriber.timeline.received / RATE : 0));
  const two = (number) => String(number).padStart(2, "0");
  $("clock").textContent = `${Math.floor(seconds / 3600)}:${two(Math.floor(seconds / 60) % 60)}:${two(seconds % 60)}`;
  $("lag").textContent = `${(running ? running.transcriber.lag : 0).toFixed(1)} s`;
}
setInterval(showTimes, 200);

function enable() {
  for (const id of ["copy", "text", "srt"]) $(id).disabled = !words.length;
  $("clear").disabled = !words.length || running !== null;
  $("hint").hidden = words.length > 0 || running !== null || $("start").disabled;
  $("start").textContent = !running ? "Start" : running.stopping ? "Stop at once" : "Stop";
  $("start").classList.toggle("running", running !== null);
}

// --- the server ---

/** Find out whether the server accepts the key; ask until it answers. */
async function greet() {
  try {
    const { id } = await model(SERVER, key);
    $("model").textContent = id;
    if (key) sessionStorage.setItem("key", key);
    $("access").hidden = true;
    $("start").disabled = false;
    enable();
    state("ready");
    say("");
  } catch (error) {
    if (error instanceof Refused) return refuse(error);
    state("waiting", "no server");
    say(`${SERVER.host}: ${error.message}. Is it still starting? Trying again.`, "wait");
    setTimeout(greet, 3000);
  }
}

function refuse(error) {
  state("refused", error.key ? "locked" : "refused");
  if (!error.key) return say(`${error.message}.`, "bad");
  say(key ? "The server does not accept this key." : "This server wants a key.", key ? "bad" : "wait");
  sessionStorage.removeItem("key");
  key = "";
  $("start").disabled = true;
  enable();
  $("access").hidden = false;
  $("key").select();
  $("key").focus();
}

$("access").onsubmit = (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  if (/[^\x21-\x7e]/.test(key)) {
    key = "";
    return say("A key has no spaces and no characters beyond ASCII.", "bad");
  }
  say("");
  greet();
};

// --- captioning ---

async function start() {
  const microphone = new Microphone({
    audio(samples, level) {
      showLevel(level);
      run.transcriber.addAudio(samples);
    },
    gone() {
      showLevel(-60);
      say("The microphone was unplugged. Plug it in again, or choose another.", "bad");
      run.gone = true;
    },
  });
  const transcriber = new Transcriber(SERVER, key, {
    state(name, message) {
      state(name);
      if (name === "waiting") say(message[0].toUpperCase() + message.slice(1) + ".", "wait");
      else if (name === "listening" && $("message").className === "wait") say("");
    },
    words: addFinal,
    partial: showPartial,
    lost(from, to) {
      if (!(from <= run.lostTo)) run.lostFrom = from; // a new outage, not the one before
      run.lostTo = to;
      say(`The server was away for too long: ${(to - run.lostFrom).toFixed(0)} s of sound are lost.`, "bad");
    },
  });
  const run = { microphone, transcriber, stopping: false, opened: false, gone: false, fresh: true };
  running = run;
  say("");
  enable();
  stayAwake();
  listen(run).then(() => run.gone && !run.opened && transcriber.end()); // it may wait for the user's permission
  try {
    await transcriber.run();
    state("ready");
    if ($("message").className === "wait") say("");
  } catch (error) {
    addFinal(transcriber.timeline.partial.splice(0));
    showPartial([]);
    if (error instanceof Refused) refuse(error);
    else {
      state("refused", "fault");
      say(`Error in this page: ${error.message}. Press Start to continue.`, "bad");
    }
  }
  microphone.close();
  showLevel(-60);
  before += transcriber.timeline.received / RATE;
  running = null;
  enable();
  stayAwake();
}

$("start").onclick = () => {
  if (!running) return start();
  if (running.stopping) return running.transcriber.stop();
  running.stopping = true;
  running.microphone.close();
  running.transcriber.end(); // the last words follow
  showLevel(-60);
  state("connecting", "finishing");
  enable();
};

// --- microphones ---

async function listDevices() {
  const found = (await microphones()).filter(({ deviceId }) => deviceId !== "default");
  const chosen = $("device").value;
  const first = $("device").options[0];
  const others = found.map(({ deviceId, label }, i) => new Option(label || `microphone ${i + 1}`, deviceId));
  $("device").replaceChildren(first, ...others);
  $("device").value = found.some(({ deviceId }) => deviceId === chosen) ? chosen : "";
}

/** Use the chosen microphone from now on. */
async function listen(run) {
  try {
    if (!(await run.microphone.open($("device").value))) return; // meanwhile the user chose another, or Stop
    run.opened = true;
    run.gone = false;
    if ($("message").className === "bad") say("");
    listDevices();
  } catch (error) {
    run.gone = true;
    say(explain(error), "bad");
  }
}

function change() {
  if (running && !running.stopping) listen(running);
}
$("device").onchange = change;

/** Keep the screen of a phone on while captions run. */
function stayAwake() {
  stayAwake.lock = Promise.resolve(stayAwake.lock).then(async (lock) => {
    if (running && lock && !lock.released) return lock;
    if (running && document.visibilityState === "visible") return navigator.wakeLock?.request("screen");
    await lock?.release();
    return null;
  }).catch(() => null); // a low battery can prevent it
}
document.addEventListener("visibilitychange", stayAwake);

// --- text size, full screen, copy, download ---

let scale = Number(localStorage.getItem("scale")) || 1;
function resize(factor) {
  scale = Math.max(0.4, Math.min(4, scale * factor));
  document.documentElement.style.setProperty("--scale", scale);
  localStorage.setItem("scale", scale);
  toEnd();
}
$("smaller").onclick = () => resize(1 / 1.15);
$("larger").onclick = () => resize(1.15);
$("full").onclick = () => document.documentElement.requestFullscreen();
$("full").hidden = !document.fullscreenEnabled;

async function copy() {
  await navigator.clipboard.writeText(plain(words));
  unsaved = false;
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 2000);
}
$("copy").onclick = () => copy().catch(() => say("The browser does not allow copying: download the text.", "bad"));

function download(text, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  const now = new Date(Date.now() - new Date().getTimezoneOffset() * 60000).toISOString();
  link.download = `captions ${now.slice(0, 16).replace("T", " ").replace(":", ".")}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  unsaved = false;
}
$("text").onclick = () => download(`${plain(words)}\n`, "txt");
$("srt").onclick = () => download(srt(words), "srt");

$("clear").onclick = () => {
  if (unsaved && !confirm("The captions were neither copied nor downloaded. Clear them?")) return;
  words.length = before = 0;
  unsaved = false;
  $("final").replaceChildren();
  enable();
};

addEventListener("beforeunload", (event) => { if (running || unsaved) event.preventDefault(); });

// --- begin ---

resize(1);
enable();
if (obstacle()) {
  state("refused", "no microphone");
  say(obstacle(), "bad");
} else {
  prepare();
  listDevices();
  navigator.mediaDevices.addEventListener("devicechange", () => listDevices().then(() => running?.gone && change()));
  greet();
}
