// The page: what the user does and sees. transcriber.js does the recognition, microphone.js the sound.

import { Microphone, context, explain, microphones, obstacle } from "./microphone.js";
import { clock, joint, plain, srt } from "./subtitles.js";
import { RATE, Refused, Transcriber, model } from "./transcriber.js";

const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const SERVER = new URL("../v1/realtime", location.href); // the page is at /captions/, or deeper behind a proxy
const PARAGRAPH_SECONDS = 2; // a longer pause begins a new line
const SILENCE = 1; // second, in place of what was not recorded: it ends a word

const words = []; // all final words: {text, start, end, fresh}
let key = stored(() => sessionStorage.getItem("key")) ?? "";
let running = null; // see `start`
let before = 0; // seconds of audio in earlier runs
let unsaved = false;

/** What `ask` gets from the browser's storage, which throws where the user has blocked it. */
function stored(ask) {
  try { return ask(); } catch { return null; }
}

// --- what the user sees ---

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

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
    if (word === added[0]) word.text = joint(last?.text, word.text) + word.text;
    word.end += before + running.missing(word.start);
    word.start += before + running.missing(word.start);
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
  const text = joint(words.at(-1)?.text, partial) + partial;
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
  [$("clock").textContent] = clock(before + (running ? running.seconds() : 0)).split(",");
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
    $("model").textContent = await model(SERVER, key);
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
  say(sentence(error.message), key || !error.key ? "bad" : "wait");
  if (!error.key) return;
  useKey("");
  $("start").disabled = true;
  enable();
  $("access").hidden = false;
  $("key").select();
  $("key").focus();
}

/** Use this key from now on, until the tab is closed. */
function useKey(text) {
  key = text;
  stored(() => sessionStorage.setItem("key", key));
}

$("access").onsubmit = (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  say("");
  greet();
};

/** Take the key of a QR code or a link out of the address, where others could see it. Was there one? */
function takeKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given === null) return false;
  useKey(given.replaceAll(" ", "+").trim()); // a plus that was not written as %2B
  history.replaceState(null, "", location.pathname + location.search);
  return true;
}
addEventListener("hashchange", () => { if (takeKey() && !$("access").hidden) greet(); });

/** Show how a device gets the server's certificate, or that the server needs one. */
async function offerCertificate() {
  const found = await fetch("ca.pem", { method: "HEAD" }).then(({ ok }) => ok, () => false);
  $("certificate").hidden = !found;
  $("uncertified").hidden = found;
  $("secure").href = `https://${location.host}${location.pathname}${key && `#key=${encodeURIComponent(key)}`}`;
}

// --- captioning ---

async function start() {
  const gaps = []; // {from, seconds}: nothing was recorded, because the microphone was unplugged or the system slept
  let began = 0; // ms
  const microphone = new Microphone({
    audio({ samples, level, time }) {
      showLevel(level);
      began ||= time - (1000 * samples.length) / RATE;
      const late = (time - began) / 1000 - run.seconds() - samples.length / RATE;
      if (late > SILENCE) {
        transcriber.addAudio(new Int16Array(SILENCE * RATE));
        gaps.push({ from: transcriber.received / RATE, seconds: late - SILENCE });
      }
      transcriber.addAudio(samples);
    },
    gone(label) {
      showLevel(-60);
      transcriber.addAudio(new Int16Array(SILENCE * RATE)); // the words before it become final
      run.gone = true;
      say(`“${label}” was unplugged. Plug it in again, or choose another microphone.`, "bad");
      reopen();
    },
  });
  const transcriber = new Transcriber(SERVER, key, {
    state(name, message) {
      state(name);
      if (name === "waiting") say(sentence(message), "wait");
      else if ($("message").className === "wait") say("");
      if (message.includes("certificate")) offerCertificate();
      else $("certificate").hidden = $("uncertified").hidden = true;
    },
    words: addFinal,
    partial: showPartial,
    lost(from, to) {
      if (!(from <= run.lostTo)) run.lostFrom = from; // a new outage, not the one before
      run.lostTo = to;
      say(`The server was away for too long: ${(to - run.lostFrom).toFixed(0)} s of sound are lost.`, "bad");
    },
  });
  const run = {
    ...{ microphone, transcriber, stopping: false, opened: false, gone: false, fresh: true },
    missing: (at = Infinity) => gaps.reduce((sum, { from, seconds }) => sum + (from <= at ? seconds : 0), 0),
    seconds: () => transcriber.received / RATE + run.missing(),
  };
  running = run;
  state("connecting");
  say("");
  enable();
  stayAwake();
  listen(run).then(() => run.gone && !run.opened && transcriber.end()); // it may wait for the user's permission
  try {
    await transcriber.run();
    state("ready");
    if ($("message").className === "wait") say("");
  } catch (error) {
    const { message } = error;
    refuse(error instanceof Refused ? error : { message: `error in this page: ${message}; press Start to continue` });
  }
  const rest = { text: $("partial").textContent, start: transcriber.kept / RATE, end: transcriber.received / RATE };
  if (rest.text) addFinal([rest]); // nothing replaces it any more
  showPartial("");
  microphone.close();
  showLevel(-60);
  before += run.seconds();
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

/** Show the microphones. One that is chosen stays, also while it is unplugged. Returns whether it is there. */
async function listDevices() {
  const found = (await microphones()).filter(({ deviceId }) => deviceId !== "default");
  const chosen = $("device").selectedOptions[0];
  const there = !chosen.value || found.some(({ deviceId }) => deviceId === chosen.value);
  const others = found.map(({ deviceId, label }, i) => new Option(label || `microphone ${i + 1}`, deviceId));
  const { value } = chosen;
  $("device").replaceChildren($("device").options[0], ...others, ...(there ? [] : [chosen]));
  $("device").value = value;
  return there;
}

/** Use the chosen microphone from now on. */
async function listen(run) {
  try {
    const label = await run.microphone.open($("device").value);
    if (!label) return; // meanwhile the user chose another, or Stop
    run.opened = true;
    if (run.gone) say(`Recording from “${label}”.`);
    else if ($("message").className === "bad") say("");
    run.gone = false;
    listDevices();
  } catch (error) {
    run.gone = true;
    say(explain(error), "bad");
  }
}

/** Go on when the chosen microphone is plugged in again; without a choice, with any. */
async function reopen() {
  if ((await listDevices()) && running?.gone) change();
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

let scale = Number(stored(() => localStorage.getItem("scale"))) || 1;
function resize(factor) {
  scale = Math.max(0.4, Math.min(4, scale * factor));
  root.style.setProperty("--scale", scale);
  stored(() => localStorage.setItem("scale", scale));
  toEnd();
}
$("smaller").onclick = () => resize(1 / 1.15);
$("larger").onclick = () => resize(1.15);
$("full").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : root.requestFullscreen());
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
  const now = new Date().toLocaleString("sv").slice(0, 16).replace(":", "."); // Sweden writes 2026-11-27 04:05
  link.download = `captions ${now}.${ending}`;
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

resize(1);
enable();
takeKey();
if (obstacle()) {
  state("refused", "no microphone");
  say(obstacle(), "bad");
  if (!isSecureContext) offerCertificate();
} else {
  context().catch(() => {}); // Start will tell
  listDevices();
  navigator.mediaDevices.addEventListener("devicechange", reopen);
  greet();
}
