// The page's client of the realtime protocol, by the easy way of PROTOCOL.md: append audio, read `completed`; keep audio until
// `audio_end_ms` has passed it; after a break connect again, send what is kept, add the offset.

export const RATE = 16000;
const KEEP = 300 * RATE; // audio kept through an outage: 9.6 MB
const AHEAD = 3 * RATE; // with more audio unanswered the server must say something
const STALL_MS = 20000; // a loaded server answers within 1 s; the first request may take longer, because it compiles
const AUDIO = { format: { type: "audio/pcm", rate: RATE }, turn_detection: { type: "server_vad" } };
const SESSION = { type: "transcription", progress: true, audio: { input: AUDIO } };
// A browser gives no reason for a refused WebSocket. The server has just answered over HTTP and accepted the key.
const SHUT = "the server answers but lets this page open no WebSocket: ";
const UNTRUSTED = "install its certificate on this device; if it is installed, a proxy blocks WebSockets";

/** Trying again is useless. `key`: the key is missing or wrong. */
export class Refused extends Error {
  constructor(message, key = false) { super(message); this.key = key; }
}

class Lost extends Error {} // a new connection can continue

/** Ask the server whose realtime endpoint is `url` (http or https) for its model's name. Throws Lost or Refused. */
export async function model(url, key) {
  if (/[^\x21-\x7e]/.test(key)) throw new Refused("the key has a space, or a character that is not ASCII", true);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, redirect: "manual", signal: AbortSignal.timeout(STALL_MS) };
  const reply = await fetch(new URL("models", url), options).catch(() => { throw new Lost("no server answers"); });
  if (reply.status === 401) throw new Refused(`${key ? "wrong API key" : "the server wants a key"} (HTTP 401)`, true);
  if (reply.status >= 429) throw new Lost(`the server returned HTTP ${reply.status}`);
  const answer = await reply.json().catch(() => ({}));
  if (answer.data?.length) return answer.data[0].id;
  throw new Refused(answer.error?.message ?? `no realtime server (HTTP ${reply.status})`);
}

/**
 * Words with times of an audio stream, whatever happens to its connections. Positions are samples of the input.
 * `on.state(state, message)`: "listening", or "waiting" and why. `on.words([{text, start, end}])`: final words, each
 * once, in seconds; all but an item's first have their space, if any. `on.partial(text)`: may still change.
 * `on.lost(start, end)`: seconds of audio that were never transcribed.
 */
export class Transcriber {
  received = 0;
  kept = 0; // words before it are final
  #audio = new Int16Array(KEEP); // sample n is at n % KEEP
  #transcribed = 0; // the furthest that the server has come
  #url; #key; #on; #ended = false; #stopped = false;
  #check = () => {}; // of `#until`

