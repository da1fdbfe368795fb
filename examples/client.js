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
//   await transcription.finished;     // throws Refused or Error, after the words before it

const RATE = 16000, FRAME = 1280, HOP = 320; // samples: a second, one delta, one level reading
const AHEAD = 5 * RATE; // audio sent but not yet understood, at most: little to send again
const PIECE = RATE / 4; // audio in one message, at most
const SETTLE = 4 * FRAME; // a word's text comes within 0.32 s of its end
const PAUSE = 3 * FRAME; // silence wanted on either side of a settled point
const ROLLOVER = 75 * RATE; // a session gets slower with every frame: a new one at the next pause
const STALL = 20e3, GIVE_UP = 120e3; // ms
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** The server will not do this, however often it is asked. */
export class Refused extends Error {}

/** What was heard, understood and settled. Positions are samples of the whole input, across all sessions. */
class Timeline {
  settled = 0; origin = 0; frames = 0; lastText = 0; tail = [];
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
    this.#pcm = this.#pcm.slice(Math.max(0, point - this.#first));
    this.#first = this.settled = point;
    return words;
  }

  /** Is this silence? Measured against the noise and the speech of the last 30 s. */
  #quiet(from, to) {
    const recent = this.#levels.slice(-1500).sort((a, b) => a - b);
    const floor = recent[Math.floor(0.1 * recent.length)], loud = recent[Math.floor(0.95 * recent.length)];
    const limit = Math.max(-65, loud - 35, floor + Math.min(8, 0.4 * (loud - floor)));
    return this.#levels.slice(Math.max(0, Math.ceil(from / HOP)), to / HOP).every((level) => level <= limit);
  }
}

/** One transcription over as many sessions as it takes. */
export class Transcription {
  #timeline = new Timeline(); #ended = false; #longest = 0; #pump = () => {}; #waiting = [];

  constructor(url, { key, model, onWord = () => {}, onTail = () => {}, onStatus = () => {} } = {}) {
    Object.assign(this, { url, key, model, onWord, onTail, onStatus });
    this.finished = this.#run();
  }

  add(samples) { this.#timeline.hear(samples); this.#changed(); }
  end() { this.#ended = true; this.#changed(); }

  /** Wait here before `add` if the audio can wait (a file); a microphone cannot. */
  async room() { while (this.#timeline.heard - this.#timeline.understood > 2 * AHEAD) await this.#change(); }

  #change() { return new Promise((resolve) => this.#waiting.push(resolve)); }
  #changed() { this.#pump(); this.#waiting.splice(0).forEach((resolve) => resolve()); }
  #tell(words) { for (const { text, at } of words) this.onWord({ text, end: Math.max(0, at / RATE) }); }

  async #run() {
    for (let failures = 0, since; ;) {
      const before = this.#timeline.settled;
      while (this.#timeline.heard <= before && !this.#ended) await this.#change();
      if (this.#timeline.heard <= before) return;
      try {
        this.#timeline.begin();
        await this.#ask();
        await this.#session();
        failures = 0;
      } catch (error) {
        if (error instanceof Refused) throw error;
        if (this.#timeline.frames || error.busy) failures = 0;
        if (!failures) since = Date.now();
        if (Date.now() - since > GIVE_UP) throw new Error(`gave up: ${error.message}`);
        this.onStatus(error.busy ? "all sessions are taken: waiting for a free one" : `${error.message}; trying again`);
        if (!error.busy) failures += 1;
        await sleep((error.busy ? 2000 : Math.min(8000, 250 * 2 ** failures)) * (0.5 + Math.random()));
      }
    }
  }

  /** /v1/models tells a wrong key (a WebSocket says only 1006), the model's name, the longest session. */
  async #ask() {
    if (this.model && this.#longest) return;
    const url = this.url.replace(/^ws/, "http").replace(/\/realtime\/?$/, "/models");
    const reply = await fetch(url, { headers: this.key ? { Authorization: `Bearer ${this.key}` } : {} })
      .catch(() => { throw new Error(`${this.url}: no server answers there`); });
    if (reply.status === 401) throw new Refused("wrong API key (HTTP 401)");
    if (reply.status === 403) throw new Refused((await reply.json()).error.message); // a page under a foreign name
    if (!reply.ok) throw new Error(`the server is not well (HTTP ${reply.status})`);
    const [served] = (await reply.json()).data;
    this.model ??= served.id;
    this.#longest = Math.min(ROLLOVER, ((served.max_model_len ?? 4096) * FRAME) / 2);
  }

  /** One session: resolves where the next one should go on (or all is done), rejects where it was lost. */
  #session() {
    const timeline = this.#timeline, browser = typeof window !== "undefined";
    const hex = Array.from(new TextEncoder().encode(this.key), (byte) => byte.toString(16).padStart(2, "0")).join("");
    const way = browser ? ["voxtral", `key.${hex}`] : { headers: { Authorization: `Bearer ${this.key}` } };
    const socket = new WebSocket(this.url, this.key ? way : []);
    const send = (type, fields) => socket.send(JSON.stringify({ type, ...fields }));
    let sent = timeline.settled, finishing = false, answered = Date.now(), watch;
    this.#pump = () => {
      if (socket.readyState !== WebSocket.OPEN || finishing) return;
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
      socket.onclose = ({ code, reason }) => reject(new Error(`connection lost (${`${code} ${reason}`.trim()})`));
      watch = setInterval(() => {
        if (sent - timeline.understood < 3 * RATE && !finishing) answered = Date.now(); // it has nothing to work on
        if (Date.now() - answered > STALL) reject(new Error("no answer for 20 s"));
      }, 1000);
      socket.onmessage = ({ data }) => {
        const event = JSON.parse(data);
        answered = Date.now();
        if (event.type === "session.created") {
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
          if (!timeline.frames) return reject(new Error("the server ended the session without a word"));
          if (!finishing || timeline.understood < timeline.heard + RATE / 4) return cut(); // the limit came first
          this.#tell(timeline.settle(timeline.understood)); // everything: that lies behind the end
          return resolve();
        } else if (event.type === "error") {
          if (event.code !== "processing_error") return reject(new Refused(`${event.code}: ${event.error}`));
          return reject(Object.assign(new Error(event.error), { busy: event.error.includes("currently busy") }));
        }
        this.#changed();
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
