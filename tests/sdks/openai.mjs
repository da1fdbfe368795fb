// OpenAI's client for JavaScript: `node openai.mjs MODULES BASE_URL KEY PCM` prints the transcript of PCM (24 kHz).
// It speaks TLS only, and sends the key as browsers must: in a subprotocol.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [modules, baseURL, apiKey, path] = process.argv.slice(2);
const require = createRequire(modules);
const { OpenAI } = require("openai");
const { OpenAIRealtimeWebSocket } = require("openai/realtime/websocket");

const realtime = new OpenAIRealtimeWebSocket({ intent: "transcription" }, new OpenAI({ baseURL, apiKey }));
realtime.on("error", (error) => {
  console.error(error);
  process.exit(1);
});
realtime.on("session.created", () => {
  const input = { format: { type: "audio/pcm", rate: 24000 }, turn_detection: null };
  realtime.send({ type: "session.update", session: { type: "transcription", audio: { input } } });
  const pcm = readFileSync(path);
  for (let at = 0; at < pcm.length; at += 48000)
    realtime.send({ type: "input_audio_buffer.append", audio: pcm.subarray(at, at + 48000).toString("base64") });
  realtime.send({ type: "input_audio_buffer.commit" });
});
realtime.on("conversation.item.input_audio_transcription.completed", (event) => {
  console.log(event.transcript);
  realtime.close();
});
