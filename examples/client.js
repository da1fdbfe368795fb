// A complete client of the realtime endpoint, for Node (22 or newer, no packages) and for browsers. See PROTOCOL.md.
//
//   node examples/client.js talk.wav [ws://HOST:8000/v1/realtime]      the key comes from VLLM_API_KEY
//
// talk.wav: 16 kHz, mono, 16 bit. Prints each word with its time in seconds. In an app:
//
//   import { Transcription } from "./client.js";
//   const transcription = new Transcription(url, { key, onWord, onTail, onStatus });
//                                     // onWord({text, end}): final, end in seconds; onTail(text): may still change
//   transcription.add(samples);       // Int16Array, 16 kHz mono, whenever there are some
//   transcription.end();              // then the last words come
//   await transcription.finished;     // throws Refused or Lost, after the words before it

const RATE = 16000, FRAME = 1280, HOP = 320; // samples: a second, one delta, one level reading
const AHEAD = 5 * RATE; // audio sent but not yet understood, at most: little to send again
const PIECE = RATE / 4; // audio in one message, at most
const SETTLE = 4 * FRAME; // a word's text comes within 0.32 s of its end
const PAUSE = 3 * FRAME; // silence wanted on either side of a settled point
const ROLLOVER = 75 * RATE; // a session of stock vLLM gets slower with every frame: a new one at the next pause
const FLAT_ROLLOVER = 300 * RATE; // where it does not, as /v1/models then says
const ANSWER = 10e3, STALL = 20e3, GIVE_UP = 120e3; // ms
// Chinese and Japanese are written without spaces.
const UNSPACED =
  /[\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\u{20000}-\u{3ffff}]/u;
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** The server will not do this, however often it is asked. */
export class Refused extends Error {}

/** The session is gone or was not granted: a new one may go on. `busy`: once the server has a free one. */
export class Lost extends Error {
  constructor(message, busy = false) { super(message); this.busy = busy; }
}

/** What was heard, understood and settled. Positions are samples of the whole input, across all sessions. */
class Timeline {
  settled = 0; origin = 0; frames = 0; lastText = 0; tail = []; spoken = "";
  #pcm = new Int16Array(0); #first = 0; #levels = [];