  constructor(url, key, on) { [this.#url, this.#key, this.#on] = [String(url), key, on]; }

  /** Take in an Int16Array. */
  addAudio(samples) {
    for (const sample of samples) this.#audio[this.received++ % KEEP] = sample;
    const oldest = this.received - KEEP;
    if (oldest > this.kept) this.#on.lost(this.kept / RATE, oldest / RATE);
    this.kept = Math.max(this.kept, oldest);
    this.#check();
  }

  /** No more audio comes: `run` returns when the last words are there. With `stop`: at once, without them. */
  end() { this.#ended = true; this.#check(); }
  stop() { this.#stopped = true; this.#check(); }

  /** Seconds of audio received but not yet transcribed. */
  get lag() { return (this.received - Math.max(this.#transcribed, this.kept)) / RATE; }

  /** Is nothing left to do? The protocol counts in milliseconds. */
  get #complete() { return this.#stopped || (this.#ended && this.received - this.kept < RATE / 1000); }

  /** Transcribe until the input has ended. Throws Refused. */
  async run() {
    for (let failures = 0, due = 0, before; !this.#complete;) {
      before = this.#transcribed;
      try { // a connection without audio would only occupy a slot
        await this.#until(() => performance.now() >= due && (this.#ended || this.lag > (before ? 1 : 0)));
        if (!this.#complete) await this.#connect();
      } catch (error) {
        if (!(error instanceof Lost)) throw error;
        if (this.#transcribed > before) failures = 0;
        this.#on.state("waiting", `${error.message}; trying again`);
        due = performance.now() + 500 * 2 ** Math.min(4, failures++) * (0.5 + Math.random());
      }
    }
  }

  /** Wait for `condition`. Sound and messages check it too: timers of a background tab come up to a minute late. */
  async #until(condition) {
    const timer = setInterval(() => this.#check(), 250);
    await new Promise((resolve, reject) => {
      this.#check = () => {
        try { if (this.#complete || condition()) resolve(); } catch (error) { reject(error); }
      };
      this.#check();
    }).finally(() => { clearInterval(timer); this.#check = () => {}; });
  }

  /** One connection, until all is transcribed. Throws Lost or Refused. */
  async #connect() {
    await model(this.#url, this.#key);
    const hex = Array.from(this.#key, (char) => char.charCodeAt(0).toString(16)).join(""); // it is ASCII
    const protocols = this.#key ? ["voxtral", `key.${hex}`] : []; // a browser cannot send the header
    const socket = new WebSocket(`${this.#url.replace("http", "ws")}?intent=transcription`, protocols);
    const send = (type, fields) => socket.send(JSON.stringify({ type, ...fields }));
    const messages = [], items = new Map(); // the text of the items that are not completed
    let origin, sent, committed = false, heard = performance.now(), closed = "";
    let fate = SHUT + (this.#url.startsWith("https") ? UNTRUSTED : "does a proxy change the Host header?");
    socket.onopen = () => {
      fate = "connection lost";
      origin = sent = this.kept;
      send("session.update", { session: SESSION });
      this.#on.state("listening", "");
    };
    socket.onmessage = ({ data }) => { heard = performance.now(); messages.push(data); this.#check(); };
    socket.onclose = ({ code, reason }) => { closed = `${code} ${reason}`.trim(); this.#check(); };
    try {
      await this.#until(() => {
        for (const data of messages.splice(0)) this.#take(JSON.parse(data), origin, items);
        if (closed) throw new Lost(`${fate} (${closed})`);
        if (performance.now() - heard > STALL_MS) throw new Lost(`no answer for ${STALL_MS / 1000} s`);
        if (socket.readyState !== WebSocket.OPEN || committed) return;
        for (let piece; sent < this.received; sent += piece.length) {
          piece = this.#audio.slice(sent % KEEP, (sent % KEEP) + Math.min(RATE, this.received - sent));
          const bytes = new Uint8Array(piece.buffer); // little-endian
          send("input_audio_buffer.append", { audio: btoa(String.fromCharCode(...bytes)) });
        }
        if (sent - this.#transcribed < AHEAD) heard = performance.now(); // nothing is owed
        committed = this.#ended;
        if (committed) send("input_audio_buffer.commit");
      });
    } finally {
      socket.onmessage = socket.onclose = null;
      socket.close();
    }
  }

  /** Take in an event of the connection that began at sample `origin`. Throws Lost or Refused. */
  #take({ type, item_id, delta, transcript, words, audio_end_ms, transcribed_ms = audio_end_ms, error }, origin, items) {
    if (error?.code === "server_busy") throw new Lost("all sessions of the server are taken");
    if (error?.code === "server_error") throw new Lost(`server error: ${error.message}`);
    if (error) throw new Refused(`the server refused a message (${error.code}): ${error.message}`);
    const position = (ms) => origin + (ms * RATE) / 1000;
    // After a break the old text stays until there is new text, or until the server has come as far as before.
    const repeated = !delta && !words && position(transcribed_ms) < this.#transcribed;
    if (delta) items.set(item_id, (items.get(item_id) ?? "") + delta);
    else if (words) {
      items.delete(item_id);
      this.#on.words(spaced(transcript, words, origin / RATE));
    } else if (type !== "voxtral.progress") return;
    if (!delta) {
      this.kept = Math.max(this.kept, Math.min(position(audio_end_ms), this.received));
      this.#transcribed = Math.max(this.#transcribed, position(transcribed_ms));
    }
    if (!repeated) this.#on.partial([...items.values()].join(" "));
  }
}

/** The words of an item with the spaces that its transcript has between them; their times `origin` seconds later. */
function spaced(transcript, words, origin) {
  let at = 0;
  return words.map(({ word, start, end }) => {
    const text = transcript.slice(at, Math.max(at, transcript.indexOf(word, at)) + word.length);
    at += text.length;
    return { text, start: origin + start, end: origin + end };
  });
}
