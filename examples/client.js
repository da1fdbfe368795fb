// A client of the realtime protocol in one file that imports nothing, by the easy way of PROTOCOL.md. `Transcription` is for
// your app, in browsers too. The rest, for Node 22.3 or newer, prints each word of a WAV (16 kHz, mono, 16 bit) with its end:
//   node examples/client.js talk.wav [ws://HOST:8000/v1/realtime [SECONDS]]      the key comes from VLLM_API_KEY
const RATE = 16000, KEEP = 300 * RATE; // samples: a second, and the audio kept through an outage
const AHEAD = 3 * RATE, STALL_MS = 20000; // with more audio unanswered the server must say something within this time
const AUDIO = { format: { type: "audio/pcm", rate: RATE }, turn_detection: { type: "server_vad" } };
const SESSION = { type: "transcription", progress: true, audio: { input: AUDIO } };
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
class Lost extends Error {} // a new connection can continue

// One transcription, over one connection after another. `onEvent(event)`: the server's, with the times of `words` in seconds
// of the input. `onState(message)`: what is wrong, or "". Set `ended` when no more audio comes: the last words follow.
class Transcription {
  audio = new Int16Array(KEEP); // sample n of the input is at n % KEEP
  received = 0; transcribed = 0; kept = 0; ended = false; // positions in the input; words before `kept` are final

