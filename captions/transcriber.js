// One transcription, in one session of /v1/realtime after another: resume, rollover, watchdog. No DOM. The state
// machine is that of voxtral_client/transcriber.py: a new session continues from the commit point. It sends the audio
// from there again, and its words replace the partial words.

import { FRAME, RATE, Timeline, WORDLESS_SECONDS } from "./timeline.js";

const AHEAD = 5 * RATE; // audio in flight: enough to keep the server busy, little to send again
const PIECE = RATE / 4; // audio in one message at most
const ROLLOVER_SECONDS = 75; // in stock vLLM each frame of a session takes longer than the one before
const FLAT_ROLLOVER_SECONDS = 300; // where it does not; eight such sessions fit on 12 GB
const STALL_MS = 20000; // a loaded server answers within 1 s; the first request may take longer, because it compiles
const BLANKS_SECONDS = 20; // speech without a word: nobody talks for so long without one
const BLANKS_MAX_SECONDS = 80; // the check of music and noise becomes less frequent, up to this
const KEEP_SECONDS = 300; // audio kept through an outage: 9.6 MB
const MAX_DELAY = 3 * RATE; // the longest delay of the model: it needs so much audio before its first text
const FLUSH = RATE / 4; // `done` is complete if the deltas reach so far beyond the input
const ANSWER_MS = 10000; // longest wait for /v1/models, and for session.created
const PROMPT_TOKENS = 80; // of the session's tokens: start, padding, delay, and a reserve

/** Trying again is useless. `key`: the key is missing or wrong. */
export class Refused extends Error {
  constructor(message, key = false) { super(message); this.key = key; }
}

/** A new session can continue where this one stopped. `busy`: all sessions of the server are taken. */
export class SessionLost extends Error {
  constructor(message, busy = false) { super(message); this.busy = busy; }
}

// A browser gives no reason for a refused WebSocket. The server has just answered over HTTP and accepted the key.
const SHUT = "the server answers but lets this page open no WebSocket: does a proxy change the Host header?";
const WRONG = "wrong path, or an origin that is not let in (HTTP 403)";

/**
 * Ask the server whose realtime endpoint is `url` (http or https) which model it serves: {id, max_model_len,
 * voxtral_speed}; the last is true if long sessions do not become slower. Throws Refused or SessionLost.
 */
export async function model(url, key) {
  let reply;
  try {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    reply = await fetch(new URL("models", url), { headers, signal: AbortSignal.timeout(ANSWER_MS) });
  } catch {
    throw new SessionLost("no server answers");
  }
  if (reply.status === 401) throw new Refused(`${key ? "wrong API key" : "the server wants a key"} (HTTP 401)`, true);
  if (reply.status >= 500) throw new SessionLost(`the server is not well (HTTP ${reply.status})`);
  const answer = await reply.json().catch(() => ({}));
  if (reply.status === 403) throw new Refused(answer.error?.message ?? WRONG);
  const models = answer.data ?? [];
  if (!models.length) throw new Refused(`no realtime server (HTTP ${reply.status})`);
  return models[0];
}

/** Timers that are also checked when sound arrives: browsers delay those of a background tab by up to a minute. */
class Alarms {
  #set = new Set();

  /** Wait for so long, or until `ring`. */
  async wait(milliseconds) {
    const alarm = { due: Date.now() + milliseconds };
    const waiting = new Promise((resolve) => { alarm.ring = resolve; });
    const timer = setTimeout(alarm.ring, milliseconds);
    this.#set.add(alarm);
    await waiting;
    clearTimeout(timer);
    this.#set.delete(alarm);
  }

  /** End the waits whose time has come. */
  check() { for (const { due, ring } of this.#set) if (Date.now() >= due) ring(); }

  /** End all waits. */
  ring() { for (const { ring } of this.#set) ring(); }
}

/** One WebSocket, one session. Messages wait in a queue for `receive`. */
class Session {
  #queue = [];
  #alarms;

  constructor(url, way, alarms) {
    this.#alarms = alarms;
    this.socket = new WebSocket(url.replace("http", "ws"), way);
    this.socket.onmessage = ({ data }) => this.#put(parsed(data));
    this.socket.onopen = () => { this.opened = true; };
    this.socket.onclose = ({ code, reason }) => {
      this.#put(new SessionLost(this.asked && !this.opened ? SHUT : `connection lost (${`${code} ${reason}`.trim()})`));
    };
  }

  #put(item) { this.#queue.push(item); this.#alarms.ring(); }

  /** The next message, or null after `milliseconds`. Throws Refused or SessionLost, also for an `error` message. */
  async receive(milliseconds) {
    if (!this.#queue.length) await this.#alarms.wait(milliseconds);
    const event = this.#queue.shift() ?? null;
    if (event instanceof Error) throw event;
    if (event?.type !== "error") return event;
    if (event.error.includes("currently busy")) throw new SessionLost("all sessions of the server are taken", true);
    const lost = (event.code ?? "processing_error") === "processing_error";
    if (lost) throw new SessionLost(`server error: ${event.error}`);
    throw new Refused(`the server refused a message (${event.code}): ${event.error}`);
  }

  /** Choose the model and start the transcription. */
  async start(id, patience) {
    const greeting = await this.receive(patience);
    if (!greeting) throw new SessionLost(`no answer for ${patience / 1000} s`);
    if (greeting.type !== "session.created") throw new SessionLost("the server did not greet");
    this.send("session.update", { model: id });
    this.send("input_audio_buffer.commit");
  }

  send(type, fields = {}) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...fields }));
  }

  close() { this.socket.onclose = this.socket.onmessage = null; this.socket.close(); }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    return new Refused("a message was not JSON");
  }
}

