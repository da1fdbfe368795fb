// A complete client of the realtime endpoint, for Node (22 or newer, no packages) and for browsers. See PROTOCOL.md.
//
//   node examples/client.js talk.wav [ws://HOST:8000/v1/realtime]      the key comes from VLLM_API_KEY
//
// It prints each word of talk.wav (16 kHz, mono, 16 bit) with its end in seconds. In an app:
//   const transcription = new Transcription(url, { key, onWord, onPartial, onState });
//     // onWord({text, start, end}): final, in seconds; onPartial(text): may still change
//     // onState(state, message): connecting, listening, waiting and why, lost and which audio, done
//   transcription.add(samples);       // Int16Array, 16 kHz mono, whenever there are some
//   transcription.end();              // then the last words come
//   await transcription.finished;     // throws Refused or SessionLost, after the words before it

import { RATE } from "../captions/timeline.js";
import { SessionLost, Refused, Transcriber } from "../captions/transcriber.js";
export { SessionLost, Refused };

export class Transcription {
  #transcriber; #over = false;
  constructor(url, { key = "", onWord = () => {}, onPartial = () => {}, onState = () => {}, ...times } = {}) {
    if (!/^wss?:\/\/.+\/realtime\/*$/.test(url)) throw new Refused(`${url}: write ws://HOST:8000/v1/realtime`);
    const on = {
      state: onState,
      words: (words) => words.forEach(onWord),
      partial: (words) => onPartial(words.map(({ text }) => text).join("")),
      lost: (start, end) => onState("lost", `audio from ${start.toFixed(1)} to ${end.toFixed(1)} s is lost`),
    };
    const node = key && typeof window === "undefined" && { way: { headers: { Authorization: `Bearer ${key}` } } };
    const endpoint = url.replace(/^ws/, "http").replace(/\/+$/, "");
    this.#transcriber = new Transcriber(endpoint, key, on, { giveUp: 120e3, ...node, ...times });
    this.finished = this.#transcriber.run();
    this.finished.catch(() => {}).then(() => { this.#over = true; }); // an app may await it later
  }

  add(samples) { this.#transcriber.addAudio(samples.slice()); }
  end() { this.#transcriber.end(); }

  /** Wait here before `add` if the audio can wait (a file); a microphone cannot. */
  async room() {
    while (!this.#over && this.#transcriber.lag > 10) await new Promise((resolve) => setTimeout(resolve, 20));
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
  if (!globalThis.WebSocket) throw new Error(`Node 22 or newer is needed; this is ${process.version}`);
  const onWord = ({ text, end }) => console.log(`${end.toFixed(2).padStart(8)} ${text}`);
  const onState = (_, message) => message && console.error(message);
  const transcription = new Transcription(url, { key: process.env.VLLM_API_KEY, onWord, onState });
  for (const piece of pieces(new Uint8Array(await readFile(path)))) {
    await transcription.room();
    transcription.add(piece);
  }
  transcription.end();
  await transcription.finished;
}

if (globalThis.process?.argv?.[1]?.endsWith("client.js")) {
  const fail = (status, message) => { console.error(message); process.exit(status); };
  process.stdout.on("error", () => process.exit(1)); // as in: ... | head
  if (!process.argv[2]) fail(2, "usage: node client.js talk.wav [ws://HOST:8000/v1/realtime]");
  await main(process.argv.slice(2)).then(() => process.exit(), (error) => fail(1, `error: ${error.message}`));
}