  constructor(url, key, onEvent, onState) {
    if (!/^wss?:\/\/.+\/realtime\/*$/.test(url)) throw new Error(`${url}: write ws://HOST:8000/v1/realtime`);
    if (/[^\x21-\x7e]/.test(key)) throw new Error("the key has a space, or a character that is not ASCII");
    Object.assign(this, { url: url.replace(/\/+$/, ""), key, onEvent, onState });
  }

  add(samples) { // an Int16Array, at any time
    for (const sample of samples) this.audio[this.received++ % KEEP] = sample;
    const oldest = this.received - KEEP;
    if (oldest > this.kept) this.onState(`audio from ${this.kept / RATE} to ${oldest / RATE} s is lost`);
    [this.kept, this.transcribed] = [Math.max(this.kept, oldest), Math.max(this.transcribed, oldest)];
  }

  get complete() { return this.ended && this.received - this.kept < RATE / 1000; } // the protocol counts milliseconds

  /** Transcribe until the input has ended. Throws an Error, also after `patience` seconds without progress. */
  async run(patience = Infinity) {
    for (let failures = 0, before = 0, since = Date.now(); !this.complete;) {
      try {
        await this.connect();
      } catch (error) {
        if (!(error instanceof Lost)) throw error;
        if (this.transcribed > before) [failures, before, since] = [0, this.transcribed, Date.now()];
        if (Date.now() - since > 1000 * patience) throw new Error(`gave up: ${error.message}`);
        this.onState(`${error.message}; trying again`);
        await sleep(500 * 2 ** Math.min(4, failures++) * (0.5 + Math.random()));
      }
    }
  }

  /** One connection, until all is transcribed. */
  async connect() {
    while (!this.ended && this.received <= this.transcribed) await sleep(20); // it would only occupy a slot
    // Ask over HTTP first: a WebSocket that is refused gives no reason, and a browser's cannot send this header.
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    const options = { headers, redirect: "manual", signal: AbortSignal.timeout(STALL_MS) };
    const reply = await fetch(new URL("models", this.url.replace("ws", "http")), options).catch(() => null);
    if (!reply || reply.status >= 429) throw new Lost(reply ? `the server returned HTTP ${reply.status}` : "no server answers");
    if (reply.status === 401) throw new Error(`${this.key ? "wrong API key" : "the server wants a key"} (HTTP 401)`);
    if (!(await reply.json().catch(() => ({}))).data) throw new Error(`no realtime server (HTTP ${reply.status})`);
    const hex = Array.from(this.key, (char) => char.charCodeAt(0).toString(16)).join("");
    const socket = new WebSocket(`${this.url}?intent=transcription`, this.key ? ["voxtral", `key.${hex}`] : []);
    const send = (type, fields) => socket.send(JSON.stringify({ type, ...fields }));
    const messages = [], position = (ms) => origin + (ms * RATE) / 1000;
    let origin = this.kept, sent = origin, committed = false, heard = Date.now();
    socket.onmessage = ({ data }) => { messages.push(data); heard = Date.now(); };
    socket.onopen = () => {
      origin = sent = this.kept; // meanwhile some may be lost
      send("session.update", { session: SESSION });
      this.onState("");
    };
    try {
      for (; !this.complete; await sleep(20)) {
        for (const data of messages.splice(0)) {
          const event = JSON.parse(data), { error, words = [], audio_end_ms, transcribed_ms = audio_end_ms } = event;
          if (error) throw new (error.code.startsWith("server_") ? Lost : Error)(`${error.message} (${error.code})`);
          for (const word of words) [word.start, word.end] = [word.start + origin / RATE, word.end + origin / RATE];
          this.onEvent(event);
          if (!event.words && event.type !== "voxtral.progress") continue;
          this.kept = Math.max(this.kept, Math.min(position(audio_end_ms), this.received));
          this.transcribed = Math.max(this.transcribed, position(transcribed_ms));
        }
        if (socket.readyState > WebSocket.OPEN) throw new Lost("connection lost");
        if (Date.now() - heard > STALL_MS) throw new Lost(`no answer for ${STALL_MS / 1000} s`);
        if (socket.readyState < WebSocket.OPEN || committed) continue;
        for (let piece; sent < this.received; sent += piece.length) {
          piece = this.audio.slice(sent % KEEP, (sent % KEEP) + Math.min(RATE, this.received - sent));
          send("input_audio_buffer.append", { audio: btoa(String.fromCharCode(...new Uint8Array(piece.buffer))) });
        }
        if (sent - this.transcribed < AHEAD) heard = Date.now(); // nothing is owed
        committed = this.ended;
        if (committed) send("input_audio_buffer.commit");
      }
    } finally {
      socket.close();
    }
  }
}

function samplesOf(wav) {
  const data = wav.indexOf("data", 36);
  const form = data > 0 && [wav.readUInt16LE(22), wav.readUInt32LE(24), wav.readUInt16LE(34)];
  if (String(form) !== "1,16000,16") throw new Error("no WAV of 16 kHz, mono, 16 bit: ffmpeg -i FILE -ar 16000 -ac 1 talk.wav");
  const bytes = wav.subarray(data + 8, data + 8 + wav.readUInt32LE(data + 4));
  return new Int16Array(new Uint8Array(bytes).buffer, 0, bytes.length >> 1);
}

async function main(path, url = "ws://localhost:8000/v1/realtime", patience = 120) {
  const samples = samplesOf(process.getBuiltinModule("fs").readFileSync(path));
  const print = ({ words = [] }) => words.forEach(({ word, end }) => console.log(`${end.toFixed(2).padStart(8)} ${word}`));
  const transcription = new Transcription(url, process.env.VLLM_API_KEY ?? "", print, (said) => said && console.error(said));
  transcription.run(patience).then(() => process.exit(), fail);
  for (let at = 0; at < samples.length; at += RATE / 10) {
    transcription.add(samples.subarray(at, at + RATE / 10));
    while (transcription.received - transcription.transcribed > 10 * RATE) await sleep(20); // a microphone cannot wait
  }
  transcription.ended = true;
}

const leave = (status, text) => { console.error(text); process.exit(status); };
const fail = ({ message }) => leave(1, `error: ${message}`);
process.stdout.on("error", () => process.exit(1)); // as in: ... | head
if (!process.argv[2]) leave(2, "usage: node client.js talk.wav [ws://HOST:8000/v1/realtime [SECONDS]]");
main(...process.argv.slice(2)).catch(fail);