  get heard() { return this.#first + this.#pcm.length; }
  get understood() { return this.origin + this.frames * FRAME; }
  audio(from, count) { return this.#pcm.subarray(from - this.#first, from - this.#first + count); }

  hear(samples) {
    const joined = new Int16Array(this.#pcm.length + samples.length);
    joined.set(this.#pcm);
    joined.set(samples, this.#pcm.length);
    this.#pcm = joined;
    for (let at; (at = this.#levels.length * HOP) + HOP <= this.heard;) {
      const power = this.audio(at, HOP).reduce((sum, x) => sum + (x / 32768) ** 2, 0) / HOP;
      this.#levels.push(10 * Math.log10(power + 1e-10));
    }
  }

  /** A new session starts at the settled point; its words replace the tail. */
  begin() {
    this.origin = this.lastText = this.settled;
    this.frames = 0;
    this.tail = [];
    return this.origin;
  }

  /** Book one delta; return the words that are final now. */
  understand(text) {
    this.frames += 1;
    // A later session's first word may come without its space.
    const ends = [this.spoken, [...text][0]];
    if (this.lastText === this.origin && ends.every((c) => c && !/\s/.test(c) && !UNSPACED.test(c))) text = ` ${text}`;
    if (text) this.lastText = this.understood;
    for (const piece of text.match(/\s*\S+|\s+/g) ?? []) {
      if (/^\s/.test(piece) || !this.tail.length) this.tail.push({ text: piece, at: this.understood - 1.5 * FRAME });
      else this.tail.at(-1).text += piece;
    }
    const point = Math.min(this.understood - SETTLE, this.heard);
    const pause = this.lastText <= point && this.#quiet(point - PAUSE, point + PAUSE);
    return pause && point > this.settled ? this.settle(point) : [];
  }

  settle(point) {
    const words = this.tail.filter(({ at }) => at <= point);
    this.tail = this.tail.slice(words.length);
    if (words.length) this.spoken = [...words.at(-1).text].at(-1);
    this.#pcm = this.#pcm.slice(Math.max(0, point - this.#first));
    this.#first = this.settled = point;
    return words;
  }

  /** Is this silence? Measured against the noise of the last 30 s and the speech around. */
  #quiet(from, to) {
    const within = (start, end) => this.#levels.slice(Math.max(0, Math.ceil(start / HOP)), Math.max(0, end / HOP));
    const part = (levels, share) => levels.sort((a, b) => a - b)[Math.floor(share * levels.length)] ?? -65;
    const recent = this.#levels.slice(-1500), floor = part(recent, 0.1), loud = part(recent, 0.95);
    const middle = (from + to) / 2, beside = [within(from - RATE / 2, middle), within(middle, to + RATE / 2)];
    const voice = Math.min(...beside.filter(({ length }) => length).map((levels) => part(levels, 0.95)));
    const limit = Math.max(-65, voice - 35, floor + Math.min(8, 0.4 * (loud - floor)));
    return within(from, to).every((level) => level <= limit);
  }
}

/** One transcription over as many sessions as it takes. */
export class Transcription {
  #timeline = new Timeline(); #ended = false; #over = false; #longest = 0; #pump = () => {}; #waiting = [];

  constructor(url, { key, model, onWord = () => {}, onTail = () => {}, onStatus = () => {} } = {}) {
    Object.assign(this, { url: url.replace(/\/+$/, ""), key, model, onWord, onTail, onStatus });
    this.finished = this.#run().finally(() => { this.#over = true; this.#changed(); });
    this.finished.catch(() => {}); // whoever awaits it gets the error; Node ends where nobody does yet
  }

  add(samples) { this.#timeline.hear(samples); this.#changed(); }
  end() { this.#ended = true; this.#changed(); }

  /** Wait here before `add` if the audio can wait (a file); a microphone cannot. */
  async room() {
    while (!this.#over && this.#timeline.heard - this.#timeline.understood > 2 * AHEAD) await this.#change();
  }

  #change() { return new Promise((resolve) => this.#waiting.push(resolve)); }
  #changed() { this.#pump(); this.#waiting.splice(0).forEach((resolve) => resolve()); }
  #tell(words) { for (const { text, at } of words) this.onWord({ text, end: Math.max(0, at / RATE) }); }

  async #run() {
    for (let failures = 0, furthest = 0, since; ;) {
      const before = this.#timeline.settled;
      while (this.#timeline.heard <= before && !this.#ended) await this.#change();
      if (this.#timeline.heard <= before) return;
      try {
        this.#timeline.begin();
        await this.#ask();
        await this.#session();
        failures = 0;
      } catch (error) {
        if (!(error instanceof Lost)) throw error;
        const { heard, understood, frames } = this.#timeline;
        const idle = !this.#ended && frames && heard - understood < 3 * RATE; // it had nothing left to work on
        if (understood > furthest || idle || error.busy) failures = 0; // what is understood again is no progress
        furthest = Math.max(furthest, understood);
        if (!failures) since = Date.now();
        if (Date.now() - since > GIVE_UP) throw new Lost(`gave up: ${error.message}`);
        this.onStatus(error.busy ? "all sessions are taken: waiting for a free one" : `${error.message}; trying again`);
        if (!error.busy) failures += 1;
        await sleep((error.busy ? 2000 : Math.min(8000, 250 * 2 ** failures)) * (0.5 + Math.random()));
      }
    }
  }

  /** /v1/models tells a wrong key (a WebSocket says only 1006), the model's name, the longest session. */
  async #ask() {
    if (this.model && this.#longest) return;
    if (!/^wss?:\/\/[^/]/.test(this.url)) throw new Refused(`${this.url}: write ws://HOST:8000/v1/realtime`);
    const url = this.url.replace(/^ws/, "http").replace(/\/realtime$/, "/models");
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    const reply = await fetch(url, { headers, signal: AbortSignal.timeout(ANSWER) })
      .catch(() => { throw new Lost(`${this.url}: no server answers there`); });
    if (reply.status === 401) throw new Refused("wrong API key (HTTP 401)");
    if (reply.status === 403) throw new Refused("wrong path, or a page that is not let in (HTTP 403)");
    if (reply.status >= 500) throw new Lost(`the server is not well (HTTP ${reply.status})`);
    const models = (await reply.json().catch(() => ({}))).data ?? [];
    const served = models.find(({ id }) => id === this.model) ?? models[0];
    if (!served) throw new Refused(`${url}: no realtime server there (HTTP ${reply.status})`);
    this.model ??= served.id;
    const rollover = served.voxtral_speed === true ? FLAT_ROLLOVER : ROLLOVER;
    this.#longest = Math.min(rollover, ((served.max_model_len ?? 4096) * FRAME) / 2);
  }

  /** One session: resolves where the next one should go on (or all is done), rejects where it was lost. */
  #session() {
    const timeline = this.#timeline, browser = typeof window !== "undefined";
    const hex = Array.from(new TextEncoder().encode(this.key), (byte) => byte.toString(16).padStart(2, "0")).join("");
    const way = browser ? ["voxtral", `key.${hex}`] : { headers: { Authorization: `Bearer ${this.key}` } };
    const socket = new WebSocket(this.url, this.key ? way : []);
    const send = (type, fields) => socket.send(JSON.stringify({ type, ...fields }));
    let sent = timeline.settled, greeted = false, finishing = false, answered = Date.now(), watch;
    this.#pump = () => {
      if (!greeted || finishing) return;
      for (;;) {
        const count = Math.min(PIECE, timeline.understood + AHEAD - sent, timeline.heard - sent);
        if (count <= 0) break;
        const samples = timeline.audio(sent, count);
        sent += count;
        const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
        send("input_audio_buffer.append", { audio: btoa(String.fromCharCode(...bytes)) });
      }
      if (this.#ended && sent >= timeline.heard) send("input_audio_buffer.commit", { final: (finishing = true) });
    };
    return new Promise((resolve, reject) => {
      const cut = () => { // where it stands, for want of a pause
        this.#tell(timeline.settle(Math.max(timeline.settled, Math.min(timeline.understood - SETTLE, timeline.heard))));
        resolve();
      };
      socket.onerror = () => {}; // onclose follows
      socket.onclose = ({ code, reason }) => reject(new Lost(`connection lost (${`${code} ${reason}`.trim()})`));
      watch = setInterval(() => {
        if (greeted && sent - timeline.understood < 3 * RATE && !finishing) answered = Date.now(); // it has no work
        const silence = Date.now() - answered;
        if (silence > (greeted ? STALL : ANSWER)) reject(new Lost(`no answer for ${Math.round(silence / 1000)} s`));
      }, 1000);
      const receive = (event) => {
        answered = Date.now();
        if (event.type === "session.created") {
          greeted = true;
          send("session.update", { model: this.model });
          send("input_audio_buffer.commit");
        } else if (event.type === "transcription.delta") {
          const before = timeline.settled, age = timeline.frames * FRAME;
          this.#tell(timeline.understand(event.delta));
          this.onTail(timeline.tail.map(({ text }) => text).join(""));
          if (finishing) return;
          if (age > this.#longest && timeline.settled > before) return resolve(); // rollover at a pause
          if (age > 1.8 * this.#longest) return cut(); // no pause: between two words
        } else if (event.type === "transcription.done") {
          const done = finishing && timeline.understood >= timeline.heard + RATE / 4;
          if (!done && timeline.frames < 6) return reject(new Lost("the server ended the session at once"));
          if (!done) return cut(); // the limit came first
          this.#tell(timeline.settle(timeline.understood)); // everything: that lies behind the end
          return resolve();
        } else if (event.type === "error") {
          if (event.code !== "processing_error") return reject(new Refused(`${event.code}: ${event.error}`));
          return reject(new Lost(event.error, event.error.includes("currently busy")));
        }
        this.#changed();
      };
      socket.onmessage = ({ data }) => {
        try {
          receive(JSON.parse(data));
        } catch (error) { // of the app's callbacks too
          reject(error instanceof SyntaxError ? new Refused("a message was not JSON") : error);
        }
      };
    }).finally(() => {
      clearInterval(watch);
      this.#pump = () => {};
      socket.onmessage = null;
      socket.close();
    });
  }
}

/** The samples of a WAV file in pieces of 0.1 s. */
function* pieces(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.length);
  const tag = (at) => String.fromCharCode(...file.subarray(at, at + 4));
  if (tag(0) !== "RIFF" || tag(8) !== "WAVE") throw new Refused("not a WAV file");
  for (let at = 12, size; at + 8 <= file.length; at += 8 + size + (size % 2)) {
    size = view.getUint32(at + 4, true);
    if (tag(at) === "fmt ") {
      const form = [view.getUint16(at + 10, true), view.getUint32(at + 12, true), view.getUint16(at + 22, true)];
      if (String(form) === "1,16000,16") continue;
      throw new Refused("the WAV must be 16 kHz, mono, 16 bit: ffmpeg -i FILE -ar 16000 -ac 1 talk.wav");
    }
    if (tag(at) !== "data") continue;
    const samples = new Int16Array(file.slice(at + 8, at + 8 + size - (size % 2)).buffer);
    for (let from = 0; from < samples.length; from += RATE / 10) yield samples.subarray(from, from + RATE / 10);
  }
}

async function main([path, url = "ws://localhost:8000/v1/realtime"]) {
  const { readFile } = await import("node:fs/promises");
  if (!globalThis.WebSocket) throw new Error(`Node 22 or newer is needed for its WebSocket; this is ${process.version}`);
  const transcription = new Transcription(url, {
    key: process.env.VLLM_API_KEY,
    onWord: ({ text, end }) => console.log(`${end.toFixed(2).padStart(8)} ${text}`),
    onStatus: (text) => console.error(text),
  });
  const send = async () => {
    for (const piece of pieces(new Uint8Array(await readFile(path)))) {
      await transcription.room();
      transcription.add(piece);
    }
    transcription.end();
    return transcription.finished;
  };
  await Promise.race([send(), transcription.finished]);
}

if (globalThis.process?.argv?.[1]?.endsWith("client.js")) {
  const usage = "usage: node client.js talk.wav [ws://HOST:8000/v1/realtime]";
  const failed = (error) => `error: ${error.message}`;
  const failure = process.argv[2] ? await main(process.argv.slice(2)).catch(failed) : usage;
  if (failure) console.error(failure);
  process.exit(failure === usage ? 2 : failure ? 1 : 0);
}
