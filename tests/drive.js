// Runs a JavaScript client as an app would: node drive.js captions|example, jobs as tests/clients.py describes them.
import { readFileSync } from "node:fs";
import { Transcription } from "../examples/client.js";
import { Refused, SessionLost, Transcriber } from "../captions/transcriber.js";

const later = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function run({ url, path, key, giveUp = 120, stall = 20, answer = 10 }) {
  const result = { text: "", told: [], states: [], end: "done", message: "" };
  const word = ({ text }) => { result.text += text; };
  const state = (name, message) => {
    result.states.push(name);
    if (message) result.told.push(message);
  };
  const times = { giveUp: 1000 * giveUp, stall: 1000 * stall, answer: 1000 * answer };
  const client = process.argv[2] === "captions" ? captions(url, key, word, state, times)
    : new Transcription(url, { key, onWord: word, onState: state, ...times });
  const samples = new Int16Array(new Uint8Array(readFileSync(path)).buffer);
  for (let at = 0; at < samples.length; at += 1600) {
    await client.room();
    client.add(samples.slice(at, at + 1600));
  }
  await later(100); // an app may look at `finished` later than it is refused
  client.end();
  try {
    await client.finished;
  } catch (error) {
    if (!(error instanceof Refused || error instanceof SessionLost)) throw error;
    result.end = error instanceof Refused ? "refused" : "gave up";
    result.message = error.message;
  }
  return result;
}

function captions(url, key, word, state, times) {
  const on = { state, words: (words) => words.forEach(word), partial() {}, lost() {} };
  const transcriber = new Transcriber(url.replace("ws", "http"), key, on, times);
  const finished = transcriber.run();
  finished.catch(() => {});
  return { room() {}, add: (samples) => transcriber.addAudio(samples), end: () => transcriber.end(), finished };
}

const jobs = JSON.parse(readFileSync(0, "utf8"));
const results = JSON.stringify(await Promise.all(jobs.map(run)));
process.stdout.write(results, () => process.exit()); // Node would wait for WebSockets whose server does not close them