/** The key as subprotocols, because a browser cannot send the header (vllm_plugin/voxtral_web/guard.py). */
export function subprotocols(key) {
  const hex = Array.from(new TextEncoder().encode(key), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return key ? ["voxtral", `key.${hex}`] : [];
}

/** PCM16 samples as base64. The protocol's samples are little-endian, and so is every machine with a browser. */
function base64(samples) {
  return btoa(String.fromCharCode(...new Uint8Array(samples.buffer)));
}

/**
 * Words with times of an audio stream, whatever happens to its sessions.
 * `on.state(state, message)`: "connecting", "listening", "waiting", "done". `on.words(words)`: final words, each once.
 * `on.partial(words)`: may still change. `on.lost(start, end)`: seconds of audio that were never transcribed.
 * Options, in ms: `giveUp` without progress, `stall` without a delta, `answer` without session.created. `way`: the
 * second argument of WebSocket.
 */
export class Transcriber {
  timeline = new Timeline();
  sessions = 0;
  #url; #key; #on; #options; #model = null;
  #sent = 0; // end of the audio sent to the current session
  #ended = false; // no more audio comes
  #stopped = false;
  #session = null;
  #lastDelta = 0;
  #patience = BLANKS_SECONDS;
  #alarms = new Alarms();

  constructor(url, key, on, options = {}) {
    this.#url = String(url);
    this.#key = key;
    this.#on = on;
    this.#options = { giveUp: Infinity, stall: STALL_MS, answer: ANSWER_MS, way: subprotocols(key), ...options };
  }

  /** Seconds of audio received but not yet transcribed. */
  get lag() { return Math.max(0, this.timeline.received - this.timeline.transcribed) / RATE; }

  /** Take in an Int16Array. */
  addAudio(samples) {
    this.timeline.addAudio(samples);
    const lost = this.timeline.dropOldest(KEEP_SECONDS * RATE);
    if (lost) this.#on.lost(lost[0] / RATE, lost[1] / RATE);
    this.#feed();
    this.#alarms.check();
  }

  /** No more audio comes: `run` returns when the last words are there. */
  end() { this.#ended = true; this.#feed(); }

  /** Stop at once, without the last words. */
  stop() { this.#ended = this.#stopped = true; this.#session?.close(); this.#alarms.ring(); }

  /** Run one session after another until the input is transcribed. Throws Refused, or SessionLost after `giveUp`. */
  async run() {
    let failures = 0, furthest = 0, since;
    this.#on.state("connecting", "");
    while (!this.#stopped && !(this.#ended && this.timeline.received <= this.timeline.committed)) {
      if (this.timeline.received <= this.timeline.committed) { // a session without audio would only occupy a slot
        await this.#alarms.wait(100);
        continue;
      }
      try {
        // Ask again after a failure: a WebSocket that is refused gives no reason.
        const ask = failures > 0 || !this.#model;
        if (ask) this.#model = await model(this.#url, this.#key);
        await this.#run(ask);
        failures = 0;
        this.#on.state("connecting", "");
      } catch (error) {
        if (!(error instanceof SessionLost)) throw error;
        if (this.#stopped) break;
        this.#on.words(this.timeline.take());
        const { received, transcribed, sessionLength } = this.timeline;
        const idle = !this.#ended && sessionLength > 0 && received - transcribed < MAX_DELAY; // the input pauses
        if (transcribed > furthest || idle || error.busy) failures = 0; // a repetition is no progress
        furthest = Math.max(furthest, transcribed);
        if (!failures) since = Date.now();
        if (Date.now() - since > this.#options.giveUp) throw new SessionLost(`gave up: ${error.message}`);
        this.#on.state("waiting", `${error.message}${error.busy ? ": waiting for a free one" : "; trying again"}`);
        failures += error.busy ? 0 : 1;
        const wait = error.busy ? 2 : Math.min(8, 0.25 * 2 ** failures);
        await this.#alarms.wait(1000 * wait * (0.5 + Math.random()));
      }
    }
    this.#on.words(this.timeline.take());
    if (this.#stopped) this.#on.words(this.timeline.partial.splice(0)); // nothing replaces them any more
    this.#on.partial([]);
    this.#on.state("done", "");
  }

  /** One session, until a new one must continue or all is transcribed. */
  async #run(asked) {
    this.sessions++;
    const session = new Session(this.#url, this.#options.way, this.#alarms);
    session.asked = asked;
    try {
      await session.start(this.#model.id, this.#options.answer);
      this.#sent = this.timeline.begin();
      this.#session = session;
      this.#lastDelta = Date.now();
      this.#on.state("listening", "");
      this.#feed();
      while (!this.#stopped && (await this.#step(session))) {
        const words = this.timeline.take();
        if (words.length) this.#on.words(words);
        this.#on.partial(this.timeline.partial);
      }
      this.#on.words(this.timeline.take());
    } finally {
      this.#session = null;
      session.close();
    }
  }

  /** Send the audio that there is, at most AHEAD before the deltas. */
  #feed() {
    const { timeline } = this;
    if (!this.#session || this.#sent < timeline.committed) return; // its audio was dropped
    while (this.#sent < Math.min(timeline.received, timeline.transcribed + AHEAD)) {
      const audio = timeline.audio(this.#sent, Math.min(PIECE, timeline.transcribed + AHEAD - this.#sent));
      this.#session.send("input_audio_buffer.append", { audio: base64(audio) });
      this.#sent += audio.length;
    }
    if (this.#ended && this.#sent >= timeline.received && !this.#session.finished) {
      this.#session.finished = true;
      this.#session.send("input_audio_buffer.commit", { final: true });
    }
  }

  /** Add the next delta; return false where a new session must continue. Throws SessionLost. */
  async #step(session) {
    const { timeline } = this;
    const committed = timeline.committed;
    const event = await session.receive(500);
    if (timeline.transcribed < timeline.committed) return false; // its audio was dropped
    if (event === null) {
      const starved = this.#sent - timeline.transcribed < MAX_DELAY && !this.#ended; // the server has nothing to do
      if (starved) this.#lastDelta = Date.now();
      const { stall } = this.#options;
      if (Date.now() - this.#lastDelta > stall) throw new SessionLost(`no answer for ${stall / 1000} s`);
      return true;
    }
    this.#lastDelta = Date.now();
    if (event.type === "transcription.done") {
      if (timeline.sessionLength === 0) throw new SessionLost("the server ended the session without a word");
      if (this.#ended && timeline.transcribed >= timeline.received + FLUSH) timeline.finish();
      else {
        timeline.commitBetweenWords(); // the server's limit came first
        const lost = timeline.committed === committed;
        if (lost) throw new SessionLost("the server ended the session before any word was final");
      }
      return false;
    }
    if (event.type !== "transcription.delta") return true;
    timeline.addDelta(event.delta);
    this.#feed();
    return !this.#needsNewSession(event.delta, committed);
  }

  /** Is it time for a rollover, or is the model stuck without words? Commits what can be committed. */
  #needsNewSession(delta, committedBefore) {
    const { timeline } = this;
    const age = timeline.sessionLength / RATE;
    const tokens = this.#model.max_model_len;
    const limit = tokens ? (Math.max(tokens - PROMPT_TOKENS, tokens / 2) * FRAME) / RATE : 2400;
    const longest = this.#model.voxtral_speed === true ? FLAT_ROLLOVER_SECONDS : ROLLOVER_SECONDS;
    const rollover = Math.min(longest, limit / 2);
    if (this.#ended && this.#sent >= timeline.received && age <= limit) return false; // only a few frames remain
    if (age > rollover && timeline.committed > committedBefore) return true;
    if (age > Math.min(limit, 4 * rollover)) { // talk without a pause, or music under it
      timeline.commitBetweenWords();
      return true;
    }
    if (delta) this.#patience = BLANKS_SECONDS;
    const sound = timeline.wordlessSound();
    if (sound > this.#patience || (timeline.wordless() > 3 * this.#patience && sound > WORDLESS_SECONDS)) {
      this.#patience = Math.min(2 * this.#patience, BLANKS_MAX_SECONDS);
      timeline.suspectBlanks();
      return true;
    }
    return false;
  }
}
